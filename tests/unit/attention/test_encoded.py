"""One row over encoded blocks: the inner forms and the tiles against decoding everything."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kvcluster.attention.encoded import EncodedKeys, attend_encoded
from kvcluster.attention.local import attend_plain
from kvcluster.attention.partial import Partial
from kvcluster.cache.store import KVStore, Piece
from kvcluster.codec.array import consecutive
from kvcluster.codec.inner import inner_values
from kvcluster.types import EXACT, LayerGeometry
from tests.codec_models import EVERY_CODEC, calibrated_codecs
from tests.scripted_model import ScriptedModel, geometry

BLOCK_SIZE = 16
NUM_BLOCKS = 11
LOSSY = [codec for codec in EVERY_CODEC if codec != EXACT]


@dataclass(frozen=True)
class Rig:
    """A store whose first layer holds encoded blocks, out of order in its pages."""

    store: KVStore
    keys: EncodedKeys
    geometry: LayerGeometry
    q_1HD: Tensor

    def attend(self, *, tile_tokens: int = 2048) -> Partial:
        return attend_encoded(
            self.q_1HD, self.store, 0, self.keys, self.geometry, tile_tokens=tile_tokens
        )

    def defined(self) -> Partial:
        planes = self.store.read_encoded(0, self.keys.codec, self.keys.ids_B)
        decoded = self.store.decode(0, self.keys.codec, planes, self.keys.positions_BS)
        k_KSD, v_KSD = (x_KSD[:, self.keys.num_skipped :] for x_KSD in decoded)
        return attend_plain(self.q_1HD, k_KSD, v_KSD, self.geometry)


def rig(
    codec: str,
    *,
    num_blocks: int = NUM_BLOCKS,
    num_skipped: int = 0,
    softcap: float | None = None,
    seed: int = 0,
) -> Rig:
    spec = ScriptedModel(geometry(softcap=softcap), max_tokens=1).spec
    store = KVStore(
        spec,
        blocks_per_group=[32],
        block_size=BLOCK_SIZE,
        like=torch.empty(0),
        codecs=calibrated_codecs(spec),
    )
    generator = torch.Generator().manual_seed(seed)
    k_BKSD, v_BKSD = torch.randn(2, num_blocks, 2, BLOCK_SIZE, 16, generator=generator)
    ids_B = torch.randperm(4 * store.blocks_per_page(0, codec), generator=generator)[:num_blocks]
    positions_BS = consecutive(torch.arange(1, num_blocks + 1) * BLOCK_SIZE, BLOCK_SIZE)
    store.encode(0, codec, ids_B, Piece(k_BKSD, v_BKSD), positions_BS)
    return Rig(
        store,
        EncodedKeys(codec, ids_B, positions_BS, num_skipped),
        spec.layers[0],
        torch.randn(1, 4, 16, generator=generator),
    )


def check(ours: Partial, defined: Partial) -> None:
    # Sums of float32 numbers near 1 over 176 keys, in another order and another basis.
    torch.testing.assert_close(ours.out_THD, defined.out_THD, rtol=0, atol=2e-5)
    torch.testing.assert_close(ours.lse_TH, defined.lse_TH, rtol=0, atol=2e-5)


@pytest.mark.parametrize("codec", LOSSY)
def test_a_row_reads_what_decoding_all_blocks_would_give(codec: str) -> None:
    reading = rig(codec)

    check(reading.attend(), reading.defined())


@pytest.mark.parametrize("codec", ["int4", "rotated3", "latent:r=0.5,bits=4"])
@pytest.mark.parametrize("tile_tokens", [1, 16, 48, 64])
def test_tiles_of_any_size_give_the_same(codec: str, tile_tokens: int) -> None:
    reading = rig(codec, num_skipped=5)

    check(reading.attend(tile_tokens=tile_tokens), reading.defined())


@pytest.mark.parametrize("codec", ["int4", "rotated3", "latent:r=0.5,bits=4"])
def test_a_softcap_is_applied_to_the_whole_logit(codec: str) -> None:
    """Latent keys have a mean: capping before it is added would show."""
    reading = rig(codec, softcap=0.5)

    check(reading.attend(), reading.defined())


def test_no_blocks_are_no_keys() -> None:
    partial = rig("latent:r=0.5", num_blocks=0).attend()

    assert not partial.out_THD.any()
    assert torch.isneginf(partial.lse_TH).all()


def test_latents_are_summed_before_they_are_expanded() -> None:
    """What is attended to is 8 numbers a token for all heads, of the 32 that 2 heads have."""
    reading = rig("latent:r=0.25")
    values = inner_values(reading.store.layer_codec(0, reading.keys.codec).values)
    _, planes = reading.store.read_arrays(0, reading.keys.codec, reading.keys.ids_B)

    latent_BJSC = values.inner(planes, reading.keys.positions_BS)

    assert latent_BJSC.shape == (NUM_BLOCKS, 1, BLOCK_SIZE, 8)
