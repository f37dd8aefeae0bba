"""The merge kernel against its twin in float64, in Triton's interpreter."""

import math

import pytest
import torch
from kvcluster_kernels.merge import merge, merge_reference
from kvcluster_kernels.prefill_arguments import PartialAttention

UNIT = torch.finfo(torch.float32).eps


def partials_of(
    num_partials: int, num_tokens: int, num_heads: int, dim: int
) -> list[PartialAttention]:
    """Random partials, each blind in some rows, all of them in row 1."""
    torch.manual_seed(0)
    partials = []
    for index in range(num_partials):
        out_THD = torch.randn(num_tokens, num_heads, dim)
        lse_TH = torch.randn(num_tokens, num_heads) * 20
        blind_T = torch.zeros(num_tokens, dtype=torch.bool)
        blind_T[index::3] = True
        blind_T[1:2] = True
        out_THD[blind_T] = 0.0
        lse_TH[blind_T] = -math.inf
        partials.append(PartialAttention(out_THD, lse_TH))
    return partials


def assert_merged(
    found: PartialAttention, partials: list[PartialAttention], sinks_H: torch.Tensor | None = None
) -> None:
    """An exponent of at most 100 is rounded by 100 units; each partial adds a few more."""
    right = merge_reference(
        [PartialAttention(out.double(), lse.double()) for out, lse in partials],
        sinks_H=None if sinks_H is None else sinks_H.double(),
    )
    largest = max((float(out.abs().max()) for out, _ in partials if out.numel()), default=0.0)
    error = (200 + 8 * len(partials)) * UNIT
    assert torch.equal(found.lse_TH.isfinite(), right.lse_TH.isfinite())
    torch.testing.assert_close(
        found.out_THD.double(), right.out_THD, rtol=0, atol=error * max(largest, 1.0)
    )
    torch.testing.assert_close(found.lse_TH.double(), right.lse_TH, rtol=4 * UNIT, atol=error)


@pytest.mark.parametrize("num_partials", [1, 2, 3, 11])
@pytest.mark.parametrize("dim", [64, 96])
def test_partials_merge_to_what_the_definition_gives(
    num_partials: int, dim: int, interpreted: torch.device
) -> None:
    partials = partials_of(num_partials, 7, 3, dim)

    assert_merged(merge(partials), partials)


def test_sinks_are_one_more_logit_a_head(interpreted: torch.device) -> None:
    partials = partials_of(2, 5, 3, 32)
    sinks_H = torch.randn(3)

    assert_merged(merge(partials, sinks_H=sinks_H), partials, sinks_H)


def test_a_merge_may_be_written_over_one_of_its_partials(interpreted: torch.device) -> None:
    partials = partials_of(3, 5, 3, 32)
    expected = merge(partials)
    own = PartialAttention(partials[1].out_THD.clone(), partials[1].lse_TH.clone())

    merge([partials[0], own, partials[2]], out=own)

    assert torch.equal(own.out_THD, expected.out_THD)
    assert torch.equal(own.lse_TH, expected.lse_TH)


def test_no_rows_merge_to_no_rows(interpreted: torch.device) -> None:
    merged = merge(partials_of(2, 0, 3, 32))

    assert merged.out_THD.shape == (0, 3, 32)
    assert merged.lse_TH.shape == (0, 3)


def test_partials_of_different_rows_are_refused(interpreted: torch.device) -> None:
    with pytest.raises(ValueError, match="different rows"):
        merge([*partials_of(1, 4, 3, 32), *partials_of(1, 5, 3, 32)])
