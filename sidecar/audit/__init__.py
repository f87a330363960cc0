"""The audit log: entries, tree, checkpoints, export, and a verifier that shares no code with them. See `docs/audit-log.md`.

Nothing is imported here: running the verifier must not load the code that it checks.
"""
