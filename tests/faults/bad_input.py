# ruff: noqa: E501 (the tables: one line each)
"""The families of bad input that payments, consents and banks' answers can be: C, D and G of the list.

Their tests are tables whose cases begin with the family's id, so a row names a table and the family, and every case of it counts.
"""

from tests.faults.families import Family, Group

__all__ = ["BAD_INPUT"]

_PAYMENTS = "tests/faults/test_bad_payments.py::test_"
_CONSENTS = "tests/faults/test_bad_consents.py::test_"
_ANSWERS = "tests/faults/test_bad_answers.py::test_"
_WIRE = "tests/faults/test_bank_answers.py::test_"
_REFUSED = f"{_PAYMENTS}a_wrong_payment_is_refused"
_NOT_ACTIVE = f"{_PAYMENTS}a_consent_that_is_not_active_pays_nothing"
_NO_CONSENT = f"{_CONSENTS}a_wrong_consent_is_refused"
_REDIRECT = f"{_CONSENTS}a_wrong_redirect_leaves_the_consent_as_it_was"
_GRANT = f"{_CONSENTS}a_token_answer_that_is_a_grant"
_NO_GRANT = f"{_CONSENTS}a_token_answer_that_is_no_grant"
_TOKEN_ERROR = f"{_CONSENTS}a_token_answer_that_is_an_error"
_LIFETIME = f"{_CONSENTS}a_lifetime_that_is_none"
_LIST = f"{_CONSENTS}a_list_that_is_asked_for_wrongly"
_IMPORT = f"{_CONSENTS}a_wrong_import_is_refused"
_TOLD = f"{_ANSWERS}an_answer_is_told_for_what_it_is"
_BYTES = f"{_WIRE}a_wrong_answer_has_its_honest_outcome"
_GENERATED = "tests/faults/test_generated_input.py::test_generated_"
_RPC = "tests/rpc/test_bad_input.py::test_"


def _row(id_: str, injected: str, *tests: str, open_: str = "") -> Family:
    """A test without a case of its own that ends with `*` stands for its cases of this family."""
    named = tuple(f"{test[:-1]}[bi_{id_}_*" if test.endswith("*") else test for test in tests)
    return Family(id=id_, injected=injected, tests=named, open=open_)


