"""Prefill over chosen blocks in Triton's interpreter, beside the definition."""

from dataclasses import replace

import pytest
import torch
from kvcluster_kernels import block_lists, prefill_reference
from kvcluster_kernels.prefill_arguments import Causal
from kvcluster_kernels.sparse_prefill import SparseTiles, TileBlocks, sparse_prefill

from tests.kernels.prefill_cases import Arguments, Case, arguments

CASES = (
    Case(name="blocks of 16", block_tokens=16),
    Case(name="in line"),
    Case(name="head 96", key_dim=96, value_dim=64, block_tokens=16),
    Case(name="head 256", key_dim=256, value_dim=256, num_heads=2, block_tokens=16),
    Case(name="causal", block_tokens=16, causal=Causal(start=38)),
    Case(name="zigzag", block_tokens=16, causal=Causal(start=3, split=18, resume=56)),
    Case(name="window", num_tokens=75, block_tokens=16, causal=Causal(window=20)),
    Case(name="softcap", block_tokens=16, softcap=2.0),
    Case(name="half precision", dtype=torch.bfloat16, block_tokens=16),
    Case(name="many heads", num_heads=24, block_tokens=16),
    Case(name="no token", num_tokens=0),
)


def drawn_lists(
    case: Case, tile_tokens: int, device: torch.device, num_lists: int | None = None
) -> TileBlocks:
    """Some of the blocks, in any order, other ones for each tile and head (each KV head, or so many
    heads); the first list of each head is empty, the last one has all of them."""
    generator = torch.Generator().manual_seed(1)
    block_tokens = case.block_tokens or 16
    num_blocks = -(-case.num_keys // block_tokens)
    num_tiles = -(-case.num_tokens // tile_tokens)
    shape = (num_lists or case.num_kv_heads, num_tiles)
    blocks_GUL = torch.rand(*shape, num_blocks, generator=generator).argsort(-1).int()
    counts_GU = torch.randint(1, num_blocks + 1, shape, generator=generator).int()
    counts_GU[:, :1] = 0
    counts_GU[:, -1:] = num_blocks
    # Behind a list's end may be anything.
    blocks_GUL[torch.arange(num_blocks) >= counts_GU[..., None]] = 1 << 28
    return TileBlocks(blocks_GUL.to(device), counts_GU.to(device), tile_tokens, block_tokens)


def check(
    case: Case,
    device: torch.device,
    tile_tokens: int = 8,
    num_lists: int | None = None,
    tiles: SparseTiles | None = None,
) -> None:
    given = arguments(case, device)
    chosen = drawn_lists(case, tile_tokens, device, num_lists)
    rules = {"scale": given.scale, "causal": given.causal, "softcap": given.softcap}

    found = sparse_prefill(given.q_THD, given.keys, chosen, **rules, tiles=tiles)

    keys = given.keys._replace(k_PKSD=given.keys.k_PKSD.double(), v_PKSD=given.keys.v_PKSD.double())
    want = block_lists.sparse_prefill(given.q_THD.double(), keys, chosen, **rules)
    assert torch.equal(found.lse_TH == -torch.inf, want.lse_TH == -torch.inf)
    assert not found.out_THD[want.lse_TH == -torch.inf].any()
    absolute = keys._replace(v_PKSD=keys.v_PKSD.abs())
    magnitude = block_lists.sparse_prefill(given.q_THD.double(), absolute, chosen, **rules)
    bound = relative_error(given)
    assert bool(((found.out_THD - want.out_THD).abs() <= bound * magnitude.out_THD).all())
    seen_TH = want.lse_TH > -torch.inf
    error_T = (found.lse_TH.double() - want.lse_TH)[seen_TH].abs()
    assert error_T.numel() == 0 or error_T.max() <= bound


def relative_error(given: Arguments) -> float:
    """Of a weight: twice that of a score, a float32 sum of D products and a few operations, its own
    rounding to the dtype of values, and sums of as many products as there are keys."""
    unit = torch.finfo(torch.float32).eps
    k_KSD = prefill_reference.keys_in_line(given.keys)[0].float()
    if not given.q_THD.numel():
        return 0.0
    largest = given.q_THD.float().norm(dim=-1).max() * k_KSD.norm(dim=-1).max() * given.scale
    rounding = float(unit * (2 * (given.q_THD.shape[2] + 16) * (largest + 1) + k_KSD.shape[1]))
    return rounding + torch.finfo(given.q_THD.dtype).eps


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_tile_reads_its_list(case: Case, interpreted: torch.device) -> None:
    check(case, interpreted)


@pytest.mark.parametrize("tile_tokens", [1, 5, 64])
def test_tiles_of_any_size(tile_tokens: int, interpreted: torch.device) -> None:
    check(replace(CASES[0], num_heads=8), interpreted, tile_tokens)


@pytest.mark.parametrize("block_m", [16, 64])
@pytest.mark.parametrize("index", [0, 1, 4, 6])
def test_products_ahead_change_nothing(index: int, block_m: int, interpreted: torch.device) -> None:
    check(CASES[index], interpreted, tiles=SparseTiles(block_m, 1, is_ahead=True))


@pytest.mark.parametrize("num_lists", [1, 8])
@pytest.mark.parametrize("index", [0, 4])
def test_lists_for_all_heads_and_for_each(
    index: int, num_lists: int, interpreted: torch.device
) -> None:
    check(replace(CASES[index], num_heads=8), interpreted, num_lists=num_lists)


def test_lists_of_all_blocks_give_attention_over_all_keys(interpreted: torch.device) -> None:
    given = arguments(CASES[0], interpreted)
    blocks_GUL = torch.arange(5, dtype=torch.int32).expand(2, 1, 5).contiguous()
    chosen = TileBlocks(blocks_GUL, torch.full((2, 1), 5, dtype=torch.int32), 37, 16)

    found = sparse_prefill(given.q_THD, given.keys, chosen, scale=given.scale)

    want = prefill_reference.prefill(given.q_THD, given.keys, scale=given.scale)
    # Both in float32, of numbers of order 1.
    torch.testing.assert_close(found.out_THD, want.out_THD, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.lse_TH, want.lse_TH, rtol=1e-5, atol=1e-5)


def test_lists_of_other_blocks_than_the_cache_has_are_refused() -> None:
    given = arguments(CASES[0], torch.device("cpu"))
    chosen = drawn_lists(CASES[0], 8, torch.device("cpu"))._replace(block_tokens=32)

    with pytest.raises(ValueError, match="do not fit a cache"):
        sparse_prefill(given.q_THD, given.keys, chosen, scale=given.scale)


def test_lists_for_other_tiles_are_refused() -> None:
    given = arguments(CASES[0], torch.device("cpu"))
    chosen = drawn_lists(CASES[0], 16, torch.device("cpu"))._replace(tile_tokens=8)

    with pytest.raises(ValueError, match="want lists for"):
        sparse_prefill(given.q_THD, given.keys, chosen, scale=given.scale)
