"""Attention over a cache that drops tokens is what its definition says, query by query."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from kvcluster.codec.basis import Basis
from kvcluster.codec.latent import LatentKeys, LatentValues
from kvcluster.quality import retained
from kvcluster.quality.retained import RetainedAttention
from kvcluster.quality.strict import ExactTokens, LayerCodecs, StrictAttention
from kvcluster.retention import registry as retention_registry
from kvcluster.retention.base import RetentionPolicy
from kvcluster.retention.full import FullRetention
from kvcluster.retention.heavy_hitters import HeavyHitters
from kvcluster.retention.key_diversity import KeyDiversity
from kvcluster.retention.scored import ScoredRetention
from kvcluster.retention.snap import Snap
from kvcluster.retention.window import WindowRetention
from kvcluster.selection import registry as selection_registry
from kvcluster.selection.base import BlockSelection
from kvcluster.selection.block_sparse import BlockSparse
from kvcluster.selection.estimated import Estimated
from kvcluster.selection.quest import Quest
from kvcluster.types import LayerGeometry
from tests.unit.quality.token_by_token import (
    EXACT,
    SIZE,
    Halving,
    Inputs,
    blocks_by_position,
    by_epochs,
    geometry,
    random_inputs,
)
from tests.unit.quality.toys import Coarse, Same, spec_of

# Some hundred float32 roundings of numbers near 1, summed in another order.
ATOL = 2e-5
SIZES = {"block_size": SIZE, "epoch_tokens": 12}
FULL, WINDOW = FullRetention(), WindowRetention(recent=8, block_size=SIZE)
SCORED: list[ScoredRetention] = [
    HeavyHitters(budget=0.4, **SIZES),
    Snap(budget=0.4, queries=5, **SIZES),
    KeyDiversity(budget=0.4, recent=0.2, **SIZES),
]
RETENTIONS: list[RetentionPolicy] = [FULL, WINDOW, *SCORED]
SELECTIONS: list[BlockSelection] = [
    BlockSparse(local=1, sinks=1, random=1, block_size=SIZE),
    Estimated(share=0.4, local=1, block_size=SIZE),
    Quest(tokens=8, sinks=0, local=1, block_size=SIZE),
]


def test_every_method_is_tested() -> None:
    assert {method.name for method in RETENTIONS} == retention_registry.METHODS.keys()
    assert {method.name for method in SELECTIONS} == selection_registry.METHODS.keys()


def id_of(part: object) -> str | None:
    return getattr(part, "name", None)


def run(
    layer: LayerGeometry,
    inputs: Inputs,
    retention: RetentionPolicy,
    codecs: LayerCodecs | None = None,
    *,
    exact: ExactTokens = EXACT,
    selection: BlockSelection | None = None,
    num_prompt_tokens: int = 0,
    sinks_H: Tensor | None = None,
) -> Tensor:
    attention = RetainedAttention(
        spec_of(layer),
        retention,
        lambda _layer: codecs,
        exact=exact,
        selection=selection,
        num_prompt_tokens=num_prompt_tokens,
    )
    return attention.attend(0, *inputs, sinks_H)


@pytest.mark.parametrize(
    "codecs",
    [
        LayerCodecs(None, None),
        LayerCodecs(Coarse(), Coarse()),
        LayerCodecs(Halving(), None),
        LayerCodecs(None, Halving()),
    ],
)
@pytest.mark.parametrize("num_tokens", [1, 12, 13, 75])
@pytest.mark.parametrize("retention", SCORED, ids=id_of)
def test_scored_retention_gives_the_loop_over_epochs_queries_and_keys(
    retention: ScoredRetention, num_tokens: int, codecs: LayerCodecs
) -> None:
    layer = geometry()
    inputs = random_inputs(layer, num_tokens)

    out_THD = run(layer, inputs, retention, codecs)

    wanted_THD, _ = by_epochs(layer, inputs, retention, codecs)
    torch.testing.assert_close(out_THD, wanted_THD, rtol=0, atol=ATOL)


def test_soft_caps_and_learned_sinks_count_once() -> None:
    layer = geometry(softcap=2.0)
    inputs, sinks_H = random_inputs(layer, 50), torch.tensor([0.5, -1.0, 2.0, 0.0])

    out_THD = run(layer, inputs, SCORED[0], sinks_H=sinks_H)

    wanted_THD, _ = by_epochs(layer, inputs, SCORED[0], LayerCodecs(None, None), sinks_H)
    torch.testing.assert_close(out_THD, wanted_THD, rtol=0, atol=ATOL)


@pytest.mark.parametrize("retention", SCORED, ids=id_of)
def test_the_definition_drops_and_never_resurrects(retention: ScoredRetention) -> None:
    _, history = by_epochs(
        geometry(), random_inputs(geometry(), 75), retention, LayerCodecs(None, None)
    )

    for place, (before, after) in enumerate(pairwise(history)):
        last = (place + 2) * retention.epoch_tokens
        for old, young in zip(before, after, strict=True):
            assert set(young) <= set(old) | set(range(last - retention.epoch_tokens, last))
            assert set(range(SIZE)) < set(young)
            assert len(young) == retention.counts(last).kept < last


@pytest.mark.parametrize("selection", SELECTIONS, ids=id_of)
@pytest.mark.parametrize("codecs", [None, LayerCodecs(Coarse(), Coarse())])
@pytest.mark.parametrize("retention", RETENTIONS, ids=id_of)
def test_a_selection_of_everything_changes_nothing(
    retention: RetentionPolicy, codecs: LayerCodecs | None, selection: BlockSelection
) -> None:
    layer = geometry()
    inputs = random_inputs(layer, 67)
    everything = {
        "block_sparse": BlockSparse(local=100, block_size=SIZE),
        "estimated": Estimated(share=1, block_size=SIZE),
        "quest": Quest(tokens=400, block_size=SIZE),
    }[selection.name]

    out_THD = run(layer, inputs, retention, codecs, selection=everything)

    wanted_THD = run(layer, inputs, retention, codecs)
    torch.testing.assert_close(out_THD, wanted_THD, rtol=0, atol=ATOL)
    # And the same method with less changes something, so it was asked.
    less_THD = run(layer, inputs, retention, codecs, selection=selection)
    assert float((less_THD - wanted_THD).abs().max()) > 0.01


@pytest.mark.parametrize("lag", [0, 2])
@pytest.mark.parametrize(
    "codecs", [None, LayerCodecs(Coarse(), None), LayerCodecs(Same(), Coarse())]
)
def test_full_retention_is_strict_attention(codecs: LayerCodecs | None, lag: int) -> None:
    layer = geometry()
    inputs, exact = random_inputs(layer, 70), ExactTokens(block_size=SIZE, lag=lag)
    strict = StrictAttention(spec_of(layer), lambda _layer: codecs, exact)
    attention = RetainedAttention(spec_of(layer), FULL, lambda _layer: codecs, exact=exact)
    selected = run(
        layer, inputs, FULL, codecs, exact=exact, selection=Quest(tokens=400, block_size=SIZE)
    )

    out_THD = attention.attend(0, *inputs, None)

    wanted_THD = strict.attend(0, *inputs, None)
    assert torch.equal(out_THD, wanted_THD)
    torch.testing.assert_close(selected, wanted_THD, rtol=0, atol=ATOL)
    assert attention.stored().total_bytes == strict.stored().total_bytes
    assert attention.stored().ratio == strict.stored().ratio


@pytest.mark.parametrize(
    "retention",
    [
        HeavyHitters(budget=1, **SIZES),
        Snap(budget=1, queries=5, **SIZES),
        KeyDiversity(budget=1, **SIZES),
        WindowRetention(recent=72, block_size=SIZE),
    ],
    ids=id_of,
)
def test_a_budget_of_everything_is_exact_attention(retention: RetentionPolicy) -> None:
    layer = geometry()
    inputs = random_inputs(layer, 70)
    attention = RetainedAttention(spec_of(layer), retention, exact=EXACT)

    out_THD = attention.attend(0, *inputs, None)

    torch.testing.assert_close(out_THD, run(layer, inputs, FULL), rtol=0, atol=ATOL)
    assert attention.stored().ratio == 1
    assert attention.read_share() == 1


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("selection", [None, *SELECTIONS], ids=id_of)
@pytest.mark.parametrize("codecs", [LayerCodecs(None, None), LayerCodecs(Coarse(), Coarse())])
@pytest.mark.parametrize("retention", [FULL, WINDOW], ids=id_of)
def test_tokens_in_place_give_the_loop_over_queries_and_keys(
    retention: RetentionPolicy,
    codecs: LayerCodecs,
    selection: BlockSelection | None,
    lag: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Several tiles, each of more than one block.
    monkeypatch.setattr(retained, "_TILE_TOKENS", 8)
    layer = geometry()
    inputs, exact = random_inputs(layer, 45), ExactTokens(block_size=SIZE, lag=lag)

    rules: dict[str, Any] = {"exact": exact, "selection": selection, "num_prompt_tokens": 22}

    out_THD = run(layer, inputs, retention, codecs, **rules)

    wanted_THD = blocks_by_position(layer, inputs, retention, codecs, **rules)
    torch.testing.assert_close(out_THD, wanted_THD, rtol=0, atol=ATOL)


@pytest.mark.parametrize("lag", [0, 2])
@pytest.mark.parametrize("selection", SELECTIONS, ids=id_of)
@pytest.mark.parametrize("retention", [FULL, WINDOW], ids=id_of)
def test_what_comes_later_changes_nothing(
    retention: RetentionPolicy, selection: BlockSelection, lag: int
) -> None:
    """Not even which form of a block's keys the selection looks at."""
    layer, codecs = geometry(), LayerCodecs(Coarse(), Coarse())
    inputs, exact = random_inputs(layer, 60), ExactTokens(block_size=SIZE, lag=lag)

    whole_THD = run(layer, inputs, retention, codecs, exact=exact, selection=selection)

    for num_tokens in range(44, 60):
        first = Inputs(*(x[:num_tokens] for x in inputs))
        first_THD = run(layer, first, retention, codecs, exact=exact, selection=selection)
        torch.testing.assert_close(first_THD, whole_THD[:num_tokens], rtol=0, atol=ATOL)


