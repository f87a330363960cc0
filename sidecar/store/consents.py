"""Consents, their sealed secrets and the leases of those who refresh them."""

from collections.abc import Sequence
from datetime import datetime, timedelta

from sqlalchemy import delete, exists, func, insert, select, update

from sidecar.domain.consent import TRANSITIONS, Consent, ConsentState, Purpose
from sidecar.domain.ids import ConsentId, ProviderId
from sidecar.errors import Internal, StaleVersion
from sidecar.ports import ConsentFilter, ConsentSecrets, RefreshLease, SecretsChange
from sidecar.store.rows import consent_of, consent_row, corrupt, lease_of, secret_of, to_microseconds
from sidecar.store.schema import CONSENTS, REFRESH_LEASES, SECRETS
from sidecar.store.statements import Connection, Listing, SqlDialect, Statement, Value, named

__all__ = ["ConsentTables"]

_IDENTITY = (
    "id",
    "caller",
    "owner",
    "provider",
    "create_time",
)  # whose consent it is: part of every change's condition
_HOLDS_KEY = "length(wrapped_data_key) > 0"  # the words of the index consents_holding_key
_HOLDS_NO_KEY = "length(wrapped_data_key) = 0"
_CAN_EXPIRE = sorted(state.value for state, following in TRANSITIONS.items() if ConsentState.EXPIRED in following)


