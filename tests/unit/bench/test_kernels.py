import ast
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from kvcluster.bench.kernels import SUITES, run
from kvcluster.errors import ConfigError


@pytest.mark.parametrize("module", SUITES.values(), ids=SUITES)
def test_every_suite_is_a_module_with_measure(module: str) -> None:
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None

    tree = ast.parse(Path(spec.origin).read_text())

    assert "measure" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_an_unknown_suite_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="no suite 'decodes'; there are decode"):
        run(["decodes"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_no_suite_is_run() -> None:
    with pytest.raises(ConfigError, match="no CUDA device"):
        run()


@pytest.mark.parametrize("module", ["kvcluster.bench.kernels", *SUITES.values()])
def test_the_suites_need_no_package_that_a_bare_gpu_machine_lacks(module: str) -> None:
    statement = f"import sys, {module}; print(*sys.modules)"

    listing = subprocess.run(
        [sys.executable, "-c", statement], capture_output=True, text=True, check=True
    )

    loaded = {name.partition(".")[0] for name in listing.stdout.split()}
    assert not loaded & {"ray", "grpc", "google", "typer", "structlog"}
