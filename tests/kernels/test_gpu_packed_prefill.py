"""Prefill over encoded blocks, compiled, against its definition in float64: pytest -m gpu."""

import pytest
import torch
from kvcluster_kernels import packed_prefill_reference
from kvcluster_kernels.packed_history import prefill_history, prefill_restored
from kvcluster_kernels.packed_prefill import prefill_packed
from kvcluster_kernels.packed_restore import restore

from tests.kernels.decode_cases import Batch
from tests.kernels.latent_history_cases import GPU_CASES as LATENT_CASES
from tests.kernels.latent_history_cases import LatentCase
from tests.kernels.latent_history_cases import check as check_latents
from tests.kernels.packed_prefill_cases import (
    GPU_CASES,
    RESTORED_CASES,
    SCALE,
    PackedCase,
    assert_close_to_definition,
    packed_arguments,
)
from tests.kernels.rotated_history_cases import check as check_rotated

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_blocks_as_they_are_stored(case: PackedCase, gpu: torch.device) -> None:
    given = packed_arguments(case, gpu)

    found = prefill_packed(given.q_THD, given.history, scale=SCALE, carry=given.carry)

    assert_close_to_definition(found, given, torch.float16)


@pytest.mark.parametrize("case", RESTORED_CASES, ids=str)
def test_restored_numbers_are_those_of_the_codec(case: PackedCase, gpu: torch.device) -> None:
    history = packed_arguments(case, gpu).history

    found = restore(history, case.dim, torch.float32)

    right = packed_prefill_reference.restored(history, case.dim, torch.float64)
    for x_1KSD, right_1KSD in zip(found[:2], right[:2], strict=True):
        # Code times scale and zero are of the size of the largest numbers, and each is rounded.
        error = float(4 * torch.finfo(torch.float32).eps * right_1KSD.abs().max())
        whole = x_1KSD[:, :, : case.num_keys].double()
        torch.testing.assert_close(whole, right_1KSD, rtol=0, atol=error)


@pytest.mark.parametrize("case", GPU_CASES[:6:2], ids=str)
def test_a_history_restored_in_pieces(case: PackedCase, gpu: torch.device) -> None:
    given = packed_arguments(case, gpu)
    bytes_per_token = case.num_kv_heads * (case.dim + case.value_dim) * 2

    found = prefill_restored(
        given.q_THD,
        given.history,
        scale=SCALE,
        carry=given.carry,
        workspace_bytes=700 * bytes_per_token,
    )

    assert_close_to_definition(found, given, case.dtype)


@pytest.mark.parametrize("num_tokens", [8, 300])
def test_whichever_is_faster(num_tokens: int, gpu: torch.device) -> None:
    case = PackedCase(bits=4, num_tokens=num_tokens, num_keys=2_048, dtype=torch.bfloat16)
    given = packed_arguments(case, gpu)

    found = prefill_history(given.q_THD, given.history, scale=SCALE)

    assert_close_to_definition(found, given, torch.bfloat16)


@pytest.mark.parametrize("case", LATENT_CASES, ids=str)
def test_latents(case: LatentCase, gpu: torch.device) -> None:
    check_latents(case, gpu)


def test_latents_in_pieces(gpu: torch.device) -> None:
    check_latents(LATENT_CASES[2], gpu, workspace_bytes=1 << 20)


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("dim", [64, 128])
def test_rotated_vectors(dim: int, bits: int, gpu: torch.device) -> None:
    batch = Batch(
        lengths=(2_003,),
        num_heads=8,
        num_kv_heads=2,
        dim_k=dim,
        dim_v=dim,
        block_size=64,
        dtype=torch.bfloat16,
    )

    check_rotated(batch, bits, gpu, num_tokens=300, is_centred=dim == 128, is_carried=True)
