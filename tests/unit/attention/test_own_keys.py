"""A long encoded history is read some blocks at a time, to the same effect."""

import pytest
import torch

from kvcluster.attention import own_keys
from kvcluster.attention.part import CacheRules
from tests.attention_group import AttentionGroup
from tests.codec_models import plain_codecs
from tests.scripted_model import ScriptedModel, geometry

MODEL = ScriptedModel(geometry(), geometry(window=24), geometry(softcap=5.0), max_tokens=192)
# A few hundred float32 roundings of numbers near 1, summed in another order.
ATOL = 2e-5


@pytest.mark.parametrize("codec", ["int4", "rotated4"])
@pytest.mark.parametrize("piece_blocks", [1, 2])
def test_a_history_read_in_pieces_is_the_history_read_at_once(
    piece_blocks: int, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = outputs(codec)

    monkeypatch.setattr(own_keys, "_PIECE_BLOCKS", piece_blocks)
    in_pieces = outputs(codec)

    for found, expected in zip(in_pieces, at_once, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=ATOL)


def outputs(codec: str) -> list[torch.Tensor]:
    """out_THD of the layers for the last of some chunks."""
    rules = CacheRules(codec=codec, exact_blocks=1)
    group = AttentionGroup(MODEL, plain_codecs(MODEL.spec), rules, num_ranks=1, block_size=16)
    for size in (72, 24, 40):
        found = group.run(size)
    return found
