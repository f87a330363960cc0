"""The tree: known answers of Certificate Transparency, and properties of all small trees."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.audit.errors import LogCorrupt
from sidecar.audit.merkle import (
    EMPTY_ROOT,
    CompactRange,
    consistency_proof,
    inclusion_proof,
    leaf_hash,
    tree_root,
    verify_consistency,
    verify_inclusion,
)
from tests.unit.audit.log_builder import VECTORS

VECTOR: dict[str, Any] = json.loads((VECTORS / "rfc6962.json").read_text())
LEAVES = [leaf_hash(bytes.fromhex(leaf)) for leaf in VECTOR["leaves"]]
ROOTS = [bytes.fromhex(root) for root in VECTOR["roots"]]
MANY = [leaf_hash(index.to_bytes(2, "big")) for index in range(300)]


def grown(leaves: list[bytes]) -> CompactRange:
    tree = CompactRange()
    for leaf in leaves:
        tree = tree.append(leaf)
    return tree


def hashes(values: list[str]) -> tuple[bytes, ...]:
    return tuple(bytes.fromhex(value) for value in values)


@pytest.mark.parametrize("size", range(9))
def test_known_roots(size: int) -> None:
    """The roots of the reference leaves of Certificate Transparency, the empty tree among them, are met both ways."""
    assert tree_root(LEAVES[:size]) == ROOTS[size]
    assert grown(LEAVES[:size]).root() == ROOTS[size]


def test_empty_root_is_the_hash_of_nothing() -> None:
    """RFC 6962 §2.1: the empty tree has the SHA-256 of the empty string."""
    assert EMPTY_ROOT.hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.mark.parametrize("case", VECTOR["inclusion"], ids=lambda case: f"{case['index']} of {case['size']}")
def test_known_inclusion_proofs(case: dict[str, Any]) -> None:
    """The reference inclusion proofs are made and verified."""
    index, size, proof = case["index"], case["size"], hashes(case["proof"])

    assert inclusion_proof(LEAVES[:size], index) == proof
    assert verify_inclusion(leaf=LEAVES[index], index=index, size=size, proof=proof, root=ROOTS[size])


@pytest.mark.parametrize("case", VECTOR["consistency"], ids=lambda case: f"{case['old_size']} to {case['new_size']}")
def test_known_consistency_proofs(case: dict[str, Any]) -> None:
    """The reference consistency proofs are made and verified."""
    old, new, proof = case["old_size"], case["new_size"], hashes(case["proof"])

    assert consistency_proof(LEAVES[:new], old) == proof
    assert verify_consistency(old_size=old, new_size=new, old_root=ROOTS[old], new_root=ROOTS[new], proof=proof)


def test_every_small_tree_proves_every_leaf_and_every_prefix() -> None:
    """All proofs of all trees up to 33 leaves verify, and the grown tree agrees with the recursive definition."""
    tree = CompactRange()
    for size in range(34):
        leaves = MANY[:size]
        root = tree_root(leaves)
        assert tree.root() == root
        for index in range(size):
            proof = inclusion_proof(leaves, index)
            assert verify_inclusion(leaf=leaves[index], index=index, size=size, proof=proof, root=root)
        for old in range(size + 1):
            proof = consistency_proof(leaves, old)
            old_root = tree_root(leaves[:old])
            assert verify_consistency(old_size=old, new_size=size, old_root=old_root, new_root=root, proof=proof)
        tree = tree.append(MANY[size])


@given(size=st.integers(1, 300), data=st.data())
def test_an_inclusion_proof_proves_only_its_own_leaf_place_and_tree(size: int, data: st.DataObject) -> None:
    """A proof fails for another leaf, index, root, and with a hash changed, added or removed."""
    index = data.draw(st.integers(0, size - 1))
    proof, root, leaf = inclusion_proof(MANY[:size], index), tree_root(MANY[:size]), MANY[index]
    other_index = data.draw(st.integers(0, size).filter(lambda value: value != index))
    other = leaf_hash(b"another")
    right: dict[str, Any] = {"leaf": leaf, "index": index, "size": size, "proof": proof, "root": root}

    def holds(**changes: Any) -> bool:
        return verify_inclusion(**right | changes)

    assert holds()
    assert not holds(leaf=other)
    assert not holds(root=other)
    assert not holds(index=other_index)
    assert not holds(index=-1)
    assert not holds(size=size * 2)
    assert not holds(proof=(*proof, other))
    assert not holds(proof=(other, *proof))
    assert not holds(leaf=leaf[:31])
    if proof:
        assert not holds(proof=proof[:-1])
        assert not holds(proof=proof[1:])
        assert not holds(proof=damaged(proof, data))


@given(sizes=st.tuples(st.integers(1, 300), st.integers(1, 300)).map(sorted), data=st.data())
def test_a_consistency_proof_proves_only_its_own_trees(sizes: list[int], data: st.DataObject) -> None:
    """A proof fails for other roots or sizes, and with a hash changed, added or removed."""
    old, new = sizes
    proof, old_root, new_root = consistency_proof(MANY[:new], old), tree_root(MANY[:old]), tree_root(MANY[:new])
    other = leaf_hash(b"another")
    right: dict[str, Any] = {
        "old_size": old,
        "new_size": new,
        "old_root": old_root,
        "new_root": new_root,
        "proof": proof,
    }

    def holds(**changes: Any) -> bool:
        return verify_consistency(**right | changes)

    assert holds()
    assert not holds(old_root=other)
    assert not holds(new_root=other)
    assert not holds(old_size=new + 1)
    assert not holds(new_size=new * 2)
    assert not holds(old_size=0)
    assert not holds(proof=(*proof, other))
    assert not holds(proof=(other, *proof))
    if proof:
        assert not holds(old_root=new_root, new_root=old_root)
        assert not holds(proof=())
        assert not holds(proof=proof[:-1])
        assert not holds(proof=proof[1:])
        assert not holds(proof=damaged(proof, data))


def damaged(proof: tuple[bytes, ...], data: st.DataObject) -> tuple[bytes, ...]:
    """The proof with one bit flipped."""
    place, bit = data.draw(st.integers(0, len(proof) - 1)), data.draw(st.integers(0, 255))
    node = (int.from_bytes(proof[place], "big") ^ 1 << bit).to_bytes(32, "big")
    return (*proof[:place], node, *proof[place + 1 :])


def test_the_empty_tree_is_continued_by_every_tree_with_an_empty_proof_only() -> None:
    """From size 0 only the empty proof and the root of the empty tree are accepted."""
    right: dict[str, Any] = {"old_size": 0, "new_size": 3, "old_root": EMPTY_ROOT, "new_root": ROOTS[3], "proof": ()}

    assert verify_consistency(**right)
    assert not verify_consistency(**right | {"proof": (ROOTS[1],)})
    assert not verify_consistency(**right | {"old_root": ROOTS[1]})


def test_proofs_of_what_is_not_there_are_not_made() -> None:
    """An index or size outside of the tree is a mistake of the caller."""
    for index in (-1, 3):
        with pytest.raises(ValueError, match="no leaf"):
            inclusion_proof(MANY[:3], index)
    for size in (-1, 4):
        with pytest.raises(ValueError, match="smaller"):
            consistency_proof(MANY[:3], size)


@given(size=st.integers(0, 300), more=st.integers(0, 20))
def test_a_tree_restored_from_its_bytes_grows_on_alike(size: int, more: int) -> None:
    """`from_bytes` undoes `to_bytes`, and appending to either gives the same tree."""
    tree = grown(MANY[:size])
    restored = CompactRange.from_bytes(tree.to_bytes())
    assert restored == tree

    for leaf in MANY[:more]:
        tree, restored = tree.append(leaf), restored.append(leaf)
    assert restored.root() == tree.root()


@given(data=st.binary(max_size=200))
def test_bytes_that_are_no_tree_are_refused(data: bytes) -> None:
    """Whatever `from_bytes` accepts is exactly what `to_bytes` writes; the rest is LogCorrupt."""
    try:
        tree = CompactRange.from_bytes(data)
    except LogCorrupt:
        return

    assert tree.to_bytes() == data


@pytest.mark.parametrize(
    "data",
    [b"", bytes(7), bytes(7) + b"\1", bytes(8) + bytes(32), bytes(7) + b"\3" + bytes(32), bytes(7) + b"\1" + bytes(33)],
    ids=["nothing", "short", "size without hash", "hash without size", "one hash of two", "odd length"],
)
def test_a_tree_whose_hashes_do_not_fit_its_size_is_refused(data: bytes) -> None:
    """The number of hashes is the number of one bits of the size."""
    with pytest.raises(LogCorrupt):
        CompactRange.from_bytes(data)


def test_only_leaf_hashes_are_appended() -> None:
    """Appending the entry itself instead of its hash is refused."""
    for tree in (CompactRange(), grown(MANY[:1])):
        with pytest.raises(LogCorrupt):
            tree.append(b"an entry")
