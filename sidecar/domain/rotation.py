"""Refresh tokens: what a provider does with the old one, hence when to renew and what may be sent again after a lost answer.

Rules:
- A refresh token counts as handed over from the moment its lease is on record, not from when its first byte leaves.
- Handed over and answered: the old token is never sent again. Handed over and not answered: only what `may_send` allows.
- What cannot be told, such as a clock that stands before the handing over, counts as not allowed: a consent that asks its owner
  again costs less than one that the provider revokes as stolen, because there the living access token dies too.

| kind            | the old refresh token at the provider           | after a lost answer the same token may be sent again |
| --------------- | ----------------------------------------------- | ---------------------------------------------------- |
| strict          | dies at its use; used again, the family is gone | never                                                |
| grace           | lives on for so many seconds after its use      | while the repeat arrives within them                 |
| when-first-used | lives until the new pair is used                | always: nobody can use a pair that never arrived     |
| none            | is the only one, and stays                      | always                                               |
"""

import hashlib
import math
from collections.abc import Mapping
from datetime import datetime, timedelta
from enum import StrEnum

from sidecar.domain.ids import ConsentId

__all__ = ["CLOCK_ERROR_SECONDS", "RotationKind", "may_send", "refresh_time"]


class RotationKind(StrEnum):
    STRICT = "strict"
    GRACE = "grace"
    WHEN_FIRST_USED = "when-first-used"
    NONE = "none"


# Two sidecars read a grace period by two clocks. They are synchronised (docs/reliability.md); this is what may remain.
CLOCK_ERROR_SECONDS = 5.0

_REPEATABLE_SECONDS: Mapping[RotationKind, float | None] = {
    RotationKind.STRICT: 0.0,
    RotationKind.GRACE: None,  # what the descriptor says
    RotationKind.WHEN_FIRST_USED: math.inf,
    RotationKind.NONE: math.inf,
}

# Of the life of an access token. Never later than half, so that the old token outlives an accident by as long again.
_LATEST = 0.5
_SPREAD = 0.1


def may_send(
    kind: RotationKind,
    *,
    grace_seconds: float | None,
    unresolved_since: datetime | None,
    now: datetime,
    call_seconds: float,
) -> bool:
    """Whether a refresh token may be handed over now. `unresolved_since`: when this same token was first handed over without an
    answer that is known; None where that never happened. A call takes at most `call_seconds`."""
    if unresolved_since is None:
        return True
    repeatable = _REPEATABLE_SECONDS[kind]
    if repeatable is None:
        repeatable = grace_seconds or 0.0
    if repeatable in (0.0, math.inf):
        return repeatable > 0
    age_seconds = (now - unresolved_since).total_seconds()
    return -CLOCK_ERROR_SECONDS <= age_seconds <= repeatable - call_seconds - CLOCK_ERROR_SECONDS


def refresh_time(consent: ConsentId, *, issued: datetime, expires: datetime) -> datetime:
    """When the background renews an access token: between 40 and 50 per cent of its life, by a digest of the consent's id. So
    ten thousand tokens of one moment do not come due at once, and all sidecars have the same time for each."""
    digest = hashlib.sha256(consent.encode()).digest()
    spread = int.from_bytes(digest[:8], "big") / 2**64
    return issued + timedelta(seconds=(expires - issued).total_seconds() * (_LATEST - _SPREAD * spread))
