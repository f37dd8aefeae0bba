"""What holds for the tree as a whole and no linter checks."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = sorted(
    path
    for folder in ("kvcluster", "kernels", "protos", "tests")
    for path in (ROOT / folder).rglob("*.py")
    if "rpc/v1" not in path.as_posix()
)
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_GPU_FUNCTION_LINES = 120
BANNED_FILES = re.compile(r"utils?|helpers?|manager|handler|common|misc|.*_v\d+|new_.*|tmp.*")


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def imported_by(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after `statement`."""
    listing = subprocess.run(
        [sys.executable, "-c", f"{statement}\nimport sys\nprint(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return {name.partition(".")[0] for name in listing.stdout.split()}


def test_no_source_file_is_over_400_lines() -> None:
    assert [
        str(path.relative_to(ROOT))
        for path in SOURCES
        if not path.is_relative_to(ROOT / "tests")
        and len(path.read_text().splitlines()) > MAX_FILE_LINES
    ] == []


def test_no_function_is_over_60_lines_and_none_on_a_gpu_over_120() -> None:
    # A command's signature is its list of flags, so its body counts alone.
    assert [
        f"{path.relative_to(ROOT)}:{function.name}"
        for path in SOURCES
        for function in functions(path)
        if (function.end_lineno or 0) - function.body[0].lineno >= max_lines(function)
    ] == []


def max_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """What a GPU's registers hold through a loop is passed through no call."""
    is_on_gpu = any(".jit" in ast.unparse(each) for each in function.decorator_list)
    return MAX_GPU_FUNCTION_LINES if is_on_gpu else MAX_FUNCTION_LINES


def test_every_module_says_what_it_is() -> None:
    assert [
        str(path.relative_to(ROOT))
        for path in SOURCES
        if path.is_relative_to(ROOT / "kvcluster")
        and path.name != "__init__.py"
        and ast.get_docstring(ast.parse(path.read_text())) is None
    ] == []


def test_package_files_are_empty_except_the_top_one() -> None:
    assert [
        str(path.relative_to(ROOT))
        for path in SOURCES
        if path.name == "__init__.py"
        and path != ROOT / "kvcluster/__init__.py"
        and path.read_text().strip()
    ] == []


def test_no_file_has_a_name_that_says_nothing() -> None:
    assert [str(path) for path in SOURCES if BANNED_FILES.fullmatch(path.stem)] == []


def test_only_the_log_module_uses_structlog() -> None:
    """Any other logger would write what its caller gives it, prompts included."""
    assert [
        str(path.relative_to(ROOT))
        for path in SOURCES
        if path.is_relative_to(ROOT / "kvcluster")
        and path.name != "log.py"
        and re.search(r"import structlog|from structlog|getLogger\(__name__\)", path.read_text())
    ] == []


def test_only_the_command_line_reads_the_environment() -> None:
    assert [
        str(path.relative_to(ROOT))
        for path in SOURCES
        if path.is_relative_to(ROOT / "kvcluster")
        and not path.is_relative_to(ROOT / "kvcluster/cli")
        and re.search(r"\bos\.(environ|getenv)\b", path.read_text())
    ] == []


def test_the_folder_of_the_kernels_is_no_package() -> None:
    """Hugging Face publishes a package called kernels, which transformers imports by that name."""
    assert not (ROOT / "kernels/__init__.py").exists()
    assert (ROOT / "kernels/kvcluster_kernels/__init__.py").exists()


@pytest.mark.parametrize("package", ["kvcluster", "kernels/kvcluster_kernels"])
def test_both_packages_say_that_they_are_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").exists()


def test_every_dependency_has_a_reason() -> None:
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    first = lines.index("dependencies = [") + 1
    listed = lines[first : lines.index("]", first)]

    assert len(listed) == len(PROJECT["project"]["dependencies"])
    assert [line for line in listed if not re.search(r'",\s+# \w', line)] == []


def test_the_makefile_offers_a_newcomer_two_commands() -> None:
    makefile = (ROOT / "Makefile").read_text()

    assert re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE) == ["help demo test"]
    assert set(re.findall(r"^(\w+):", makefile, re.MULTILINE)) == {"help", "demo", "test"}


def test_ci_runs_what_a_newcomer_runs() -> None:
    assert (ROOT / ".ci/run").read_text().rstrip().endswith("make test")


@pytest.mark.slow
def test_the_command_line_starts_without_torch_ray_and_grpc() -> None:
    loaded = imported_by("import kvcluster.cli.main")

    assert loaded.isdisjoint({"torch", "ray", "grpc", "transformers", "numpy"})


@pytest.mark.slow
def test_the_package_itself_imports_nothing_heavy() -> None:
    loaded = imported_by("import kvcluster")

    assert loaded.isdisjoint({"torch", "ray", "grpc", "transformers", "numpy"})
