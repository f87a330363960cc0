"""custodyctl audit export and verify, and config: what they do with files, and what files do to them."""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from custody.errors import CustodyError
from custody.testing import FakeCustody

from sidecar.cli.session import Session
from sidecar.domain.audit import AuditEvent
from tests.unit.audit.log_builder import LogBuilder
from tests.unit.cli.support import assert_golden, run, sandbox, session_of

VECTORS = Path(__file__).parents[2] / "vectors" / "audit"
EXPORT, KEY = VECTORS / "export.txt", VECTORS / "export_public_key.pem"


# --- audit export ---------------------------------------------------------------------------------------------------------


def export(session: Session, output: Path, *options: str) -> Any:
    return run(*options, "audit", "export", "--output", str(output), session=session)


def test_the_export_is_a_whole_file_for_its_owner_alone(tmp_path: Path) -> None:
    """Byte for byte what the sidecar streams; mode 0600, whatever the umask."""
    fake, _ = sandbox()
    before = os.umask(0)
    try:
        ran = export(session_of(fake), tmp_path / "log", "--format", "json")
    finally:
        os.umask(before)

    assert ran.code == 0, ran.err
    assert (tmp_path / "log").read_bytes() == b"".join(fake.client().audit.export())
    assert stat.S_IMODE((tmp_path / "log").stat().st_mode) == 0o600
    assert ran.document()["written_bytes"] == (tmp_path / "log").stat().st_size
    assert "audit verify" in ran.err
    assert_golden("audit-export.json", ran.out.replace(str(tmp_path), "/DIRECTORY"))


def test_bi_e12_a_file_that_exists_is_not_replaced(tmp_path: Path) -> None:
    """Not by a second export, either; the first stays as it is."""
    fake, _ = sandbox()
    (tmp_path / "log").write_text("precious")
    ran = export(session_of(fake), tmp_path / "log")

    assert ran.code == 1
    assert "exists already" in ran.err
    assert (tmp_path / "log").read_text() == "precious"


def test_bi_e12_a_symbolic_link_is_not_followed(tmp_path: Path) -> None:
    """Whether it leads somewhere or nowhere."""
    fake, _ = sandbox()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    ran = export(session_of(fake), tmp_path / "link")

    assert ran.code == 1
    assert not (tmp_path / "elsewhere").exists()


def test_bi_e12_a_folder_that_is_not_there(tmp_path: Path) -> None:
    """Said in words; nothing is made."""
    fake, _ = sandbox()
    ran = export(session_of(fake), tmp_path / "no" / "log")

    assert ran.code == 1
    assert "cannot be made" in ran.err


class Breaking(FakeCustody):
    """A sidecar whose export breaks off after its first piece."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self._error = error

    def stream(self, method: str, request: Any) -> Iterator[Any]:
        from custody.v1 import audit_pb2

        yield audit_pb2.ExportLogResponse(chunk=b"custody-audit-export/1 x\n")
        raise self._error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CustodyError("gone", code="UNAVAILABLE"), 5),
        (CustodyError("no", code="INTERNAL", reason="INTERNAL"), 1),
        (KeyboardInterrupt(), 130),
        (OSError(28, "No space left on device"), 1),
    ],
)
def test_bi_e12_what_breaks_off_leaves_nothing(error: BaseException, code: int, tmp_path: Path) -> None:
    """A part of a log looks like a log that was cut back; so no part stays."""
    ran = export(session_of(Breaking(error)), tmp_path / "log")

    assert ran.code == code
    assert list(tmp_path.iterdir()) == []


# --- audit verify ---------------------------------------------------------------------------------------------------------


def verify(path: Path, *options: str, key: Path = KEY) -> Any:
    return run("--format", "json", "audit", "verify", str(path), "--key", str(key), *options)


def test_a_good_export_verifies_offline() -> None:
    """Exit status 0; the document is the contract's."""
    ran = verify(EXPORT, "--witnessed", str(VECTORS / "export_witnessed.txt"))

    assert ran.code == 0
    assert ran.document()["verdict"] == "verified"
    assert ran.document()["witnessed_sizes"] == [5]
    assert_golden("audit-verification.json", ran.out)


