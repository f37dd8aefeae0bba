"""The protos keep to the rules of protos/buf.yaml, and what does not is named."""

import runpy
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

PROTOS = Path(__file__).parents[2] / "protos"
TENANTS = "kvcluster/rpc/v1/tenant_service.proto"
lint: Callable[[Path], str] = runpy.run_path(str(PROTOS / "lint.py"))["lint"]


def test_our_protos_are_clean() -> None:
    assert lint(PROTOS) == ""


@pytest.mark.parametrize(
    ("text", "instead", "rule"),
    [
        ("string display_name = 4", "string displayName = 4", "should be lower_snake_case"),
        ("STATE_ACTIVE = 1", "ACTIVE = 1", "should be prefixed"),
        ("STATE_UNSPECIFIED = 0", "STATE_NONE = 0", "should be suffixed"),
        ("  // Lists tenants, by id. Operators only.\n", "", "non-empty comment"),
        ("service TenantService {", "service Tenants {", 'should be suffixed with "Service"'),
        ("package kvcluster.rpc.v1;", "package kvcluster.rpc.v1.x;", "should be suffixed"),
        ("import", 'import "google/protobuf/any.proto";\nimport', "unused"),
    ],
)
def test_a_fault_is_named(text: str, instead: str, rule: str, tmp_path: Path) -> None:
    shutil.copytree(PROTOS, tmp_path, dirs_exist_ok=True)
    proto = tmp_path / TENANTS
    assert text in proto.read_text()
    proto.write_text(proto.read_text().replace(text, instead, 1))

    assert rule in lint(tmp_path)