PAYMENTS = Group(
    title="Bad input: InitiatePayment",
    prefix="C",
    count=34,
    families=(
        _row("C1", "no request id", _REFUSED + "*", f"{_RPC}every_field_in_every_way", f"{_GENERATED}payments"),
        _row("C2", "request ids of 1 to 10,000 characters", _REFUSED + "*"),
        _row("C3", "request ids of other characters", _REFUSED + "*"),
        _row("C4", "the same request again", f"{_PAYMENTS}bi_c4_the_same_request_again"),
        _row("C5", "the same request id with each field other", f"{_PAYMENTS}bi_c5_the_same_request_id_with_another_body", f"{_PAYMENTS}bi_c5_the_same_request_id_with_another_consent"),
        _row("C6", "another caller's request id", f"{_PAYMENTS}request_ids_of_others_do_not_meet[bi_C6_another_caller]"),
        _row("C7", "another tenant's request id", f"{_PAYMENTS}request_ids_of_others_do_not_meet[bi_C7_another_tenant]"),
        _row("C8", "the same request id while the first is in flight", f"{_PAYMENTS}bi_c8_while_the_first_is_in_flight"),
        _row("C9", "the same request id after a second, a day, a year", f"{_PAYMENTS}bi_c9_the_same_request_later"),
        _row("C10", "the same body under a new request id", f"{_PAYMENTS}bi_c10_the_same_body_under_a_new_request_id", open_="it is made; it is not flagged as a likely duplicate"),
        _row("C11", "amounts that are zero, negative, too exact, too large", _REFUSED + "*", "tests/unit/domain/test_values.py::test_bi_c11_what_is_no_exact_amount_is_none"),
        _row("C12", "currencies in lower case, unknown, historic", _REFUSED + "*", "tests/unit/domain/test_values.py::test_bi_c11_c12_money_of_another_form_is_refused"),
        _row("C13", "at a limit, and a cent above it", _REFUSED + "*", f"{_PAYMENTS}bi_c13_at_the_limit"),
        _row("C14", "sums over calls beyond a limit, from two pods", "tests/unit/store/test_postgresql_limits.py::test_the_last_of_a_limit_between_two_sidecars", "tests/e2e/test_limits.py::test_payments_that_race_for_a_limit"),
        _row("C15", "IBANs with wrong check digits, form, length, country", _REFUSED + "*", "tests/unit/domain/test_values.py::test_bi_c15_an_iban_of_another_form_is_refused"),
        _row("C16", "UK sort codes and account numbers", _REFUSED + "*", open_="accounts are IBANs only, so each of them is refused"),
        _row("C17", "creditor equal to debtor", _REFUSED + "*"),
        _row("C18", "creditor names", _REFUSED + "*", "tests/unit/domain/test_values.py::test_bi_c18_c19_text_outside_the_sepa_set_is_refused"),
        _row("C19", "references with lines, too long", _REFUSED + "*"),
        _row("C20", "end-to-end ids, twice the same, too long", _REFUSED + "*", f"{_PAYMENTS}bi_c20_one_end_to_end_id_for_two_payments"),
        _row("C21", "execution dates", _REFUSED + "*", open_="payments have no execution date yet, so a field that would be one is refused"),
        _row("C22", "an unknown consent", _REFUSED + "*"),
        _row("C23", "a revoked consent", _NOT_ACTIVE + "*"),
        _row("C24", "a consent that expires a second ago, now, in a second, while it is prepared", _NOT_ACTIVE + "*", f"{_PAYMENTS}bi_c24_expires", f"{_PAYMENTS}bi_c24_expires_while_it_is_prepared"),
        _row("C25", "a used-up consent", _NOT_ACTIVE + "*", open_="no provider with single-use consents yet: one that has failed stands for it"),
        _row("C26", "a consent of another tenant, caller, provider", _REFUSED + "*"),
        _row("C27", "a consent to account information", _REFUSED + "*"),
        _row("C28", "a consent that awaits its owner", _NOT_ACTIVE + "*"),
        _row("C29", "a consent that needs its owner again", _NOT_ACTIVE + "*"),
        _row("C30", "a provider that is not configured any more", _REFUSED + "*"),
        _row("C31", "a product that the provider does not offer", _REFUSED + "*"),
        _row("C32", "instant where there is none", _REFUSED + "*"),
        _row("C33", "an account that the consent does not name", _REFUSED + "*"),
        _row("C34", "while the sidecar stops, the HSM is away, keys are rotated", f"{_PAYMENTS}bi_c34_during_an_outage", f"{_PAYMENTS}bi_c34_an_unknown_outcome_is_an_answer", "tests/rpc/test_operations.py::test_graceful_stop", open_="the master key cannot be rotated yet"),
    ),
)  # fmt: skip

