"""Vaults for tests of what must work with every table: rows of all tables, made from the schema alone, and a vault in use."""

import asyncio
import re
import sqlite3
import tempfile
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

from sqlalchemy import LargeBinary, Text
from sqlalchemy.sql.schema import Column, Table, UniqueConstraint

from sidecar.domain.audit import AuditEvent
from sidecar.domain.consent import Consent
from sidecar.domain.payment import Payment, PaymentState
from sidecar.domain.secrets import SealedSecret, SecretKind
from sidecar.ports import Claim, MasterKeyRecord, SecretsChange, Store
from sidecar.store.schema import METADATA, RELOCATIONS
from tests.fakes.store import HandClock, SoftwareSigner
from tests.unit.store.support import (
    NOW,
    active_consent,
    claim_of,
    dispatch_draft,
    draft,
    intent_draft,
    new_claim,
    new_database,
    new_payment,
    opened,
)

ROWS = 7  # of each table
# Made by a store, because they must fit together.
_LOG_TABLES = ("instances", "log_heads", "log_leaves", "log_checkpoints")
# What the text of a table does not say: a rule over several rows.
_SPECIAL = {("master_keys", "current"): [0, 1, 0, 0, 0, 0, 0]}

# Their order differs between bytes, UTF-16 and locales, and each is somewhere a special character.
_KEYS = ("Z", "a", "~", "é", "\ue000", "\U0001d11e", "\\N")
_TEXTS = ("", "Élodie \U0001d11e", "a\tb\\nc\r\nd", "\\N", "'; DROP TABLE claims; --", "\x01\x7f", "x" * 20_000)
_NUMBERS = (0, -1, 2**63 - 1, -(2**63), 1, 1_790_000_000_000_000, 42)
_BYTES = (b"", b"\x00", bytes(range(256)), b"\\x00", b"\xff" * 20_000, b"\\N", b"text")


def full_vault(directory: Path) -> Path:
    """A file with varied rows in every table, whatever tables there are. No sidecar could work with most of them."""
    path = new_database(directory)
    path.write_bytes(_full())
    return path


@cache
def _full() -> bytes:
    """Made once a run."""
    with tempfile.TemporaryDirectory(prefix="vault-") as directory:
        return _make_full(Path(directory)).read_bytes()