def test_a_selection_takes_survivors_and_the_open_epoch_as_one_list_of_blocks() -> None:
    """Zero queries weigh all keys alike, so the output is the mean of the values that are read."""
    layer, retention = geometry(), KeyDiversity(budget=0.5, **SIZES)
    inputs = random_inputs(layer, 34)
    inputs = inputs._replace(q_THD=torch.zeros_like(inputs.q_THD))
    selection = BlockSparse(local=2, sinks=1, block_size=SIZE)

    out_THD = run(layer, inputs, retention, selection=selection)

    _, history = by_epochs(layer, inputs, retention, LayerCodecs(None, None))
    for head, survivors in enumerate(history[1]):
        # 12 survivors are 3 blocks; the last token is in block 2 of its epoch, which is block 5.
        assert len(survivors) == 12
        seen = [*survivors[:SIZE], *range(28, 34)]
        wanted_D = inputs.v_TKD[seen, head].mean(dim=0)
        torch.testing.assert_close(out_THD[33, 2 * head], wanted_D, rtol=0, atol=ATOL)


def needle(num_tokens: int, place: int) -> tuple[LayerGeometry, Inputs]:
    """A token that all queries look at, whose value is 1; other values are 0. Its key is unlike
    the others, which have a mean in common, as real keys have."""
    layer = geometry()
    q_THD = torch.zeros(num_tokens, layer.num_query_heads, layer.key_dim)
    q_THD[..., 0] = 1
    k_TKD = torch.zeros(num_tokens, layer.num_kv_heads, layer.key_dim)
    k_TKD[..., 1] = 1
    k_TKD[place, :, 0] = 40
    v_TKD = torch.zeros_like(k_TKD)
    v_TKD[place] = 1
    return layer, Inputs(q_THD, k_TKD, v_TKD)


