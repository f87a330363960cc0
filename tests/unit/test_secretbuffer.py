"""Secrets in memory: wiped, locked, kept from children, and proven absent after use by reading the process's memory."""

import copy
import ctypes
import mmap
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hpke as reference
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from sidecar import hkdf, sealing
from sidecar.domain.secrets import SecretContext, SecretKind
from sidecar.hardening import WIPING_ENVIRONMENT
from sidecar.secretbuffer import SecretBuffer, scrub, wipe, wipe_bytes

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = SecretContext(cluster="cluster-a", owner="o", consent="c", provider_origin="https://api.bank.example:443")


def test_buffer_is_wiped_and_closed_at_the_end() -> None:
    """After the block the memory is zero, even for someone who kept a slice, and the view is gone."""
    with SecretBuffer(100) as buffer:
        kept = buffer.view[10:20]
        buffer.view[:] = b"s" * 100

    assert bytes(kept) == bytes(10)
    with pytest.raises(ValueError, match="closed"):
        _ = buffer.view


def test_buffer_is_wiped_when_the_block_fails() -> None:
    """An exception does not leave the secret behind and is not hidden by the wiping."""
    buffer = SecretBuffer(10)
    kept = buffer.view[:]
    kept[:] = b"s" * 10

    with pytest.raises(RuntimeError, match="inside"), buffer:
        raise RuntimeError("inside")
    assert bytes(kept) == bytes(10)


def test_forgotten_buffer_is_wiped() -> None:
    """A buffer that nobody closed is wiped when it goes."""
    buffer = SecretBuffer(10)
    kept = buffer.view[:]
    kept[:] = b"s" * 10
    del buffer

    assert bytes(kept) == bytes(10)


def test_closing_twice() -> None:
    """A second close does nothing."""
    buffer = SecretBuffer(1)
    buffer.close()
    buffer.close()


@pytest.mark.parametrize("size", [0, -1])
def test_empty_buffer_is_refused(size: int) -> None:
    """A buffer of no bytes is a mistake of the caller."""
    with pytest.raises(ValueError, match="at least one byte"):
        SecretBuffer(size)


@pytest.mark.parametrize("copying", [bytes, copy.copy, copy.deepcopy, pickle.dumps], ids=lambda f: f.__name__)
def test_buffer_is_not_copied(copying: Callable[[object], object]) -> None:
    """bytes(), copy and pickle are refused, and repr, str and format show nothing."""
    with SecretBuffer(6) as buffer:
        buffer.view[:] = b"secret"

        with pytest.raises(TypeError):
            copying(buffer)
        assert {repr(buffer), str(buffer), f"{buffer}"} == {"<SecretBuffer>"}


def test_kernel_keeps_the_buffer_to_itself() -> None:
    """The kernel's flags of the pages: locked (lo), out of core dumps (dd), emptied in a forked child (wf)."""
    with SecretBuffer(mmap.PAGESIZE) as buffer:
        buffer.view[:4] = b"mark"
        flags = _kernel_flags(_address_of(buffer))

        assert {"dd", "wf"} <= flags
        assert ("lo" in flags) == buffer.locked


def test_refused_lock_is_told_not_raised() -> None:
    """Where RLIMIT_MEMLOCK allows nothing, the buffer works and says that it is not locked."""
    script = (
        "import os, resource; resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))\n"
        "if os.geteuid() == 0: os.setgid(65534); os.setuid(65534)\n"
        "from sidecar.secretbuffer import SecretBuffer\n"
        "with SecretBuffer(10) as buffer: buffer.view[:1] = b'x'; print(buffer.locked)"
    )
    preloaded = "import sidecar.secretbuffer\n" + script  # before privileges go: the tree may be unreadable without

    done = subprocess.run(
        [sys.executable, "-c", preloaded], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )

    assert (done.stdout, done.stderr) == ("False\n", "")


def test_wipe() -> None:
    """wipe zeroes bytearrays and writable views, and says so when it cannot."""
    octets = bytearray(b"secret")
    words = memoryview(bytearray(b"secret!!")).cast("I")

    wipe(memoryview(octets)[1:3])
    assert octets == b"s\x00\x00ret"
    wipe(words)
    assert words.tobytes() == bytes(8)
    with pytest.raises(TypeError):
        wipe(memoryview(b"secret"))