CONSENTS = Group(
    title="Bad input: consents and tokens",
    prefix="D",
    count=30,
    families=(
        _row("D1", "tokens that are empty, one character, 16 to 64 kilobytes", _GRANT + "*", _NO_GRANT + "*", _IMPORT + "*", f"{_GENERATED}token_answers"),
        _row("D2", "tokens with lines, NUL, other characters", _NO_GRANT + "*", _IMPORT + "*"),
        _row("D3", "token types", _GRANT + "*", _NO_GRANT + "*"),
        _row("D4", "expiry of zero, in the past, far ahead, missing", _NO_CONSENT + "*", _IMPORT + "*"),
        _row("D5", "scopes missing, wider, narrower", _NO_CONSENT + "*", _NO_GRANT + "*", f"{_CONSENTS}bi_d5_a_scope_that_is_narrower_or_wider_is_not_looked_at", open_="what a token's scope says is not compared with what was asked for"),
        _row("D6", "no refresh token", _GRANT + "*", "tests/unit/custody/test_tokens.py::test_without_a_refresh_token_the_living_token_goes_on_to_its_end"),
        _row("D7", "one consent stored twice", f"{_CONSENTS}bi_d7_one_request_id_for_two_imports", "tests/unit/custody/test_consents.py::test_import_sealed_again_is_another_request"),
        _row("D8", "a provider that is not configured", _NO_CONSENT + "*"),
        _row("D9", "state missing, replayed, of another tenant", _REDIRECT + "*", f"{_CONSENTS}bi_d9_the_state_of_another_tenants_consent"),
        _row("D10", "a code that is replayed", _REDIRECT + "*", f"{_CONSENTS}bi_d10_a_code_that_is_replayed", "tests/e2e/test_main_job.py::test_replayed_redirect"),
        _row("D11", "redirect URIs with another host, userinfo, fragment", _NO_CONSENT + "*"),
        _row("D12", "mix-up: another issuer; ID tokens", _REDIRECT + "*", open_="OpenID Connect is not used: an ID token is not asked for and not read"),
        _row("D13", "refresh while it is refreshed", f"{_CONSENTS}bi_d13_refresh_while_it_is_refreshed"),
        _row("D14", "a refresh without a new refresh token", _GRANT + "*", "tests/unit/custody/test_tokens.py::test_a_provider_that_sends_no_new_refresh_token_keeps_the_old_one"),
        _row("D15", "a refresh with the same tokens", _GRANT + "*"),
        _row("D16", "a refresh for another subject", open_="a token answer names no subject, and the accounts are not asked for again after a refresh"),
        _row("D17", "lifetimes that are text, negative, zero, 10^12", _GRANT + "*", _LIFETIME + "*"),
        _row("D18", "two answers to one request", _NO_GRANT + "*", f"{_BYTES}[bi_G32_two_answers-payment]"),
        _row("D19", "revoked twice", f"{_CONSENTS}bi_d19_revoked_twice"),
        _row("D20", "revoked while a payment is in flight", f"{_CONSENTS}bi_d20_revoked_while_a_payment_is_in_flight"),
        _row("D21", "revoking what is unknown, or not one's own", f"{_CONSENTS}a_revocation_of_what_is_not_ones_own*"),
        _row("D22", "revoked here, 5xx at the bank", f"{_CONSENTS}bi_d22_the_bank_cannot_be_told"),
        _row("D23", "reading another tenant's", _NO_CONSENT + "*", f"{_CONSENTS}bi_d23_what_is_not_ones_own_does_not_exist", "tests/rpc/test_tenants.py::test_another_owner", "tests/rpc/test_tenants.py::test_another_workload"),
        _row("D24", "page sizes of 0, -1, 10^9", _LIST + "*", f"{_CONSENTS}bi_d24_no_page_size_is_no_way_around"),
        _row("D25", "page tokens forged, foreign, truncated", _LIST + "*", f"{_RPC}page_tokens_that_no_page_gave"),
        _row("D26", "rows that change while they are listed", f"{_CONSENTS}bi_d26_rows_change_while_they_are_listed"),
        _row("D27", "wildcards in a filter", _LIST + "*"),
        _row("D28", "another tenant's payment", f"{_CONSENTS}bi_d28_the_payment_of_another_tenant"),
        _row("D29", "a status asked for a thousand times", f"{_CONSENTS}bi_d29_a_status_that_is_asked_for_a_thousand_times"),
        _row("D30", "ending a consent with an open payment", f"{_CONSENTS}bi_d30_ended_with_an_open_payment"),
    ),
)  # fmt: skip

