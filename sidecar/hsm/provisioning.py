"""Makes the sidecar's keys in a token, where they stay.

    python -m sidecar.hsm.provisioning --module M --token-label L --token-serial S --pin-file F --output keys.json

Rules:
- A process of its own: PKCS#11 is never loaded into a process that goes on to do something else.
- Keys are born in the HSM, cannot leave it, cannot be changed or copied, and each can do one thing.
- Where a key with one of the labels exists already, nothing is made. What could not be finished is removed again.
- Everything is read back and tried, by the same code that checks it at every start of the sidecar.
- The output holds labels, ids and public keys, nothing secret, and never replaces a file.

Exit codes: 0, and those of `ChildExit`.
"""

import contextlib
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgspec

from sidecar.domain.provider import KeyPurpose
from sidecar.hardening import harden
from sidecar.hsm.errors import HsmFault, StartRefused
from sidecar.hsm.module import P256_PARAMETERS, Token, faults
from sidecar.ipc.messages import ChildExit, HsmSettings, KeyDescription, KeyFile, KeyReference

__all__ = ["KeyFile", "generate_keys", "main"]

_ID_BYTES: Final = 16


def generate_keys(token: Token, *, suffix: str) -> tuple[KeyDescription, ...]:
    """Makes one key of each purpose, labelled `<purpose>/<suffix>`, in a token that was logged in writable.

    Raises StartRefused(KEY_REFUSED) where a label is taken or a key is not what was asked for; then none of them is left.
    """
    references = [_new_reference(token, purpose, suffix) for purpose in KeyPurpose]
    for reference in references:
        _refuse_taken_label(token, reference)
    with _all_or_none() as made:
        for reference in references:
            make = _make_root if reference.purpose is KeyPurpose.ROOT else _make_signing
            made.extend(make(token, reference))
        return tuple(_proven(token, reference) for reference in references)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code."""
    options = _parser().parse_args(arguments)
    try:
        harden()
        file = _provision(options)
    except StartRefused as refused:
        sys.stderr.write(f"No key was made: {refused.message}.\n")
        return refused.code
    except HsmFault as fault:
        sys.stderr.write(f"No key was made: the HSM failed ({fault.cause}).\n")
        return ChildExit.SICK
    for key in file.descriptions:
        sys.stdout.write(
            f"made {key.label} ({key.key_type}, {key.size_bits} bits, id {key.id_hex}); it cannot leave the HSM\n"
        )
    sys.stdout.write(f"wrote {options.output}: labels, ids and public keys, nothing secret\n")
    return 0


def _provision(options: Namespace) -> KeyFile:
    with _new_file(options.output) as output:
        settings = HsmSettings(
            cluster="",
            module_path=str(options.module),
            token_label=options.token_label,
            token_serial=options.token_serial,
            pin_file=str(options.pin_file),
            keys=(),
        )
        token = Token.log_in(settings, writable=True)
        try:
            descriptions = generate_keys(token, suffix=options.suffix)
        finally:
            token.close()
        file = KeyFile(
            token_label=token.facts.token_label,
            token_serial=token.facts.token_serial,
            keys=tuple(KeyReference(purpose=key.purpose, label=key.label, id_hex=key.id_hex) for key in descriptions),
            descriptions=descriptions,
        )
        output.append(msgspec.json.format(msgspec.json.encode(file), indent=2) + b"\n")
    return file


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[list[bytes]]:
    """Taken before the first key is made, so that no key is made whose id cannot be written down."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise StartRefused(ChildExit.SETTINGS_REFUSED, "the output file exists or cannot be made") from error
    content: list[bytes] = []
    try:
        yield content
    except BaseException:
        os.close(descriptor)
        path.unlink()
        raise
    with os.fdopen(descriptor, "wb") as file:
        file.writelines(content)
        file.flush()
        os.fsync(file.fileno())


def _new_reference(token: Token, purpose: KeyPurpose, suffix: str) -> KeyReference:
    key_id = bytearray(_ID_BYTES)
    token.random_into(key_id)
    return KeyReference(purpose=purpose, label=f"{purpose}/{suffix}", id_hex=key_id.hex())


def _refuse_taken_label(token: Token, reference: KeyReference) -> None:
    import pkcs11

    with faults():
        taken = list(token.session.get_objects({pkcs11.Attribute.LABEL: reference.label}))
    if taken:
        raise StartRefused(
            ChildExit.KEY_REFUSED,
            f"the token has an object labelled '{reference.label}' already; give another --suffix",
        )


@contextlib.contextmanager
def _all_or_none() -> Iterator[list[Any]]:
    """Objects put on the list are destroyed when the block fails: they are seconds old and nothing was wrapped with them."""
    import pkcs11

    made: list[Any] = []
    try:
        yield made
    except BaseException:
        for key in made:
            with contextlib.suppress(pkcs11.PKCS11Error):
                key.destroy()
        raise


def _make_root(token: Token, reference: KeyReference) -> list[Any]:
    import pkcs11

    with faults():
        key = token.session.generate_key(
            pkcs11.KeyType.AES,
            256,
            id=bytes.fromhex(reference.id_hex),
            label=reference.label,
            store=True,
            capabilities=pkcs11.MechanismFlag.ENCRYPT | pkcs11.MechanismFlag.DECRYPT,
            template={**_immovable(), pkcs11.Attribute.SENSITIVE: True, pkcs11.Attribute.EXTRACTABLE: False},
        )
    return [key]


def _make_signing(token: Token, reference: KeyReference) -> list[Any]:
    import pkcs11

    attribute = pkcs11.Attribute
    with faults():
        curve = token.session.create_domain_parameters(
            pkcs11.KeyType.EC, {attribute.EC_PARAMS: P256_PARAMETERS}, local=True
        )
        pair = curve.generate_keypair(
            id=bytes.fromhex(reference.id_hex),
            label=reference.label,
            store=True,
            capabilities=pkcs11.MechanismFlag.SIGN | pkcs11.MechanismFlag.VERIFY,
            public_template={**_immovable(), attribute.PRIVATE: False},
            private_template={**_immovable(), attribute.SENSITIVE: True, attribute.EXTRACTABLE: False},
        )
    return list(pair)


def _immovable() -> dict[Any, bool]:
    import pkcs11

    attribute = pkcs11.Attribute
    return {attribute.PRIVATE: True, attribute.MODIFIABLE: False, attribute.COPYABLE: False}


def _proven(token: Token, reference: KeyReference) -> KeyDescription:
    if reference.purpose is KeyPurpose.ROOT:
        return token.root_key(reference).describe()
    return token.signing_key(reference).describe()


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m sidecar.hsm.provisioning",
        description="Make the sidecar's keys in a PKCS#11 token. They never leave it.",
    )
    parser.add_argument("--module", type=Path, required=True, help="the PKCS#11 module, a shared library")
    parser.add_argument("--token-label", required=True)
    parser.add_argument("--token-serial", required=True)
    parser.add_argument("--pin-file", type=Path, required=True, help="holds the user PIN; only its owner may read it")
    parser.add_argument("--output", type=Path, required=True, help="keys.json; must not exist")
    parser.add_argument(
        "--suffix", default=f"{datetime.now(UTC):%Y-%m}", help="second part of the labels (default: %(default)s)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
