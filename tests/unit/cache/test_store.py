"""What is written to slots is read back, whichever pages the slots lie in."""

import resource
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcluster.cache.store import KVStore, Piece, in_line
from kvcluster.codec.array import BlockShape, consecutive
from kvcluster.types import PAGE_BLOCKS, LayerGeometry, ModelSpec
from tests.codec_models import PLAIN, plain_codecs
from tests.scripted_model import ScriptedModel, latent_geometry

BLOCK_SIZE = 2
PAGE_TOKENS = PAGE_BLOCKS * BLOCK_SIZE
NUM_BLOCKS = 4 * PAGE_BLOCKS
NUM_SLOTS = NUM_BLOCKS * BLOCK_SIZE


def spec_of(*windows: int | None) -> ModelSpec:
    return ModelSpec(
        name="test",
        layers=tuple(
            LayerGeometry(
                num_query_heads=4, num_kv_heads=2, key_dim=6, value_dim=4, scale=1.0, window=window
            )
            for window in windows
        ),
        vocab_size=8,
        max_context_tokens=64,
        eos_token_ids=(),
        dtype="float32",
        bytes_per_element=4,
        weights_digest="",
        tokenizer_digest="",
    )


def filled_store() -> tuple[KVStore, torch.Tensor, torch.Tensor]:
    """A store of three layers and two groups; K and V of layer 1 by slot."""
    spec = spec_of(None, 8, None)
    store = KVStore(
        spec,
        blocks_per_group=[NUM_BLOCKS, 5],
        block_size=BLOCK_SIZE,
        like=torch.empty(0),
        codecs=plain_codecs(spec),
    )
    generator = torch.Generator().manual_seed(0)
    k_SKD = torch.randn(NUM_SLOTS, 2, 6, generator=generator)
    v_SKD = torch.randn(NUM_SLOTS, 2, 4, generator=generator)
    shuffled = torch.randperm(NUM_SLOTS, generator=generator)
    store.write(2, store.places(shuffled), k_SKD[shuffled], v_SKD[shuffled])
    return store, k_SKD, v_SKD


runs_of_slots = st.lists(
    st.tuples(st.integers(0, NUM_SLOTS), st.integers(0, NUM_SLOTS))
    .map(sorted)
    .map(lambda bounds: slice(*bounds))
    .filter(lambda run: run.start < run.stop),
    max_size=4,
)


@given(runs=runs_of_slots)
def test_pieces_and_copies_hold_the_slots_in_order(runs: list[slice]) -> None:
    store, k_SKD, v_SKD = filled_store()
    slots = [slot for run in runs for slot in range(run.start, run.stop)]

    gathered = store.gather(2, runs)
    pieces = store.pieces(2, runs)

    for plane, written, parts in zip(
        gathered.planes,
        (k_SKD, v_SKD),
        zip(*pieces, strict=True) if pieces else ((), ()),
        strict=True,
    ):
        assert torch.equal(plane, written[slots].transpose(0, 1))
        assert sum(len(part) * part.shape[2] for part in parts) == len(slots)
        if parts:
            assert torch.equal(torch.cat([in_line(part) for part in parts], dim=1), plane)


def test_whole_pages_are_one_piece_and_no_copy() -> None:
    store, _, _ = filled_store()

    pieces = store.pieces(2, [slice(3, 3 * PAGE_TOKENS + 1)])

    assert [tuple(piece.k_PKSD.shape) for piece in pieces] == [
        (1, 2, PAGE_TOKENS - 3, 6),
        (2, 2, PAGE_TOKENS, 6),
        (1, 2, 1, 6),
    ]
    assert pieces[1].k_PKSD.data_ptr() == store.planes(2).k_PKSD[1].data_ptr()


def test_layers_do_not_overlap() -> None:
    store, _, _ = filled_store()

    for layer in (0, 1):
        for plane in store.planes(layer):
            assert not plane.any()
            plane.fill_(7.0)

    assert all(not (plane == 7.0).any() for plane in store.planes(2))


def test_the_bytes_are_those_of_the_pages() -> None:
    store, _, _ = filled_store()
    bytes_per_token = 4 * 2 * (6 + 4)

    # Four pages for two layers; five blocks of the windowed layer take one page.
    assert store.num_bytes == (4 * 2 + 1) * PAGE_TOKENS * bytes_per_token