class ConsentTables:
    def __init__(self, dialect: SqlDialect) -> None:
        table, secrets, leases = CONSENTS, SECRETS, REFRESH_LEASES
        changing = [column.name for column in table.columns if column.name not in _IDENTITY]
        of_consent = secrets.c.consent == named("consent")
        self._list = Listing(dialect, tuple(table.columns))
        self._insert = Statement(insert(table), dialect)
        self._update = Statement(
            update(table)
            .where(
                table.c.version == named("at_version"), *(table.c[name] == named(f"at_{name}") for name in _IDENTITY)
            )
            .values({name: named(name) for name in changing}),
            dialect,
        )
        self._get = Statement(select(table).where(table.c.id == named("id")), dialect)
        self._get_for_payment = Statement(
            # Locked against changes until the dispatch is committed: a revocation is answered before or after it, never meanwhile.
            select(table).where(table.c.id == named("id")).with_for_update(read=True),
            dialect,
        )
        self._expired = Statement(
            select(table)
            .where(table.c.state.in_(_CAN_EXPIRE), table.c.expire_time <= named("now"))
            .limit(named("limit")),
            dialect,
        )
        self._counts = Statement(select(table.c.state, func.count()).group_by(table.c.state), dialect)
        self._expiring = Statement(
            select(table.c.provider, func.count())
            .where(table.c.state == ConsentState.ACTIVE.value, table.c.access_expire_time < named("before"))
            .group_by(table.c.provider),
            dialect,
        )
        self._put_secret = Statement(insert(secrets), dialect)
        self._delete_secret = Statement(
            delete(secrets).where(
                of_consent, secrets.c.kind == named("kind"), secrets.c.row_version == named("row_version")
            ),
            dialect,
        )
        self._delete_secrets = Statement(delete(secrets).where(of_consent), dialect)
        self._secrets = Statement(
            select(secrets.c.kind, secrets.c.row_version, secrets.c.sealed)
            .where(of_consent)
            .order_by(secrets.c.kind, secrets.c.row_version.desc()),
            dialect,
        )
        self._add_lease = Statement(dialect.insert_unless_there(leases), dialect)
        self._take_lease = Statement(
            update(leases)
            .where(
                leases.c.consent == named("at_consent"),
                leases.c.epoch == named("at_epoch"),
                leases.c.expire_time <= named("now"),
            )
            .values(
                {
                    "holder": named("holder"),
                    "expire_time": named("expire_time"),
                    "epoch": leases.c.epoch + 1,
                    "unresolved_since": func.coalesce(leases.c.unresolved_since, named("now")),
                }
            ),
            dialect,
        )
        self._lease = Statement(
            select(leases.c.epoch, leases.c.expire_time, leases.c.unresolved_since).where(
                leases.c.consent == named("consent")
            ),
            dialect,
        )
        self._release_lease = Statement(
            update(leases)
            .where(leases.c.consent == named("at_consent"), leases.c.epoch == named("at_epoch"))
            .values({"expire_time": named("expire_time"), "unresolved_since": named("unresolved_since")}),
            dialect,
        )
        refreshed = (table.c.provider == named("provider"), table.c.state == ConsentState.ACTIVE.value)
        self._unresolved = Statement(
            select(leases.c.consent)
            .where(
                leases.c.unresolved_since.is_not(None),
                leases.c.expire_time <= named("now"),
                exists().where(table.c.id == leases.c.consent, *refreshed),
            )
            .order_by(leases.c.expire_time, leases.c.consent)
            .limit(named("limit")),
            dialect,
        )
        self._due = Statement(
            select(table.c.id)
            .where(
                *refreshed,
                table.c.refresh_time <= named("now"),
                ~exists().where(leases.c.consent == table.c.id, leases.c.expire_time > named("now")),
            )
            .order_by(table.c.refresh_time)
            .limit(named("limit")),
            dialect,
        )

    def insert(self, connection: Connection, consent: Consent) -> None:
        connection.change(self._insert, consent_row(consent))

    def change(self, connection: Connection, consent: Consent) -> None:
        """Raises StaleVersion where the row is not one version older, or is of another owner, caller or provider."""
        row = consent_row(consent)
        condition: dict[str, Value] = {f"at_{name}": row[name] for name in _IDENTITY}
        if connection.change(self._update, {**row, **condition, "at_version": consent.version - 1}) != 1:
            raise StaleVersion

    def change_secrets(self, connection: Connection, consent: ConsentId, change: SecretsChange) -> None:
        """Deletes first, so that a version can be replaced by another text of itself."""
        if change.delete_all:
            connection.change(self._delete_secrets, {"consent": consent})
        for kind, row_version in change.delete:
            connection.change(self._delete_secret, {"consent": consent, "kind": kind, "row_version": row_version})
        for secret in change.put:
            values: dict[str, Value] = {
                "consent": consent,
                "kind": secret.kind,
                "row_version": secret.row_version,
                "sealed": secret.sealed,
            }
            connection.change(self._put_secret, values)

    def get(self, connection: Connection, consent: ConsentId) -> Consent | None:
        rows = connection.rows(self._get, {"id": consent})
        return consent_of(rows[0]) if rows else None

    def check_pays(self, connection: Connection, consent: ConsentId, now: datetime) -> None:
        """Raises PreconditionFailed, with the consent's own reason, unless a payment may be sent under it at `now`."""
        rows = connection.rows(self._get_for_payment, {"id": consent})
        if not rows:
            raise Internal("a payment without its consent")
        found = consent_of(rows[0])
        found.check_usable(Purpose.PAYMENTS, now)
        if not found.wrapped_data_key:
            raise found.not_active()

    def list(self, connection: Connection, where: ConsentFilter, *, after: str, limit: int) -> Sequence[Consent]:
        equal = {"caller": where.caller, "owner": where.owner, "provider": where.provider}
        extra = () if where.holds_key is None else (_HOLDS_KEY if where.holds_key else _HOLDS_NO_KEY,)
        rows = self._list.rows(connection, equal, where.states, extra=extra, after=after, limit=limit)
        return [consent_of(row) for row in rows]

    def expired(self, connection: Connection, now: datetime, *, limit: int) -> Sequence[Consent]:
        return [
            consent_of(row) for row in connection.rows(self._expired, {"now": to_microseconds(now), "limit": limit})
        ]

    def secrets(self, connection: Connection, consent: ConsentId) -> ConsentSecrets:
        rows = connection.rows(self._secrets, {"consent": consent})
        return ConsentSecrets(secrets=tuple(secret_of(row) for row in rows))

    def lease(self, connection: Connection, consent: ConsentId) -> RefreshLease | None:
        rows = connection.rows(self._lease, {"consent": consent})
        return lease_of(rows[0]) if rows else None

    def take_lease(
        self,
        connection: Connection,
        consent: ConsentId,
        *,
        holder: str,
        now: datetime,
        seconds: float,
        after_epoch: int,
    ) -> int | None:
        """The new epoch, or None while the lease is held (by whomever: two tasks of one holder are two refreshers) and where its
        epoch is not `after_epoch`: somebody had it since the taker looked."""
        values: dict[str, Value] = {
            "holder": holder,
            "expire_time": to_microseconds(now + timedelta(seconds=seconds)),
        }
        if after_epoch == 0:
            first = {**values, "consent": consent, "epoch": 1, "unresolved_since": to_microseconds(now)}
            return 1 if connection.change(self._add_lease, first) == 1 else None
        again = {**values, "at_consent": consent, "at_epoch": after_epoch, "now": to_microseconds(now)}
        return after_epoch + 1 if connection.change(self._take_lease, again) == 1 else None

    def release_lease(
        self,
        connection: Connection,
        consent: ConsentId,
        *,
        epoch: int,
        unresolved_since: datetime | None,
        free_time: datetime | None,
    ) -> bool:
        """Whether the lease still had this epoch."""
        values: dict[str, Value] = {
            "at_consent": consent,
            "at_epoch": epoch,
            "expire_time": 0 if free_time is None else to_microseconds(free_time),
            "unresolved_since": None if unresolved_since is None else to_microseconds(unresolved_since),
        }
        return connection.change(self._release_lease, values) == 1

    def due_refreshes(
        self, connection: Connection, provider: ProviderId, now: datetime, *, limit: int
    ) -> Sequence[ConsentId]:
        values: dict[str, Value] = {"provider": provider, "now": to_microseconds(now), "limit": limit}
        rows = [*connection.rows(self._unresolved, values), *connection.rows(self._due, values)]
        return [ConsentId(identifier) for identifier in dict.fromkeys(row[0] for row in rows)][:limit]

    def counts(self, connection: Connection) -> dict[ConsentState, int]:
        try:
            return {ConsentState(state): count for state, count in connection.rows(self._counts, {})}
        except ValueError as error:
            raise corrupt() from error

    def expiring(self, connection: Connection, before: datetime) -> dict[ProviderId, int]:
        rows = connection.rows(self._expiring, {"before": to_microseconds(before)})
        return {ProviderId(provider): count for provider, count in rows}
