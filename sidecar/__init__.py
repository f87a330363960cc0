"""The token custody sidecar. Start with `docs/architecture.md`; the contract is `protos/custody/v1`."""

__version__ = "0.1.0"
