"""The development HSM: SoftHSM found or unpacked, and tokens made in it. Nothing here needs root.

`softhsm.setup` is the whole interface; `softhsm.module` finds the PKCS#11 module, `softhsm.token` makes tokens.
"""