def test_memory_is_committed_as_it_is_written() -> None:
    def committed() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) * 1024

    before = committed()
    spec = spec_of(None)
    store = KVStore(
        spec,
        blocks_per_group=[8_000_000],
        block_size=BLOCK_SIZE,
        like=torch.empty(0),
        codecs=plain_codecs(spec),
    )

    assert store.num_bytes > 500 * 2**20
    assert committed() - before < 50 * 2**20


def store_of_latents(*, block_size: int = BLOCK_SIZE) -> KVStore:
    spec = ScriptedModel(latent_geometry(), latent_geometry(), max_tokens=64).spec
    return KVStore(
        spec,
        blocks_per_group=[NUM_BLOCKS],
        block_size=block_size,
        like=torch.empty(0),
        codecs=plain_codecs(spec),
    )


def test_values_that_are_part_of_keys_take_no_bytes() -> None:
    store = store_of_latents()

    tensors = {
        plane.untyped_storage().data_ptr(): plane.untyped_storage().nbytes()
        for layer in (0, 1)
        for plane in store.planes(layer)
    }

    # Of each token two layers keep a latent of 16 and a rotary key of 8 numbers of 4 bytes.
    assert sum(tensors.values()) == store.num_bytes == NUM_SLOTS * (16 + 8) * 2 * 4


def test_values_that_are_part_of_keys_are_read_from_them() -> None:
    store = store_of_latents()
    k_TKD = torch.randn(NUM_SLOTS, 1, 24, generator=torch.Generator().manual_seed(0))

    store.write(1, store.places(torch.arange(NUM_SLOTS)), k_TKD, k_TKD[..., :16])

    [piece] = store.pieces(1, [slice(0, NUM_SLOTS)])
    assert torch.equal(in_line(piece.k_PKSD), k_TKD.transpose(0, 1))
    assert torch.equal(in_line(piece.v_PKSD), k_TKD[..., :16].transpose(0, 1))
    assert not any(plane.any() for plane in store.planes(0))


def test_keys_with_their_values_travel_as_one_array() -> None:
    store = store_of_latents()

    assert [plane.shape for plane in store.gather(0, [slice(3, 40)]).planes] == [(1, 37, 24)]
    assert [plane.shape for plane in store.gather(0, []).planes] == [(1, 0, 24)]
    assert [plane.shape for plane in store.empty(0, 7).planes] == [(1, 7, 24)]


@pytest.mark.parametrize("codec", PLAIN)
def test_blocks_of_latents_take_the_planes_of_their_keys(codec: str) -> None:
    store = store_of_latents(block_size=16)
    k_BKSD = torch.randn(2, 1, 16, 24, generator=torch.Generator().manual_seed(0))
    positions_BS = consecutive(torch.tensor([16, 32]), 16)
    ids_B = torch.tensor([1, 0])

    store.encode(0, codec, ids_B, Piece(k_BKSD, k_BKSD[..., :16]), positions_BS)

    planes = store.read_encoded(0, codec, ids_B)
    [read_KSD] = store.decode(0, codec, planes, positions_BS)
    layer_codec = plain_codecs(ScriptedModel(latent_geometry(), max_tokens=1).spec).layers(codec)[0]
    assert len(planes) == len(layer_codec.keys.planes(BlockShape(1, 16, 24)))
    encoded = layer_codec.keys.encode(k_BKSD, positions_BS)
    expected_BKSD = layer_codec.keys.decode(encoded, positions_BS)
    assert torch.equal(read_KSD, in_line(expected_BKSD))


def test_memory_is_committed_when_it_is_written_or_all_of_it_when_asked() -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    spec = spec_of(None)
    num_bytes = 64 << 20
    num_blocks = num_bytes // (BLOCK_SIZE * 2 * (6 + 4) * 4)
    before = resident_bytes()
    store = KVStore(
        spec,
        blocks_per_group=[num_blocks],
        block_size=BLOCK_SIZE,
        like=torch.zeros(()),
        codecs=plain_codecs(spec),
    )
    reserved = resident_bytes()
    store.commit()
    committed = resident_bytes()

    assert reserved - before < num_bytes // 8
    assert committed - reserved > num_bytes * 7 // 8
    assert not any(plane.any() for plane in store.planes(0))
