"""Servicers translate; they do not decide. One file per service of the contract."""