def _make_full(directory: Path) -> Path:
    path = new_database(directory)

    async def run() -> None:
        async with opened(path) as store:
            for _ in range(ROWS):
                await store.record([draft()])
                await store.sign_pending()

    asyncio.run(run())
    with closing(sqlite3.connect(path, isolation_level=None)) as driver:
        driver.execute("PRAGMA foreign_keys = ON")
        texts = dict(driver.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table'").fetchall())
        for table in tables():
            if table.name not in _LOG_TABLES:
                _fill(driver, table, texts[table.name])
    return path


def tables() -> list[Table]:
    return [table for table in METADATA.sorted_tables if table is not RELOCATIONS]


def contents(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of the file, each table sorted, with columns by name."""
    with closing(sqlite3.connect(path)) as driver:
        return {table.name: sorted(driver.execute(select_all(table)), key=repr) for table in tables()}


def select_all(table: Table, *, schema: str = "") -> str:
    columns = ", ".join(f'"{column.name}"' for column in table.columns)
    return f"SELECT {columns} FROM {schema}{table.name}"


def _fill(driver: sqlite3.Connection, table: Table, text: str) -> None:
    marks = ", ".join("?" for _ in table.columns)
    columns = ", ".join(f'"{column.name}"' for column in table.columns)
    for number in range(ROWS):
        row = {column.name: _value(table, column, text, number) for column in table.columns}
        for constraint in table.foreign_key_constraints:
            names = [element.column.name for element in constraint.elements]
            parents = driver.execute(f"SELECT {', '.join(names)} FROM {constraint.referred_table.name}").fetchall()
            row.update(zip(constraint.column_keys, parents[number], strict=True))
        try:
            driver.execute(f"INSERT INTO {table.name} ({columns}) VALUES ({marks})", list(row.values()))
        except sqlite3.IntegrityError as error:
            raise AssertionError(f"teach tests/unit/store/vaults.py how rows of {table.name} look: {error}") from error


def _value(table: Table, column: Column[Any], text: str, number: int) -> Any:
    """By the rules that the table's text has for the column. Optional ones are there together or not at all."""
    if column.primary_key and column is not next(iter(table.primary_key)):
        number = ROWS - 1 - number  # what comes first in the order of one column comes last in that of the next
    if (table.name, column.name) in _SPECIAL:
        return _SPECIAL[table.name, column.name][number]
    if column.nullable and number % 2:
        return None
    if among := re.search(rf"\b{column.name} IN \(([^)]*)\)", text):
        listed = [each.strip() for each in among[1].split(",")]
        chosen = listed[number % len(listed)]
        return chosen.strip("'") if chosen.startswith("'") else int(chosen)
    if between := re.search(rf"\b{column.name} BETWEEN (\d+) AND (\d+)", text):
        low, high = int(between[1]), int(between[2])
        return low + number % (high - low + 1)
    is_ruled = bool(re.search(rf"CHECK \([^,]*\b{column.name}\b", text))
    is_distinct = column.primary_key or column.unique or column in _unique_columns(table)
    if isinstance(column.type, Text):
        if f"length({column.name}) = 3" in text:
            return ("EUR", "GBP", "SEK")[number % 3]
        return f"{_KEYS[number]}-{number}" if is_distinct or is_ruled else _TEXTS[number]
    if isinstance(column.type, LargeBinary):
        return bytes([number]) * (number + 1) if is_distinct or is_ruled else _BYTES[number]
    return number + 1 if is_distinct or is_ruled else _NUMBERS[number]


def _unique_columns(table: Table) -> set[Column[Any]]:
    return {column for each in table.constraints if isinstance(each, UniqueConstraint) for column in each.columns}


@dataclass(frozen=True, slots=True, kw_only=True)
class UsedVault:
    """A vault in use, and the values that were stored in it."""

    path: Path
    signer: SoftwareSigner
    clock: HandClock
    consents: tuple[Consent, ...]
    payments: tuple[Payment, ...]
    claims: tuple[Claim, ...]
    secrets: tuple[SealedSecret, ...]
    master_key: MasterKeyRecord


def used_vault(directory: Path) -> UsedVault:
    """As a sidecar would leave it: consents with tokens, a held lease, a payment on its way and one that is over."""
    path, signer, clock = new_database(directory), SoftwareSigner(), HandClock()
    consents = (active_consent(), active_consent(payment_limit=None))
    secrets = tuple(
        SealedSecret(kind=kind, row_version=1, sealed=bytes([kind]) * 40)
        for kind in (SecretKind.ACCESS_TOKEN, SecretKind.REFRESH_TOKEN)
    )
    intents = (new_payment(consents[0]), new_payment(consents[1]))
    dispatched = intents[0].to(PaymentState.DISPATCHED, now=NOW, attempts=1, dispatch_time=NOW)
    key = MasterKeyRecord(
        key_id=b"k" * 16, version=1, wrapped=b"wrapped", root_key_id="root", current=True, create_time=NOW
    )
    claims = (*(new_claim(consent.id) for consent in consents), *map(claim_of, intents))

    async def fill(store: Store) -> None:
        await store.add_master_key(key, draft())
        for consent, claim in zip(consents, claims[:2], strict=True):
            await store.claim_consent(consent, claim, draft(AuditEvent.CONSENT_CREATED))
        await store.change_consent(replace(consents[0], version=2), secrets=SecretsChange(put=secrets), audit=[draft()])
        await store.take_refresh_lease(
            consents[0].id, holder="pod", now=NOW, seconds=60.0, after_epoch=0, audit=draft()
        )
        for payment, claim in zip(intents, claims[2:], strict=True):
            await store.claim_payment(payment, claim, intent_draft(payment))
        await store.record_dispatch(dispatched, expected_epoch=1, audit=dispatch_draft(dispatched))

    async def run() -> None:
        async with opened(path, signer=signer, clock=clock) as store:
            await fill(store)

    asyncio.run(run())
    clock.advance(timedelta(minutes=1).total_seconds())
    return UsedVault(
        path=path,
        signer=signer,
        clock=clock,
        consents=(replace(consents[0], version=2), consents[1]),
        payments=(dispatched, intents[1]),
        claims=claims,
        secrets=secrets,
        master_key=key,
    )
