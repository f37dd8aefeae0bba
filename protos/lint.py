"""Checks the protos beside this file with buf: `buf.yaml` says against which rules.

`python protos/lint.py` prints what is wrong, one line each, and exits 1.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from google.api import field_behavior_pb2

PROTO_ROOT = Path(__file__).resolve().parent
RULES = PROTO_ROOT / "buf.yaml"


def lint(protos: Path) -> str:
    """What is wrong with the protos below a folder; empty: nothing."""
    with tempfile.TemporaryDirectory() as scratch:
        # buf finds imports in modules of the workspace alone, and Google's come with Python.
        workspace = Path(scratch)
        shutil.copy(RULES, workspace / "buf.yaml")
        _copy_protos(protos, workspace / "protos")
        google = Path(field_behavior_pb2.__file__).parent
        _copy_protos(google, workspace / "google" / "google" / "api")
        found = subprocess.run(
            [_buf(), "lint", "protos"],
            cwd=workspace,
            capture_output=True,
            text=True,
            check=False,
        )
    return found.stdout + found.stderr if found.returncode else ""


def _copy_protos(source: Path, target: Path) -> None:
    for proto in source.rglob("*.proto"):
        copied = target / proto.relative_to(source)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(proto, copied)


def _buf() -> str:
    installed = Path(sys.executable).parent / "buf"
    found = str(installed) if installed.exists() else shutil.which("buf")
    if found is None:
        sys.exit("protos/lint.py: no buf; install it with: pip install buf-bin")
    return found


def main() -> None:
    found = lint(PROTO_ROOT)
    if found:
        sys.stderr.write(found)
        sys.exit(1)


if __name__ == "__main__":
    main()
