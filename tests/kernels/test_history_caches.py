"""The histories that prefill is timed with are histories that it reads."""

import torch
from kvcluster_kernels.packed_history import prefill_history

from kvcluster.bench.decode_caches import DecodeShape
from kvcluster.bench.kernel_history import histories

SHAPE = DecodeShape(num_query_heads=4, num_kv_heads=2, dim=64, num_keys=192, num_tokens=3)


def test_a_timed_history_gives_numbers(interpreted: torch.device) -> None:
    q_THD = torch.randn(SHAPE.num_tokens, SHAPE.num_query_heads, SHAPE.dim)
    names = []

    for name, history in histories(SHAPE, interpreted):
        found = prefill_history(q_THD, history, scale=0.1)
        names.append(name)

        assert found.out_THD.shape == q_THD.shape
        assert found.out_THD.isfinite().all()
        assert found.lse_TH.isfinite().all()

    assert names == ["fp8", "int8", "int4", "rotated4", "latent"]
