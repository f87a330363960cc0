"""Where the development HSM's module is looked for, and how it is fetched."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from softhsm import module
from softhsm.setup import ModuleMissingError, ensure_module, find_module, softhsm2_util


@pytest.fixture
def real_module() -> Path:
    """SoftHSM's module on this machine."""
    return ensure_module()


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is the whole PATH: what a test puts there is all that the machine has."""
    directory = tmp_path / "commands"
    directory.mkdir()
    monkeypatch.setenv("PATH", str(directory))
    monkeypatch.delenv(module.MODULE_VARIABLE, raising=False)
    return directory


def _command(directory: Path, name: str, script: str) -> None:
    path = directory / name
    path.write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_the_operators_choice_comes_first(real_module: Path) -> None:
    """`$PKCS11_MODULE` wins over every place that is searched."""
    found = find_module(environ={"PKCS11_MODULE": str(real_module)}, search=[Path("/nonexistent.so")])

    assert found == real_module.resolve()


def test_a_wrong_choice_is_an_error_and_not_overruled(real_module: Path) -> None:
    """If the operator names a file that is not there, another module is not silently used instead."""
    with pytest.raises(ModuleMissingError, match=r"names /nonexistent.so, which is not a file"):
        find_module(environ={"PKCS11_MODULE": "/nonexistent.so"}, search=[real_module])


def test_a_choice_that_does_not_load_is_an_error(tmp_path: Path) -> None:
    """A file that is no shared library is refused with the loader's reason."""
    (tmp_path / "libhsm.so").write_text("not a library")

    with pytest.raises(ModuleMissingError, match=r"does not load: .*libhsm\.so"):
        find_module(environ={"PKCS11_MODULE": str(tmp_path / "libhsm.so")})


def test_the_first_place_that_has_a_module_is_taken(real_module: Path, tmp_path: Path) -> None:
    """Places are tried in order; missing ones and files that do not load are passed over."""
    broken, first, second = (tmp_path / name for name in ("broken.so", "first.so", "second.so"))
    broken.write_text("not a library")
    first.symlink_to(real_module)
    second.symlink_to(real_module)

    assert find_module(environ={}, search=[tmp_path / "missing.so", broken, first, second]) == first


def test_a_library_that_is_not_pkcs11_is_passed_over(real_module: Path, tmp_path: Path) -> None:
    """A shared library without C_GetFunctionList is not a module."""
    other = next(Path("/lib").glob("*-linux-*/libm.so.6"), None)
    if other is None:
        pytest.skip("no glibc here")

    assert find_module(environ={}, search=[other, real_module]) == real_module


def test_nothing_found_says_what_to_type() -> None:
    """The error is one line that names the package."""
    with pytest.raises(ModuleMissingError, match=r"^Install SoftHSM 2 .*softhsm") as missing:
        find_module(environ={}, search=[])

    assert "\n" not in str(missing.value)


def test_installed_places_come_before_our_own_copy(tmp_path: Path) -> None:
    """Debian's place is looked at first and the unpacked copy last."""
    own = tmp_path / "usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so"
    own.parent.mkdir(parents=True)
    own.write_text("")

    places = list(module.candidates(cache=tmp_path))

    assert places[0] == Path("/usr/lib/softhsm/libsofthsm2.so")
    assert places[-1] == own
    assert Path("/opt/homebrew/lib/softhsm/libsofthsm2.so") in places
    assert Path("/usr/lib64/pkcs11/libsofthsm2.so") in places


def test_our_own_copy_stays_inside_the_project() -> None:
    """What is unpacked lies under `.cache`, which git ignores."""
    root = Path(module.__file__).resolve().parents[1]

    assert module.cache_directory() == root / ".cache" / "softhsm"


