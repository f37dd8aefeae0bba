"""What the suite `selected` times is what it says."""

import pytest
import torch
from kvcluster_kernels import prefill_reference
from kvcluster_kernels.paging import Partial
from kvcluster_kernels.prefill_arguments import Causal, Keys, PartialAttention

from kvcluster.bench.decode_caches import BLOCK_SIZE, DecodeShape, queries
from kvcluster.bench.kernel_selected import DECODE_STEPS, METHODS, prefill_steps

SHAPE = DecodeShape(num_query_heads=4, num_kv_heads=2, dim=64, num_keys=6 * BLOCK_SIZE)


@pytest.mark.parametrize("codec", DECODE_STEPS)
def test_timed_steps_of_decode_give_numbers(codec: str, interpreted: torch.device) -> None:
    q_RTHD = queries(SHAPE, interpreted)

    found = DECODE_STEPS[codec](SHAPE, q_RTHD)["in all"]()

    assert isinstance(found, Partial | PartialAttention)
    assert found[0].numel() == q_RTHD.numel()
    assert all(plane.isfinite().all() for plane in found)


@pytest.mark.parametrize("name", METHODS)
def test_timed_lists_of_few_blocks_have_all_or_less(name: str, interpreted: torch.device) -> None:
    """With so few blocks the fixed pattern reads all of them."""
    generator = torch.Generator().manual_seed(0)
    k_1KSD, v_1KSD = torch.randn(2, 1, 2, 6 * BLOCK_SIZE, 32, generator=generator)
    q_THD = torch.randn(2 * BLOCK_SIZE, 4, 32, generator=generator)
    order_N = torch.randperm(6, generator=generator).int()
    keys = Keys(k_1KSD, v_1KSD, 6 * BLOCK_SIZE, order_N, BLOCK_SIZE)

    steps, operations = prefill_steps(name, q_THD, keys)
    found = steps["in all"]()

    assert isinstance(found, PartialAttention)
    causal = Causal(4 * BLOCK_SIZE)
    want = prefill_reference.prefill(q_THD, keys, scale=32**-0.5, causal=causal)
    reads_all = name.startswith("block_sparse")
    # Both in float32, of numbers of order 1.
    is_same = torch.allclose(found.out_THD, want.out_THD, rtol=1e-5, atol=1e-5)
    assert is_same == reads_all
    whole = 4 * BLOCK_SIZE**2 * (5 + 6) * 4 * 32
    assert operations == whole if reads_all else 0 < operations < whole
