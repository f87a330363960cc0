"""Process 3: the only place that talks to the HSM. It holds the PIN for a moment, the one login, and the unwrapped master keys.

`module` is the only import of pkcs11; `vault` keeps master keys and makes data keys; `server` answers two sockets;
`provisioning` makes the keys, in a process of its own.
"""
