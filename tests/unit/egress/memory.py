"""Looks for a secret in the memory of another process. Needs the right to trace it (root, or CAP_SYS_PTRACE)."""

import base64
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["RUN_BYTES", "may_read", "places_of", "runs_found"]

RUN_BYTES = 12
_BLOCK_BYTES = 6  # every run of 12 bytes holds one whole block of 6 that begins at a multiple of 6


def may_read(pid: int) -> bool:
    try:
        with Path(f"/proc/{pid}/mem").open("rb", buffering=0):
            return True
    except PermissionError:
        return False


def runs_found(pid: int, *secrets: bytes) -> list[str]:
    """Where runs of 12 bytes of a secret, from whatever offset of it, lie; or its base64, hexadecimal or UTF-16 form."""
    return [
        f"secret {number} in {name} at {start + at:x}"
        for name, start, content in _writable_memory(pid)
        for number, secret in enumerate(secrets)
        for at in _runs_in(content, secret)
    ]


def places_of(pid: int, octets: bytes) -> list[str]:
    """Where exactly `octets` lie."""
    return [
        f"{name} at {start + at:x}" for name, start, content in _writable_memory(pid) for at in _all_in(content, octets)
    ]


def _runs_in(content: bytes, secret: bytes) -> Iterator[int]:
    for start in range(0, len(secret) - _BLOCK_BYTES + 1, _BLOCK_BYTES):
        block = secret[start : start + _BLOCK_BYTES]
        yield from (at for at in _all_in(content, block) if _is_run(content, at, secret, start))
    for form in _other_forms(secret):
        yield from _all_in(content, form)


def _is_run(content: bytes, at: int, secret: bytes, start: int) -> bool:
    """Whether the block at `at` stands among enough of its neighbours to be no chance."""
    before = after = 0
    while start - before > 0 and at - before > 0 and content[at - before - 1] == secret[start - before - 1]:
        before += 1
    end, stop = start + _BLOCK_BYTES, at + _BLOCK_BYTES
    while end + after < len(secret) and stop + after < len(content) and content[stop + after] == secret[end + after]:
        after += 1
    return before + _BLOCK_BYTES + after >= RUN_BYTES


def _other_forms(secret: bytes) -> Sequence[bytes]:
    return (
        base64.b64encode(secret)[:16],
        secret.hex().encode("ascii")[:24],
        secret[:RUN_BYTES].decode("latin-1").encode("utf-16-le"),
    )


def _all_in(content: bytes, octets: bytes) -> Iterator[int]:
    at = content.find(octets)
    while at >= 0:
        yield at
        at = content.find(octets, at + 1)


def _writable_memory(pid: int) -> Iterator[tuple[str, int, bytes]]:
    """Each mapping that the process can write, whole: what it cannot write holds no copy."""
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text(encoding="ascii").splitlines():
            addresses, permissions, *rest = line.split(maxsplit=5)
            if not permissions.startswith("rw"):
                continue
            start, end = (int(text, 16) for text in addresses.split("-"))
            memory.seek(start)
            yield (rest[-1] if len(rest) == 4 else "anonymous"), start, memory.read(end - start)
