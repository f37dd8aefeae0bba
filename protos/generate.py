"""Regenerates the committed stubs in kvcluster/rpc from the protos beside this file.

`python protos/generate.py` writes them; with `--check` it writes nothing and exits 1 when a
committed file differs from what the protos give.
"""

import argparse
import difflib
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from google.api import field_behavior_pb2
from grpc_tools import protoc

PROTO_ROOT = Path(__file__).resolve().parent
REPOSITORY = PROTO_ROOT.parent
PACKAGE = Path("kvcluster/rpc/v1")


def generate(target: Path) -> None:
    """Write the modules and their type stubs below `target`. Exits when protoc fails."""
    names = sorted(path.name for path in (PROTO_ROOT / PACKAGE).glob("*.proto"))
    services = [name for name in names if name.endswith("_service.proto")]
    plugins = Path(sys.executable).parent
    common = [
        f"--plugin=protoc-gen-mypy={plugins / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={plugins / 'protoc-gen-mypy_grpc'}",
        f"--proto_path={PROTO_ROOT}",
        f"--proto_path={files('grpc_tools') / '_proto'}",
        f"--proto_path={_google_api_root()}",
    ]
    _protoc([*common, f"--python_out={target}", f"--mypy_out=quiet:{target}"], names)
    _protoc([*common, f"--grpc_python_out={target}", f"--mypy_grpc_out=quiet:{target}"], services)


def differences(target: Path) -> list[str]:
    """Unified diffs between the committed stubs and fresh ones below `target`."""
    fresh = {path.name: path.read_text() for path in (target / PACKAGE).iterdir()}
    committed = {
        path.name: path.read_text()
        for path in (REPOSITORY / PACKAGE).iterdir()
        if path.suffix in (".py", ".pyi") and path.name != "__init__.py"
    }
    found = []
    for name in sorted(fresh.keys() | committed.keys()):
        diff = difflib.unified_diff(
            committed.get(name, "").splitlines(),
            fresh.get(name, "").splitlines(),
            f"committed/{name}",
            f"generated/{name}",
            lineterm="",
            n=1,
        )
        found.extend(diff)
    return found


def _protoc(options: list[str], names: list[str]) -> None:
    status = protoc.main(["protoc", *options, *(str(PACKAGE / name) for name in names)])
    if status != 0:
        sys.exit(status)


def _google_api_root() -> Path:
    # googleapis-common-protos installs its .proto files beside its modules, as google/api/*.proto.
    return Path(field_behavior_pb2.__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 on a difference")
    if not parser.parse_args().check:
        generate(REPOSITORY)
        return
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch))
        found = differences(Path(scratch))
    if found:
        sys.stderr.write("\n".join([*found[:60], "run: python protos/generate.py", ""]))
        sys.exit(1)


if __name__ == "__main__":
    main()
