"""Fakes of the ports, each of which passes the contract suite of its port, and small programs and tokens for tests."""
