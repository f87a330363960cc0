"""The Merkle tree of RFC 6962 (SHA-256), grown one leaf at a time.

Rules: values never change; a leaf hash and a node hash can never be mistaken for each other (prefixes 0x00 and 0x01);
a proof is accepted only if it has exactly the length that its sizes demand.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

from sidecar.audit.errors import LogCorrupt

__all__ = [
    "EMPTY_ROOT",
    "HASH_BYTES",
    "CompactRange",
    "consistency_proof",
    "inclusion_proof",
    "leaf_hash",
    "node_hash",
    "tree_root",
    "verify_consistency",
    "verify_inclusion",
]

HASH_BYTES = 32
EMPTY_ROOT = sha256(b"").digest()
_MAX_SIZE = 2**63 - 1


def leaf_hash(entry: bytes) -> bytes:
    """RFC 6962 §2.1: the hash under which `entry` stands in the tree."""
    return sha256(b"\x00" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """RFC 6962 §2.1: the hash of an inner node."""
    return sha256(b"\x01" + left + right).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class CompactRange:
    """All that is needed of a tree of `size` leaves to go on growing it: the roots of its perfect subtrees, largest first."""

    size: int = 0
    hashes: tuple[bytes, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.size <= _MAX_SIZE:
            raise LogCorrupt("the size of the tree is out of range")
        # Each one bit of the size is one perfect subtree.
        if len(self.hashes) != self.size.bit_count() or any(len(node) != HASH_BYTES for node in self.hashes):
            raise LogCorrupt("the right edge of the tree does not fit its size")

    def append(self, leaf: bytes) -> "CompactRange":
        """The tree with one more leaf, given by its leaf hash."""
        if len(leaf) != HASH_BYTES:
            raise LogCorrupt("a leaf hash has another length")
        edge, node, size = list(self.hashes), leaf, self.size
        while size & 1:  # two perfect subtrees of one height become one, as in carrying over
            node = node_hash(edge.pop(), node)
            size >>= 1
        return CompactRange(size=self.size + 1, hashes=(*edge, node))

    def root(self) -> bytes:
        """RFC 6962 §2.1: the tree head, 32 bytes."""
        if not self.hashes:
            return EMPTY_ROOT
        node = self.hashes[-1]
        for left in reversed(self.hashes[:-1]):
            node = node_hash(left, node)
        return node

    def to_bytes(self) -> bytes:
        """Size (8 bytes, big-endian), then the hashes."""
        return self.size.to_bytes(8, "big") + b"".join(self.hashes)

    @classmethod
    def from_bytes(cls, data: bytes) -> "CompactRange":
        """The inverse of `to_bytes`. Raises LogCorrupt."""
        edge, rest = data[8:], len(data) - 8
        if rest < 0 or rest % HASH_BYTES:
            raise LogCorrupt("the stored tree has another length")
        hashes = tuple(edge[start : start + HASH_BYTES] for start in range(0, rest, HASH_BYTES))
        return cls(size=int.from_bytes(data[:8], "big"), hashes=hashes)


def tree_root(leaf_hashes: Sequence[bytes]) -> bytes:
    """RFC 6962 §2.1: the tree head over all `leaf_hashes`."""
    return _subtree(leaf_hashes, 0, len(leaf_hashes)) if leaf_hashes else EMPTY_ROOT


def inclusion_proof(leaf_hashes: Sequence[bytes], index: int) -> tuple[bytes, ...]:
    """RFC 6962 §2.1.1: the audit path of leaf `index` in the tree over `leaf_hashes`.

    Raises ValueError when there is no such leaf.
    """
    if not 0 <= index < len(leaf_hashes):
        raise ValueError("the tree has no leaf of this index")
    proof: list[bytes] = []
    start, end = 0, len(leaf_hashes)
    while end - start > 1:  # from the root down; the path is told from the leaf up
        middle = start + _split(end - start)
        if index < middle:
            proof.append(_subtree(leaf_hashes, middle, end))
            end = middle
        else:
            proof.append(_subtree(leaf_hashes, start, middle))
            start = middle
    return tuple(reversed(proof))


def consistency_proof(leaf_hashes: Sequence[bytes], old_size: int) -> tuple[bytes, ...]:
    """RFC 6962 §2.1.2: proof that the tree over `leaf_hashes` continues its first `old_size` leaves.

    Empty when `old_size` is 0 or the whole. Raises ValueError when the tree is smaller than `old_size`.
    """
    if not 0 <= old_size <= len(leaf_hashes):
        raise ValueError("the tree is smaller than the old one")
    if old_size in (0, len(leaf_hashes)):
        return ()
    proof: list[bytes] = []
    start, end = 0, len(leaf_hashes)
    while old_size != end:
        middle = start + _split(end - start)
        if old_size <= middle:
            proof.append(_subtree(leaf_hashes, middle, end))
            end = middle
        else:
            proof.append(_subtree(leaf_hashes, start, middle))
            start = middle
    if start > 0:  # otherwise the node is the old root itself, which the verifier has
        proof.append(_subtree(leaf_hashes, start, end))
    return tuple(reversed(proof))


def verify_inclusion(*, leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> bool:
    """RFC 9162 §2.1.3.2: whether `proof` shows the leaf hash `leaf` at `index` of the tree of `size` leaves with `root`."""
    if not 0 <= index < size or any(len(node) != HASH_BYTES for node in (leaf, root, *proof)):
        return False
    place, last, node = index, size - 1, leaf
    for sibling in proof:
        if last == 0:
            return False
        if place & 1 or place == last:
            node = node_hash(sibling, node)
            place, last = _climb_to_right_child(place, last)
        else:
            node = node_hash(node, sibling)
        place, last = place >> 1, last >> 1
    return last == 0 and node == root


def verify_consistency(
    *, old_size: int, new_size: int, old_root: bytes, new_root: bytes, proof: Sequence[bytes]
) -> bool:
    """RFC 9162 §2.1.4.2: whether `proof` shows that the new tree continues the old one.

    An empty old tree is continued by every tree, if its root is that of the empty tree and the proof is empty.
    """
    if not 0 <= old_size <= new_size or any(len(node) != HASH_BYTES for node in (old_root, new_root, *proof)):
        return False
    if old_size == new_size:
        return not proof and old_root == new_root
    if old_size == 0:
        return not proof and old_root == EMPTY_ROOT
    return _continues(old_size, new_size, old_root, new_root, proof)


def _continues(old_size: int, new_size: int, old_root: bytes, new_root: bytes, proof: Sequence[bytes]) -> bool:
    # A perfect old tree is a node of the new one, and the proof leaves it out.
    path = (old_root, *proof) if old_size & (old_size - 1) == 0 else tuple(proof)
    if not path:
        return False
    place, last = old_size - 1, new_size - 1
    while place & 1:
        place, last = place >> 1, last >> 1
    old_node = new_node = path[0]
    for sibling in path[1:]:
        if last == 0:
            return False
        if place & 1 or place == last:
            old_node, new_node = node_hash(sibling, old_node), node_hash(sibling, new_node)
            place, last = _climb_to_right_child(place, last)
        else:
            new_node = node_hash(new_node, sibling)
        place, last = place >> 1, last >> 1
    return last == 0 and old_node == old_root and new_node == new_root


def _climb_to_right_child(place: int, last: int) -> tuple[int, int]:
    """Up to the level where the node is a right child or the leftmost: the levels between have no sibling."""
    while place and not place & 1:
        place, last = place >> 1, last >> 1
    return place, last


def _split(size: int) -> int:
    """The largest power of two smaller than `size` (at least 2)."""
    return 1 << ((size - 1).bit_length() - 1)


def _subtree(leaf_hashes: Sequence[bytes], start: int, end: int) -> bytes:
    if end - start == 1:
        return leaf_hashes[start]
    middle = start + _split(end - start)
    return node_hash(_subtree(leaf_hashes, start, middle), _subtree(leaf_hashes, middle, end))