@pytest.mark.parametrize("place", [5, 30, 100])
@pytest.mark.parametrize("method", [HeavyHitters, Snap, KeyDiversity])
def test_what_all_queries_look_at_is_kept(
    method: Callable[..., RetentionPolicy], place: int
) -> None:
    layer, inputs = needle(120, place)

    out_THD = run(layer, inputs, method(budget=0.6, recent=0.2, block_size=SIZE, epoch_tokens=32))

    # Everything else together weighs 120 * exp(-16).
    assert float(out_THD[-1].min()) > 1 - 2e-5


def test_a_window_drops_what_leaves_it_whoever_looks_at_it() -> None:
    layer, inputs = needle(120, 13)

    out_THD = run(layer, inputs, WINDOW)

    # Token 13 is in block 3, which the queries of blocks 3 and 4 read.
    assert float(out_THD[19].min()) > 1 - 2e-5
    assert float(out_THD[20:].abs().max()) == 0


def test_quest_finds_the_block_of_a_needle() -> None:
    layer, inputs = needle(120, 37)
    attention = RetainedAttention(
        spec_of(layer),
        FULL,
        exact=EXACT,
        selection=Quest(tokens=16, block_size=SIZE),
        num_prompt_tokens=0,
    )

    out_THD = attention.attend(0, *inputs, None)

    assert float(out_THD[-1].min()) > 1 - 2e-5
    assert attention.read_share() < 0.3


