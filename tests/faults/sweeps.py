"""One run of a scenario under a fault: database and bank as they are before it, the act, the recovery, and the judgement.

The judgement is the same after every fault: executed at most once; what anybody was told fits the bank's books; the log verifies
and has a signed dispatch before each send; nothing is half-written; what is unknown for good is flagged for a human.
"""

import contextlib
import itertools
import os
import shutil
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs

from sidecar.domain.provider import Answer, NotSent
from tests.fakes.bank import ScriptedBank, Twist, error, lost
from tests.faults.core_process import Command, CoreProcesses, Ended, said
from tests.faults.remote_bank import BankSocket
from tests.faults.scenarios import SCENARIOS, A, Scenario, bank_of
from tests.faults.tracing import Tracer
from tests.unit.store.support import new_database

__all__ = ["Harness", "Place", "Prepared"]

SAID_YES = {"accepted", "awaiting-authorisation", "settled"}
REFRESH_ENDS = ("TOKEN_REFRESHED", "TOKEN_REFRESH_FAILED", "CONSENT_NEEDS_REAUTHORISATION")
SAID_NO = {"rejected", "rejected-late", "abandoned", "cancelled"}


def _received(answer: Answer) -> Answer:
    """The bank has it and has not decided."""
    return replace(answer, body=answer.body.replace(b"ACSC", b"ACTC"))


