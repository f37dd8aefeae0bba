"""Blocks of one layer to encode, and a cache to encode them into, for benchmarks."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final, NamedTuple

import torch
from kvcluster_kernels.encode_blocks import Blocks, store_blocks
from kvcluster_kernels.encode_floats import encode_float8, encode_halves
from kvcluster_kernels.encode_integers import IntegerFormat, encode_integers
from kvcluster_kernels.encode_latents import LatentProjection, encode_latents
from kvcluster_kernels.encode_rotated import RotatedFormat, encode_rotated
from torch import Tensor

from kvcluster.codec.array import ArrayCodec, BlockShape, consecutive
from kvcluster.codec.basis import Basis
from kvcluster.codec.exact_array import ExactArray
from kvcluster.codec.float8 import Float8
from kvcluster.codec.latent import LatentStorage, LatentValues
from kvcluster.codec.quantized import ChannelQuantizer, TokenQuantizer
from kvcluster.codec.rotated import Rotated, codebook, signs
from kvcluster.types import PAGE_BLOCKS

_SPANS: Final = (0.85, 0.7)
_Encode = Callable[[Blocks, tuple[Tensor, ...]], None]


class EncodeShape(NamedTuple):
    """Blocks that are encoded together, one array of one layer."""

    num_blocks: int
    num_kv_heads: int
    dim: int
    block_size: int = 64

    def __str__(self) -> str:
        return f"{self.num_blocks} blocks of {self.num_kv_heads} heads D{self.dim}"


class EncodeCalls(NamedTuple):
    """The same work in two ways; both write the same bytes."""

    kernel: Callable[[], None]
    codec: Callable[[], None]
    num_bytes: int
    """Read and written."""


def encode_calls(name: str, shape: EncodeShape, device: torch.device) -> EncodeCalls:
    """Of the format of that name, bfloat16 blocks."""
    codec, encode = FORMATS[name](shape, device)
    block = BlockShape(shape.num_kv_heads, shape.block_size, shape.dim)
    x_BKSD = torch.randn((shape.num_blocks, *block), dtype=torch.float16, device=device).bfloat16()
    order = torch.randperm(shape.num_blocks, device=device).to(torch.int32)
    blocks = Blocks(x_BKSD, order)
    num_pages = -(-shape.num_blocks // PAGE_BLOCKS)
    planes = tuple(
        torch.empty((num_pages, PAGE_BLOCKS, *plane.shape), dtype=plane.dtype, device=device)
        for plane in codec.planes(block)
    )
    positions_BS = consecutive(torch.zeros_like(order), shape.block_size)

    def by_codec() -> None:
        store_blocks(planes, order, codec.encode(x_BKSD, positions_BS))

    num_bytes = x_BKSD.nbytes + sum(plane.nbytes for plane in planes)
    return EncodeCalls(partial(encode, blocks, planes), by_codec, num_bytes)


def _halves(_shape: EncodeShape, _device: torch.device) -> tuple[ArrayCodec, _Encode]:
    return ExactArray(torch.bfloat16), lambda blocks, planes: encode_halves(blocks, planes[0])


def _float8(_shape: EncodeShape, _device: torch.device) -> tuple[ArrayCodec, _Encode]:
    def encode(blocks: Blocks, planes: tuple[Tensor, ...]) -> None:
        encode_float8(blocks, (planes[0], planes[1]), is_transposed=True)

    return Float8(transposed=True), encode


def _integers(
    form: IntegerFormat, _shape: EncodeShape, _device: torch.device
) -> tuple[ArrayCodec, _Encode]:
    quantizer = TokenQuantizer if form.is_transposed else ChannelQuantizer
    codec = quantizer(form.bits, group=form.group, spans=form.spans)
    return codec, lambda blocks, planes: encode_integers(blocks, form, planes)


def _rotated(
    codec: Rotated, shape: EncodeShape, device: torch.device
) -> tuple[ArrayCodec, _Encode]:
    form = RotatedFormat(
        codec.bits,
        codebook(codec.bits, device),
        signs(shape.dim, device),
        codec.centred,
        codec.transposed,
    )
    return codec, lambda blocks, planes: encode_rotated(blocks, form, planes)


def _latents(shape: EncodeShape, device: torch.device) -> tuple[ArrayCodec, _Encode]:
    width = shape.num_kv_heads * shape.dim
    rank, form = width // 4, IntegerFormat(4, 64)
    basis = Basis(
        mean_F=torch.zeros(width, device=device),
        down_FC=torch.randn(width, rank, device=device) * width**-0.5,
        up_CF=torch.randn(rank, width, device=device) * rank**-0.5,
        spectrum_F=torch.ones(width, dtype=torch.float64),
    )
    projection = LatentProjection.of(basis.down_FC, basis.mean_F)
    storage = LatentStorage(bits=form.bits, group=form.group)
    codec = LatentValues(basis, num_heads=shape.num_kv_heads, rank=rank, storage=storage)
    return codec, lambda blocks, planes: encode_latents(blocks, projection, form, planes)


FORMATS: Final[Mapping[str, Callable[[EncodeShape, torch.device], tuple[ArrayCodec, _Encode]]]] = {
    "bf16": _halves,
    "fp8 values": _float8,
    "int8 keys": partial(_integers, IntegerFormat(8, 64)),
    "int4 keys": partial(_integers, IntegerFormat(4, 64)),
    "int4 values": partial(_integers, IntegerFormat(4, 64, is_transposed=True)),
    "int2 keys": partial(_integers, IntegerFormat(2, 32, spans=_SPANS)),
    "int2 values": partial(_integers, IntegerFormat(2, 32, spans=_SPANS, is_transposed=True)),
    "latent r=0.25 bits=4": _latents,
    "rotated4 keys": partial(_rotated, Rotated(4, centred=True)),
    "rotated4 values": partial(_rotated, Rotated(4, transposed=True)),
    "rotated2 values": partial(_rotated, Rotated(2, transposed=True)),
}
"""By name: what is encoded with the parameters of the policies."""
