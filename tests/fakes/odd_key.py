"""Makes a key with odd attributes in a SoftHSM token, for tests of what the sidecar refuses.

`python -m tests.fakes.odd_key`; one JSON object on standard input: module, serial, pin_file, kind (`secret` or `pair`), label,
id_hex, bits (of a secret key), attributes (name to value, on top of what a good key has). In a process of its own, because a
PKCS#11 module stays in the process that loads it.
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
        common: dict[str, Any] = {"id": bytes.fromhex(order["id_hex"]), "label": order["label"], "store": True}
        odd = {Attribute[name]: value for name, value in order["attributes"].items()}
        hidden = {Attribute.SENSITIVE: True, Attribute.EXTRACTABLE: False}
        fixed = {Attribute.MODIFIABLE: False, Attribute.COPYABLE: False}
        if order["kind"] == "secret":
            session.generate_key(
                KeyType.AES,
                order["bits"],
                capabilities=MechanismFlag.ENCRYPT | MechanismFlag.DECRYPT,
                template={**hidden, **fixed, **odd},
                **common,
            )
        else:
            curve = session.create_domain_parameters(KeyType.EC, {Attribute.EC_PARAMS: _P256}, local=True)
            curve.generate_keypair(
                capabilities=MechanismFlag.SIGN | MechanismFlag.VERIFY,
                public_template=fixed,
                private_template={**hidden, **fixed, **odd},
                **common,
            )


if __name__ == "__main__":
    main()
