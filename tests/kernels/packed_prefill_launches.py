"""Calls over histories in packed formats whose code is looked at on machines without a GPU
(`launches`): of the sizes that are served, and all that the tests on a GPU make."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from kvcluster_kernels.latent_history import restore_latents
from kvcluster_kernels.packed_prefill import prefill_packed
from kvcluster_kernels.packed_restore import restore
from kvcluster_kernels.rotated_history import restore_rotated

from tests.kernels.decode_cases import Batch
from tests.kernels.latent_history_cases import GPU_CASES as LATENT_CASES
from tests.kernels.latent_history_cases import LatentCase, latent_arguments
from tests.kernels.packed_prefill_cases import (
    GPU_CASES,
    RESTORED_CASES,
    SCALE,
    PackedCase,
    packed_arguments,
)
from tests.kernels.rotated_history_cases import rotated_arguments

_CPU = torch.device("cpu")


def _served(bits: int, dim: int = 128, **changes: int) -> PackedCase:
    given = {"num_tokens": 64, "num_heads": 32, "num_kv_heads": 8, "group": 64, **changes}
    return PackedCase(bits=bits, dim=dim, value_dim=dim, dtype=torch.bfloat16, **given)


SERVED = {
    "fp8": _served(0),
    "int8": _served(8),
    "int4": _served(4),
    "int4 D64": _served(4, 64),
    "int2": _served(2, group=32, value_group=32),
    "int4 few rows": _served(4, num_tokens=8),
}


def _packed(case: PackedCase) -> object:
    given = packed_arguments(case, _CPU)
    return prefill_packed(given.q_THD, given.history, scale=SCALE, carry=given.carry, num_splits=1)


def _restored(case: PackedCase) -> object:
    return restore(packed_arguments(case, _CPU).history, case.dim, case.dtype)


def _latents(case: LatentCase) -> object:
    _, history, _ = latent_arguments(case, _CPU)
    return restore_latents(history, case.dtype)


def _expanded(case: LatentCase) -> object:
    """The second kernel that is launched is the first one of latents that are no codes."""
    return _latents(replace(case, bits=None))


EXPANDED = {
    "latent": LatentCase(rank=256, dim=128, num_heads=32, num_kv_heads=8, dtype=torch.bfloat16),
    "latent D64": LatentCase(rank=128, num_heads=32, num_kv_heads=8, dtype=torch.bfloat16),
}


def _rotated(bits: int) -> object:
    batch = Batch(
        lengths=(130,),
        num_heads=32,
        num_kv_heads=8,
        dim_k=128,
        dim_v=128,
        block_size=64,
        dtype=torch.bfloat16,
    )
    _, history, _ = rotated_arguments(batch, bits, 64, _CPU, is_centred=True)
    return restore_rotated(history, torch.bfloat16)


RESTORED = ("int3", *(f"rotated{bits}" for bits in (4, 3, 2)))

LAUNCHES: dict[str, Callable[[], object]] = {
    **{f"packed {name}": partial(_packed, case) for name, case in SERVED.items()},
    **{f"restore {name}": partial(_restored, case) for name, case in SERVED.items()},
    "restore int3": partial(_restored, _served(3)),
    **{f"restore rotated{bits}": partial(_rotated, bits) for bits in (4, 3, 2)},
    **{f"restore {name}": partial(_latents, replace(EXPANDED[name], bits=4)) for name in EXPANDED},
    **{f"expand {name}": partial(_expanded, case) for name, case in EXPANDED.items()},
    **{f"test of {case}": partial(_latents, case) for case in LATENT_CASES},
    **{f"test of packed {case}": partial(_packed, case) for case in GPU_CASES},
    **{f"test of restore {case}": partial(_restored, case) for case in RESTORED_CASES},
}