def test_without_root_the_packages_are_unpacked(
    real_module: Path, tmp_path: Path, commands: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user without root gets the packages downloaded and unpacked into the project, and the module is found there."""
    cache = tmp_path / "cache" / "softhsm"
    inside = "usr/lib/x86_64-linux-gnu/softhsm"
    _command(commands, "apt-get", f'echo "$@" >> {tmp_path}/asked; touch softhsm2.deb libsofthsm2.deb')
    _command(commands, "dpkg-deb", f'mkdir -p "$3/{inside}" && cp -L {real_module} "$3/{inside}/libsofthsm2.so"')
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(module, "candidates", lambda: (cache / inside / "libsofthsm2.so",))

    assert ensure_module(cache=cache) == cache / inside / "libsofthsm2.so"

    assert (tmp_path / "asked").read_text() == "download softhsm2 libsofthsm2\n"
    assert [path.name for path in cache.parent.iterdir()] == ["softhsm"]


def test_without_package_lists_own_ones_are_fetched(
    tmp_path: Path, commands: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slim images have no package lists, and a plain user may not write the system's: ours are used for the download."""
    cache = tmp_path / "softhsm"
    script = f'echo "$@" >> {tmp_path}/asked; case "$1" in -o) touch a.deb;; *) exit 100;; esac'
    _command(commands, "apt-get", script)
    _command(commands, "dpkg-deb", 'mkdir -p "$3"')
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(module, "candidates", tuple)

    with pytest.raises(ModuleMissingError):
        ensure_module(cache=cache)

    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked[0] == "download softhsm2 libsofthsm2"
    assert asked[1].endswith(" update")
    assert asked[2].endswith(" download softhsm2 libsofthsm2")
    assert all(f"Dir::State::lists={tmp_path}" in line for line in asked[1:])


def test_root_installs_the_package(
    tmp_path: Path, commands: Path, real_module: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root gets the distribution's package, which the system then keeps up to date."""
    place = tmp_path / "libsofthsm2.so"
    _command(commands, "apt-get", f'echo "$@" >> {tmp_path}/asked; cp -L {real_module} {place}')
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(module, "candidates", lambda: (place,))

    assert ensure_module(cache=tmp_path / "cache") == place

    assert (tmp_path / "asked").read_text() == "install -y --no-install-recommends softhsm2\n"
    assert not (tmp_path / "cache").exists()


def test_a_failed_download_leaves_nothing_and_says_what_to_type(
    tmp_path: Path, commands: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a network there is one line of advice, and no half-filled cache that a later search would find."""
    _command(commands, "apt-get", "exit 100")
    _command(commands, "dpkg-deb", "exit 0")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(module, "candidates", tuple)

    with pytest.raises(ModuleMissingError, match=r"cannot download it .*sudo apt-get install softhsm2"):
        ensure_module(cache=tmp_path / "cache" / "softhsm")

    assert list((tmp_path / "cache").iterdir()) == []


def test_a_package_that_cannot_be_unpacked_is_refused(
    tmp_path: Path, commands: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged package stops the set-up and leaves no cache."""
    _command(commands, "apt-get", "touch softhsm2.deb")
    _command(commands, "dpkg-deb", "exit 2")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(module, "candidates", tuple)

    with pytest.raises(ModuleMissingError, match=r"softhsm2\.deb cannot be unpacked"):
        ensure_module(cache=tmp_path / "cache" / "softhsm")

    assert list((tmp_path / "cache").iterdir()) == []


def test_without_apt_nothing_is_tried(commands: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a system without apt the advice names that system's own installer."""
    _command(commands, "brew", "exit 0")
    monkeypatch.setattr(module, "candidates", tuple)

    with pytest.raises(ModuleMissingError, match=r"no apt-get.*brew install softhsm"):
        ensure_module()


def test_a_wrong_choice_is_not_repaired_by_installing(
    commands: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the operator's module is missing, nothing is fetched in its place."""
    _command(commands, "apt-get", f"touch {tmp_path}/asked")
    monkeypatch.setenv(module.MODULE_VARIABLE, "/nonexistent.so")

    with pytest.raises(ModuleMissingError, match="not a file"):
        ensure_module(cache=tmp_path / "cache")

    assert not (tmp_path / "asked").exists()


def test_the_utility_is_found_or_said_to_be_missing(tmp_path: Path) -> None:
    """`softhsm2_util` names an existing file, or what to install."""
    (tmp_path / "softhsm2-util").write_text("")

    assert softhsm2_util(search=[tmp_path / "missing", tmp_path / "softhsm2-util"]) == tmp_path / "softhsm2-util"
    with pytest.raises(ModuleMissingError, match="softhsm2-util is not installed"):
        softhsm2_util(search=[tmp_path / "missing"])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_plain_user_can_make_a_token(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The user nobody, who has no home and no group softhsm, makes a working token."""
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv is not installed")
    real = ensure_module()
    home = Path("/tmp") / f"softhsm-nobody-{os.getpid()}"  # pytest's own directories are closed to other users
    home.mkdir(mode=0o777)
    try:
        home.chmod(0o777)
        shutil.copytree(Path(module.__file__).parent, home / "softhsm", ignore=shutil.ignore_patterns("__pycache__"))
        done = subprocess.run(
            [
                *("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"),
                *("/usr/bin/python3", "-m", "softhsm.setup", "--token", str(home / "token")),
            ],
            cwd=home,
            env={"PATH": "/usr/bin:/bin", "PKCS11_MODULE": str(real), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert (home / "token" / "pin").stat().st_uid == 65534
    finally:
        shutil.rmtree(home)
