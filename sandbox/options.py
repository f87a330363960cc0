"""How a bank behaves: the options of `serve`, as a value."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How the bank behaves."""

    port: int = 0  # API listener; 0 lets the system choose
    browser_port: int = 0
    control_port: int = 0
    idempotency: str = "none"  # header | none
    idempotency_window_seconds: float = 86400.0
    payment_lookup: bool = False  # whether payments can be listed by the reference that the caller gave them
    signature: str = "required"  # required | writes | optional
    access_token_seconds: int = 600
    token_prefix: str = ""  # begins every token, so that a search can find what must be nowhere
    frequency_per_day: int | None = None  # agreed number; None lets each consent's own number count
    delay_seconds: float = 0.0  # latency of every answer below /v1
    duration_seconds: float | None = None
    state: Path | None = None  # file in which the bank's memory outlives the process; None keeps it in memory only
