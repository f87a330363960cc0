"""A bank to try against: OAuth 2, a consent page, Berlin Group NextGenPSD2 1.3.11, a ledger, and faults on demand.

Rules this package keeps:
- It judges the sidecar, so it shares no code with it: nothing here imports `sidecar`.
- The ledger holds what the bank executed and nothing else; a fault may spoil an answer, never the ledger.
- Whatever the official description or the RFCs do not allow is refused, with the code that they name.
- Tokens live in memory as hashes only; no page, log or control address shows one.
"""
