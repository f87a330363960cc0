"""The PostgreSQL that tests run against: found or fetched, without a server of its own being started, and gone with its user."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import psycopg
import pytest

from tools.postgresql import binaries
from tools.postgresql.binaries import PostgresqlMissingError, ensure_binaries, find_binaries
from tools.postgresql.cluster import ClusterError, ScratchCluster

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("initdb", "postgres", "pg_ctl", "pg_basebackup")


def _programs(folder: Path, *, version: str = "15.2") -> Path:
    folder.mkdir(parents=True)
    for name in PROGRAMS:
        _script(folder / name, f"echo 'postgres (PostgreSQL) {version}'")
    return folder


def _script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_this_machine_has_one() -> None:
    """The set-up has seen to it."""
    assert (find_binaries().directory / "postgres").is_file()


def test_the_operators_choice_is_an_error_when_it_is_wrong(tmp_path: Path) -> None:
    """POSTGRESQL_BIN decides alone: nothing else is looked for, be there one or not."""
    right = _programs(tmp_path / "right")

    assert find_binaries(environ={"POSTGRESQL_BIN": str(right)}).directory == right
    (right / "initdb").unlink()
    for wrong in (right, tmp_path / "nowhere", _programs(tmp_path / "old", version="12.22")):
        with pytest.raises(PostgresqlMissingError, match="POSTGRESQL_BIN"):
            find_binaries(environ={"POSTGRESQL_BIN": str(wrong)})


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without PostgreSQL and with nothing on its path but `tools`."""
    tools = tmp_path / "tools"
    tools.mkdir()
    unpacked = binaries._candidates
    monkeypatch.setattr(
        binaries,
        "_candidates",
        lambda cache: [one for one in unpacked(cache) if one.directory.is_relative_to(tmp_path)],
    )
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setattr("shutil.which", lambda name: str(tools / name) if (tools / name).exists() else None)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    return tools


def test_without_apt_the_one_line_is_said(bare: Path, tmp_path: Path) -> None:
    """Nothing is tried that cannot work."""
    with pytest.raises(PostgresqlMissingError, match=r"no apt-get.*Install it"):
        ensure_binaries(cache=tmp_path / "cache")


def test_without_root_the_packages_are_unpacked(bare: Path, tmp_path: Path) -> None:
    """What an installation would add is downloaded and unpacked into the cache, libraries included."""
    _script(
        bare / "apt-get",
        'case "$*" in *--simulate*) echo "Inst postgresql-15 (15.2)"; echo "Inst libpq5 (15.2)";;'
        " download*) for name in $2 $3; do echo x > $name.deb; done;; *) exit 1;; esac",
    )
    _script(
        bare / "dpkg-deb",
        'folder="$3/usr/lib/postgresql/15/bin"; mkdir -p "$folder" "$3/usr/lib/x86_64-linux-gnu"; echo "$2" >> "$3/packages"\n'
        "for name in initdb postgres pg_ctl pg_basebackup; do\n"
        '  printf "#!/bin/sh\\necho \\"postgres (PostgreSQL) 15.2\\"\\n" > "$folder/$name"; chmod +x "$folder/$name"\ndone',
    )

    found = ensure_binaries(cache=tmp_path / "cache")

    assert found.directory == tmp_path / "cache/usr/lib/postgresql/15/bin"
    assert found.environment() == {"LD_LIBRARY_PATH": str(tmp_path / "cache/usr/lib/x86_64-linux-gnu")}
    packages = [Path(line).name for line in (tmp_path / "cache/packages").read_text().splitlines()]
    assert packages == ["libpq5.deb", "postgresql-15.deb"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("cache")] == ["cache"]


def test_a_download_that_fails_leaves_nothing(bare: Path, tmp_path: Path) -> None:
    """No network: the one line to type, and no half-made cache that the next set-up would find."""
    _script(bare / "apt-get", "exit 1")
    _script(bare / "dpkg-deb", "exit 1")

    with pytest.raises(PostgresqlMissingError, match=r"cannot download it.*sudo apt-get install postgresql"):
        ensure_binaries(cache=tmp_path / "cache")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["tools"]


def test_as_root_it_is_installed_and_no_server_is_started(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Debian's package would make and start a cluster: it is told not to before it is installed."""
    told = tmp_path / "etc/createcluster.conf"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(binaries, "_NO_CLUSTER", told)
    log = tmp_path / "log"
    _script(bare / "apt-get", f'cat {told} >> {log}; echo "$*" >> {log}')

    with pytest.raises(PostgresqlMissingError):  # this apt-get installs nothing
        ensure_binaries(cache=tmp_path / "cache")

    lines = log.read_text().splitlines()
    assert lines == ["create_main_cluster = false", "install -y --no-install-recommends postgresql"]


def test_nobody_else_can_enter_the_servers_folder() -> None:
    """Whoever could reach the socket could be any role."""
    with ScratchCluster.create() as cluster:
        for folder in (cluster.directory, cluster.sockets, cluster.data):
            assert stat.S_IMODE(folder.stat().st_mode) & 0o077 == 0
        assert cluster.connect().execute("SHOW listen_addresses").fetchone() == ("",)
        directory = cluster.directory

    assert not directory.exists()


def test_a_server_that_does_not_start_says_why() -> None:
    """And leaves nothing behind."""
    with pytest.raises(ClusterError, match="shared_buffers"):
        ScratchCluster.create(settings={"shared_buffers": "nonsense"})


def test_the_server_ends_with_the_process_that_started_it() -> None:
    """However that ends: killed by SIGKILL it can clean nothing up, and the server is gone all the same."""
    program = (
        "import time; from tools.postgresql.cluster import ScratchCluster\n"
        "cluster = ScratchCluster.create(); print(cluster.directory, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            directory = Path(process.stdout.readline().strip())
            pid = int((directory / "data/postmaster.pid").read_text().splitlines()[0])
            with psycopg.connect(host=str(directory / "s"), user="postgres", dbname="postgres"):
                process.send_signal(signal.SIGKILL)
                process.wait(30)
        finally:
            process.kill()
    end = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
        time.sleep(0.05)

    assert not Path(f"/proc/{pid}").exists()
    subprocess.run(["rm", "-rf", str(directory)], check=True)  # nobody is left to do it
