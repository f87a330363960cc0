"""What the store refuses when it is opened. Never crosses the contract: the sidecar does not start."""

from pathlib import Path

from sidecar.errors import PreconditionFailed

__all__ = ["RESTORING", "StoreRefused"]

# A backup has lost the claims made since, so it is never advised without saying what that costs.
RESTORING = (
    "a backup lacks the newest claims of request ids, so once it is restored a repeat may pay again: "
    "reconcile all payments with the bank first (docs/store.md, Restoring)"
)


class StoreRefused(PreconditionFailed):
    """The database must not be used as it is. The message says why and what to do; `path` says where."""

    def __init__(self, message: str, *, path: Path | str = "") -> None:
        super().__init__("STORE_REFUSED", message, metadata={"path": str(path)} if str(path) else None)

    def __str__(self) -> str:
        path = self.metadata.get("path", "")
        return f"{path}: {self.message}" if path else self.message
