"""Every family of faults and of bad input, what is injected, and the tests that prove the answer.

Rules: a family without a row fails `test_families`; so does a row that names a test that does not exist. A row says what it does
not prove (`open`) and why: with tests beside it the family is proven in part, without any it is open. The tables of
`docs/reliability.md` are made from this file: `python -m tests.faults write`.
"""

from dataclasses import dataclass

__all__ = ["FAULTS", "Family", "Group"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """`tests` are pytest's node ids: of a function (all its cases), of one case, or of those that begin so (ending with `*`)."""

    id: str
    injected: str
    tests: tuple[str, ...] = ()
    open: str = ""

    @property
    def standing(self) -> str:
        if not self.tests:
            return "open"
        return "in part" if self.open else "proven"


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """`count`: how many families there are, by the list that they come from."""

    title: str
    prefix: str
    count: int
    families: tuple[Family, ...]


def _of(file: str, *names: str) -> tuple[str, ...]:
    return tuple(f"tests/{file}.py::test_{name}" for name in names)


def _payments(*names: str) -> tuple[str, ...]:
    return _of("unit/custody/test_payments", *names)


def _reconcile(*names: str) -> tuple[str, ...]:
    return _of("unit/custody/test_reconcile", *names)


def _tokens(*names: str) -> tuple[str, ...]:
    return _of("unit/custody/test_tokens", *names)


def _consents(*names: str) -> tuple[str, ...]:
    return _of("unit/custody/test_consents", *names)


def _supervisor(*names: str) -> tuple[str, ...]:
    return _of("unit/gateway/test_supervisor", *names)


def _committer(*names: str) -> tuple[str, ...]:
    return _of("unit/store/test_committer", *names)


def _store(*names: str) -> tuple[str, ...]:
    return _of("contract/test_store_contract", *names)


def _bank(*names: str) -> tuple[str, ...]:
    return _of("faults/test_bank_answers", *names)


def _answer(*cases: str) -> tuple[str, ...]:
    """Cases of the byte-exact bank, each read as the answer to a payment."""
    return tuple(f"{_bank('a_wrong_answer_has_its_honest_outcome')[0]}[{case}-payment]" for case in cases)


def _unknown(*cases: str) -> tuple[str, ...]:
    """Cases of the whole system, with a bank of each class."""
    tests = _of("e2e/test_unknown_outcomes", "class_c_unknown_goes_to_a_human", "class_a_unknown_is_found_out")
    return tuple(f"{test}[{case}]" for case in cases for test in tests)


def _processes(*names: str) -> tuple[str, ...]:
    return _of("e2e/test_processes", *names)


def _signals(*names: str) -> tuple[str, ...]:
    return _of("faults/test_processes_under_signals", *names)


def _clock(*names: str) -> tuple[str, ...]:
    return _of("faults/test_clock", *names)


def _network(*names: str) -> tuple[str, ...]:
    return _of("faults/test_network", *names)


def _races(*names: str) -> tuple[str, ...]:
    return _of("faults/test_races", *names)


_SYSTEM_CALLS_KILLED = _of("faults/test_kill_at_every_system_call", "killed_at_a_system_call")
_SIMULATION = _of("simulation/test_simulation", "no_fault_pays_twice_or_lies")

PROCESS = Group(
    title="Process",
    prefix="P",
    count=14,
    families=(
        Family(
            id="P1",
            injected="SIGKILL at every await",
            tests=(
                *_of("faults/test_kill_at_every_await", "killed_at_an_await", "killed_again_while_it_recovers"),
                *_of("unit/store/test_crash", "kill_9_at_random_moments", "kill_9_at_the_worst_moments"),
            ),
        ),
        Family(
            id="P2",
            injected="SIGKILL at every system call that writes, sends or receives",
            tests=_SYSTEM_CALLS_KILLED,
        ),
        Family(
            id="P3",
            injected="SIGSTOP, then SIGCONT: longer than the send's time, than a lease, than the bank's window",
            tests=(
                *_signals("signals_at_each_step", "paused_past_the_banks_window"),
                *_payments("rule_4_a_process_that_was_paused_after_the_record_sends_nothing"),
                *_reconcile("class_a_a_process_paused_past_the_window_repeats_nothing"),
                *_supervisor("a_gateway_that_stands_still_does_not_blame_its_children", "a_stopped_child_is_replaced"),
            ),
            open="no process is paused past a refresh lease of 30 s",
        ),
        Family(
            id="P4",
            injected="SIGTERM in every state of a payment",
            tests=(
                *_signals("sigterm_in_every_state"),
                *_processes("graceful_stop_brings_the_payment_to_its_outcome"),
                *_of("rpc/test_operations", "graceful_stop"),
            ),
        ),
        Family(id="P5", injected="a second SIGTERM", tests=_signals("other_signals_while_a_payment_is_at_the_bank")),
        Family(
            id="P6",
            injected="SIGINT, SIGHUP",
            tests=(
                *_signals("other_signals_while_a_payment_is_at_the_bank"),
                *_of("unit/hsm/test_process", "a_signal_to_the_whole_group_does_not_end_it"),
                *_of("unit/egress/test_process", "a_signal_to_the_whole_group_does_not_end_it"),
            ),
        ),
        Family(
            id="P7",
            injected="the kernel's out-of-memory killer",
            tests=(
                *_signals("signals_at_each_step"),
                *_processes("killed_child_is_replaced", "sidecar_killed_between_dispatch_and_answer"),
            ),
            open="by SIGKILL, which is what it sends; no memory is used up",
        ),
        Family(
            id="P8",
            injected="the hsm process is killed, wedged, or returns garbage",
            tests=(
                *_signals("signals_at_each_step"),
                *_supervisor(
                    "a_killed_hsm_is_replaced_and_signs_within_five_seconds",
                    "a_stopped_child_is_replaced",
                    "a_call_during_the_restart_waits_for_the_new_process",
                ),
                *_of(
                    "unit/gateway/test_links",
                    "rubbish_ends_the_connection",
                    "an_answer_of_another_kind_ends_the_connection",
                ),
                *_processes("killed_child_is_replaced", "hanging_hsm_fails_its_callers_and_is_replaced"),
            ),
        ),
        Family(id="P9", injected="file descriptors used up", tests=_signals("no_file_descriptor_left")),
        Family(
            id="P10",
            injected="no more threads or processes",
            open="the limit does not bind root, as which the tests may run",
        ),
        Family(
            id="P11",
            injected="the event loop blocked for seconds",
            tests=(
                *_supervisor("a_gateway_that_stands_still_does_not_blame_its_children"),
                *_of("unit/gateway/test_links", "an_answer_that_came_while_the_gateway_stood_still_counts"),
                *_of("unit/egress/test_service", "a_close_that_the_loop_has_not_seen_yet_is_found_before_the_write"),
            ),
        ),
        Family(
            id="P12",
            injected="an exception that nobody expected, in any task",
            tests=(
                *_of("unit/gateway/test_boundary", "unexpected_error"),
                *_reconcile("a_defect_in_one_step_is_raised_after_all_others_have_had_their_turn"),
                *_of("unit/egress/test_service", "a_defect_of_ours_after_the_send_is_unknown"),
                *_supervisor("an_unexpected_error_while_restarting_is_not_lost"),
            ),
        ),
        Family(
            id="P13",
            injected="two sidecars on one SQLite file",
            tests=(
                *_of("unit/store/test_file", "two_sidecars_cannot_have_one_file"),
                *_of("faults/test_startup", "two_sidecars"),
            ),
        ),
        Family(
            id="P14",
            injected="the application's container dies first, or the sidecar's",
            tests=(
                *_payments("a_caller_that_gives_up_at_any_moment_does_not_cut_the_payment"),
                *_processes(
                    "sidecar_killed_between_dispatch_and_answer", "graceful_stop_brings_the_payment_to_its_outcome"
                ),
                *_of("rpc/test_wire", "calls_that_are_cancelled"),
            ),
        ),
    ),
)

SQLITE = Group(
    title="SQLite",
    prefix="L",
    count=8,
    families=(
        Family(id="L1", injected="SIGKILL at each pwrite64 and fdatasync", tests=_SYSTEM_CALLS_KILLED),
        Family(
            id="L2",
            injected="ENOSPC or EIO at each write-type system call, once or from then on",
            tests=(
                *_of("faults/test_kill_at_every_system_call", "an_error_at_a_system_call", "an_error_that_stays"),
                *_committer("a_full_disk_is_unavailable_and_passes"),
            ),
        ),
        Family(
            id="L3",
            injected="power cut: of what was not synced any part is lost, and writes are torn",
            tests=(
                *_of("faults/test_store_on_a_failing_machine", "power_cut"),
                *_of(
                    "unit/store/test_file", "every_connection_has_the_settings", "less_than_full_synchronous_is_refused"
                ),
                *_committer("a_commit_that_happened_is_a_success"),
            ),
        ),
        Family(id="L4", injected="database is locked", tests=_committer("a_locked_database_is_unavailable_and_passes")),
        Family(
            id="L5",
            injected="the file is deleted, renamed or replaced while it is open",
            tests=_committer("a_file_that_is_gone_takes_no_commits"),
        ),
        Family(
            id="L6",
            injected="the write-ahead log grows without a checkpoint",
            tests=_of("faults/test_store_on_a_failing_machine", "a_reader_that_keeps_the_write_ahead_log"),
        ),
        Family(
            id="L7",
            injected="a copy made by `cp` while it is written",
            tests=_of("faults/test_store_on_a_failing_machine", "a_copy_made_while_it_is_written"),
            open="a copy that opens is whole, but older: what is missing only a witness tells (docs/store.md)",
        ),
        Family(
            id="L8",
            injected="file system read-only",
            tests=_of("unit/store/test_file", "a_read_only_file_system_is_refused"),
            open="at the start; not remounted while the sidecar runs",
        ),
    ),
)

CLOCK = Group(
    title="Clock",
    prefix="C",
    count=6,
    families=(
        Family(
            id="C1",
            injected="the wall clock jumps by a second to ten years, both ways, at each await",
            tests=(
                *_clock("the_wall_clock_jumps_at_an_await"),
                *_payments("a_wall_clock_that_is_set_back_closes_the_window"),
            ),
            open="of payments; a consent that a jump makes expire has expired, and a refresh lease lasts as long as its clock says",
        ),
        Family(
            id="C2",
            injected="leap second, change of daylight saving time",
            tests=(*_clock("the_time_zone_of_the_machine_does_not_matter", "the_wall_clock_jumps_at_an_await"),),
            open="a leap second is a jump of a second; a kernel that inserts one is not tried",
        ),
        Family(
            id="C3",
            injected="suspend: CLOCK_MONOTONIC stands, CLOCK_BOOTTIME goes on",
            tests=(
                *_clock("suspend_uses_up_time"),
                *_payments("rule_4_a_process_that_was_paused_after_the_record_sends_nothing"),
            ),
            open="egress's deadline is read on the right clock; its timer, like any of asyncio, stands during the suspend itself",
        ),
        Family(
            id="C4",
            injected="two sidecars five minutes apart",
            tests=_clock("two_sidecars_whose_clocks_disagree"),
            open="of payments; refresh leases are taken by the clock of whoever takes them",
        ),
        Family(id="C5", injected="the bank's clock ten minutes off", tests=_clock("a_bank_whose_clock_is_off")),
        Family(
            id="C6",
            injected="expires exactly now",
            tests=(
                *_payments("bi_c24_a_consent_that_expires_now_pays_no_more"),
                *_store("no_dispatch_from_the_moment_a_consent_expires"),
                *_tokens("at_half_of_its_life_a_token_is_renewed_and_the_new_one_used"),
            ),
        ),
    ),
)

NETWORK = Group(
    title="Network and bank",
    prefix="N",
    count=22,
    families=(
        Family(
            id="N1",
            injected="connection refused",
            tests=(
                *_of("contract/test_egress_contract", "a_bank_that_cannot_be_reached_is_not_sent"),
                *_payments("rule_2_what_fails_before_the_dispatch_leaves_an_intent"),
            ),
        ),
        Family(
            id="N2",
            injected="connecting takes too long",
            tests=(f"{_bank('a_peer_that_speaks_no_tls_gets_nothing')[0]}[silent]",),
        ),
        Family(
            id="N3",
            injected="TLS fails",
            tests=_bank("only_the_right_bank_gets_a_connection", "a_peer_that_speaks_no_tls_gets_nothing"),
        ),
        Family(
            id="N4",
            injected="reset before the first byte is sent",
            tests=_bank(
                "a_connection_that_dies_while_prepared_is_not_sent",
                "a_reset_at_any_byte_of_request_or_answer_is_unknown",
            ),
        ),
        Family(
            id="N5",
            injected="reset after k bytes of the request",
            tests=_bank("a_reset_at_any_byte_of_request_or_answer_is_unknown"),
        ),
        Family(
            id="N6",
            injected="reset after the request, before the answer",
            tests=(
                *_answer("bi_G36_reset_before_any_byte", "bi_G36_close_before_any_byte"),
                *_unknown("fi_N6_cut_after_commit"),
            ),
        ),
        Family(
            id="N7",
            injected="reset in the answer's header or body",
            tests=(
                *_answer("bi_G36_close_in_headers", "bi_G36_reset_in_body"),
                *_unknown("fi_N7_cut_mid_header", "fi_N7_cut_mid_body"),
            ),
        ),
        Family(
            id="N8",
            injected="time-out after the send; the bank has executed, has not, or executes later",
            tests=(
                *_SIMULATION,
                *_network("a_request_that_arrives_later", "a_peer_that_vanishes_after_the_handshake"),
                *_reconcile("class_a_repeats_the_identical_request_under_the_same_key"),
            ),
            open="up to 23 h late: a request that the network keeps for longer than the bank keeps its key pays again",
        ),
        Family(
            id="N9",
            injected="5xx, executed or not",
            tests=_unknown("fi_N9_500_executed", "fi_N9_500_not_executed"),
        ),
        Family(
            id="N10",
            injected="the answer is lost; the repeat is answered normally, with 409 or with another status",
            tests=(
                *_network("an_answer_that_is_lost_and_a_repeat_that_is_answered_otherwise"),
                *_reconcile(
                    "class_a_repeats_the_identical_request_under_the_same_key",
                    "rule_9_the_refusal_of_a_repeat_settles_nothing",
                ),
            ),
        ),
        Family(
            id="N11",
            injected="our request is delivered twice",
            tests=_network("a_request_that_is_delivered_twice"),
            open="at a bank of class A; one without keys pays twice what is delivered twice, whoever doubles it on the way",
        ),
        Family(
            id="N12",
            injected="our request is delivered late, after a repeat or a look-up",
            tests=(*_network("a_request_that_arrives_later"), *_SIMULATION),
        ),
        Family(
            id="N13",
            injected="the bank forgets the key: its window is over",
            tests=_reconcile("class_a_outside_the_window_asks_a_human"),
        ),
        Family(
            id="N14",
            injected="the bank keeps a refusal under the key",
            tests=_network("a_refusal_that_the_bank_keeps_under_the_key"),
        ),
        Family(
            id="N15",
            injected="two nodes of the bank say different things of a status",
            tests=_network("two_nodes_of_the_bank_disagree_about_a_status"),
        ),
        Family(
            id="N16",
            injected="wrong content type, huge body, slow answer",
            tests=(
                *_unknown("bi_G2_wrong_content_type", "bi_G3_huge"),
                *_answer("bi_G34_silence", "bi_G34_slow_loris_headers", "bi_G34_slow_loris_body"),
            ),
        ),
        Family(
            id="N17",
            injected="the bank's certificate changes between two attempts",
            tests=_network("the_banks_certificate_changes"),
        ),
        Family(
            id="N18",
            injected="429, again and again",
            tests=(
                *_network("too_many_requests_for_a_day"),
                *_reconcile("a_bank_that_allows_no_more_reads_is_left_alone_for_as_long_as_it_takes"),
            ),
        ),
        Family(
            id="N19",
            injected="the bank's name does not resolve any more",
            tests=_network("the_banks_name_does_not_resolve"),
        ),
        Family(
            id="N20",
            injected="a proxy answers 200 with its login page",
            tests=_unknown("bi_G2_html", "bi_G6_200_instead_of_201"),
        ),
        Family(
            id="N21",
            injected="a kept connection that the peer has closed",
            tests=(
                *_bank("a_kept_connection_that_the_bank_closed_is_replaced"),
                *_of("unit/egress/test_service", "a_close_that_the_loop_has_not_seen_yet_is_found_before_the_write"),
            ),
        ),
        Family(
            id="N22",
            injected="HTTP/2 GOAWAY",
            tests=_answer("bi_G44_http_2_frames", "bi_G44_http_2_version"),
            open="egress speaks HTTP/1.1 only, so frames of HTTP/2 are no answer",
        ),
    ),
)

RACES = Group(
    title="Races",
    prefix="R",
    count=12,
    families=(
        Family(
            id="R1",
            injected="two pods, one request id, the same moment",
            tests=(
                f"{_races('one_request_id_at_the_same_moment')[0]}[R1_two]",
                *_payments("rule_1_two_calls_at_once_are_one_payment"),
                *_store("of_a_hundred_equal_payments_one_is_made"),
                *_of("unit/store/test_postgresql_races", "r1_one_request_id_is_claimed_once"),
                *_of("e2e/test_postgresql", "two_pods_with_one_request_id_pay_once"),
            ),
        ),
        Family(
            id="R2",
            injected="two pods, one request id, different bodies",
            tests=(
                *_races("one_request_id_with_two_bodies_at_the_same_moment"),
                *_payments("bi_c5_same_request_id_with_another_content_is_refused"),
            ),
            open="two cores on one store in one process",
        ),
        Family(
            id="R3",
            injected="a hundred calls with one request id",
            tests=(
                f"{_races('one_request_id_at_the_same_moment')[0]}[R3_a_hundred]",
                *_store("of_a_hundred_equal_claims_one_wins", "of_a_hundred_equal_payments_one_is_made"),
            ),
        ),
        Family(
            id="R4",
            injected="two request ids, one single-use consent",
            open="no connector has single-use consents: class B looks payments up by our own key",
        ),
        Family(
            id="R5",
            injected="a limit on the sum, from two pods",
            tests=(
                *_of("unit/store/test_postgresql_limits", "the_last_of_a_limit_between_two_sidecars"),
                *_of("e2e/test_limits", "payments_that_race_for_a_limit"),
            ),
        ),
        Family(
            id="R6",
            injected="refresh by two to fifty at once",
            tests=(
                *_races("refresh_by_many_sidecars"),
                *_store("of_fifty_refreshers_one_gets_the_lease"),
                *_tokens("fifty_calls_at_once_refresh_once", "two_sidecars_refresh_once"),
            ),
        ),
        Family(
            id="R7",
            injected="refresh while paying",
            tests=(
                *_races("refresh_while_paying"),
                f"{_of('faults/test_kill_at_every_await', 'killed_at_an_await')[0]}[payment with a refresh on the way]",
            ),
        ),
        Family(
            id="R8",
            injected="revocation while paying, while refreshing",
            tests=(
                *_races("revocation_while_paying_and_refreshing"),
                *_tokens("a_consent_revoked_while_its_token_is_renewed_is_revoked"),
                *_payments("rule_2_a_consent_that_ends_while_preparing_pays_nothing"),
                *_committer("a_revocation_stops_the_dispatch_of_its_own_group"),
                *_store("a_revocation_ahead_of_a_dispatch_stops_it"),
            ),
        ),
        Family(
            id="R9",
            injected="rotation of the master key while reading and writing",
            open="the master key cannot be rotated yet",
        ),
        Family(
            id="R10",
            injected="two rotations at once",
            tests=_store("of_two_first_master_keys_one_stays"),
            open="of the first key only: the master key cannot be rotated yet",
        ),
        Family(
            id="R11",
            injected="two reconcilers, one payment",
            tests=(
                *_races("many_reconcilers"),
                *_store("of_two_take_overs_one_wins"),
                *_reconcile(
                    "two_sidecars_that_reconcile_one_payment_send_one_repeat",
                    "overlapping_rounds_work_on_a_payment_once",
                ),
            ),
        ),
        Family(
            id="R12",
            injected="new calls while the sidecar stops",
            tests=_of("rpc/test_operations", "graceful_stop"),
        ),
    ),
)

_PG = "unit/store/test_postgresql"


def _pg(file: str, *names: str) -> tuple[str, ...]:
    return _of(f"{_PG}_{file}", *names)


_FINDING_OUT = (
    "a_commit_that_failed_has_not_happened",
    "a_commit_whose_answer_is_lost_is_found_out",
    "what_is_only_visible_is_not_told",
)

POSTGRESQL = Group(
    title="PostgreSQL",
    prefix="D",
    count=18,
    families=(
        Family(
            id="D1",
            injected="the session is terminated before, during, after COMMIT",
            tests=_pg(
                "commits",
                *_FINDING_OUT,
                "a_connection_that_ends_within_a_transaction_is_unavailable",
                "a_commit_that_ends_while_it_waits_for_a_replica_is_proven",
            ),
        ),
        Family(
            id="D2",
            injected="immediate stop of the server at each statement",
            tests=_pg("network", "after_a_crash_of_the_server_all_goes_on"),
            open="stopped under load, not at each statement in turn; each statement fails in D7",
        ),
        Family(
            id="D3",
            injected="a replica is promoted, asynchronous and synchronous",
            tests=(
                *_pg(
                    "network",
                    "after_a_fail_over_to_a_synchronous_replica_all_goes_on",
                    "after_a_fail_over_that_lost_commits_nothing_is_written",
                ),
                *_pg("commits", "a_database_that_has_lost_commits_is_never_written_to_again"),
            ),
            open="a sidecar that starts after the fail-over cannot know what was lost",
        ),
        Family(
            id="D4",
            injected="read-only",
            tests=(
                *_pg("commits", "a_server_that_becomes_read_only_is_unavailable_and_passes"),
                *_pg("start", "a_standby_is_refused"),
            ),
        ),
        Family(
            id="D5",
            injected="disk full",
            tests=_pg(
                "commits", "an_error_at_any_statement_harms_nobody_for_good", "a_commit_that_failed_has_not_happened"
            ),
            open="by the server's code for it (53100); no disk is filled",
        ),
        Family(
            id="D6",
            injected="EIO at fsync",
            tests=_pg("network", "after_a_crash_of_the_server_all_goes_on"),
            open="by what the server does then, which is to crash; no disk fails",
        ),
        Family(
            id="D7",
            injected="40001, 40P01, 55P03, 57014, 53300, 57P01, 08006, 08007, 40003 at each statement",
            tests=_pg(
                "commits",
                "a_conflict_at_any_statement_runs_the_group_again",
                "a_conflict_that_stays_is_given_up",
                "a_deadlock_between_two_sidecars_is_resolved",
                "an_error_at_any_statement_harms_nobody_for_good",
            ),
        ),
        Family(
            id="D8",
            injected="a stranger holds a lock",
            tests=_pg(
                "commits",
                "a_strangers_lock_fails_its_own_command_only",
                "many_commands_wait_for_a_stranger_little_longer_than_one",
            ),
        ),
        Family(
            id="D9",
            injected="no connection left in the pool",
            tests=_pg(
                "readers",
                "when_all_connections_are_busy_a_read_is_unavailable_in_time",
                "too_many_waiting_reads_are_refused_at_once",
            ),
        ),
        Family(
            id="D10",
            injected="a pooler in transaction mode",
            open="not supported: session locks need a connection of one's own (docs/store.md)",
        ),
        Family(
            id="D11",
            injected="latency, jitter, half-open TCP, black hole",
            tests=(
                *_pg("commits", "a_server_that_falls_silent_is_given_up", "a_connection_that_died_idle_is_replaced"),
                *_pg("readers", "a_reader_that_died_idle_is_replaced"),
            ),
            open="a server that stands still; no network between them is shaped",
        ),
        Family(
            id="D12",
            injected="the database's clock jumps",
            open="nothing rests on it: every time in a row is a sidecar's",
        ),
        Family(
            id="D13",
            injected="a stale replica is read",
            tests=(
                *_pg("start", "a_standby_is_refused"),
                *_pg("readers", "no_reader_outlives_the_writers_connection"),
            ),
        ),
        Family(
            id="D14",
            injected="writes refused near the wrap-around of transaction ids",
            tests=_pg("commits", "an_error_at_any_statement_harms_nobody_for_good"),
            open="as any error of a statement; the server is not brought there",
        ),
        Family(
            id="D15",
            injected="an older or newer schema",
            tests=_pg("start", "a_schema_that_is_not_ours_is_refused", "a_newer_schema_is_not_migrated"),
        ),
        Family(
            id="D16",
            injected="the role has lost a right",
            tests=_pg("start", "a_role_with_more_or_less_is_refused"),
        ),
        Family(
            id="D17",
            injected="locks of autovacuum and ALTER",
            tests=_pg("commits", "a_strangers_lock_fails_its_own_command_only"),
            open="by a stranger's lock; autovacuum itself gives way",
        ),
        Family(
            id="D18",
            injected="restored to yesterday while sidecars run",
            tests=_pg("commits", "a_database_that_has_lost_commits_is_never_written_to_again"),
        ),
    ),
)

_HSM = "unit/hsm/test_module"

HSM = Group(
    title="HSM",
    prefix="S",
    count=14,
    families=(
        Family(
            id="S1",
            injected="the session is lost between calls",
            tests=_of("unit/hsm/test_process", "a_token_that_vanishes_fails_the_call_and_ends_the_process"),
        ),
        Family(
            id="S2",
            injected="an error in the middle of an operation",
            tests=_of(_HSM, "every_error_of_signing_is_a_fault", "a_sick_module_is_a_fault_and_not_a_bad_record"),
        ),
        Family(
            id="S3",
            injected="all sessions are lost",
            tests=_of("unit/hsm/test_process", "a_token_that_vanishes_fails_the_call_and_ends_the_process"),
            open="there is one session a process",
        ),
        Family(
            id="S4",
            injected="the login is lost",
            tests=_of(_HSM, "every_error_of_signing_is_a_fault"),
            open="as an error of the call; the process then ends and its next one logs in once",
        ),
        Family(
            id="S5",
            injected="the token is removed, comes back, comes back with other content",
            tests=(
                *_of("unit/hsm/test_process", "a_token_that_vanishes_fails_the_call_and_ends_the_process"),
                *_supervisor("master_keys_that_do_not_open_stop_the_start"),
            ),
        ),
        Family(
            id="S6",
            injected="the PIN is locked",
            tests=_of(
                _HSM,
                "a_pin_that_is_locked_or_nearly_is_not_tried",
                "a_refused_pin_is_tried_exactly_once_and_never_again",
            ),
        ),
        Family(
            id="S7",
            injected="a call takes seconds, or for ever",
            tests=(
                *_committer("a_signer_that_hangs_fails_its_callers_only"),
                *_processes("hanging_hsm_fails_its_callers_and_is_replaced"),
            ),
        ),
        Family(
            id="S8",
            injected="one call in a hundred fails",
            tests=_of(
                _HSM, "a_wrong_tag_is_told_from_a_sick_module_by_the_known_answer", "every_error_of_signing_is_a_fault"
            ),
            open="each error once, at each call; not at random under load",
        ),
        Family(id="S9", injected="no more sessions", open="no test yet"),
        Family(
            id="S10",
            injected="the module crashes",
            tests=(*_signals("signals_at_each_step"), *_processes("killed_child_is_replaced")),
            open="by SIGKILL of its process",
        ),
        Family(
            id="S11",
            injected="a key is deleted, doubled, or its attributes change",
            tests=(
                *_of(
                    _HSM,
                    "anything_but_exactly_one_root_key_is_refused",
                    "a_weaker_root_key_is_refused_by_name_of_the_attribute",
                ),
                *_of(
                    "unit/hsm/test_process",
                    "two_root_keys_with_one_label_and_id_are_refused",
                    "a_missing_key_is_refused",
                ),
            ),
            open="between two processes, not under a running one",
        ),
        Family(
            id="S12",
            injected="slots are numbered otherwise",
            tests=_of(_HSM, "the_token_is_selected_by_label_and_serial"),
        ),
        Family(
            id="S13",
            injected="the HSM comes back with its counters reset",
            tests=_of(_HSM, "an_hsm_that_repeats_its_random_numbers_does_no_harm"),
        ),
        Family(
            id="S14",
            injected="fail-over to an HSM that lacks the newest key",
            tests=(
                *_of("unit/hsm/test_process", "a_missing_key_is_refused"),
                *_supervisor("master_keys_that_do_not_open_stop_the_start"),
            ),
        ),
    ),
)

AUDIT = Group(
    title="Audit log",
    prefix="U",
    count=8,
    families=(
        Family(
            id="U1",
            injected="disk full",
            tests=(
                *_committer("a_full_disk_is_unavailable_and_passes"),
                *_of("faults/test_kill_at_every_system_call", "an_error_that_stays"),
            ),
        ),
        Family(id="U2", injected="a write that blocks", tests=_committer("a_blocked_disk_fails_by_deadline")),
        Family(
            id="U3", injected="the file is removed or renamed", tests=_committer("a_file_that_is_gone_takes_no_commits")
        ),
        Family(
            id="U4",
            injected="the right to write is lost",
            open="an open file keeps its rights; a new start is refused (startup)",
            tests=_of("unit/store/test_file", "a_file_that_is_not_safe_is_refused"),
        ),
        Family(id="U5", injected="a witness that is away, or says another size", open="there is no witness yet"),
        Family(
            id="U6",
            injected="the HSM is down when a checkpoint is due",
            tests=(
                *_committer("a_signer_that_hangs_fails_its_callers_only"),
                *_store("others_go_on_while_nothing_can_be_signed", "without_a_signature_there_is_no_dispatch"),
            ),
        ),
        Family(
            id="U7",
            injected="an entry that is too long",
            tests=_store("an_entry_that_breaks_the_format_stops_the_act"),
        ),
        Family(
            id="U8",
            injected="SIGKILL between entry and checkpoint",
            tests=(
                f"{_of('unit/store/test_crash', 'kill_9_at_the_worst_moments')[0]}[at-signature:3]",
                *_of("faults/test_kill_at_every_await", "killed_at_an_await"),
            ),
        ),
    ),
)

FAULTS = (PROCESS, HSM, SQLITE, POSTGRESQL, CLOCK, NETWORK, RACES, AUDIT)
