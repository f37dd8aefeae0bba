"""Suite `decode` of `kvcluster bench kernels`: one token, or a few, over a long paged cache."""

from collections.abc import Iterator
from typing import Final, NamedTuple

import torch

from kvcluster.bench.kernel_peers import decode_peers
from kvcluster.bench.kernel_timing import KernelTimer
from kvcluster.bench.report import Measurement


class DecodeShape(NamedTuple):
    """One request's decode in one layer."""

    num_query_heads: int
    num_kv_heads: int
    dim: int
    num_keys: int
    num_tokens: int = 1

    def __str__(self) -> str:
        keys = self.num_keys >> 10
        length = f"{keys >> 10}M" if keys >= 1024 else f"{keys}K"
        return f"D{self.dim} {self.num_query_heads}/{self.num_kv_heads} q{self.num_tokens} {length}"

    @property
    def exact_bytes(self) -> int:
        """Of K and V in bfloat16."""
        return 4 * self.num_keys * self.num_kv_heads * self.dim


SHAPES: Final = (
    DecodeShape(64, 8, 128, 1 << 17),
    DecodeShape(64, 8, 128, 1 << 20),
    DecodeShape(32, 8, 128, 1 << 17),
    DecodeShape(32, 8, 128, 1 << 20),
)


def measure(timer: KernelTimer, *, with_variants: bool) -> Iterator[Measurement]:
    """Times, and bandwidth over the bytes of the cache."""
    del with_variants
    for shape in SHAPES:
        yield from _peers(timer, shape)


def _peers(timer: KernelTimer, shape: DecodeShape) -> Iterator[Measurement]:
    kv_shape = (1, shape.num_kv_heads, shape.num_keys, shape.dim)
    k_1KSD, v_1KSD = (torch.randn(kv_shape, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    q_1HTD = torch.randn(
        1, shape.num_query_heads, shape.num_tokens, shape.dim, dtype=torch.bfloat16, device="cuda"
    )
    for name, call in decode_peers(q_1HTD, k_1KSD, v_1KSD).items():
        if timer.is_over:
            return
        taken = timer.microseconds(call)
        yield Measurement(name=f"{shape} {name}", value=taken, unit="us")
        speed = shape.exact_bytes / taken * 1e-6
        yield Measurement(name=f"{shape} {name} speed", value=speed, unit="TB/s")