def test_wipe_bytes() -> None:
    """A fresh bytes object is overwritten in place; the shared objects of lengths 0 and 1 are left alone."""
    fresh = os.urandom(40)
    wipe_bytes(fresh)
    wipe_bytes(b"")
    wipe_bytes(b"a")

    assert fresh == bytes(40)
    assert bytes([97]).hex() == "61"


def test_scrub_may_be_called_at_any_time() -> None:
    """scrub needs nothing, changes nothing and leaves other buffers alone."""
    octets = bytearray(b"secret")

    scrub()

    assert octets == b"secret"


# What the child does with a secret. It reports each step and waits for a byte, so that its memory can be read meanwhile.
CHILD = """
import os, sys
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from sidecar import hpke, sealing
from sidecar.domain.secrets import SecretContext, SecretKind
from sidecar.secretbuffer import SecretBuffer, scrub

CONTEXT = SecretContext(cluster="cluster-a", owner="o", consent="c", provider_origin="https://api.bank.example:443")

def pause():
    os.write(1, b".")
    os.read(0, 1)

def receive(size):
    received = b""
    while len(received) < size:
        received += os.read(0, size - len(received))
    return received

def open_sealed(key, message, into):
    sealing.open_into(key=key, sealed=message, kind=SecretKind.ACCESS_TOKEN, context=CONTEXT, buffer=into)

def open_hpke(key, message, into):
    private_key = X25519PrivateKey.from_private_bytes(key)
    hpke.open_into(private_key=private_key, enc_and_ciphertext=message, info=b"info", aad=b"", buffer=into)

def careless(key, message, into):
    global LEAK
    open_sealed(key, message, into)
    LEAK = bytes(into[:40])

opening = {"sealed": open_sealed, "hpke": open_hpke, "careless": careless}[sys.argv[1]]
with SecretBuffer(32) as key:
    for _ in range(int(sys.argv[2])):
        os.readv(0, [key.view])
        message = receive(int.from_bytes(receive(4), "big"))
        with SecretBuffer(5000) as buffer:
            opening(key.view, message, buffer.view)
            pause()
        scrub()
        pause()
"""


def test_opened_secret_is_in_memory_once_and_then_not_at_all() -> None:
    """Read from outside: while open, the process holds exactly one copy of the token; after the block none, whole or
    partial, and neither the message key nor what it was derived with. The rounds catch allocator-dependent residue."""
    with _child("sealed", rounds=12) as exchange:
        for size in (40, 256, 700, 3000) * 3:
            key, token = os.urandom(32), os.urandom(size)
            sealed = sealing.seal(
                key=key, key_id=bytes(16), key_version=1, kind=SecretKind.ACCESS_TOKEN, context=CONTEXT, plaintext=token
            )
            derived = _derived(key, sealing.parse(sealed).salt)
            exchange.send(key, sealed)

            opened = exchange.copies(token=token, **derived)
            exchange.go_on()
            closed = exchange.copies(token=token, **derived)
            exchange.go_on()

            assert opened == {"token": 1, "pseudorandom key": 0, "message key": 0}
            assert closed == {"token": 0, "pseudorandom key": 0, "message key": 0}


def test_hpke_plaintext_is_in_memory_once_and_then_not_at_all() -> None:
    """The same proof for a token that arrives as HPKE ciphertext; the shared secret is gone too."""
    suite = reference.Suite(reference.KEM.X25519, reference.KDF.HKDF_SHA256, reference.AEAD.AES_256_GCM)
    with _child("hpke", rounds=6) as exchange:
        for _ in range(6):
            private_key, token = X25519PrivateKey.generate(), os.urandom(300)
            message = suite.encrypt(token, private_key.public_key(), b"info")
            shared = private_key.exchange(_encapsulated(message))
            exchange.send(private_key.private_bytes_raw(), message)

            opened = exchange.copies(token=token, shared=shared)
            exchange.go_on()
            closed = exchange.copies(token=token, shared=shared)
            exchange.go_on()

            assert opened == {"token": 1, "shared": 0}
            assert closed == {"token": 0, "shared": 0}


