"""Array codecs `ChannelQuantizer` (keys) and `TokenQuantizer` (values): integers of 8, 4, 3 or
2 bits with a scale and a zero-point per group (KIVI, arXiv 2402.02750).

Stored x is zero + scale * code. Keys have a few channels far from zero, so each channel has its
own groups of tokens: scale and zero fold into the query once per group. Values have none, so each
token has its own groups of channels: scale folds into the token's weight. In memory both are the
same array [K, G, N, C], groups of N numbers along the second axis and packed along the last: for
keys the axes are tokens and channels; values are transposed, so that tokens are contiguous.

Scale and zero are rounded first and the codes computed from what is stored, outwards, so that
no number lies outside its group's range.

Shape letters: B blocks, K KV heads, S tokens of a block, D head dimension; of stored arrays
G groups, N numbers of a group, C the contiguous axis.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvcluster.codec.array import BlockShape, Plane
from kvcluster.codec.checks import (
    check_multiple,
    check_one_of,
    check_planes,
    shape_of_blocks,
    shape_of_stored,
)
from kvcluster.codec.packing import (
    CODE_BITS,
    code_planes,
    num_code_planes,
    pack,
    unpack,
)
from kvcluster.codec.rounding import (
    MAX_HALF,
    half_at_least,
    half_at_most,
    pairwise_sum,
    power_of_two_at_least,
    quotient,
)


@dataclass(frozen=True)
class _Quantizer:
    """Groups along the second last axis of an array, packed along its last."""

    _transposed: ClassVar[bool]

    bits: int
    """Of a code: 8, 4, 3 or 2."""

    group: int = 64
    """Numbers that share a scale and a zero-point; the whole axis where it is shorter."""

    scale_bits: int = 16
    """16: scale and zero are float16. 8: half of that; the zero is a multiple of the scale, at
    most 128 of it, so a group far from 0 for its range is coarser (error up to 1/256 of it)."""

    spans: tuple[float, ...] = ()
    """Parts of a group's range, around its middle, that codes may cover instead of all of it: each
    group takes what gives it the least squared error. Changes no format; pays for 2 and 3 bits."""

    def __post_init__(self) -> None:
        check_one_of("bits", self.bits, CODE_BITS)
        check_one_of("scale_bits", self.scale_bits, (16, 8))
        if self.group < 2:
            raise ValueError(f"group must be 2 or more, not {self.group}")
        if not all(0 < span < 1 for span in self.spans):
            raise ValueError(f"spans must be above 0 and below 1, not {self.spans}")

    def planes(self, shape: BlockShape) -> tuple[Plane, ...]:
        """Codes, then `scale` and `zero` [K, G, C], then with 8 scale bits `unit` [K]."""
        num_heads, num_grouped, num_contiguous = self._stored_shape(shape)
        group = min(self.group, num_grouped)
        axis = "the head dimension" if self._transposed else "tokens of a block"
        check_multiple(f"{axis}, in groups of {group},", num_grouped, group)
        grouped = (num_heads, num_grouped // group, num_contiguous)
        codes = code_planes((num_heads, num_grouped, num_contiguous), self.bits)
        if self.scale_bits == 16:
            half = torch.float16
            return (*codes, Plane("scale", grouped, half), Plane("zero", grouped, half))
        return (
            *codes,
            Plane("scale", grouped, torch.uint8),
            Plane("zero", grouped, torch.int8),
            Plane("unit", (num_heads,), torch.float32),
        )

    def encode(self, x_BKSD: Tensor, positions_BS: Tensor) -> tuple[Tensor, ...]:
        """Contiguous planes. Numbers beyond the largest float16 are stored as that."""
        shape = shape_of_blocks(x_BKSD, positions_BS)
        self.planes(shape)
        x = self._swap(x_BKSD.float().clamp(-MAX_HALF, MAX_HALF))
        group = min(self.group, x.shape[2])
        x_BKGNC = x.reshape(*x.shape[:2], x.shape[2] // group, group, x.shape[3])
        levels = (1 << self.bits) - 1
        low, high = _best_range(x_BKGNC, levels, self.spans)
        write_scales = _write_half_scales if self.scale_bits == 16 else _write_byte_scales
        scale_planes = write_scales(low, high, levels)
        scale, zero = (grid[:, :, :, None] for grid in _read_scales(scale_planes))
        codes = _nearest_codes(x_BKGNC, scale, zero, levels).to(torch.uint8)
        return (*pack(codes.flatten(2, 3), self.bits), *scale_planes)

    def decode(self, planes: Sequence[Tensor], positions_BS: Tensor) -> Tensor:
        return self._swap(self._read(planes, positions_BS, (0, 1, 2, 3))).contiguous()

    def inner(self, planes: Sequence[Tensor], positions_BS: Tensor) -> Tensor:
        """The same numbers; in memory a head's tokens follow one another over all blocks."""
        axes = (1, 2, 0, 3) if self._transposed else (1, 0, 2, 3)
        return self._swap(self._read(planes, positions_BS, axes))

    def fold(self, q_THD: Tensor) -> Tensor:
        return q_THD.float()

    def expand(self, out_THC: Tensor) -> Tensor:
        return out_THC

    def _read(
        self, planes: Sequence[Tensor], positions_BS: Tensor, axes: tuple[int, ...]
    ) -> Tensor:
        """Numbers on the stored axes, which lie in memory in the order `axes`."""
        shape_of_stored(planes[0])
        split = num_code_planes(self.bits)
        codes = unpack([plane.permute(axes) for plane in planes[:split]], self.bits)
        places = tuple(axes.index(axis) for axis in range(len(axes)))
        stored = codes.float().permute(places)
        check_planes(planes, self.planes(self._stored_shape(shape_of_stored(stored))), positions_BS)
        scale, zero = (grid[:, :, :, None] for grid in _read_scales(planes[split:]))
        num_blocks, num_heads, num_grouped, num_contiguous = stored.shape
        num_groups = scale.shape[2]
        grouped = (num_blocks, num_heads, num_groups, num_grouped // num_groups, num_contiguous)
        stored.view(grouped).mul_(scale).add_(zero)
        return stored

    def _swap(self, x: Tensor) -> Tensor:
        """From tokens by channels to the stored axes, and back."""
        return x.transpose(2, 3) if self._transposed else x

    def _stored_shape(self, shape: BlockShape) -> BlockShape:
        """The same for a shape."""
        num_heads, num_tokens, dim = shape
        return BlockShape(num_heads, dim, num_tokens) if self._transposed else shape


class ChannelQuantizer(_Quantizer):
    """For keys: each channel in groups of tokens. Codes [K, S, D], packed along D; scale and zero
    [K, S / group, D]."""

    _transposed = False


class TokenQuantizer(_Quantizer):
    """For values: each token in groups of channels. Codes [K, D, S], packed along S; scale and
    zero [K, D / group, S]."""

    _transposed = True


def _nearest_codes(x: Tensor, scale: Tensor, zero: Tensor, levels: int) -> Tensor:
    steps = torch.where(scale > 0, (x - zero) / scale, 0.0)
    return steps.round().clamp(0, levels)


def _best_range(x_BKGNC: Tensor, levels: int, spans: Sequence[float]) -> tuple[Tensor, Tensor]:
    """What the codes of each group shall cover: all of it, or one of the spans around its middle.
    Errors are those of scales that nothing rounds."""
    # Of zeros of both signs, devices differ in which is the least; the sum of both is 0.
    low = x_BKGNC.amin(dim=3, keepdim=True) + 0.0
    high = x_BKGNC.amax(dim=3, keepdim=True) + 0.0
    best, least = torch.zeros_like(low), None
    for span in (1.0, *spans) if spans else ():
        inset = (high - low) * ((1 - span) / 2)
        scale, zero = (high - low) * (span / levels), low + inset
        rounded = zero + scale * _nearest_codes(x_BKGNC, scale, zero, levels)
        error = pairwise_sum((rounded - x_BKGNC).square().transpose(3, 4))[:, :, :, None]
        best = best if least is None else torch.where(error < least, inset, best)
        least = error if least is None else torch.minimum(error, least)
    return (low + best).squeeze(3), (high - best).squeeze(3)


def _write_half_scales(low: Tensor, high: Tensor, levels: int) -> tuple[Tensor, ...]:
    zero = half_at_most(low)
    return half_at_least(quotient(high - zero.float(), levels)), zero


# Half of the bits that a float16 has below its sign: 3 of the exponent, 5 of the mantissa.
_SCALE_SHIFT = 5
_MAX_BYTE_SCALE = 1.96875 * 2.0**-8


def _write_byte_scales(low: Tensor, high: Tensor, levels: int) -> tuple[Tensor, ...]:
    # The last two: code 0 may not be more than 128 steps below 0, nor code `levels` more than
    # 127 + levels steps above.
    lower_bounds = [
        quotient(high - low, levels),
        quotient(-low, 128),
        quotient(high, levels + 127),
    ]
    wanted = torch.stack(lower_bounds).amax(dim=0)
    unit_BK = power_of_two_at_least(quotient(wanted.amax(dim=(2, 3)), _MAX_BYTE_SCALE))
    halves = half_at_least(wanted / unit_BK[..., None, None]).view(torch.int16)
    bytes_up = ((halves + (1 << _SCALE_SHIFT) - 1) >> _SCALE_SHIFT).clamp(max=255)
    scale = bytes_up.to(torch.uint8)
    step = _read_byte_scale(scale, unit_BK)
    zero = torch.where(step > 0, low / step, 0.0).round().clamp(-128, 127)
    return scale, zero.to(torch.int8), unit_BK


def _read_byte_scale(scale: Tensor, unit_BK: Tensor) -> Tensor:
    halves = (scale.to(torch.int16) << _SCALE_SHIFT).view(torch.float16)
    return halves.float() * unit_BK[..., None, None]


def _read_scales(planes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Scale and zero of every group, float32."""
    if planes[0].dtype == torch.float16:
        scale, zero = planes
        return scale.float(), zero.float()
    scale, multiple, unit_BK = planes
    step = _read_byte_scale(scale, unit_BK)
    return step, step * multiple
