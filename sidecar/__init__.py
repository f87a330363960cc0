"""The token custody sidecar. Start with `docs/architecture.md`; the contract is `protos/custody/v1`."""
