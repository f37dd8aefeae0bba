"""The caches that decode kernels are timed with are caches that they read."""

import pytest
import torch

from kvcluster.bench.decode_caches import CACHES, DecodeShape, queries

SHAPE = DecodeShape(num_query_heads=4, num_kv_heads=2, dim=64, num_keys=192)


@pytest.mark.parametrize("name", CACHES)
def test_a_timed_cache_gives_numbers(name: str, interpreted: torch.device) -> None:
    q_RTHD = queries(SHAPE, interpreted)

    found = CACHES[name](SHAPE, q_RTHD).decode(None)

    assert found.out_RTHD.shape == q_RTHD.shape
    assert found.out_RTHD.isfinite().all()
    assert found.lse_RTH.isfinite().all()


def test_compressed_caches_take_the_bytes_of_their_formats() -> None:
    q_RTHD = queries(SHAPE._replace(num_keys=512), torch.device("cpu"))
    shape = SHAPE._replace(num_keys=512)
    elements = shape.exact_bytes / 2

    bits = {name: 8 * build(shape, q_RTHD).num_bytes / elements for name, build in CACHES.items()}

    # Codes, and 32 bits (or 16) for each group of 64 numbers, of 32 with 2 bits.
    assert bits["bf16"] == 16
    assert bits["int8"] == 8.5
    assert bits["int4"] == 4.5
    assert bits["int4 scale_bits=8"] == pytest.approx(4.25, abs=0.02)
    assert bits["int8 scale_bits=8"] == pytest.approx(8.25, abs=0.02)
    assert bits["int3"] == 3.5
    assert bits["int2"] == 3
    assert bits["rotated3"] == 3.375
    assert bits["fp8"] == pytest.approx(8, abs=0.02)
