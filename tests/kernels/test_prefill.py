"""The portable prefill kernel against its twin in float64, in Triton's interpreter."""

import pytest
import torch
from kvcluster_kernels import prefill_reference, prefill_tl
from kvcluster_kernels.prefill_arguments import Causal, Keys
from kvcluster_kernels.prefill_tl import Tiles

from tests.kernels import prefill_cases
from tests.kernels.prefill_cases import (
    DIMS,
    LAYOUTS,
    RULES,
    Case,
    arguments,
    assert_within_rounding,
    exact,
)

SMALL = Tiles(32, 32, 4, 2)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("case", [*DIMS, *RULES, *LAYOUTS], ids=lambda case: case.name)
def test_the_kernel_gives_what_the_definition_gives(case: Case, interpreted: torch.device) -> None:
    given = arguments(case, interpreted)

    found = prefill_tl.prefill(
        given.q_THD, given.keys, **given.rules(), tiles=SMALL, num_splits=case.num_splits
    )

    # The interpreter multiplies numbers of 16 bits as float32, weights included.
    assert_within_rounding(found, given)


@pytest.mark.parametrize("is_ahead", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        Case(name="full", num_keys=61),
        Case(name="whole steps", num_keys=64, is_carried=True),
        Case(name="one key", num_keys=1),
        *(case for case in RULES if case.value_dim == 32),
    ],
    ids=lambda case: case.name,
)
def test_keys_that_the_copy_engine_fetches(
    case: Case, is_ahead: bool, interpreted: torch.device
) -> None:
    given = arguments(case, interpreted)
    tiles = SMALL._replace(is_copied=True, is_ahead=is_ahead)

    found = prefill_tl.prefill(
        given.q_THD, given.keys, **given.rules(), tiles=tiles, num_splits=case.num_splits
    )

    assert_within_rounding(found, given)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("block_tokens", [None, 16])
def test_numbers_of_16_bits_are_read_as_they_are(
    dtype: torch.dtype, block_tokens: int | None, interpreted: torch.device
) -> None:
    case = Case(name="16 bits", dtype=dtype, block_tokens=block_tokens, causal=Causal(start=38))
    given = arguments(case, interpreted)

    found = prefill_tl.prefill(given.q_THD, given.keys, **given.rules(), tiles=SMALL)

    assert_within_rounding(found, given)


@pytest.mark.parametrize("tiles", [Tiles(16, 64, 4, 1), Tiles(64, 16, 4, 1)], ids=str)
def test_tiles_change_nothing_but_rounding(tiles: Tiles, interpreted: torch.device) -> None:
    case = Case(name="tiles", causal=Causal(3, 18, 56, 30), block_tokens=32)
    given = arguments(case, interpreted)

    found = prefill_tl.prefill(given.q_THD, given.keys, **given.rules(), tiles=tiles)

    assert_within_rounding(found, given)


def test_an_output_of_16_bits_is_the_float32_one_rounded(interpreted: torch.device) -> None:
    given = arguments(Case(name="fp16 out"), interpreted)

    whole = prefill_tl.prefill(given.q_THD, given.keys, **given.rules(), tiles=SMALL)
    rounded = prefill_tl.prefill(
        given.q_THD, given.keys, **given.rules(), tiles=SMALL, out_dtype=torch.float16
    )

    assert torch.equal(rounded.out_THD, whole.out_THD.half())
    assert torch.equal(rounded.lse_TH, whole.lse_TH)


def test_two_spans_of_keys_by_carry_are_all_keys_at_once(interpreted: torch.device) -> None:
    given = arguments(Case(name="spans", num_keys=80), interpreted)
    k_KSD, v_KSD = prefill_reference.keys_in_line(given.keys)

    first = prefill_tl.prefill(
        given.q_THD, Keys.in_line(k_KSD[:, :33], v_KSD[:, :33]), scale=given.scale, tiles=SMALL
    )
    both = prefill_tl.prefill(
        given.q_THD,
        Keys.in_line(k_KSD[:, 33:], v_KSD[:, 33:]),
        scale=given.scale,
        tiles=SMALL,
        carry=first,
    )

    assert_within_rounding(both, given)


def test_queries_may_be_rows_of_a_wider_tensor(interpreted: torch.device) -> None:
    given = arguments(Case(name="strides"), interpreted)
    wide_THD = torch.full((37, 8, 48), torch.nan)
    wide_THD[:, 1:7, :32] = given.q_THD

    found = prefill_tl.prefill(wide_THD[:, 1:7, :32], given.keys, **given.rules(), tiles=SMALL)

    assert_within_rounding(found, given)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"scale": 0.0}, "scale"),
        ({"causal": Causal(0, 10, 3)}, "second piece"),
        ({"keys": Keys(torch.zeros(1, 4, 8, 32), torch.zeros(1, 4, 8, 32), 8)}, "4 KV heads"),
        ({"keys": Keys(torch.zeros(1, 2, 8, 32), torch.zeros(1, 2, 8, 32), 9)}, "one page"),
        ({"keys": Keys(torch.zeros(1, 2, 8, 16), torch.zeros(1, 2, 8, 16), 8)}, "keys of 16"),
        ({"keys": Keys(torch.zeros(1, 2, 8, 32), torch.zeros(1, 2, 7, 32), 7)}, "values"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arguments_that_do_not_fit_are_refused_with_the_reason(
    wrong: dict[str, object], words: str, interpreted: torch.device
) -> None:
    given = arguments(Case(name="wrong"), interpreted)
    taken = {"keys": given.keys, **given.rules(), **wrong}

    with pytest.raises(ValueError, match=words):
        prefill_tl.prefill(given.q_THD, **taken)


def test_the_definition_sees_what_a_mask_of_positions_shows() -> None:
    """Positions by hand: rows 0-1 are keys 1-2, rows 2-3 are keys 5-6, each sees two keys."""
    mask_TS = prefill_reference.visible(Causal(1, 2, 5, 2), 4, 7, torch.device("cpu"))

    assert [row.nonzero().flatten().tolist() for row in mask_TS] == [[0, 1], [1, 2], [4, 5], [5, 6]]


@pytest.mark.parametrize("case", RULES, ids=lambda case: case.name)
def test_the_exact_result_is_the_same_in_pieces(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments(case, torch.device("cpu"))

    at_once = exact(given)
    monkeypatch.setattr(prefill_cases, "_MAX_LOGITS", 5 * case.num_heads * case.num_keys)
    in_pieces = exact(given)

    torch.testing.assert_close(in_pieces.out_THD, at_once.out_THD, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(in_pieces.lse_TH, at_once.lse_TH, rtol=1e-12, atol=1e-12)