TWISTS: Mapping[str, Twist] = {
    "lost": lost,
    "refused": error(400, "FORMAT_ERROR"),
    "not sent": NotSent(code="CONNECT_FAILED"),
    "received": _received,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A scenario's database before the act, to be copied for each run, and what its set-up has to say."""

    name: str
    scenario: Scenario
    database: Path
    given: dict[str, str]


@dataclass(slots=True, kw_only=True)
class Place:
    """One run: a database of its own and a bank with new books. `story` names it in what an assertion says."""

    prepared: Prepared
    harness: "Harness"
    database: Path
    bank: ScriptedBank
    story: str
    stage: int = 0
    ended: list[Ended] = field(default_factory=list)
    rotations: list[int] = field(
        default_factory=list
    )  # refresh tokens that the bank had given out, at the end of each stage
    executed_at_kill: int = 0

    def command(self, do: str, **changes: Any) -> Command:
        return Command(
            do=do,
            scenario=self.prepared.name,
            database=str(self.database),
            bank=str(self.harness.bank.path),
            said=str(self.database.with_name(f"said-{len(self.ended)}")),
            given=self.prepared.given,
            **{"after_seconds": self.prepared.scenario.age_seconds, **changes},
        )

    def act(self, **changes: Any) -> Ended:
        return self.note(self.harness.processes.run(self.command("act", **changes)))

    def act_traced(
        self,
        thread: str,
        calls: Sequence[str],
        *injected: str,
        data: bool = False,
        kill_after_seconds: float | None = None,
    ) -> tuple[Ended, Tracer]:
        """The act with strace on its loop's or its writer's thread; killed after a while where it may not end by itself."""
        hold = self.database.with_name("hold")
        os.mkfifo(hold)
        command = self.command("act", hold=str(hold))
        self.harness.processes.begin(command)
        threads = _threads(Path(command.said))
        if data:  # the files as the recorded calls find them
            self.at_hold.mkdir(mode=0o700)
            for file in self.database.parent.glob("store.db*"):
                shutil.copy(file, self.at_hold)
        tracer = Tracer(
            threads[thread], calls=calls, output=self.database.with_name("trace"), injected=injected, data=data
        )
        killer = threading.Timer(kill_after_seconds or 0, os.kill, (threads["loop"], signal.SIGKILL))
        with tracer:
            hold.write_bytes(b"")  # lets it go on
            if kill_after_seconds is not None:
                killer.start()
            ended = self.harness.processes.end(command)
            killer.cancel()
        return self.note(ended), tracer

    @property
    def at_hold(self) -> Path:
        return self.database.with_name("at-hold")

    def use_bank(self, bank: ScriptedBank) -> None:
        """Books that another run has left."""
        self.bank = bank
        self.harness.bank.serve(bank, self.database)

    def nothing_was_told(self) -> None:
        """The act was somebody else's: this place begins with its end."""
        self.executed_at_kill = sum(self.bank.executed.values())
        self.rotations.append(self.bank.rotations)
        self.ended.append(Ended(status=-signal.SIGKILL, said=()))

    def note(self, ended: Ended) -> Ended:
        """After a stage: the bank's books as they stand, once all that was under way has arrived."""
        self.harness.bank.settle()
        self.rotations.append(self.bank.rotations)
        if not self.ended:
            self.executed_at_kill = sum(self.bank.executed.values())
        self.ended.append(ended)
        return ended

    def recover(self, *, number: int, **changes: Any) -> Ended:
        """The next process, some time later: at once, before, or after all that was under way has had its time."""
        self.stage += 1
        later = (0.5, 25.0, 200.0)[number % 3]
        if self.prepared.scenario.work == "refresh":
            later = min(later, 25.0)  # the old access token must still live, so that it can be seen to work
        later += 1000.0 * (self.stage - 1)
        if self.prepared.scenario.rounds:
            later += 2.0 * self.prepared.scenario.rounds
        options = {
            "after_seconds": self.prepared.scenario.age_seconds + later,
            "asks_first": number % 2 == 0,
            **changes,
        }
        return self.note(self.harness.processes.run(self.command("recover", **options)))

    # -- the judgement

    def judge(self) -> None:
        last = self.ended[-1]
        assert last.status == 0, self.story
        assert last.last("verified"), f"{self.story}: {last.last('findings')}"
        assert self.harness.bank.off_record == [], f"{self.story}: sent without a signed record"
        driver = sqlite3.connect(self.database)
        assert driver.execute("PRAGMA integrity_check").fetchone() == ("ok",), self.story
        assert driver.execute("PRAGMA foreign_key_check").fetchall() == [], self.story
        driver.close()
        judges = {
            "payment": self._judge_payment,
            "completion": self._judge_completion,
            "refresh": self._judge_refresh,
            "revocation": self._judge_revocation,
        }
        judges[self.prepared.scenario.work]()

    def _told(self) -> set[str]:
        return {told for ended in self.ended for told in ended.all("told")}

    def _judge_payment(self) -> None:
        last = self.ended[-1]
        (payment,) = last.last(
            "payments"
        )  # the application asks again with the same request id, so there is one, and only one
        count = self.bank.executed[payment["end_to_end_id"]]
        told = self._told() | {payment["state"]}
        story = f"{self.story}: {payment['state']}, executed {count} times, told {sorted(told)}"
        events = [event for event, of in last.last("events") if of == payment["id"]]
        assert sum(self.bank.executed.values()) == count <= 1, story
        assert payment["claimed"], story
        assert events[0] == "PAYMENT_INTENT", story
        assert payment["state"] in {"settled", "rejected", "abandoned", "needs-attention"}, story
        assert payment["state"] not in SAID_YES or count == 1, story
        assert payment["state"] not in SAID_NO or count == 0, story
        assert not (told & SAID_YES and told & SAID_NO), story
        assert count == 0 or "PAYMENT_DISPATCHED" in events, story
        (consent,) = last.last("consents")
        if self.prepared.scenario.descriptor == A:  # without a token a repeat cannot be sent, and a human has to ask
            assert payment["state"] != "needs-attention" or consent["state"] != "active", story
        elif self.executed_at_kill and payment["state"] != "settled":
            assert payment["state"] == "needs-attention", story

    def _judge_completion(self) -> None:
        """The code is exchanged at most once; what was told active is active and reads; what has failed keeps nothing."""
        last = self.ended[-1]
        (consent,) = last.last("consents")
        exchanges = sum(b"authorization_code" in request.body for request in self.bank.requests)
        story = f"{self.story}: {consent}, exchanged {exchanges} times, told {sorted(self._told())}"
        assert exchanges <= 1, story
        assert consent["state"] in {"active", "failed"}, story
        if consent["state"] == "active":
            assert last.last("reads") == "1 account", story
            assert consent["secrets"] == ["ACCESS_TOKEN", "REFRESH_TOKEN"], story
        else:
            assert "active" not in self._told(), story
            assert not consent["has_key"], story
            assert consent["secrets"] == [], story

    def _judge_refresh(self) -> None:
        """Lost for sure where a kill fell between the provider's rotation and its record; lost at most where a refresh was begun
        whose outcome nobody knows. Then it is said, and the old access token went on meanwhile."""
        last = self.ended[-1]
        (consent,) = last.last("consents")
        # The first start is the set-up's, the second the act's: from there on, what each process put on record.
        stages = _split([event for event, _ in last.last("events")], "SIDECAR_STARTED")[2:]
        saved = itertools.accumulate(stage.count("TOKEN_REFRESHED") for stage in stages)
        was_lost = any(given > stored for given, stored in zip(self.rotations, saved, strict=True))
        was_left = any(stage.count("TOKEN_REFRESH_INTENT") > sum(map(stage.count, REFRESH_ENDS)) for stage in stages)
        at_once = self.ended[1].all("reads at once")
        story = f"{self.story}: {consent}, rotations {self.rotations}, lost {was_lost}, {last.said[:4]}"
        assert at_once == ["1 account"] or (self.ended[1].killed and not at_once), story
        if consent["state"] == "active":
            assert not was_lost, story
            assert last.last("reads") == "1 account", story
        else:
            assert was_lost or was_left, story
            assert consent["state"] == "needs-reauthorisation", story
            assert last.last("reads") == "CONSENT_NEEDS_REAUTHORISATION", story

    def _judge_revocation(self) -> None:
        """Revoked in the end, the key destroyed, the provider told; nothing of the consent can be used."""
        last = self.ended[-1]
        (consent,) = last.last("consents")
        events = [event for event, _ in last.last("events")]
        story = f"{self.story}: {consent}, {events}, {self.bank.consents}"
        assert consent == {"state": "revoked", "has_key": False, "secrets": []}, story
        assert last.last("reads") == "CONSENT_REVOKED", story
        assert events.index("CONSENT_REVOKED") < events.index("CONSENT_KEY_DESTROYED"), story
        assert events.count("CONSENT_REVOKED") == events.count("CONSENT_KEY_DESTROYED") == 1, story
        assert self.bank.consents["bank-consent-0"] == "terminatedByTpp", story
        assert self.bank.count("revoke") >= 1, story


@dataclass(slots=True, kw_only=True)
class Harness:
    folder: Path
    processes: CoreProcesses
    bank: BankSocket
    _prepared: dict[str, Prepared] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @classmethod
    @contextlib.contextmanager
    def started(cls, folder: Path) -> Iterator[Self]:
        folder.chmod(0o700)
        bank = BankSocket(folder / "bank.sock")
        try:
            with CoreProcesses() as processes:
                yield cls(folder=folder, processes=processes, bank=bank)
        finally:
            bank.close()

    def prepared(self, name: str) -> Prepared:
        if name not in self._prepared:
            self._prepared[name] = self._prepare(name)
        return self._prepared[name]

    def _prepare(self, name: str) -> Prepared:
        scenario = SCENARIOS[name]
        place = self._place(
            Prepared(name=name, scenario=scenario, database=new_database(self.folder), given={}), "set-up"
        )
        ended = self.processes.run(place.command("set_up", after_seconds=0.0))
        given = dict(ended.last("given"))
        if scenario.work == "completion":
            given["state"] = _state_of(place.bank)
        return replace(place.prepared, database=place.database, given=given)

    def place(self, name: str, story: str) -> Place:
        """A run of its own: the database as it was after the set-up, new books at the bank."""
        place = self._place(self.prepared(name), story)
        for kind, twists in place.prepared.scenario.twists.items():
            place.bank.script[kind] = [TWISTS[twist] for twist in twists]
        return place

    def _place(self, prepared: Prepared, story: str) -> Place:
        directory = self.folder / f"run-{next(self._numbers)}"
        directory.mkdir(mode=0o700)
        database = directory / "store.db"
        shutil.copy(prepared.database, database)
        bank = bank_of(prepared.scenario)
        self.bank.serve(bank, database)
        return Place(
            prepared=prepared,
            harness=self,
            database=database,
            bank=bank,
            story=f"{prepared.name}, {story}",
        )

    def done(self, place: Place) -> None:
        """A run that went well leaves nothing; one that did not keeps its database until the module's end."""
        shutil.rmtree(place.database.parent)


def _split(events: Sequence[str], start: str) -> list[list[str]]:
    """The events from each `start` to the next one; those before the first are a part of their own."""
    parts: list[list[str]] = [[]]
    for event in events:
        if event == start:
            parts.append([])
        parts[-1].append(event)
    return parts


def _threads(said_file: Path) -> dict[str, int]:
    """The threads of a child that is held before its act."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        for words in said(said_file):
            if "threads" in words:
                return dict(words["threads"])
        time.sleep(0.001)
    raise AssertionError("the process did not come to its act")


def _state_of(bank: ScriptedBank) -> str:
    (pushed,) = [request for request in bank.requests if bank.kind(request) == "par"]
    return parse_qs(pushed.body.decode())["state"][0]
