"""Process 2, the only place where a token is in the clear. Start with `service.py`; the rules are in docs/egress.md."""
