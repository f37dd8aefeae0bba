"""Encoded blocks whose keys are latents, for the kernel that expands them as it reads.

A latent is read as its codec stores it, one layer's own or one of several layers
(`codec/joined.py`), of which each has its part of the way back. Codes of a rotated latent are not
rotated back: the way back does that.

Shape letters: R rows, T query tokens of a row, H query heads, K KV heads, D head dimension, C
latent dimension, F = K * D.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Final, NamedTuple

import torch
from kvcluster_kernels.integer_decode import BITS as INTEGER_BITS
from kvcluster_kernels.integer_decode import IntegerPages
from kvcluster_kernels.latent_decode import decode_latents, fits
from kvcluster_kernels.latent_history import LatentHistory
from kvcluster_kernels.latent_pages import (
    KeyExpansion,
    KeyRotation,
    LatentPages,
    Latents,
    LatentSections,
    key_expansion,
    sections_of,
)
from kvcluster_kernels.latent_values import ValuePages, row_fits
from kvcluster_kernels.paging import Attention, PagedRows, Partial
from kvcluster_kernels.rotated_decode import RotatedPages
from torch import Tensor

from kvcluster.codec.array import ArrayCodec
from kvcluster.codec.basis import Basis
from kvcluster.codec.exact_array import ExactArray
from kvcluster.codec.latent import LatentKeys, LatentValues, PairRotation
from kvcluster.codec.method import LayerCodec
from kvcluster.codec.packing import num_code_planes
from kvcluster.codec.quantized import ChannelQuantizer, TokenQuantizer
from kvcluster.codec.rotated import Rotated, rotate
from kvcluster.codec.sections import Sections
from kvcluster.types import LayerGeometry

_LEAST: Final = 16
"""Tokens of a block, and of a group of it: a matrix product is of as many numbers at least."""


class WayBack(NamedTuple):
    """What makes weighted sums of values of those of what is stored, for each KV head."""

    up_KCD: Tensor
    """Float32."""
    mean_KD: Tensor | None
    """Added to sums of weight 1."""

    def restored(self, found: Partial) -> Partial:
        """Rows that saw no key stay zero."""
        num_rows, num_tokens, num_heads, width = found.out_RTHD.shape
        num_kv_heads, _, dim = self.up_KCD.shape
        out_XKGC = found.out_RTHD.view(num_rows * num_tokens, num_kv_heads, -1, width)
        out_KXC = out_XKGC.transpose(0, 1).flatten(1, 2)
        out_KXD = out_KXC @ self.up_KCD
        if self.mean_KD is not None:
            out_KXD = out_KXD + self.mean_KD[:, None]
        out_XKGD = out_KXD.view(num_kv_heads, len(out_XKGC), -1, dim).transpose(0, 1)
        out_RTHD = out_XKGD.reshape(num_rows, num_tokens, num_heads, dim)
        if self.mean_KD is not None:
            out_RTHD = out_RTHD.masked_fill(found.lse_RTH[..., None] == -torch.inf, 0.0)
        return found._replace(out_RTHD=out_RTHD)


class LatentCache(NamedTuple):
    """The encoded blocks of one layer, as kernels take them."""

    keys: Latents
    expansion: KeyExpansion
    values: ValuePages
    back: WayBack | None
    """Of values that are stored in another basis."""
    value_expansion: KeyExpansion | None
    """The same of values that are latents, for many rows."""

    def decode(self, q_RTHD: Tensor, rows: PagedRows, attention: Attention) -> Partial:
        """Attention of a few query tokens of each row over its blocks."""
        found = decode_latents(q_RTHD, self.keys, self.expansion, self.values, rows, attention)
        return found if self.back is None else self.back.restored(found)

    def history(
        self, blocks_N: Tensor, positions_N: Tensor, geometry: LayerGeometry
    ) -> LatentHistory:
        """Whole blocks for `prefill_history`, and the positions of their first tokens; int32."""
        block_size = sections_of(self.keys)[0].codes.shape[3]
        is_rotated = isinstance(self.values, RotatedPages)
        return LatentHistory(
            self.keys,
            self.expansion,
            self.values,
            self.value_expansion,
            blocks_N,
            positions_N,
            len(blocks_N) * block_size,
            geometry.key_dim,
            geometry.value_dim,
            self.back.up_KCD[0] if self.back is not None and is_rotated else None,
        )


def latent_cache(
    codec: LayerCodec,
    planes: tuple[Sequence[Tensor], Sequence[Tensor]],
    geometry: LayerGeometry,
    block_size: int,
) -> LatentCache | None:
    """As `packed_keys.packed_pages`, of keys that are latents."""
    keys, values = codec
    if not isinstance(keys, LatentKeys) or block_size & (block_size - 1) or block_size < _LEAST:
        return None
    rotation = keys.rotation
    if geometry.key_dim % 2 or not (rotation is None or isinstance(rotation, PairRotation)):
        return None
    latents = latent_pages(keys.stored, planes[0], keys.rank)
    found = _values(values, planes[1], geometry, block_size)
    if latents is None or found is None:
        return None
    if not fits(latents, found[0], geometry.key_dim):
        return None
    expansion = key_expansion(
        stored_up(keys.stored, keys.basis),
        keys.basis.mean_F,
        num_kv_heads=geometry.num_kv_heads,
        rotation=None if rotation is None else KeyRotation(*rotation.pairs),
    )
    value_expansion = None
    if isinstance(values, LatentValues) and geometry.value_dim % 2 == 0:
        value_expansion = key_expansion(
            stored_up(values.stored, values.basis),
            values.basis.mean_F,
            num_kv_heads=geometry.num_kv_heads,
            rotation=None,
        )
    return LatentCache(latents, expansion, *found, value_expansion)


def latent_pages(stored: ArrayCodec, planes: Sequence[Tensor], rank: int) -> Latents | None:
    """The pages of a latent that `stored` writes; None: no kernel reads them."""
    left = iter(planes)
    sections = [_section(codec, left, dim) for codec, dim in _sections(stored, rank)]
    whole = [section for section in sections if section is not None]
    if len(whole) < len(sections):
        return None
    return whole[0] if len(whole) == 1 else LatentSections(tuple(whole))


def stored_up(stored: ArrayCodec, basis: Basis) -> Tensor:
    """up_CF from what is stored: where a section is rotated, x = R^T z, so that x up = z (R up)."""
    dims = [dim for _, dim in _sections(stored, basis.rank)]
    parts = [
        rotate(up_CF.T).T if isinstance(codec, Rotated) else up_CF
        for (codec, _), up_CF in zip(
            _sections(stored, basis.rank), torch.split(basis.up_CF, dims), strict=True
        )
    ]
    return torch.cat(parts)


def _sections(stored: ArrayCodec, rank: int) -> list[tuple[ArrayCodec, int]]:
    if isinstance(stored, Sections):
        return list(zip(stored.codecs, stored.dims, strict=True))
    return [(stored, rank)]


def _section(codec: ArrayCodec, planes: Iterator[Tensor], dim: int) -> LatentPages | None:
    """Takes the planes of the section."""
    if isinstance(codec, ExactArray):
        return LatentPages(next(planes))
    if isinstance(codec, Rotated) and not codec.centred and not codec.transposed:
        codes, *high = islice(planes, num_code_planes(codec.bits))
        return LatentPages(codes, next(planes), high=high[0] if high else None, rotated_rank=dim)
    if not isinstance(codec, ChannelQuantizer):
        return None
    codes, *high = islice(planes, num_code_planes(codec.bits))
    scale, zero = islice(planes, 2)
    unit = next(planes) if codec.scale_bits == 8 else None
    return LatentPages(codes, scale, zero, unit, high[0] if high else None)


def _values(
    codec: ArrayCodec, planes: Sequence[Tensor], geometry: LayerGeometry, block_size: int
) -> tuple[ValuePages, WayBack | None] | None:
    """The pages of values, and their way back; None: no kernel reads them beside latent keys."""
    num_heads, dim = geometry.num_kv_heads, geometry.value_dim
    if isinstance(codec, ExactArray):
        return LatentPages(planes[0]), None
    if isinstance(codec, LatentValues):
        pages = latent_pages(codec.stored, planes, codec.rank)
        up_CKD = stored_up(codec.stored, codec.basis).view(-1, num_heads, dim)
        mean_KD = codec.basis.mean_F.view(num_heads, dim)
        back = WayBack(up_CKD.transpose(0, 1).contiguous(), mean_KD)
        return None if pages is None else (pages, back)
    if isinstance(codec, Rotated) and codec.transposed and not codec.centred:
        codes, *others, scale = planes
        rotation_DD = rotate(torch.eye(dim, device=codes.device)).T.contiguous()
        back = WayBack(rotation_DD.expand(num_heads, -1, -1), None)
        is_read = row_fits(block_size, codec.bits) and codec.bits in (4, 3, 2)
        return (
            (RotatedPages(codes, scale, high=others[0] if others else None), back)
            if is_read
            else None
        )
    if isinstance(codec, TokenQuantizer) and codec.bits in INTEGER_BITS:
        codes, *high = planes[: num_code_planes(codec.bits)]
        scale, zero, *unit = planes[num_code_planes(codec.bits) :]
        pages_of_integers = IntegerPages(
            codes, scale, zero, unit[0] if unit else None, high[0] if high else None
        )
        return (pages_of_integers, None) if row_fits(block_size, codec.bits) else None
    return None
