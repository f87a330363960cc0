"""Generate the Python stubs of the contract from protos/, or check that those committed are fresh.

One path makes them all, so that two machines with the same grpcio-tools and mypy-protobuf make the same bytes:
grpc_tools.protoc with the plugins of mypy-protobuf, third_party before protos (else a file would have two paths).
The import root equals the proto root: `from custody.v1 import consent_pb2` works with nothing rewritten.

    tools/generate_stubs.py            write clients/python/src
    tools/generate_stubs.py --check    write nothing; exit with 1 and name the files that differ
"""

import argparse
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from google.protobuf.descriptor_pb2 import FileDescriptorSet

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
THIRD_PARTY = PROTOS / "third_party"
TARGET = ROOT / "clients" / "python" / "src"

# The packages whose stubs we make. Those of google.api, google.rpc and google.type come from googleapis-common-protos.
GENERATED_FOLDERS = ("custody/v1", "buf/validate")


class StubGenerationError(Exception):
    """protoc refused the protos; it has said why on standard error."""


def main() -> int:
    """Write the stubs, or with --check compare them; answers with the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--check", action="store_true", help="fail when a committed stub is not what protos/ gives")
    if not parser.parse_args().check:
        _replace(TARGET)
        return 0
    stale = stale_files(TARGET)
    for name in stale:
        sys.stderr.write(f"stale: {name}\n")
    if stale:
        sys.stderr.write("Run tools/generate_stubs.py and commit what it writes.\n")
    return 1 if stale else 0


def stale_files(target: Path) -> list[str]:
    """Name the files under `target` that differ from fresh stubs: altered, missing, or left over."""
    with tempfile.TemporaryDirectory() as folder:
        fresh_root = Path(folder)
        generate(fresh_root)
        fresh, committed = _contents(fresh_root), _contents(target)
    return sorted(name for name in fresh.keys() | committed.keys() if fresh.get(name) != committed.get(name))


def generate(target: Path) -> None:
    """Write all stubs below `target`."""
    outputs = [f"--python_out={target}", f"--grpc_python_out={target}"]
    typed = [f"--mypy_out=quiet:{target}", f"--mypy_grpc_out=quiet:{target}"]
    _protoc(*_plugin_arguments(), *outputs, *typed, *_sources(PROTOS, "custody"))
    # The rules' own descriptors have to be importable; nobody programs against them, so they get no types.
    _protoc(f"--python_out={target}", *_sources(THIRD_PARTY, "buf"))
    _drop_empty_grpc_stubs(target / "custody/v1")
    (target / "custody/v1/__init__.py").write_text('"""Stubs of the contract, generated from protos/custody/v1."""\n')


def describe() -> FileDescriptorSet:
    """Answer with the contract's own files as descriptors, comments and unread options included."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "contract.binpb"
        _protoc("--include_source_info", f"--descriptor_set_out={output}", *_sources(PROTOS, "custody"))
        return FileDescriptorSet.FromString(output.read_bytes())


def _protoc(*arguments: str) -> None:
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{THIRD_PARTY}", f"-I{PROTOS}", *arguments]
    status = subprocess.run(command, check=False).returncode
    if status != 0:
        raise StubGenerationError(f"protoc ended with {status}")


def _plugin_arguments() -> list[str]:
    """Name the plugins by path: they are found also where the environment's bin folder is not on PATH."""
    scripts = Path(sysconfig.get_path("scripts"))
    return [f"--plugin={name}={scripts / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")]


def _sources(root: Path, folder: str) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in (root / folder).rglob("*.proto"))


def _drop_empty_grpc_stubs(folder: Path) -> None:
    """Remove the service stubs of files that have no service: an empty module only takes time to import."""
    for path in folder.glob("*_pb2_grpc.py"):
        if "class " not in path.read_text():
            path.unlink()
            path.with_suffix(".pyi").unlink(missing_ok=True)


def _replace(target: Path) -> None:
    for folder in GENERATED_FOLDERS:
        for path in _generated(target / folder):
            path.unlink()
        (target / folder).mkdir(parents=True, exist_ok=True)
    generate(target)


def _contents(root: Path) -> dict[str, bytes]:
    files = (path for folder in GENERATED_FOLDERS for path in _generated(root / folder))
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def _generated(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*") if path.suffix in {".py", ".pyi"}]


if __name__ == "__main__":
    sys.exit(main())
