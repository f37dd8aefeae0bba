"""The measured attention error against its definition, over any ranks."""

import pytest
import torch

from kvcluster.attention.local import attend_plain
from kvcluster.attention.part import CacheRules
from tests.attention_group import AttentionGroup
from tests.codec_models import EVERY_CODEC, calibrated_codecs
from tests.scripted_model import ScriptedModel, geometry

BLOCK_SIZE = 16
STEPS = (64, 70, 1, 1, 16, 40)
MODEL = ScriptedModel(geometry(), geometry(softcap=5.0), max_tokens=sum(STEPS))
CODECS = calibrated_codecs(MODEL.spec)


def defined(group: AttentionGroup, rank: int, start: int, end: int) -> tuple[float, float]:
    """What a rank should measure in the step that computes [start, end)."""
    own = [p for p in range(start, end) if group.table.owner(p) == rank]
    first, last = (
        max(1, position // BLOCK_SIZE - group.rules.exact_blocks) * BLOCK_SIZE
        for position in (start, end)
    )
    blocks = [p for p in range(first, last, BLOCK_SIZE) if group.table.owner(p) == rank]
    if not own or not blocks:
        return 0.0, 0.0
    tokens = torch.cat([torch.arange(p, p + BLOCK_SIZE) for p in blocks])
    squared_error = squared_size = 0.0
    for layer, (q_THD, k_TKD, v_TKD) in enumerate(MODEL.script):
        exact = [x_TKD[tokens].transpose(0, 1) for x_TKD in (k_TKD, v_TKD)]
        encoded = []
        for codec, x_KSD in zip(CODECS.layers(group.rules.codec)[layer], exact, strict=True):
            x_BKSD = x_KSD.unflatten(1, (-1, BLOCK_SIZE)).transpose(0, 1)
            positions_BS = tokens.reshape(-1, BLOCK_SIZE)
            planes = codec.encode(x_BKSD, positions_BS)
            encoded.append(codec.decode(planes, positions_BS).transpose(0, 1).flatten(1, 2))
        q_1HD = q_THD[own[-1]][None]
        before, after = (
            attend_plain(q_1HD, k_KSD, v_KSD, MODEL.spec.layers[layer]).out_THD
            for k_KSD, v_KSD in (exact, encoded)
        )
        squared_error += float((after - before).square().sum())
        squared_size += float(before.square().sum())
    return squared_error, squared_size


@pytest.mark.parametrize("codec", [codec for codec in EVERY_CODEC if codec != "exact"])
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_each_rank_measures_its_last_row_over_its_new_blocks(codec: str, num_ranks: int) -> None:
    group = AttentionGroup(
        MODEL,
        CODECS,
        CacheRules(codec, exact_blocks=1),
        num_ranks=num_ranks,
        block_size=BLOCK_SIZE,
    )
    measured = []
    for size in STEPS:
        start = group.num_tokens
        group.run(size)
        expected = [defined(group, rank, start, start + size) for rank in range(num_ranks)]
        # Differences of float32 outputs near 1: each is rounded to 1e-7, and squared.
        torch.testing.assert_close(group.errors, expected, rtol=2e-3, atol=1e-9)
        measured += group.errors

    assert sum(size for _, size in measured) > 0


def test_an_exact_cache_measures_nothing() -> None:
    group = AttentionGroup(MODEL, CODECS, CacheRules(), num_ranks=2, block_size=BLOCK_SIZE)

    for size in STEPS:
        group.run(size)
        assert group.errors == [(0.0, 0.0)] * 2
