"""Histories of rotated vectors, as the cache's codecs write them, and how far a prefill over one
may be from its definition."""

import torch
from kvcluster_kernels import packed_plain, prefill_reference
from kvcluster_kernels.packed_history import prefill_restored
from kvcluster_kernels.paging import Attention, PagedRows, Partial
from kvcluster_kernels.prefill_arguments import Keys, PartialAttention
from kvcluster_kernels.rotated_decode import RotatedPages
from kvcluster_kernels.rotated_history import RotatedHistory
from torch import Tensor

from kvcluster.codec.rotated import Rotated, rotate
from tests.kernels.decode_cases import Batch, Bounds, assert_within, draw_rows
from tests.kernels.packed_cases import draw_packed

SCALE = 0.1


def rotated_arguments(
    batch: Batch, bits: int, num_tokens: int, device: torch.device, *, is_centred: bool
) -> tuple[Tensor, RotatedHistory, PagedRows]:
    """What lies in blocks that are not the sequence's is NaN, or the largest code."""
    generator = torch.Generator().manual_seed(0)
    rows = draw_rows(batch, generator, device)
    keys, values = (
        _pages(bits, draw_packed(codec, batch.dim_k, batch, rows, generator))
        for codec in (Rotated(bits, is_centred), Rotated(bits, transposed=True))
    )
    rotation_DD = rotate(torch.eye(batch.dim_k)).T.contiguous().to(device)
    q_shape = (num_tokens, batch.num_heads, batch.dim_k)
    q_THD = torch.randn(q_shape, generator=generator).to(batch.dtype).to(device)
    history = RotatedHistory(keys, values, rotation_DD, rows.blocks_RB[0], batch.lengths[0])
    return q_THD, history, rows


def _pages(bits: int, planes: list[Tensor]) -> RotatedPages:
    codes, *others = planes
    high = others.pop(0) if bits == 3 else None
    scale, *mean = others
    return RotatedPages(codes, scale, mean[0] if mean else None, high)


def check(
    batch: Batch,
    bits: int,
    device: torch.device,
    *,
    num_tokens: int = 5,
    is_centred: bool = False,
    is_carried: bool = False,
    workspace_bytes: int = 1 << 30,
) -> None:
    """The call beside attention in float64 over the keys and values of the definition."""
    q_THD, history, rows = rotated_arguments(batch, bits, num_tokens, device, is_centred=is_centred)
    carry = None
    if is_carried:
        generator = torch.Generator().manual_seed(1)
        carry = PartialAttention(
            torch.randn(q_THD.shape, generator=generator).to(device),
            torch.randn(q_THD.shape[:2], generator=generator).to(device),
        )

    found = prefill_restored(
        q_THD, history, scale=SCALE, carry=carry, workspace_bytes=workspace_bytes
    )

    rotation_DD = history.rotation_DD.double()
    k_RBKSD = packed_plain.restore_rotated_keys(history.keys, rotation_DD, rows.blocks_RB)
    v_RBKSD = packed_plain.restore_rotated_values(history.values, rotation_DD, rows.blocks_RB)
    k_KSD, v_KSD = (packed_plain.in_line(x)[0][:, : history.num_keys] for x in (k_RBKSD, v_RBKSD))
    right = prefill_reference.prefill(
        q_THD.double(),
        Keys.in_line(k_KSD, v_KSD),
        scale=SCALE,
        carry=carry and PartialAttention(*(x.double() for x in carry)),
    )
    # Of a rotated vector any number may be as large as its norm, and is rounded by itself.
    spread = k_KSD.norm(dim=-1, keepdim=True).expand_as(k_KSD) * batch.dim_k**-0.5
    rounded = batch.dtype
    bounds = Bounds(
        q_THD, 3 * (k_KSD.abs() + spread), Attention(SCALE), weights=rounded, operands=rounded
    )
    largest = v_KSD.norm(dim=-1).amax()
    if carry is not None:
        largest = torch.maximum(largest, carry.out_THD.abs().amax().double())
    assert_within(
        Partial(found.out_THD[None], found.lse_TH[None]),
        Partial(right.out_THD[None], right.lse_TH[None]),
        largest.expand(found.out_THD[None].shape),
        bounds,
    )
