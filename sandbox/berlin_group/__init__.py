"""Berlin Group NextGenPSD2 1.3.11: consents, accounts, payments, over HTTP.

Rules this package keeps:
- Each answer fits the official OpenAPI description; each error names a code of its list in `tppMessages`.
- In this order: request id, TLS certificate, signature, role, token, consent, the request itself.
- What another client or person has looks like what does not exist.
"""
