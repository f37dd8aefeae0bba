"""Every codec keeps the protocol's promises; each new one inherits these tests."""

import pytest
import torch

from kvcluster.codec.base import Codec, KVShape
from kvcluster.codec.registry import CODECS
from kvcluster.types import LayerGeometry

GEOMETRY = LayerGeometry(num_query_heads=4, num_kv_heads=2, key_dim=8, value_dim=6, scale=1.0)
SHAPE = KVShape(GEOMETRY, num_blocks=3, block_size=4)


@pytest.fixture(params=sorted(CODECS))
def codec(request: pytest.FixtureRequest) -> Codec:
    return CODECS[request.param]


def random_kv(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(num_tokens, 2, 8, generator=generator),
        torch.randn(num_tokens, 2, 6, generator=generator),
    )


def test_reported_bytes_are_those_allocated(codec: Codec) -> None:
    pool = codec.allocate(SHAPE, torch.empty(0))

    assert pool.num_tokens == 12
    assert pool.num_bytes == codec.bytes_per_token(GEOMETRY, 4) * 12


def test_slots_are_written_alone(codec: Codec) -> None:
    pool = codec.allocate(SHAPE, torch.empty(0))
    k_TKD, v_TKD = random_kv(2)

    codec.encode(pool, torch.tensor([7, 1]), k_TKD, v_TKD)

    untouched = [slot for slot in range(12) if slot not in (1, 7)]
    assert all(not plane[:, untouched].any() for plane in pool.planes)


def test_a_view_and_a_copy_of_the_same_slots_restore_the_same(codec: Codec) -> None:
    pool = codec.allocate(SHAPE, torch.empty(0))
    codec.encode(pool, torch.arange(4, 8), *random_kv(4))

    viewed = codec.restore(pool.slice(4, 8))
    copied = codec.restore(pool.take(torch.arange(4, 8)))

    for plane_of_view, plane_of_copy in zip(viewed, copied, strict=True):
        assert torch.equal(plane_of_view, plane_of_copy)


def test_a_slice_of_the_pool_is_not_a_copy(codec: Codec) -> None:
    pool = codec.allocate(SHAPE, torch.empty(0))

    for whole, part in zip(pool.planes, pool.slice(0, 4).planes, strict=True):
        assert part.data_ptr() == whole.data_ptr()


def test_exact_restores_every_bit() -> None:
    pool = CODECS["exact"].allocate(SHAPE, torch.empty(0))
    k_TKD, v_TKD = random_kv(3)

    CODECS["exact"].encode(pool, torch.tensor([5, 0, 9]), k_TKD, v_TKD)

    k_KSD, v_KSD = CODECS["exact"].restore(pool.take(torch.tensor([5, 0, 9])))
    assert torch.equal(k_KSD, k_TKD.transpose(0, 1))
    assert torch.equal(v_KSD, v_TKD.transpose(0, 1))
