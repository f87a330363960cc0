"""Forward-only migrations; run by `python -m sidecar.store.migrate`."""
