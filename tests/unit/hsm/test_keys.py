"""Which keys are good enough, as a table."""

from collections.abc import Mapping

import pytest

from sidecar.domain.provider import KeyPurpose
from sidecar.hsm.errors import StartRefused
from sidecar.hsm.keys import ROOT_MUST_BE, SIGNING_MUST_BE, check_attributes, check_references
from sidecar.ipc.messages import ChildExit, HsmSettings, KeyReference

ROOT = KeyReference(purpose=KeyPurpose.ROOT, label="root/2026-11", id_hex="00" * 16)
AUDIT = KeyReference(purpose=KeyPurpose.AUDIT, label="audit/2026-11", id_hex="01" * 16)


def settings(*keys: KeyReference) -> HsmSettings:
    return HsmSettings(cluster="c", module_path="m", token_label="l", token_serial="s", pin_file="p", keys=keys)


@pytest.mark.parametrize("must_be", [ROOT_MUST_BE, SIGNING_MUST_BE])
def test_a_key_with_every_attribute_as_it_must_be_is_taken(must_be: Mapping[str, bool]) -> None:
    """The tables can be met."""
    check_attributes(ROOT, must_be, dict(must_be))


@pytest.mark.parametrize(
    ("reference", "must_be", "name"),
    [(ROOT, ROOT_MUST_BE, name) for name in ROOT_MUST_BE]
    + [(AUDIT, SIGNING_MUST_BE, name) for name in SIGNING_MUST_BE],
)
def test_each_attribute_alone_is_enough_to_refuse_and_is_named(
    reference: KeyReference, must_be: Mapping[str, bool], name: str
) -> None:
    """One attribute that is not as it must be: refused, and the message names key and attribute."""
    found = {**must_be, name: not must_be[name]}

    with pytest.raises(StartRefused) as caught:
        check_attributes(reference, must_be, found)

    assert caught.value.code is ChildExit.KEY_REFUSED
    assert f"'{reference.label}'" in caught.value.message
    assert f"CKA_{name} is {str(found[name]).lower()} and must be" in caught.value.message


@pytest.mark.parametrize("name", ROOT_MUST_BE)
def test_an_attribute_that_cannot_be_read_is_not_taken_on_trust(name: str) -> None:
    """Only CKA_COPYABLE may be unknown to a module: PKCS#11 before 2.40 does not have it."""
    found = {key: value for key, value in ROOT_MUST_BE.items() if key != name}

    if name == "COPYABLE":
        check_attributes(ROOT, ROOT_MUST_BE, found)
    else:
        with pytest.raises(StartRefused, match=f"CKA_{name} cannot be read"):
            check_attributes(ROOT, ROOT_MUST_BE, found)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ((), "name no root key"),
        ((AUDIT,), "name no root key"),
        ((ROOT, KeyReference(purpose=KeyPurpose.ROOT, label="r", id_hex="02" * 16)), "two keys for one purpose"),
        ((ROOT, KeyReference(purpose=KeyPurpose.AUDIT, label="a", id_hex=ROOT.id_hex)), "one key id twice"),
        ((KeyReference(purpose=KeyPurpose.ROOT, label="r", id_hex="0011"),), "not hexadecimal, or of another length"),
        ((KeyReference(purpose=KeyPurpose.ROOT, label="r", id_hex="zz" * 16),), "not hexadecimal"),
        ((ROOT, KeyReference(purpose=KeyPurpose.AUDIT, label="a", id_hex="")), "not hexadecimal"),
    ],
)
def test_references_that_are_not_one_to_one_are_refused(keys: tuple[KeyReference, ...], message: str) -> None:
    """The settings name exactly one root key, one key per purpose and one purpose per key."""
    with pytest.raises(StartRefused, match=message) as caught:
        check_references(settings(*keys))

    assert caught.value.code is ChildExit.SETTINGS_REFUSED


def test_good_references_are_taken() -> None:
    """A root key and one key of each other purpose."""
    check_references(settings(ROOT, AUDIT))
