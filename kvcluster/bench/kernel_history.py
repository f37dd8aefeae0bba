"""Suite `history` of `kvcluster bench kernels`: query tokens over a long history of encoded blocks,
which all of them see, beside the same over bfloat16 blocks."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from statistics import fmean
from typing import Any, Final

import torch
from kvcluster_kernels import prefill_gluon, prefill_tl
from kvcluster_kernels.latent_history import LatentHistory, restore_latents
from kvcluster_kernels.latent_pages import KeyRotation, key_expansion
from kvcluster_kernels.packed_history import AnyHistory, prefill_restored
from kvcluster_kernels.packed_prefill import History, PackedTiles, prefill_packed
from kvcluster_kernels.packed_restore import restore
from kvcluster_kernels.prefill_arguments import Keys
from kvcluster_kernels.rotated_history import RotatedHistory, restore_rotated
from torch import Tensor

from kvcluster.attention.kernel_choice import Prefill, prefill_choice
from kvcluster.bench.decode_caches import (
    BLOCK_SIZE,
    DecodeShape,
    exact_pages,
    float8_pages,
    integer_pages,
    rotated_pages,
)
from kvcluster.bench.kernel_failures import FAILURES, report_failure
from kvcluster.bench.kernel_timing import KernelTimer
from kvcluster.bench.latent_caches import latent_pages, rotary_frequencies
from kvcluster.bench.report import Measurement

SHAPES: Final = (
    DecodeShape(32, 8, 128, 1 << 17, num_tokens=8192),
    DecodeShape(32, 8, 64, 1 << 17, num_tokens=8192),
    DecodeShape(32, 8, 128, 1 << 17, num_tokens=32),
)
"""A chunk as it is served on a GPU, and what goes on after a cached prefix."""
_RATIOS: Final[Mapping[str, float]] = {"fp8": 1.0, "int8": 1.0, "int4": 0.85, "latent": 0.85}
"""How fast as attention over bfloat16 is wanted, of the longest call."""
_TILES: Final = (PackedTiles(num_stages=4), PackedTiles(block_m=128, num_warps=8))
_RANK_SHARE: Final = 4
"""Of latents: so many numbers of keys to one of a latent."""
_REPEATS: Final = 5
_FEW_TOKENS: Final = 64
"""Of calls that blocks are read for as they are stored."""
_RESTORING: Final = "restoring alone"

_Calls = Mapping[str, Callable[[], object]]


def measure(timer: KernelTimer, *, with_variants: bool) -> Iterator[Measurement]:
    """Times, and ratios to the best kernel over bfloat16 blocks."""
    for shape in SHAPES:
        size = (shape.num_tokens, shape.num_query_heads, shape.dim)
        q_THD = torch.randn(size, dtype=torch.bfloat16, device="cuda")
        rules = {"scale": shape.dim**-0.5, "out_dtype": torch.bfloat16}
        exact = {
            "bf16": _over(q_THD, _exact(shape, q_THD.device), rules),
            "bf16 in line": _over(q_THD, _in_line(shape, q_THD.device), rules),
        }
        for name, history in histories(shape, q_THD.device):
            if timer.is_over:
                return
            calls = {f"{name} {way}": call for way, call in _ways(q_THD, history, rules).items()}
            if with_variants and isinstance(history, History):
                for tiles in _TILES:
                    calls[f"{name} {tiles}"] = partial(
                        prefill_packed, q_THD, history, **rules, tiles=tiles
                    )
            wanted = _RATIOS.get(name) if shape.num_tokens == SHAPES[0].num_tokens else None
            yield from _beside(timer, f"{shape} {name}", {**exact, **calls}, wanted)


def _over(q_THD: Tensor, keys: Keys, rules: Mapping[str, Any]) -> Callable[[], object]:
    """By the kernel that is chosen for the call."""
    is_pipelined = prefill_choice(q_THD, keys) is Prefill.PIPELINED
    kernel = prefill_gluon if is_pipelined else prefill_tl
    return partial(kernel.prefill, q_THD, keys, **rules)


def _ways(q_THD: Tensor, history: AnyHistory, rules: Mapping[str, Any]) -> _Calls:
    dim = q_THD.shape[2]
    calls = {"restored": partial(prefill_restored, q_THD, history, **rules)}
    if isinstance(history, LatentHistory):
        return {**calls, _RESTORING: partial(restore_latents, history, torch.bfloat16)}
    if isinstance(history, RotatedHistory):
        return {**calls, _RESTORING: partial(restore_rotated, history, torch.bfloat16)}
    if q_THD.shape[0] <= _FEW_TOKENS:
        calls["as stored"] = partial(prefill_packed, q_THD, history, **rules)
    return {**calls, _RESTORING: partial(restore, history, dim, torch.bfloat16)}


def _beside(
    timer: KernelTimer, title: str, calls: _Calls, wanted: float | None
) -> Iterator[Measurement]:
    """All calls in one order and then in the other one: what comes later finds a warmer GPU, which
    is slower. Ratios are to the first."""
    times: dict[str, list[float]] = {}
    for names in (list(calls), list(calls)[::-1]):
        for name in names:
            try:
                taken = timer.microseconds(calls[name], repeats=_REPEATS)
            except FAILURES as error:
                report_failure(f"{title}: {name}", error)
                continue
            times.setdefault(name, []).append(taken)
    base = fmean(times["bf16"]) if "bf16" in times else None
    for name, found in times.items():
        taken = fmean(found)
        yield Measurement(name=f"{title}: {name}", value=taken, unit="us")
        if base is None or name == "bf16" or name.endswith(_RESTORING):
            continue
        yield Measurement(
            name=f"{title}: {name} beside bf16",
            value=base / taken,
            unit="x",
            at_least=wanted if name.endswith("restored") else None,
        )


def _exact(shape: DecodeShape, device: torch.device) -> Keys:
    pages = exact_pages(shape, device)
    ids_N = _block_ids(shape, device)
    return Keys(pages.k_PKND, pages.v_PKND, shape.num_keys, ids_N, BLOCK_SIZE)


def _in_line(shape: DecodeShape, device: torch.device) -> Keys:
    size = (shape.num_kv_heads, shape.num_keys, shape.dim)
    k_KSD, v_KSD = (torch.randn(size, dtype=torch.bfloat16, device=device) for _ in range(2))
    return Keys.in_line(k_KSD, v_KSD)


def histories(shape: DecodeShape, device: torch.device) -> Iterator[tuple[str, AnyHistory]]:
    """Of all keys of the shape, in blocks in any order, in each format by its name."""
    ids_N = _block_ids(shape, device)
    yield "fp8", History(*float8_pages(shape, device), ids_N, shape.num_keys)
    for bits in (8, 4):
        yield f"int{bits}", History(*integer_pages(bits, 16, shape, device), ids_N, shape.num_keys)
    yield "rotated4", RotatedHistory(*rotated_pages(4, shape, device), ids_N, shape.num_keys)
    yield "latent", _latents(shape, ids_N)


def _latents(shape: DecodeShape, ids_N: Tensor) -> LatentHistory:
    """Keys of a quarter as many numbers of 4 bits, and values of 4 bits."""
    device, width = ids_N.device, shape.num_kv_heads * shape.dim
    rank = width // _RANK_SHARE
    expansion = key_expansion(
        torch.randn(rank, width, device=device) * rank**-0.5,
        torch.randn(width, device=device),
        num_kv_heads=shape.num_kv_heads,
        rotation=KeyRotation(rotary_frequencies(shape.dim, device)),
    )
    positions_N = torch.arange(shape.num_blocks, dtype=torch.int32, device=device) * BLOCK_SIZE
    return LatentHistory(
        latent_pages(shape, device, rank, 4),
        expansion,
        integer_pages(4, 16, shape, device)[1],
        None,
        ids_N,
        positions_N,
        shape.num_keys,
        shape.dim,
        shape.dim,
    )


def _block_ids(shape: DecodeShape, device: torch.device) -> Tensor:
    return torch.randperm(shape.num_blocks, dtype=torch.int32, device=device)
