"""Everything the development HSM can refuse. Each message says what happened and what to type."""


class SoftHsmError(Exception):
    """The development HSM cannot be set up."""


class ModuleMissingError(SoftHsmError):
    """There is no PKCS#11 module to load."""


class TokenRefusedError(SoftHsmError):
    """A token cannot be made, or opened, in this directory."""