@pytest.mark.parametrize("codecs", [None, LayerCodecs(Coarse(), Coarse())])
def test_bytes_are_those_of_the_survivors_and_the_open_epoch(codecs: LayerCodecs | None) -> None:
    layer, retention = geometry(), HeavyHitters(budget=0.4, **SIZES)
    attention = RetainedAttention(spec_of(layer), retention, lambda _layer: codecs, exact=EXACT)

    attention.attend(0, *random_inputs(layer, 65), None)

    # Five epochs end at 60: 24 survivors are 6 blocks, of which 5 are encoded in one byte each.
    stored, per_token = attention.stored(), 2 * (8 + 8)
    num_encoded = 0 if codecs is None else 20
    assert stored.encoded_bytes == num_encoded * per_token
    assert stored.exact_elements == (24 + 5 - num_encoded) * per_token
    assert stored.dropped_elements == (60 - 24) * per_token
    assert stored.ratio == pytest.approx(65 * per_token * 2 / stored.total_bytes)
    assert stored.bytes_per_token == pytest.approx(stored.total_bytes / 65)


@pytest.mark.parametrize("num_tokens", [3, 8, 45])
def test_bytes_of_a_window_are_those_of_its_blocks_and_the_first(num_tokens: int) -> None:
    layer = geometry()
    attention = RetainedAttention(spec_of(layer), WINDOW, exact=EXACT)

    attention.attend(0, *random_inputs(layer, num_tokens), None)

    num_held = {3: 3, 8: 8, 45: 4 + 4 + 1}[num_tokens]
    assert attention.stored().exact_elements == num_held * 2 * (8 + 8)
    assert attention.stored().ratio == pytest.approx(num_tokens / num_held)


@pytest.mark.parametrize("retention", RETENTIONS[1:], ids=id_of)
def test_layers_with_a_window_of_the_models_own_are_left_alone(retention: RetentionPolicy) -> None:
    layer = geometry(window=9)
    inputs, codecs = random_inputs(layer, 50), LayerCodecs(Coarse(), Coarse())
    strict = StrictAttention(spec_of(layer), lambda _layer: codecs, EXACT)
    attention = RetainedAttention(
        spec_of(layer), retention, lambda _layer: codecs, exact=EXACT, selection=SELECTIONS[0]
    )

    out_THD = attention.attend(0, *inputs, None)

    assert torch.equal(out_THD, strict.attend(0, *inputs, None))
    assert attention.stored().total_bytes == strict.stored().total_bytes