def test_the_origin_can_be_pinned() -> None:
    """The right name verifies, another does not."""
    right = verify(EXPORT, "--origin", "audit/vectors/4be0643f1d98")
    wrong = verify(EXPORT, "--origin", "audit/vectors/000000000000")

    assert (right.code, wrong.code) == (0, 4)
    assert right.document()["origin_pinned"] is True


def lines(change: Callable[[list[bytes]], list[bytes]]) -> bytes:
    return b"".join(change(EXPORT.read_bytes().splitlines(keepends=True)))


def swapped(parts: list[bytes]) -> list[bytes]:
    return [parts[0], parts[2], parts[1], *parts[3:]]


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(lines(lambda parts: parts[:-1]), id="truncated"),
        pytest.param(lines(swapped), id="swapped"),
        pytest.param(lines(lambda parts: [*parts, b"end 1 1\n"]), id="trailing"),
        pytest.param(b"\x00" * 4096, id="zeros"),
        pytest.param(b"x" * 1_000_000, id="long-line"),
        pytest.param(b"not a log\n", id="foreign"),
    ],
)
def test_bi_e24_a_log_that_is_not_whole(content: bytes, tmp_path: Path) -> None:
    """Exit status 4, with the place, and no crash."""
    (tmp_path / "log").write_bytes(content)
    ran = verify(tmp_path / "log")

    assert ran.code == 4
    assert ran.document()["verdict"] == "failed"
    assert ran.document()["failure"]


def test_bi_e24_a_forked_log(tmp_path: Path) -> None:
    """Whole by itself, and another one than a witness saw: exit status 4."""
    ours, theirs = LogBuilder(), LogBuilder(clock_ns=1_795_420_900_000_000_000)
    for log in (ours, theirs):
        log.put(AuditEvent.SIDECAR_STARTED)
        log.checkpoint()
    (tmp_path / "log").write_bytes(ours.export())
    (tmp_path / "note").write_text(theirs.notes[-1])
    (tmp_path / "key").write_bytes(ours.key.pem)

    alone = verify(tmp_path / "log", key=tmp_path / "key")
    witnessed = verify(tmp_path / "log", "--witnessed", str(tmp_path / "note"), key=tmp_path / "key")

    assert (alone.code, witnessed.code) == (0, 4)
    assert "forked" in witnessed.document()["failure"]


def test_entries_that_nothing_covers_yet_are_not_verified(tmp_path: Path) -> None:
    """No fault, and no proof: exit status 4 all the same."""
    log = LogBuilder()
    log.put(AuditEvent.SIDECAR_STARTED)
    log.checkpoint()
    log.put(AuditEvent.SIDECAR_STARTED)
    (tmp_path / "log").write_bytes(log.export())
    (tmp_path / "key").write_bytes(log.key.pem)
    ran = verify(tmp_path / "log", key=tmp_path / "key")

    assert ran.code == 4
    assert ran.document()["verdict"] == "not covered"


@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", b"\xff" * 100_000]
)
def test_bi_e25_a_key_that_is_none(content: bytes, tmp_path: Path) -> None:
    """Exit status 4: without the key nothing is proven."""
    (tmp_path / "key").write_bytes(content)

    assert verify(EXPORT, key=tmp_path / "key").code == 4


def test_bi_e25_another_public_key(tmp_path: Path) -> None:
    """Exit status 4: a good log under the wrong key is not proven."""
    (tmp_path / "key").write_bytes(LogBuilder().key.pem)

    assert verify(EXPORT, key=tmp_path / "key").code == 4


def test_files_that_are_not_there(tmp_path: Path) -> None:
    """Exit status 1 and the file's name: nothing was found false, it was not looked at."""
    for arguments in ((tmp_path / "no", KEY), (EXPORT, tmp_path / "no"), (tmp_path, KEY)):
        ran = verify(arguments[0], key=arguments[1])

        assert ran.code == 1
        assert str(tmp_path) in ran.err


# --- config ---------------------------------------------------------------------------------------------------------------


