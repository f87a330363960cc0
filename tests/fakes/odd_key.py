"""Makes keys with odd attributes in a SoftHSM token, for tests of what the sidecar refuses.

`python -m tests.fakes.odd_key`; one JSON object on standard input: module, serial, pin_file, keys. Each key: kind (`secret` or
`pair`), label, id_hex, bits (of a secret key), attributes (name to value, on top of what a good key has). In a process of its
own, because a PKCS#11 module stays in the process that loads it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pkcs11
from pkcs11 import Attribute, KeyType, MechanismFlag

_P256 = bytes.fromhex("06082a8648ce3d030107")


def main() -> None:
    order = json.load(sys.stdin)
    library = pkcs11.lib(order["module"])
    token = next(token for token in library.get_tokens() if token.serial == order["serial"].encode())
    with token.open(rw=True, user_pin=Path(order["pin_file"]).read_text()) as session:
        for key in order["keys"]:
            make(session, key)


def make(session: Any, key: dict[str, Any]) -> None:
    common: dict[str, Any] = {"id": bytes.fromhex(key["id_hex"]), "label": key["label"], "store": True}
    good = {
        Attribute.SENSITIVE: True,
        Attribute.EXTRACTABLE: False,
        Attribute.MODIFIABLE: False,
        Attribute.COPYABLE: False,
    }
    odd = {Attribute[name]: value for name, value in key["attributes"].items()}
    if key["kind"] == "secret":
        uses = MechanismFlag.ENCRYPT | MechanismFlag.DECRYPT
        session.generate_key(KeyType.AES, key["bits"], capabilities=uses, template={**good, **odd}, **common)
        return
    curve = session.create_domain_parameters(KeyType.EC, {Attribute.EC_PARAMS: _P256}, local=True)
    uses = MechanismFlag.SIGN | MechanismFlag.VERIFY
    curve.generate_keypair(capabilities=uses, private_template={**good, **odd}, **common)


if __name__ == "__main__":
    main()