@pytest.mark.parametrize("retention", SCORED, ids=id_of)
def test_a_lag_is_for_layers_with_a_window_alone(retention: ScoredRetention) -> None:
    """In the others the open epoch is exact."""
    codecs, lagging = LayerCodecs(Coarse(), Coarse()), ExactTokens(block_size=SIZE, lag=2)
    for layer, is_moved in ((geometry(), False), (geometry(window=30), True)):
        inputs = random_inputs(layer, 50)

        out_THD = run(layer, inputs, retention, codecs, exact=lagging)

        assert torch.equal(out_THD, run(layer, inputs, retention, codecs)) != is_moved


def test_bytes_of_all_layers_are_added() -> None:
    layers = (geometry(), geometry(window=8), geometry())
    attention = RetainedAttention(spec_of(*layers), SCORED[0], exact=EXACT)
    for number, layer in enumerate(layers):
        attention.attend(number, *random_inputs(layer, 49), None)

    per_token = 2 * (8 + 8)
    assert attention.stored().exact_elements == (2 * (20 + 1) + 9) * per_token
    assert attention.stored().dropped_elements == 2 * (48 - 20) * per_token
    assert attention.stored().num_tokens == 49


@pytest.mark.parametrize("retention", RETENTIONS, ids=id_of)
def test_bfloat16_tensors_give_bfloat16_within_its_rounding(retention: RetentionPolicy) -> None:
    layer, codecs = geometry(), LayerCodecs(Coarse(), Coarse())
    halves = Inputs(*(x.bfloat16() for x in random_inputs(layer, 50)))

    out_THD = run(layer, halves, retention, codecs)

    wanted_THD = run(layer, Inputs(*(x.float() for x in halves)), retention, codecs)
    assert out_THD.dtype == torch.bfloat16
    # One rounding of the result, to 8 bits.
    torch.testing.assert_close(out_THD.float(), wanted_THD, rtol=2**-8, atol=ATOL)


@pytest.mark.gpu
@pytest.mark.parametrize("selection", [None, *SELECTIONS], ids=id_of)
@pytest.mark.parametrize("codecs", [None, LayerCodecs(Coarse(), Coarse())])
@pytest.mark.parametrize("retention", RETENTIONS, ids=id_of)
def test_a_gpu_keeps_and_reads_the_same(
    retention: RetentionPolicy, codecs: LayerCodecs | None, selection: BlockSelection | None
) -> None:
    layer = geometry()
    inputs = random_inputs(layer, 75)

    out_THD = run(
        layer, Inputs(*(x.cuda() for x in inputs)), retention, codecs, selection=selection
    )

    wanted_THD = run(layer, inputs, retention, codecs, selection=selection)
    torch.testing.assert_close(out_THD.cpu(), wanted_THD, rtol=0, atol=ATOL)


def identity_basis(width: int) -> Basis:
    eye = torch.eye(width)
    return Basis(mean_F=torch.zeros(width), down_FC=eye, up_CF=eye, spectrum_F=torch.ones(width))


def test_codecs_that_need_the_heads_of_one_token_are_refused() -> None:
    layer = geometry()
    values = LatentValues(identity_basis(16), num_heads=2, rank=8)
    keys = LatentKeys(identity_basis(16), num_heads=2, rank=8, rotation=None)

    for codecs, array in ((LayerCodecs(None, values), "values"), (LayerCodecs(keys, None), "keys")):
        with pytest.raises(ValueError, match=f"the {array} of all .* ask for heads=shared"):
            run(layer, random_inputs(layer, 30), SCORED[0], codecs)


@pytest.mark.parametrize(
    ("retention", "exact", "selection", "complaint"),
    [
        (WindowRetention(recent=64), EXACT, None, "one block size"),
        (HeavyHitters(budget=0.5), EXACT, None, "one block size"),
        (FULL, EXACT, Quest(tokens=192), "one block size"),
    ],
    ids=str,
)
def test_parts_that_do_not_fit_together_are_refused(
    retention: RetentionPolicy,
    exact: ExactTokens,
    selection: BlockSelection | None,
    complaint: str,
) -> None:
    with pytest.raises(ValueError, match=complaint):
        RetainedAttention(spec_of(geometry()), retention, exact=exact, selection=selection)
