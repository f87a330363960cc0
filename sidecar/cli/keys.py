"""custodyctl key: looks only. Keys are made by the provisioning, and never leave the HSM."""

from typing import TYPE_CHECKING
from urllib.parse import quote

import click

from sidecar.cli.documents import document, key_document
from sidecar.cli.failures import Failure
from sidecar.cli.output import Table
from sidecar.cli.plumbing import Command, CommandGroup, Entry
from sidecar.cli.session import Session, pass_session

if TYPE_CHECKING:
    from custody.values import HsmToken, Key

__all__ = ["key", "list_keys", "show_key"]

key = CommandGroup(
    "key",
    help="The keys that the sidecar uses. No secret key can be read.",
    entries={
        "list": Entry("sidecar.cli.keys:list_keys", "List them."),
        "show": Entry("sidecar.cli.keys:show_key", "Show one, with its attributes and its public half."),
    },
)


@click.command("list", cls=Command)
@pass_session
def list_keys(session: Session) -> None:
    """List the keys that the sidecar uses."""
    with session.client() as client:
        keys = client.keys.list()
    session.show(
        document("keys", keys=[key_document(each) for each in keys]),
        Table(
            columns=("name", "label", "purpose", "algorithm", "state", "version"),
            rows=[
                (each.name, each.label, each.purpose, each.algorithm, each.state, str(each.version or "-"))
                for each in keys
            ],
        ),
    )


@click.command("show", cls=Command)
@click.argument("wanted", metavar="KEY")
@click.option("--pem", is_flag=True, help="Print the public key alone, as a PEM file.")
@pass_session
def show_key(session: Session, wanted: str, pem: bool) -> None:  # noqa: FBT001 (click passes options so)
    """Show one key: KEY is its name, its id, or its label if only one key has it."""
    with session.client() as client:
        found = _the_one(client.keys.list(), wanted)
        if pem:
            session.output.raw(_public_pem(found))
            return
        uri = pkcs11_uri(found, client.keys.status().hsm_token)
    rows = [
        ("name", found.name),
        ("label", found.label),
        ("purpose", found.purpose),
        ("algorithm", found.algorithm),
        ("state", found.state),
        ("version", str(found.version or "-")),
        ("URI", uri or "- (not an object of the HSM: stored encrypted under the root key)"),
    ]
    tables = [Table(rows=rows)]
    if found.attributes:
        attributes = [(name, "true" if value else "false") for name, value in sorted(found.attributes.items())]
        tables.append(Table(title="Attributes, as the HSM says", rows=attributes))
    if found.public_key_pem:
        tables.append(Table(title="Public key", rows=[(line,) for line in found.public_key_pem.splitlines()]))
    session.show(document("key", **key_document(found), uri=uri), *tables)


def pkcs11_uri(key: "Key", token: "HsmToken | None") -> str | None:
    """The key's address for other PKCS#11 tools (RFC 7512). None for what is no object of the token."""
    if token is None or key.purpose == "MASTER":
        return None
    key_id = "".join(f"%{octet:02X}" for octet in bytes.fromhex(key.name.partition("/")[2]))
    kind = "secret-key" if key.purpose == "ROOT" else "private"
    parts = {"token": quote(token.label, safe=""), "serial": quote(token.serial, safe="")}
    parts |= {"object": quote(key.label, safe=""), "id": key_id, "type": kind}
    return "pkcs11:" + ";".join(f"{name}={value}" for name, value in parts.items())


def _public_pem(key: "Key") -> str:
    if not key.public_key_pem:
        raise Failure(f"{key.name} is a secret key and has no public half")
    return key.public_key_pem.rstrip("\n") + "\n"


def _the_one(keys: "tuple[Key, ...]", wanted: str) -> "Key":
    name = wanted if "/" in wanted else f"keys/{wanted}"
    matching = [each for each in keys if each.name == name] or [each for each in keys if each.label == wanted]
    if len(matching) != 1:
        number = "no key" if not matching else "more than one key"
        raise Failure(f"{number} has this name, id or label", advice="custodyctl key list shows them all")
    return matching[0]
