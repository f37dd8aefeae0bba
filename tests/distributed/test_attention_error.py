"""The measured attention error against its definition, over any ranks."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from kvcluster.attention.local import attend_plain
from kvcluster.attention.part import CacheRules
from kvcluster.cache.exact_region import ExactRegion
from kvcluster.cache.store import in_blocks, in_line
from kvcluster.codec.joined import member_of
from kvcluster.codec.method import LayerCodec
from kvcluster.types import Policy
from tests.attention_group import AttentionGroup
from tests.codec_models import EVERY_CODEC, JOINED, Served, calibrated_codecs
from tests.reference_group import ReferenceGroup
from tests.scripted_model import ScriptedModel, geometry

BLOCK_SIZE = 16
STEPS = (64, 70, 1, 1, 16, 40)
MODEL = ScriptedModel(geometry(), geometry(softcap=5.0), max_tokens=sum(STEPS))
CODECS = calibrated_codecs(MODEL.spec)
ORDINARY = Served(MODEL, CODECS)
STACKED_MODEL = ScriptedModel(geometry(), geometry(), geometry(), max_tokens=sum(STEPS))
STACKED = Served(STACKED_MODEL, calibrated_codecs(STACKED_MODEL.spec))
"""Layers that can share a latent."""


def restored(
    codecs: Sequence[LayerCodec], exact: Sequence[Sequence[Tensor]], positions_BS: Tensor
) -> list[list[Tensor]]:
    """k_KSD and v_KSD of each layer after all of them were encoded, by themselves or together."""
    found: list[list[Tensor]] = [[] for _ in codecs]
    for array in (0, 1):
        of_array = [codec[array] for codec in codecs]
        blocks = [in_blocks(x_KSD[array], BLOCK_SIZE) for x_KSD in exact]
        planes: tuple[Tensor, ...] = ()
        for layer, codec in enumerate(of_array):
            member = member_of(codec)
            if member is None:
                planes = codec.encode(blocks[layer], positions_BS)
            elif member.place == 0:
                together = blocks[layer : layer + member.num_layers]
                planes = member.whole.encode(torch.cat(together, dim=1), positions_BS)
            found[layer].append(in_line(codec.decode(planes, positions_BS)))
    return found


def defined(
    group: AttentionGroup, rank: int, start: int, end: int, subject: Served
) -> tuple[float, float]:
    """What a rank should measure in the step that computes [start, end)."""
    own = [p for p in range(start, end) if group.table.owner(p) == rank]
    region = ExactRegion(group.rules.exact_blocks, group.rules.encoded_step)
    first, last = (
        max(1, region.first_block(position // BLOCK_SIZE)) * BLOCK_SIZE for position in (start, end)
    )
    blocks = [p for p in range(first, last, BLOCK_SIZE) if group.table.owner(p) == rank]
    if not own or not blocks:
        return 0.0, 0.0
    tokens = torch.cat([torch.arange(p, p + BLOCK_SIZE) for p in blocks])
    squared_error = squared_size = 0.0
    script, layers = subject.model.script, subject.model.spec.layers
    exact = [[x_TKD[tokens].transpose(0, 1) for x_TKD in (k, v)] for _, k, v in script]
    codecs = subject.codecs.layers(group.rules.codec)
    encoded = restored(codecs, exact, tokens.reshape(-1, BLOCK_SIZE))
    for layer, (q_THD, _, _) in enumerate(script):
        q_1HD = q_THD[own[-1]][None]
        before, after = (
            attend_plain(q_1HD, k_KSD, v_KSD, layers[layer]).out_THD
            for k_KSD, v_KSD in (exact[layer], encoded[layer])
        )
        squared_error += float((after - before).square().sum())
        squared_size += float(before.square().sum())
    return squared_error, squared_size


@pytest.mark.parametrize("codec", [codec for codec in EVERY_CODEC if codec != "exact"])
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_each_rank_measures_its_last_row_over_its_new_blocks(codec: str, num_ranks: int) -> None:
    check(ORDINARY, CacheRules(codec, exact_blocks=1), num_ranks, STEPS)


@pytest.mark.parametrize("codec", JOINED)
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_each_rank_measures_every_layer_of_those_that_are_written_together(
    codec: str, num_ranks: int
) -> None:
    rules = CacheRules(codec, exact_blocks=4, encoded_step=4)

    check(STACKED, rules, num_ranks, (64, 50, 14, 63, 1))


def check(subject: Served, rules: CacheRules, num_ranks: int, steps: Sequence[int]) -> None:
    group = AttentionGroup(*subject, rules, num_ranks=num_ranks, block_size=BLOCK_SIZE)
    measured = []
    for size in steps:
        start = group.num_tokens
        group.run(size)
        expected = [defined(group, rank, start, start + size, subject) for rank in range(num_ranks)]
        # Differences of float32 outputs near 1: each is rounded to 1e-7, and squared.
        torch.testing.assert_close(group.errors, expected, rtol=2e-3, atol=1e-9)
        measured += group.errors

    assert sum(size for _, size in measured) > 0


def test_an_exact_cache_measures_nothing() -> None:
    group = AttentionGroup(MODEL, CODECS, CacheRules(), num_ranks=2, block_size=BLOCK_SIZE)

    for size in STEPS:
        group.run(size)
        assert group.errors == [(0.0, 0.0)] * 2


def of_survivors(retention: str, num_ranks: int, codec: str = "int2") -> tuple[float, float]:
    """The sums of all ranks over a prompt of 3 epochs of 2 blocks, and the first row after it."""
    MODEL.recorded.clear()
    group = ReferenceGroup(
        MODEL.loaded, num_ranks=num_ranks, block_size=BLOCK_SIZE, codecs=CODECS, exact_blocks=1
    )
    group.start(7, [3] * 96, Policy(codec=codec, retention=f"{retention},epoch=32"))
    for size in (32, 20, 12, 32, 1):
        group.run({7: size}, owners=range(num_ranks))
    return sum(e.squared_error for e in group.errors), sum(e.squared_size for e in group.errors)


@pytest.mark.parametrize("heads", ["own", "shared"])
def test_survivors_are_measured_when_they_are_encoded(heads: str) -> None:
    """Where all tokens survive, the blocks of an epoch are encoded when it ends, but the first."""
    script, layers = MODEL.script, MODEL.spec.layers
    squared_error = squared_size = 0.0
    for start, end in ((16, 32), (32, 64), (64, 96)):
        tokens = torch.arange(start, end)
        exact = [[x_TKD[tokens].transpose(0, 1) for x_TKD in (k, v)] for _, k, v in script]
        encoded = restored(CODECS.layers("int2"), exact, tokens.reshape(-1, BLOCK_SIZE))
        for layer, (q_THD, _, _) in enumerate(script):
            before, after = (
                attend_plain(q_THD[end - 1][None], *read[layer], layers[layer]).out_THD
                for read in (exact, encoded)
            )
            squared_error += float((after - before).square().sum())
            squared_size += float(before.square().sum())

    measured = of_survivors(f"key_diversity:budget=1,heads={heads}", num_ranks=1)

    # As in `check`.
    torch.testing.assert_close(measured, (squared_error, squared_size), rtol=2e-3, atol=1e-9)


@pytest.mark.parametrize("retention", ["heavy_hitters:budget=0.6", "snap:budget=0.6,queries=8"])
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_what_is_kept_by_score_has_an_error_that_falls_with_the_bits(
    num_ranks: int, retention: str
) -> None:
    sums = [of_survivors(retention, num_ranks, codec) for codec in ("exact", "int8", "int2")]

    assert sums[0] == (0.0, 0.0)
    errors = [(error / size) ** 0.5 for error, size in sums[1:]]
    assert 0 < 8 * errors[0] < errors[1] < 1
