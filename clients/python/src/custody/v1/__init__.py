"""Stubs of the contract, generated from protos/custody/v1."""
