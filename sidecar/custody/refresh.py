"""Renewing tokens in the background, before anybody needs them.

Rules:
- Each consent has a time of its own (`domain/rotation.py`), so tokens of one moment do not come due together.
- At one provider no more than AT_ONCE are under way, and no more are begun in a round: that bounds the rate too, and a provider
  that hangs keeps only its own waiting.
- What is unresolved comes first: whoever crashed in the middle of a refresh is found out within a round of its lease's end.
- A round begins refreshes and does not wait for them.
"""

from collections.abc import Mapping

from sidecar.connectors.base import Connector
from sidecar.custody.owned_tasks import OwnedTasks
from sidecar.custody.tokens import Tokens
from sidecar.domain.ids import ConsentId, ProviderId
from sidecar.errors import CustodyError, Internal
from sidecar.ports import Clock, Store

__all__ = ["AT_ONCE", "Refresher"]

AT_ONCE = 32


class Refresher:
    def __init__(
        self,
        *,
        store: Store,
        clock: Clock,
        connectors: Mapping[ProviderId, Connector],
        tokens: Tokens,
        tasks: OwnedTasks,
    ) -> None:
        self._store = store
        self._clock = clock
        self._connectors = connectors
        self._tokens = tokens
        self._tasks = tasks
        self._at_work: dict[ConsentId, ProviderId] = {}
        self._failed: Exception | None = None

    async def run_due(self) -> int:
        """Begins what is due and has a place; returns how many that were.

        Raises, after that, what a refresh of an earlier round failed with. What a provider answers is no failure.
        """
        begun = 0
        for provider in self._connectors:
            free = AT_ONCE - sum(other == provider for other in self._at_work.values())
            if free == 0:
                continue
            # Those that are being worked on may not have their lease yet, and are still listed.
            due = await self._store.due_refreshes(provider, self._clock.now(), limit=AT_ONCE + free)
            for consent in [identifier for identifier in due if identifier not in self._at_work][:free]:
                self._at_work[consent] = provider
                self._tasks.begin(self._renew(consent))
                begun += 1
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed if isinstance(failed, CustodyError) else Internal from failed
        return begun

    async def _renew(self, consent_id: ConsentId) -> None:
        try:
            consent = await self._store.consent(consent_id)
            if consent is not None:
                await self._tokens.renew(consent)
        except Exception as error:  # noqa: BLE001 - the next round says it
            self._failed = error
        finally:
            del self._at_work[consent_id]
