"""Suite `prefill` of `kvcluster bench kernels`: many query tokens over many keys."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any, Final, NamedTuple, Protocol

import torch
from kvcluster_kernels import prefill_gluon, prefill_tl
from kvcluster_kernels.prefill_arguments import Causal, Keys
from kvcluster_kernels.prefill_gluon import Pipeline
from kvcluster_kernels.prefill_tl import Tiles
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvcluster.bench.kernel_failures import FAILURES, report_failure, runs
from kvcluster.bench.kernel_peers import flash3
from kvcluster.bench.kernel_timing import KernelTimer
from kvcluster.bench.report import Measurement

Call = Callable[[], object]

_BLOCK_TOKENS: Final = 64
_PAGE_BLOCKS: Final = 8
_MAX_ERROR: Final = 2.0**-7
"""Relative, of all outputs together, against a peer's: both round weights and outputs to bfloat16,
by 2**-9 at most each time."""


@dataclass(frozen=True, kw_only=True)
class PrefillShape:
    """One call of attention in one layer."""

    num_tokens: int
    num_keys: int
    dim: int
    is_causal: bool = False
    num_query_heads: int = 32
    num_kv_heads: int = 8
    at_least: float | None = None
    """Speed of our best kernel that is wanted, as a part of FlashAttention 3's."""

    def __str__(self) -> str:
        rows = f"{self.num_tokens >> 10}K" if self.num_tokens >= 1024 else str(self.num_tokens)
        rule = "causal" if self.is_causal else "full"
        heads = f"{self.num_query_heads}/{self.num_kv_heads}"
        return f"D{self.dim} {heads} {rows} x {self.num_keys >> 10}K {rule}"

    @property
    def flops(self) -> float:
        """Of both products, over the keys that are seen."""
        pairs = self.num_tokens * self.num_keys
        if self.is_causal:
            # The last row is the last key.
            pairs -= self.num_tokens * (self.num_tokens - 1) // 2
        return 4.0 * pairs * self.num_query_heads * self.dim

    @property
    def causal(self) -> Causal | None:
        """The rule of our kernels."""
        return Causal(self.num_keys - self.num_tokens) if self.is_causal else None


def _square(num_tokens: int, dim: int, num_kv_heads: int, *, is_causal: bool) -> PrefillShape:
    """A whole prompt, four query heads to a KV head."""
    return PrefillShape(
        num_tokens=num_tokens,
        num_keys=num_tokens,
        dim=dim,
        is_causal=is_causal,
        num_query_heads=4 * num_kv_heads,
        num_kv_heads=num_kv_heads,
        at_least=0.95,
    )


_32K: Final = 1 << 15
_128K: Final = 1 << 17
SQUARES: Final = tuple(
    _square(_32K, dim, 8, is_causal=is_causal) for dim in (128, 64) for is_causal in (False, True)
)
SHAPES: Final = (
    *SQUARES,
    # Of a quarter of the heads: four times the work of 32K is enough to be measured.
    *(_square(_128K, 128, 2, is_causal=is_causal) for is_causal in (False, True)),
    PrefillShape(num_tokens=4096, num_keys=_128K, dim=128),
    PrefillShape(num_tokens=4096, num_keys=_128K, dim=128, is_causal=True),
    PrefillShape(num_tokens=256, num_keys=_128K, dim=128, num_query_heads=8, num_kv_heads=1),
    *(_square(_128K, 64, 2, is_causal=is_causal) for is_causal in (False, True)),
)
_MAX_BLOCKS_FLOPS: Final = 2e13
"""Of shapes that the portable kernel is measured with over blocks: of longer ones it takes the time
of all others together."""
_PORTABLE_AT_LEAST: Final = 0.65
_WIDE: Final = Pipeline(num_consumers=3, block_n=64, num_stages=4)
_PIPELINES: Final = {
    (64, False): (
        Pipeline(num_consumers=3, num_stages=3, takes_turns=False),
        Pipeline(num_consumers=3, num_stages=4),
    ),
    (64, True): (
        Pipeline(num_consumers=3, num_stages=3, takes_turns=False),
        Pipeline(num_consumers=3, num_stages=3, is_persistent=True),
    ),
    (128, False): (
        Pipeline(takes_turns=False),
        _WIDE,
        Pipeline(takes_turns=False, holds_queries=True, num_stages=3),
        Pipeline(),
        Pipeline(holds_queries=True, is_persistent=True),
    ),
    (128, True): (
        Pipeline(takes_turns=False, is_persistent=True, num_stages=3),
        _WIDE._replace(is_persistent=True),
        Pipeline(is_persistent=True),
        Pipeline(takes_turns=False),
    ),
}
_TILES: Final = {
    64: (
        Tiles(128, 64, 8, 3, is_ahead=False),
        Tiles(128, 64, 8, 3, is_ahead=False, is_copied=True),
        Tiles(128, 128, 8, 3, is_copied=True),
    ),
    128: (
        Tiles(128, 64, 8, 3),
        Tiles(64, 64, 4, 3, is_ahead=False),
        Tiles(128, 128, 8, 2, is_ahead=False, is_copied=True),
        Tiles(128, 64, 8, 3, is_ahead=False, is_copied=True),
    ),
}