def configuration(directory: Path) -> dict[str, Any]:
    policy = directory / "policy.yaml"
    policy.write_text(yaml.safe_dump({"workloads": [{"workload": "workload:operator", "roles": ["administrator"]}]}))
    keys = directory / "keys.json"
    keys.write_text(
        '{"token_label":"t","token_serial":"1","keys":[],"descriptions":[{"type":"KeyDescription","purpose":"client-authentication",'
        '"label":"c","id_hex":"01","key_type":"EC","size_bits":256,"attributes":{},"spki_der":"","key_id":"k"}]}'
    )
    return {
        "cluster": "blue",
        "listeners": [{"address": f"unix:{directory}/admin.sock", "surface": "admin", "workload": "operator"}],
        "operations_address": "127.0.0.1:9090",
        "policy_file": str(policy),
        "store": {"path": str(directory / "custody.db")},
        "hsm": {
            "module_path": "/opt/hsm/module.so",
            "token_label": "custody",
            "token_serial": "1a2b",
            "pin_file": str(directory / "pin"),
            "keys_file": str(keys),
        },
        "providers": [],
    }


def written(directory: Path, document: dict[str, Any]) -> str:
    path = directory / "custody.yaml"
    path.write_text(yaml.safe_dump(document))
    return str(path)


def provider(name: str, **more: Any) -> dict[str, Any]:
    return {"id": name, "descriptor": "sandbox-bank", "ca_file": "/ca.pem", **more}


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    """Unknown keys, wrong types and missing keys together, each with its place; no value is repeated."""
    document = configuration(tmp_path)
    document["hsm"]["pin"] = "hunter22"
    document["store"]["synchronous"] = "OFF"
    del document["cluster"]
    document["shutdown_seconds"] = -1
    ran = run("--format", "json", "config", "check", "--config", written(tmp_path, document))
    mistakes = ran.document()["mistakes"]

    assert ran.code == 1
    assert ran.document()["valid"] is False
    assert len(mistakes) >= 4
    assert any("hsm: unknown key: pin" in mistake for mistake in mistakes)
    assert any("store.synchronous" in mistake for mistake in mistakes)
    assert any("missing key: cluster" in mistake for mistake in mistakes)
    assert any("shutdown_seconds" in mistake for mistake in mistakes)
    assert "hunter22" not in ran.out + ran.err


def test_mistakes_of_policy_and_of_every_provider(tmp_path: Path) -> None:
    """Those that a start would find one after the other are found together."""
    document = configuration(tmp_path)
    document["providers"] = [provider("bank-a"), provider("bank-b")]
    Path(document["policy_file"]).write_text("workloads: []\nsurprise: 1\n")
    ran = run("--format", "json", "config", "check", "--config", written(tmp_path, document))
    mistakes = "\n".join(ran.document()["mistakes"])

    assert ran.code == 1
    assert "policy_file: (top): unknown key: surprise" in mistakes
    assert "bank-a" in mistakes
    assert "bank-b" in mistakes


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    """One mistake, exit status 1, for both commands."""
    check = run("--format", "json", "config", "check", "--config", str(tmp_path / "no.yaml"))
    show = run("config", "show", "--config", str(tmp_path / "no.yaml"))

    assert (check.code, show.code) == (1, 1)
    assert list(check.document()) == ["schema", "file", "valid", "mistakes"]
    assert check.document()["schema"] == "custodyctl.config-check/1"
    assert len(check.document()["mistakes"]) == 1
    assert "no.yaml" in show.err


def test_without_a_file_it_is_wrong_usage() -> None:
    """Exit status 2, and how to name one."""
    for command in ("check", "show"):
        ran = run("config", command)

        assert ran.code == 2
        assert "CUSTODY_CONFIG" in ran.err


def with_provider(directory: Path) -> str:
    document = configuration(directory)
    document["providers"] = [provider("bank-a")]
    return written(directory, document)


def test_the_effective_configuration_is_shown(tmp_path: Path) -> None:
    """With its defaults, and with what the environment overrides; as YAML for people, as a document for scripts."""
    path = with_provider(tmp_path)
    shown = run("config", "show", "--config", path, environment={"CUSTODY_LOG_LEVEL": "debug"})
    document = run("--format", "json", "config", "show", environment={"CUSTODY_CONFIG": path})

    assert shown.code == 0, shown.err
    assert yaml.safe_load(shown.out)["log"] == {"level": "debug"}
    assert yaml.safe_load(shown.out)["shutdown_seconds"] > 0  # the file does not say it: a default
    assert list(document.document()) == ["schema", "file", "configuration"]
    assert document.document()["configuration"]["hsm"]["pin_file"] == str(tmp_path / "pin")
