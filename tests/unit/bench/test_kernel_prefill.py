from collections.abc import Callable

import pytest
import torch
from kvcluster_kernels.prefill_arguments import Keys
from kvcluster_kernels.prefill_reference import keys_in_line, visible
from triton.errors import TritonError

from kvcluster.bench.kernel_failures import runs
from kvcluster.bench.kernel_prefill import SHAPES, PrefillShape, in_pages, median_times


def broken() -> None:
    raise TritonError("at 23:18:\n  unexpected type fp32")


class ScriptedTimer:
    """Runs calls, each of which takes three microseconds."""

    is_over = False

    def microseconds(self, call: Callable[[], object], *, repeats: int) -> float:
        call()
        return 3.0


def test_a_kernel_that_does_not_compile_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert not runs("D128 full portable", broken)

    said = capsys.readouterr().err
    assert said == "D128 full portable: TritonError: at 23:18: unexpected type fp32\n"


def test_a_kernel_that_fails_costs_no_other_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    shape = PrefillShape(num_tokens=64, num_keys=1024, dim=64)

    taken = median_times(ScriptedTimer(), shape, {"first": list, "broken": broken, "last": list})

    assert taken == {"first": 3.0, "last": 3.0}
    assert capsys.readouterr().err.count("broken: TritonError") == 2


@pytest.mark.parametrize(("num_tokens", "num_keys"), [(5, 5), (3, 8), (8, 8)])
def test_operations_are_counted_over_the_keys_that_rows_see(num_tokens: int, num_keys: int) -> None:
    shape = PrefillShape(num_tokens=num_tokens, num_keys=num_keys, dim=64, is_causal=True)
    assert shape.causal is not None

    mask_TS = visible(shape.causal, num_tokens, num_keys, torch.device("cpu"))

    # Two products of two operations each for every number of every head.
    assert shape.flops == 4 * int(mask_TS.sum()) * 64 * 32


def test_pages_hold_the_keys_that_lie_in_line() -> None:
    x_KSD = torch.randn(3, 1024, 4)
    ids_N = torch.randperm(16)

    x_PKSD = in_pages(x_KSD, ids_N)

    paged, _ = keys_in_line(Keys(x_PKSD, x_PKSD, 1024, ids_N.int(), 64))
    assert torch.equal(paged, x_KSD)


def test_shapes_have_names_of_their_own() -> None:
    assert len({str(shape) for shape in SHAPES}) == len(SHAPES)