class Timer(Protocol):
    """What times calls: a `KernelTimer`."""

    @property
    def is_over(self) -> bool:
        """Whether there is no time for more."""

    def microseconds(self, call: Call, *, repeats: int) -> float:
        """Median time of a call."""


def measure(timer: KernelTimer, *, with_variants: bool) -> Iterator[Measurement]:
    """Speeds in TFLOP/s, ours beside FlashAttention 3; then, if asked, of settings that were not
    chosen; last those of cuDNN and torch's flash attention."""
    for shape in SHAPES:
        if not timer.is_over:
            yield from _compare(timer, shape)
    for shape in SQUARES if with_variants else ():
        if not timer.is_over:
            yield from _variants(timer, shape)
    for shape in SHAPES:
        if not timer.is_over:
            yield from _others(timer, shape)


class _Inputs(NamedTuple):
    q_THD: Tensor
    keys: Keys
    paged: Keys

    @classmethod
    def random(cls, shape: PrefillShape) -> "_Inputs":
        """Normal numbers; the same keys in line, and in blocks in random order."""
        torch.manual_seed(0)
        kv_shape = (shape.num_kv_heads, shape.num_keys, shape.dim)
        k_KSD, v_KSD = (
            torch.randn(kv_shape, dtype=torch.bfloat16, device="cuda") for _ in range(2)
        )
        q_shape = (shape.num_tokens, shape.num_query_heads, shape.dim)
        q_THD = torch.randn(q_shape, dtype=torch.bfloat16, device="cuda")
        num_blocks = shape.num_keys // _BLOCK_TOKENS
        ids_N = torch.randperm(num_blocks, device="cuda")
        k_PKSD, v_PKSD = (in_pages(x, ids_N) for x in (k_KSD, v_KSD))
        paged = Keys(k_PKSD, v_PKSD, shape.num_keys, ids_N.to(torch.int32), _BLOCK_TOKENS)
        return cls(q_THD, Keys.in_line(k_KSD, v_KSD), paged)


def in_pages(x_KSD: Tensor, ids_N: Tensor) -> Tensor:
    """x_PKSD with the i-th block of keys at block ids_N[i]."""
    num_heads, _, dim = x_KSD.shape
    x_NKsD = x_KSD.view(num_heads, -1, _BLOCK_TOKENS, dim).transpose(0, 1)
    placed_NKsD = torch.empty_like(x_NKsD)
    placed_NKsD[ids_N] = x_NKsD
    x_PbKsD = placed_NKsD.view(-1, _PAGE_BLOCKS, num_heads, _BLOCK_TOKENS, dim)
    return x_PbKsD.transpose(1, 2).reshape(-1, num_heads, _PAGE_BLOCKS * _BLOCK_TOKENS, dim)


def _compare(timer: KernelTimer, shape: PrefillShape) -> Iterator[Measurement]:
    inputs = _Inputs.random(shape)
    peers, ours = (
        {name: call for name, call in calls.items() if runs(f"{shape} {name}", call)}
        for calls in (_flash3(shape, inputs), _ours(shape, inputs))
    )
    yield from _errors(shape, peers, ours)
    speeds = _speeds(timer, shape, {**peers, **ours})
    for name, speed in speeds.items():
        yield Measurement(name=f"{shape} {name}", value=speed, unit="TFLOP/s")
    if "FA3" not in speeds:
        return
    for name in (name for name in ours if name in speeds):
        at_least = _PORTABLE_AT_LEAST if name.startswith("portable") else shape.at_least
        yield Measurement(
            name=f"{shape} {name} / FA3",
            value=speeds[name] / speeds["FA3"],
            unit="",
            at_least=None if shape.at_least is None else at_least,
        )


def _others(timer: KernelTimer, shape: PrefillShape) -> Iterator[Measurement]:
    inputs = _Inputs.random(shape)
    calls = {
        name: call
        for name, call in _torch_peers(shape, inputs).items()
        if runs(f"{shape} {name}", call)
    }
    for name, speed in _speeds(timer, shape, calls).items():
        yield Measurement(name=f"{shape} {name}", value=speed, unit="TFLOP/s")


def _speeds(timer: Timer, shape: PrefillShape, calls: Mapping[str, Call]) -> dict[str, float]:
    """TFLOP/s, of what ran in time."""
    return {
        name: shape.flops / microseconds * 1e-6
        for name, microseconds in median_times(timer, shape, calls).items()
    }


def median_times(timer: Timer, shape: PrefillShape, calls: Mapping[str, Call]) -> dict[str, float]:
    """Microseconds of each call that runs each time; of none once the timer's time is over."""
    # One order and then the other one: what comes later finds a warmer GPU. And nothing finds a
    # cold one, which draws more than it may for a while and is fast.
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in list(calls.values())[:1]:
        timer.microseconds(call, repeats=_repeats(shape))
    for names in (list(calls), list(calls)[::-1]):
        for name in names:
            if timer.is_over:
                return {}
            try:
                taken[name].append(timer.microseconds(calls[name], repeats=_repeats(shape)))
            except FAILURES as error:
                report_failure(f"{shape} {name}", error)
    return {name: fmean(times) for name, times in taken.items() if len(times) == 2}


