"""Where kernels run in tests: interpreted on a CPU, or compiled on a GPU for tests marked `gpu`.

`tests/conftest.py` asks Triton for its interpreter before anything imports Triton. The interpreter
shows what a kernel computes; what it becomes is shown by `sm90.py`.
"""

import pytest
import torch
import triton

from tests.kernels import interpreter_patches

interpreter_patches.install()


@pytest.fixture(scope="session")
def interpreted() -> torch.device:
    """The device of tests in the interpreter, which are left out where kernels are compiled."""
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here: pytest -m gpu runs the same cases on the GPU")
    if triton.__version__.startswith("3.6."):
        # With NumPy < 2.4 and DeprecationWarning ignored, this release runs them too.
        pytest.skip("the interpreter of Triton 3.6 takes no loop bound that a kernel computed")
    return torch.device("cpu")


@pytest.fixture(scope="session")
def gpu() -> torch.device:
    """The device of tests marked `gpu`."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda")
