"""The posture of a process that handles secrets: what the kernel and the allocator are told at start, and what they agreed to.

Rules:
- Called once, before the first secret is read. Each measure is read back: the report says what holds, not what was asked.
- Nobody but root may look into the process: no core file, no ptrace, no /proc/PID/mem or environ (PR_SET_DUMPABLE 0).
- A child never outlives its parent (PR_SET_PDEATHSIG) and never gains rights by exec (no_new_privs).
- Memory that is freed is overwritten: the supervisor sets the allocator's switches in a child's environment, and
  `freed_memory_is_wiped` proves here that they work, because a misspelt switch is ignored without a word.

Linux only: prctl(2), <linux/prctl.h>.
"""

import ctypes
import gc
import os
import resource
import signal
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

__all__ = [
    "WIPING_ENVIRONMENT",
    "ParentGone",
    "Posture",
    "freed_memory_is_wiped",
    "give_back_freed_memory",
    "harden",
]

WIPING_ENVIRONMENT = {
    "PYTHONMALLOC": "malloc",
    "GLIBC_TUNABLES": "glibc.malloc.perturb=90:glibc.malloc.tcache_count=0",
    "LD_BIND_NOW": "1",
}
"""What a process must have been started with for `freed_memory_is_wiped` to hold (glibc). Binding at once keeps the dynamic
linker from spilling vector registers, and key material with them, to the stack later."""

_PR_SET_PDEATHSIG, _PR_GET_PDEATHSIG = 1, 2
_PR_GET_DUMPABLE, _PR_SET_DUMPABLE = 3, 4
_PR_SET_NO_NEW_PRIVS, _PR_GET_NO_NEW_PRIVS = 38, 39
_MARK = b"freed-memory-mark"
# glibc leaves up to one pointer of a freed block as it was.
_TAIL_BYTES = 8
_SIZES_BYTES = (32, 64, 200, 600, 2000, 5000, 20_000)


class ParentGone(Exception):
    """The parent ended before this process was bound to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Posture:
    """What holds for this process."""

    not_dumpable: bool
    no_core_file: bool
    no_new_privileges: bool
    dies_with_parent: bool
    freed_memory_wiped: bool
    no_capabilities: bool

    def missing(self) -> tuple[str, ...]:
        """Names of the measures that do not hold."""
        return tuple(field.name for field in fields(self) if not getattr(self, field.name))


def harden(*, parent_pid: int | None = None) -> Posture:
    """Takes the measures and reports what holds. Call it before any secret is in memory.

    `parent_pid` binds this process to its parent's life; None leaves that out (the gateway has no such parent).
    Raises ParentGone when that parent is gone already, OSError when the kernel refuses what every Linux grants.
    """
    # First, because a process that is not dumpable cannot look into itself through /proc.
    wiped = freed_memory_is_wiped()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _prctl(_PR_SET_DUMPABLE, 0)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if parent_pid is not None:
        _die_with(parent_pid)
    return Posture(
        not_dumpable=_prctl(_PR_GET_DUMPABLE) == 0,
        no_core_file=resource.getrlimit(resource.RLIMIT_CORE) == (0, 0),
        no_new_privileges=_prctl(_PR_GET_NO_NEW_PRIVS) == 1,
        dies_with_parent=_parent_death_signal() == signal.SIGKILL,
        freed_memory_wiped=wiped,
        no_capabilities=_no_capabilities(),
    )


def freed_memory_is_wiped() -> bool:
    """Whether freed memory loses its content: Python objects, the C library's blocks, and blocks that realloc moved.

    Reads memory just after it was freed, which is safe here because the pages stay with the allocator.
    """
    return all(_object_wiped(size) and _block_wiped(size) and _moved_block_wiped(size) for size in _SIZES_BYTES)


def give_back_freed_memory() -> None:
    """Collects what the start left behind and returns free pages to the kernel: some megabytes. No effect without glibc.

    What is left lives as long as the process: the collector no longer walks through it, which is a twentieth of a call's work.
    """
    gc.collect()
    gc.freeze()
    trim = getattr(_c_library(), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


def _die_with(parent_pid: int) -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # It may have ended between exec and here; then no signal will ever come.
    if os.getppid() != parent_pid:
        raise ParentGone


def _object_wiped(size_bytes: int) -> bool:
    value = bytearray(_pattern(size_bytes))
    address = ctypes.addressof((ctypes.c_char * size_bytes).from_buffer(value))
    del value
    return _holds_no_mark(address, size_bytes)


def _block_wiped(size_bytes: int) -> bool:
    libc = _c_library()
    address = libc.malloc(size_bytes)
    ctypes.memmove(address, _pattern(size_bytes), size_bytes)
    libc.free(address)
    return _holds_no_mark(address, size_bytes)


def _moved_block_wiped(size_bytes: int) -> bool:
    libc = _c_library()
    address = libc.malloc(size_bytes)
    # A neighbour keeps the block from growing in place.
    neighbour = libc.malloc(size_bytes)
    ctypes.memmove(address, _pattern(size_bytes), size_bytes)
    moved = libc.realloc(address, size_bytes * 3)
    wiped = moved == address or _holds_no_mark(address, size_bytes)
    libc.free(moved)
    libc.free(neighbour)
    return wiped


def _pattern(size_bytes: int) -> bytes:
    return (_MARK * (size_bytes // len(_MARK) + 1))[:size_bytes]


def _holds_no_mark(address: int, size_bytes: int) -> bool:
    left = ctypes.string_at(address, size_bytes)
    # The mark is longer than the tail that may stay, so one whole mark is a copy that nobody overwrote.
    return _MARK not in left and left[: size_bytes - _TAIL_BYTES] != _pattern(size_bytes)[: size_bytes - _TAIL_BYTES]


def _parent_death_signal() -> int:
    number = ctypes.c_int()
    _prctl(_PR_GET_PDEATHSIG, ctypes.addressof(number))
    return number.value


def _no_capabilities() -> bool:
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    values = [line.split()[1] for line in lines if line.startswith(("CapEff:", "CapPrm:"))]
    return len(values) == 2 and all(int(value, 16) == 0 for value in values)


def _prctl(option: int, argument: int = 0) -> int:
    zero = ctypes.c_ulong(0)
    answer = int(_c_library().prctl(ctypes.c_int(option), ctypes.c_ulong(argument), zero, zero, zero))
    if answer < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return answer


@cache
def _c_library() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.realloc.argtypes, libc.realloc.restype = [ctypes.c_void_p, ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes, libc.free.restype = [ctypes.c_void_p], None
    return libc