def test_the_search_finds_a_leak() -> None:
    """Control: one `bytes` made of the beginning of the token is found by the same search, before and after."""
    with _child("careless", rounds=1) as exchange:
        key, token = os.urandom(32), os.urandom(256)
        sealed = sealing.seal(
            key=key, key_id=bytes(16), key_version=1, kind=SecretKind.ACCESS_TOKEN, context=CONTEXT, plaintext=token
        )
        exchange.send(key, sealed)

        opened = exchange.copies(token=token)
        exchange.go_on()
        closed = exchange.copies(token=token)
        exchange.go_on()

        assert opened["token"] > 1
        assert closed["token"] > 0


class _Exchange:
    """The parent's side: sends work to the child and reads its memory between the steps."""

    _FRAGMENT_BYTES = 12

    def __init__(self, child: "subprocess.Popen[bytes]") -> None:
        self._child = child

    def send(self, key: bytes, message: bytes) -> None:
        self._write(key + len(message).to_bytes(4, "big") + message)

    def go_on(self) -> None:
        self._write(b"g")

    def copies(self, **secrets: bytes) -> dict[str, int]:
        """Wait for the child's next step; count copies of each secret's start, middle and end, and take the largest."""
        assert self._child.stdout is not None
        assert self._child.stdout.read(1) == b"."
        counts = dict.fromkeys(secrets, 0)
        found = {(name, fragment): 0 for name, secret in secrets.items() for fragment in self._fragments(secret)}
        for memory in self._mappings():
            for name, fragment in found:
                found[name, fragment] += memory.count(fragment)
        for (name, _), count in found.items():
            counts[name] = max(counts[name], count)
        return counts

    def _fragments(self, secret: bytes) -> set[bytes]:
        last = len(secret) - self._FRAGMENT_BYTES
        return {secret[start : start + self._FRAGMENT_BYTES] for start in (0, last // 2, last)}

    def _mappings(self) -> Iterator[bytes]:
        process = Path("/proc") / str(self._child.pid)
        with (process / "mem").open("rb", buffering=0) as memory:
            for line in (process / "maps").read_text().splitlines():
                addresses, permissions, *_ = line.split()
                if not permissions.startswith("rw"):  # what cannot be written holds no secret
                    continue
                start, end = (int(address, 16) for address in addresses.split("-"))
                memory.seek(start)
                yield memory.read(end - start)

    def _write(self, data: bytes) -> None:
        assert self._child.stdin is not None
        self._child.stdin.write(data)
        self._child.stdin.flush()


@contextmanager
def _child(opening: str, *, rounds: int) -> Iterator[_Exchange]:
    # As egress is started: else the dynamic linker spills vector registers, keys in them, where a function is called first.
    environment = {**os.environ, "LD_BIND_NOW": WIPING_ENVIRONMENT["LD_BIND_NOW"]}
    arguments = [sys.executable, "-c", CHILD, opening, str(rounds)]
    with subprocess.Popen(arguments, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        try:
            yield _Exchange(child)
            assert child.wait(timeout=30) == 0
        finally:
            child.kill()


def _derived(key: bytes, salt: bytes) -> dict[str, bytes]:
    pseudorandom_key, message_key = bytearray(64), bytearray(32)
    hkdf.extract_into(digest="sha512", salt=salt, key=key, into=pseudorandom_key)
    info = b"token-custody/sealed/1\x00\x01DERIVEKEY"
    hkdf.expand_into(digest="sha512", pseudorandom_key=pseudorandom_key, info=info, into=message_key)
    return {"pseudorandom key": bytes(pseudorandom_key), "message key": bytes(message_key)}


def _encapsulated(message: bytes) -> X25519PublicKey:
    return X25519PublicKey.from_public_bytes(message[:32])


def _address_of(buffer: SecretBuffer) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer.view))


def _kernel_flags(address: int) -> set[str]:
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *values = line.split()
        if "-" in name and not name.endswith(":"):
            start, end = (int(bound, 16) for bound in name.split("-"))
            inside = start <= address < end
        elif inside and name == "VmFlags:":
            return set(values)
    raise AssertionError("no such mapping")
