"""Attention that each key got, in Triton's interpreter, beside the definition."""

import math
from dataclasses import replace

import pytest
import torch
from kvcluster_kernels import column_sums_plain, prefill_reference
from kvcluster_kernels.column_sums import column_sums
from kvcluster_kernels.prefill_arguments import BlockBound, Causal

from tests.kernels.prefill_cases import Arguments, Case, arguments, exact

CASES = (
    Case(name="all keys"),
    Case(name="head 64", key_dim=64, value_dim=64),
    Case(name="head 96", key_dim=96, value_dim=96),
    Case(name="head 256", key_dim=256, value_dim=256, num_heads=2),
    Case(name="chunk after history", causal=Causal(start=38)),
    Case(name="zigzag", num_keys=150, causal=Causal(start=3, split=18, resume=56)),
    Case(name="window", num_tokens=75, causal=Causal(window=20)),
    Case(name="rows before all keys", causal=Causal(start=-20)),
    Case(name="softcap", softcap=2.0, causal=Causal(start=38)),
    Case(name="blocks of 16", block_tokens=16, causal=Causal(start=38)),
    Case(name="splits", num_splits=3, num_tokens=90),
    Case(name="half precision", dtype=torch.bfloat16, num_keys=150),
    Case(name="no token", num_tokens=0),
    Case(name="no key", num_keys=0),
)


def check(case: Case, device: torch.device) -> None:
    given = arguments(case, device)
    rules = {"scale": given.scale, "causal": given.causal, "softcap": given.softcap}
    lse_TH = exact(given).lse_TH

    found_KS = column_sums(
        given.q_THD, given.keys, lse_TH.float(), num_splits=case.num_splits, **rules
    )

    keys = given.keys._replace(k_PKSD=given.keys.k_PKSD.double())
    want_KS = column_sums_plain.column_sums(given.q_THD.double(), keys, lse_TH, **rules)
    assert found_KS.shape == want_KS.shape
    assert not found_KS.isnan().any()
    assert bool(((found_KS - want_KS).abs() <= relative_error(given) * want_KS).all())
    # Every row that sees a key hands out 1.
    seeing_H = (lse_TH > -math.inf).sum(0)
    seeing_K = seeing_H.view(case.num_kv_heads, -1).sum(1).double()
    torch.testing.assert_close(want_KS.sum(1), seeing_K, rtol=1e-9, atol=1e-9)


def relative_error(given: Arguments) -> float:
    """Of a weight: that of the score, a float32 sum of D products, of a few operations on it and
    the LSE, which is rounded to float32; and of sums of as many weights as there are rows."""
    unit = torch.finfo(torch.float32).eps
    k_KSD = prefill_reference.keys_in_line(given.keys)[0].float()
    if not given.q_THD.numel() or not k_KSD.numel():
        return 0.0
    largest = given.q_THD.float().norm(dim=-1).max() * k_KSD.norm(dim=-1).max() * given.scale
    num_rows = given.q_THD.shape[0] * given.q_THD.shape[1]
    return unit * float((given.q_THD.shape[2] + 16) * (largest + 1) * 2 + num_rows)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_sums_are_those_of_the_definition(case: Case, interpreted: torch.device) -> None:
    check(case, interpreted)


def test_rows_that_saw_no_key_elsewhere_either_add_nothing(interpreted: torch.device) -> None:
    given = arguments(CASES[0], interpreted)
    lse_TH = torch.full(given.q_THD.shape[:2], -torch.inf)

    assert not column_sums(given.q_THD, given.keys, lse_TH, scale=given.scale).any()


def test_a_bound_that_moves_is_refused() -> None:
    given = arguments(CASES[0], torch.device("cpu"))
    causal = Causal(bound=BlockBound(16, 1, is_before=True))

    with pytest.raises(ValueError, match="want rows that see all keys"):
        column_sums(given.q_THD, given.keys, exact(given).lse_TH, scale=given.scale, causal=causal)


def test_an_lse_of_other_heads_is_refused() -> None:
    given = arguments(replace(CASES[0]), torch.device("cpu"))

    with pytest.raises(ValueError, match="LSE of"):
        column_sums(given.q_THD, given.keys, torch.zeros(37, 2), scale=given.scale)
