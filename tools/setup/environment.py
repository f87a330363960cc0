"""The virtual environment `.venv`: made once, filled from the lock, the project and its commands put into it.

Rules this module keeps:

- Nothing is installed that does not match a hash in the lock, the installer included.
- Two installers, one lock: `uv`, itself pinned, because it takes two seconds where pip takes thirty; pip where uv does not run.
  uv reads none of pip's settings, so the machine's own (mirror, certificate, proxy) are handed over to it.
- What was done is noted last. An interrupted set-up is done again.
- The project is put on the path with a `.pth` file: no build, no network, and the working copy is what runs.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import sys
import tomllib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tools.setup.commands import Commands, SetupError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["LOCK", "Environment"]

LOCK = "requirements-dev.lock"
_INSTALLER_LOCK = "requirements-setup.lock"
_SOURCES = (".", "clients/python/src")

_NETWORK_ADVICE = (
    "The packages could not be installed. Is the package index reachable? Mirrors and certificates are set as for pip."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """The virtual environment of the working copy in `root`."""

    root: Path
    commands: Commands
    environ: Mapping[str, str]

    def needs_making(self) -> bool:
        """There is none, it belongs to another Python, or the working copy was moved (its scripts name their old place)."""
        whole = self._python.is_file() and self._packages.is_dir()
        noted = self._noted().get("root", str(self.root))
        return not whole or self._made_with() != _own_version() or noted != str(self.root)

    def make(self) -> None:
        """Makes it anew with the Python that runs this."""
        self.commands.run(
            [sys.executable, "-m", "venv", "--clear", str(self._directory)],
            environ=self.environ,
            advice=f"{sys.executable} could not make a virtual environment.",
        )

    def needs_packages(self) -> bool:
        """The locks are not the ones that were installed."""
        return self._noted().get("locks") != self._digest()

    def install_packages(self) -> None:
        """Installs exactly what the lock names."""
        digest = self._digest()
        try:
            self._install_with_uv()
        except SetupError:
            self._pip(LOCK)
        self._note.write_text(json.dumps({"root": str(self.root), "locks": digest}) + "\n")

    def needs_project(self) -> bool:
        """The project's folders are not on the path, or a command is missing."""
        return any(not path.is_file() or path.read_text() != text for path, text in self._project_files())

    def install_project(self) -> None:
        """Puts the working copy on the path and its commands into `.venv/bin`."""
        for path, text in self._project_files():
            path.write_text(text)
            path.chmod(0o755 if path.suffix != ".pth" else 0o644)

    @property
    def _directory(self) -> Path:
        return self.root / ".venv"

    @property
    def _python(self) -> Path:
        return self._directory / "bin" / "python"

    @property
    def _packages(self) -> Path:
        return self._directory / "lib" / f"python{_own_version()}" / "site-packages"

    @property
    def _note(self) -> Path:
        return self._directory / "set-up.json"

    def _noted(self) -> dict[str, str]:
        try:
            noted = json.loads(self._note.read_text())
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return {}  # none, or half-written by an interrupted set-up: the step is done again
        return noted if isinstance(noted, dict) else {}

    def _made_with(self) -> str:
        """Major and minor version of the Python that the environment was made with; empty if that cannot be read."""
        try:
            lines = (self._directory / "pyvenv.cfg").read_text().splitlines()
        except OSError:
            return ""
        fields = {key.strip(): value.strip() for key, _, value in (line.partition("=") for line in lines)}
        return ".".join(fields.get("version", fields.get("version_info", "")).split(".")[:2])

    def _digest(self) -> str:
        digest = hashlib.sha256()
        for name in (_INSTALLER_LOCK, LOCK):
            digest.update((self.root / name).read_bytes())
        return digest.hexdigest()

    def _install_with_uv(self) -> None:
        self._pip(_INSTALLER_LOCK)
        uv = str(self._directory / "bin" / "uv")
        self.commands.run(
            [uv, "pip", "install", "--quiet", "--python", str(self._python), *_CHECKED, "-r", LOCK],
            environ={**self.environ, **self._settings_for_uv()},
            advice=_NETWORK_ADVICE,
        )

    def _pip(self, lock: str) -> None:
        pip = [str(self._python), "-m", "pip", "--disable-pip-version-check", "--no-input"]
        self.commands.run(
            [*pip, "install", "--quiet", *_CHECKED, "-r", lock], environ=self.environ, advice=_NETWORK_ADVICE
        )

    def _settings_for_uv(self) -> dict[str, str]:
        """uv's environment for the settings that pip would use; what pip does not say is left to uv and its own variables."""
        listing = self.commands.run(
            [str(self._python), "-m", "pip", "config", "list"],
            environ=self.environ,
            advice="pip cannot read its settings.",
        )
        settings = {
            "UV_CACHE_DIR": str(self.root / ".cache" / "uv"),
            "UV_PYTHON_DOWNLOADS": "never",
            "UV_NO_PROGRESS": "1",
        }
        return {**settings, **uv_settings(listing)}

    def _project_files(self) -> list[tuple[Path, str]]:
        sources = "".join(f"{(self.root / source).resolve()}\n" for source in _SOURCES)
        scripts = tomllib.loads((self.root / "pyproject.toml").read_text())["project"]["scripts"]
        commands = [(self._directory / "bin" / name, self._script(entry)) for name, entry in scripts.items()]
        return [(self._packages / "token_custody_sidecar.pth", sources), *commands]

    def _script(self, entry: str) -> str:
        """A command that calls `module:function`. Starts as a shell script: a `#!` line can hold no space and no long path."""
        module, _, function = entry.partition(":")
        return (
            "#!/bin/sh\n"
            f"'''exec' \"{self._python}\" \"$0\" \"$@\"\n"
            "' '''\n"
            "import sys\n"
            f"from {module} import {function}\n"
            f"sys.exit({function}())\n"
        )  # fmt: skip


_CHECKED = ("--require-hashes", "--no-deps")

_UV_VARIABLES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "cert": "SSL_CERT_FILE",
    "proxy": "ALL_PROXY",
    "trusted-host": "UV_INSECURE_HOST",
}


def uv_settings(listing: str) -> dict[str, str]:
    """Translates `pip config list` (lines like `global.index-url='…'`; the environment comes last and wins) for uv."""
    settings: dict[str, str] = {}
    for line in listing.splitlines():
        key, _, value = line.partition("=")
        variable = _UV_VARIABLES.get(key.rpartition(".")[2].lower().replace("_", "-"))
        if variable is not None:
            settings[variable] = " ".join(str(ast.literal_eval(value)).split())
    return settings


def _own_version() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def clean_environ() -> dict[str, str]:
    """The process's environment without what would make the environment's Python look at another one's packages."""
    return {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}}