ANSWERS = Group(
    title="Bad input: answers of banks and authorisation servers",
    prefix="G",
    count=44,
    families=(
        _row("G1", "2xx without a body", _TOLD + "*", _BYTES + "*", _NO_GRANT + "*"),
        _row("G2", "another content type, a charset that lies, XML, HTML", _TOLD + "*", _BYTES + "*", _NO_GRANT + "*"),
        _row("G3", "JSON that is truncated, doubled, deep, huge; lengths and codings that lie", _TOLD + "*", _BYTES + "*", _NO_GRANT + "*", f"{_GENERATED}answers"),
        _row("G4", "headers of a megabyte, ten thousand, with lines, folded", _TOLD + "*", _BYTES + "*"),
        _row("G5", "a flood of interim answers", _BYTES + "*"),
        _row("G6", "200 instead of 201", _TOLD + "*"),
        _row("G7", "202, 204", _TOLD + "*"),
        _row("G8", "redirects", _TOLD + "*", _BYTES + "*", _TOKEN_ERROR + "*"),
        _row("G9", "400 with and without a code that is known", _TOLD + "*", _BYTES + "*"),
        _row("G10", "401, once and for ever", _TOLD + "*", _BYTES + "*", f"{_ANSWERS}bi_g10_expired_for_ever"),
        _row("G11", "403 of the bank, of a firewall", _TOLD + "*", _BYTES + "*"),
        _row("G12", "404, also right after 201", _TOLD + "*", _BYTES + "*", f"{_ANSWERS}bi_g12_not_found_right_after_it_was_made"),
        _row("G13", "405, 406, 415", _TOLD + "*", _BYTES + "*"),
        _row("G14", "408, 425", _TOLD + "*", _BYTES + "*", _TOKEN_ERROR + "*"),
        _row("G15", "409 with and without the payment", _TOLD + "*", _BYTES + "*", _TOKEN_ERROR + "*"),
        _row("G16", "429 with every Retry-After", _TOLD + "*", _BYTES + "*"),
        _row("G17", "5xx before and after execution", _TOLD + "*", _BYTES + "*", _TOKEN_ERROR + "*"),
        _row("G18", "statuses that do not exist", _TOLD + "*", _BYTES + "*"),
        _row("G19", "the echo of our request id missing, or another", _TOLD + "*"),
        _row("G20", "payment ids that are empty, a megabyte, paths; that change", _TOLD + "*", f"{_ANSWERS}bi_g20_the_payments_id_changes_between_two_answers"),
        _row("G21", "statuses that are unknown, lower case, null, a list", _TOLD + "*"),
        _row("G22", "statuses that go back", f"{_ANSWERS}bi_g22_a_status_that_goes_back", "tests/unit/custody/test_reconcile.py::test_bi_g22_a_final_status_never_goes_back"),
        _row("G23", "another amount or creditor in the answer", _TOLD + "*", open_="what the answer repeats of the order is not compared with it"),
        _row("G24", "another consent in the answer", _TOLD + "*", open_="what the answer repeats of the consent is not compared with it"),
        _row("G25", "links to other hosts", _TOLD + "*"),
        _row("G26", "where the owner is sent: javascript, http, other hosts", _TOLD + "*", "tests/unit/connectors/test_reading.py::test_bi_g26_the_owner_is_sent_nowhere_else"),
        _row("G27", "signatures of answers", open_="signatures on answers are not verified"),
        _row("G28", "the bank's certificate: another CA, expired, another host, new", f"{_WIRE}only_the_right_bank_gets_a_connection", "tests/faults/test_network.py::test_the_banks_certificate_changes", open_="revocation of the bank's certificate is not asked for"),
        _row("G29", "a TLS alert in the body, a close without close_notify", _TOLD + "*", _BYTES + "*"),
        _row("G30", "an answer before the request has ended", _TOLD + "*", f"{_WIRE}a_connection_that_dies_while_prepared_is_not_sent"),
        _row("G31", "the answer to another request on the same connection", f"{_WIRE}an_answer_nobody_asked_for_is_never_given_to_the_next_request"),
        _row("G32", "two answers", _TOLD + "*", _BYTES + "*"),
        _row("G33", "an answer after our time-out", _TOLD + "*", f"{_WIRE}a_cancelled_answer_does_not_reach_the_next_request"),
        _row("G34", "an answer byte by byte", _BYTES + "*"),
        _row("G35", "a window of zero for ever", f"{_WIRE}a_request_that_the_bank_does_not_read_is_unknown_at_the_deadline"),
        _row("G36", "a reset at each byte of request and answer", _BYTES + "*", f"{_WIRE}a_reset_at_any_byte_of_request_or_answer_is_unknown"),
        _row("G37", "names: none, a hundred addresses, private, rebinding", "tests/faults/test_network.py::test_the_banks_name_does_not_resolve", open_="which addresses a name may have is left to TLS: whoever has not the bank's certificate gets no byte"),
        _row("G38", "a bank with IPv6 only", open_="not every machine that runs the tests has IPv6"),
        _row("G39", "absurd times in a token answer", _LIFETIME + "*"),
        _row("G40", "errors of a token endpoint", _TOKEN_ERROR + "*"),
        _row("G41", "a token answer as a form", _NO_GRANT + "*"),
        _row("G42", "accounts of another person", _GRANT + "*", f"{_ANSWERS}bi_g42_the_accounts_of_another_person"),
        _row("G43", "cookies", _TOLD + "*", f"{_WIRE}cookies_are_ignored"),
        _row("G44", "HTTP/2 GOAWAY", _BYTES + "*", open_="egress speaks HTTP/1.1 only, so frames of HTTP/2 are no answer"),
    ),
)  # fmt: skip

BAD_INPUT = (PAYMENTS, CONSENTS, ANSWERS)