def _repeats(shape: PrefillShape) -> int:
    """More of short calls: about 0.1 s of each."""
    return max(3, min(15, math.ceil(5e13 / shape.flops)))


def _ours(shape: PrefillShape, inputs: _Inputs) -> dict[str, Call]:
    calls: dict[str, Call] = {}
    q_THD = inputs.q_THD
    has_pipeline = prefill_gluon.is_available(q_THD.device)
    for name, keys in (("", inputs.keys), (", paged", inputs.paged)):
        rules = _rules(shape)
        if has_pipeline:
            calls[f"pipelined{name}"] = partial(prefill_gluon.prefill, q_THD, keys, **rules)
        if not name or shape.flops <= _MAX_BLOCKS_FLOPS:
            calls[f"portable{name}"] = partial(prefill_tl.prefill, q_THD, keys, **rules)
    return calls


def _rules(shape: PrefillShape) -> dict[str, Any]:
    return {"scale": shape.dim**-0.5, "causal": shape.causal, "out_dtype": torch.bfloat16}


def _flash3(shape: PrefillShape, inputs: _Inputs) -> dict[str, Call]:
    """FlashAttention 3, where it is installed."""
    flash = flash3()
    if flash is None:
        return {}
    k_1SKD, v_1SKD = (
        x.transpose(1, 2).contiguous() for x in (inputs.keys.k_PKSD, inputs.keys.v_PKSD)
    )
    q_1THD = inputs.q_THD[None]
    return {"FA3": partial(flash.attend, q_1THD, k_1SKD, v_1SKD, causal=shape.is_causal)}


def _torch_peers(shape: PrefillShape, inputs: _Inputs) -> dict[str, Call]:
    """By name; they do not take every shape."""
    if shape.is_causal and shape.num_tokens != shape.num_keys:
        return {}
    q_1HTD = inputs.q_THD.transpose(0, 1)[None]
    keys = inputs.keys
    return {
        name: partial(_sdpa, backend, q_1HTD, keys.k_PKSD, keys.v_PKSD, is_causal=shape.is_causal)
        for name, backend in (
            ("cuDNN", SDPBackend.CUDNN_ATTENTION),
            ("torch flash", SDPBackend.FLASH_ATTENTION),
        )
    }


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool) -> Tensor:
    with sdpa_kernel(backend):
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=is_causal, enable_gqa=True
        )


def _errors(
    shape: PrefillShape, peers: Mapping[str, Call], ours: Mapping[str, Call]
) -> Iterator[Measurement]:
    """How far our kernels are from FlashAttention 3, which is thought to be right."""
    if "FA3" not in peers:
        return
    found = peers["FA3"]()
    right = found[0] if isinstance(found, tuple) else found
    assert isinstance(right, Tensor)
    right_THD = right[0].float()
    for name, call in ours.items():
        out_THD = call().out_THD.float()  # type: ignore[attr-defined]
        error = float((out_THD - right_THD).norm() / right_THD.norm())
        yield Measurement(
            name=f"{shape} {name}, error against FA3", value=error, unit="", at_most=_MAX_ERROR
        )


def _variants(timer: KernelTimer, shape: PrefillShape) -> Iterator[Measurement]:
    """The settings that were not chosen, for the tables of the kernels: each beside FlashAttention
    3 right before it, because the speed of both follows what the GPU draws."""
    inputs = _Inputs.random(shape)
    beside = _flash3(shape, inputs).get("FA3")
    calls: dict[str, Call] = {}
    rules = _rules(shape)
    has_pipeline = prefill_gluon.is_available(inputs.q_THD.device)
    for layout, keys in (("in line", inputs.keys), ("paged", inputs.paged)):
        for pipeline in _PIPELINES[shape.dim, shape.is_causal] if has_pipeline else ():
            calls[f"{layout} {pipeline}"] = partial(
                prefill_gluon.prefill, inputs.q_THD, keys, **rules, pipeline=pipeline
            )
    for layout, keys in (("in line", inputs.keys), ("paged", inputs.paged)):
        for tiles in () if shape.is_causal else _TILES[shape.dim]:
            if layout == "in line" or not tiles.is_copied:
                calls[f"{layout} {tiles}"] = partial(
                    prefill_tl.prefill, inputs.q_THD, keys, **rules, tiles=tiles
                )
    for name, call in calls.items():
        if timer.is_over:
            return
        try:
            peer = timer.microseconds(beside, repeats=2) if beside else None
            taken = timer.microseconds(call, repeats=3)
        except FAILURES as error:
            report_failure(f"{shape} {name}", error)
            continue
        yield Measurement(name=f"{shape} {name}", value=shape.flops / taken * 1e-6, unit="TFLOP/s")
        if peer is not None:
            yield Measurement(name=f"{shape} {name} / FA3", value=peer / taken, unit="")
