"""Pages of latents, and what turns latents into the keys of a layer.

    key_th = R(position_t) (mean_h + sum_c latent_tc up_ch)

R turns pairs of channels by an angle, position * frequency of the pair. A dot product does not
depend on the order of channels, so kernels have the first channels of all pairs side by side, then
the second ones; channels that are not turned are pairs of frequency 0.

Shape letters: those of `paging.py`; S tokens of a block, C latent dimension, F = K * D, J the two
channels of a pair, E pairs of a head.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from kvcluster_kernels.codes import num_fields

_LEAST_PAIRS = 16
"""A matrix product is of 16 numbers at least."""


class LatentPages(NamedTuple):
    """Pages of one array as `[pages, blocks of a page, ...]`: latents, which are the one head of
    all KV heads, or plain numbers of 16 bits of each KV head."""

    codes: Tensor
    """[P, N, 1, S, C], float16; or [P, N, 1, S, C * bits / 8], uint8, or int8 where codes have 8
    bits, packed along C; of 3 bits the lower two."""
    scale: Tensor | None = None
    """[P, N, 1, groups of S, C], float16, or uint8 with 8 scale bits; None for numbers. Of rotated
    codes [P, N, 1, S]."""
    zero: Tensor | None = None
    """As the scale, float16 or int8; None for rotated codes."""
    unit: Tensor | None = None
    """[P, N, 1], float32, with 8 scale bits."""
    high: Tensor | None = None
    """Of codes of 3 bits the third, [P, N, 1, S, C / 8], uint8."""
    rotated_rank: int | None = None
    """C of rotated codes (`levels.py`), which stand for levels times the scale of their token. What
    they are before the rotation back are the numbers of a token here: the way back rotates."""

    @property
    def rank(self) -> int:
        """Numbers of a token."""
        if self.rotated_rank is not None:
            return self.rotated_rank
        return int((self.codes if self.scale is None else self.scale).shape[4])

    @property
    def bits(self) -> int:
        """Of a number. Raises: ValueError for codes of a width that kernels do not read."""
        if self.scale is None:
            return 16
        bits, rest = divmod(8 * int(self.codes.shape[4]), self.rank)
        bits += self.high is not None
        if rest or bits not in (8, 4, 3, 2):
            raise ValueError(
                f"{self.codes.shape[4]} bytes of {self.rank} codes: want 8, 4, 3 or 2 bits"
            )
        return bits


class LatentSections(NamedTuple):
    """Latents of which each part is written in its own way."""

    sections: tuple[LatentPages, ...]
    """In order of the numbers of a token."""


Latents = LatentPages | LatentSections


def sections_of(pages: Latents) -> tuple[LatentPages, ...]:
    """One, where all is written alike."""
    return pages.sections if isinstance(pages, LatentSections) else (pages,)


class SectionForm(NamedTuple):
    """What a kernel is compiled for, of one section."""

    rank: int
    bits: int
    groups: int
    """Of tokens that share scales."""
    scale_bits: int
    is_rotated: bool
    piece: int
    """Bytes, or numbers of 16 bits, of a token that are worked on together."""

    @classmethod
    def of(cls, pages: LatentPages, most: int) -> "SectionForm":
        """`most`: of a piece. Raises: ValueError, as `LatentPages.bits`."""
        is_rotated = pages.rotated_rank is not None
        count = pages.rank // num_fields(pages.bits)
        return cls(
            pages.rank,
            pages.bits,
            1 if pages.scale is None or is_rotated else int(pages.scale.shape[3]),
            16 if pages.unit is None else 8,
            is_rotated,
            max(_LEAST_PAIRS, min(most, triton.next_power_of_2(count))),
        )

    @property
    def num_arrays(self) -> int:
        """That a block is unpacked to, of a piece's numbers each; the last may be filled up."""
        fields = int(num_fields(self.bits))
        return -(-self.rank // fields // self.piece) * fields


# Triton takes their names from the fields of tuples in tuples: kernels ask these functions.


@triton.constexpr_function
def form_rank(forms: tuple[SectionForm, ...], section: int) -> int:
    return SectionForm(*forms[section]).rank


@triton.constexpr_function
def form_bits(forms: tuple[SectionForm, ...], section: int) -> int:
    return SectionForm(*forms[section]).bits


@triton.constexpr_function
def form_groups(forms: tuple[SectionForm, ...], section: int) -> int:
    return SectionForm(*forms[section]).groups


@triton.constexpr_function
def form_scale_bits(forms: tuple[SectionForm, ...], section: int) -> int:
    return SectionForm(*forms[section]).scale_bits


@triton.constexpr_function
def form_is_rotated(forms: tuple[SectionForm, ...], section: int) -> bool:
    return bool(SectionForm(*forms[section]).is_rotated)


@triton.constexpr_function
def form_piece(forms: tuple[SectionForm, ...], section: int) -> int:
    return SectionForm(*forms[section]).piece


@triton.constexpr_function
def form_fields(forms: tuple[SectionForm, ...], section: int) -> int:
    """Arrays that a piece is unpacked to."""
    return int(num_fields(SectionForm(*forms[section]).bits))


@triton.constexpr_function
def form_count(forms: tuple[SectionForm, ...], section: int) -> int:
    """Bytes, or numbers of 16 bits, of a token."""
    own = SectionForm(*forms[section])
    return own.rank // int(num_fields(own.bits))


@triton.constexpr_function
def form_grid(forms: tuple[SectionForm, ...], section: int, block_size: int) -> int:
    """Scales of a block."""
    own = SectionForm(*forms[section])
    return block_size if own.is_rotated else own.groups * own.rank


@triton.constexpr_function
def first_number(forms: tuple[SectionForm, ...], section: int) -> int:
    """Of a section among the numbers of a token."""
    return sum(SectionForm(*forms[before]).rank for before in range(section))


@triton.constexpr_function
def num_arrays(forms: tuple[SectionForm, ...], section: int) -> int:
    """Arrays that the sections before it are unpacked to."""
    return sum(SectionForm(*forms[before]).num_arrays for before in range(section))


def section_planes(pages: LatentPages) -> tuple[Tensor, ...]:
    """In the order of the kernels; the codes stand for planes that are not there."""
    planes = (pages.codes, pages.high, pages.scale, pages.zero, pages.unit)
    return tuple(pages.codes if plane is None else plane for plane in planes)


class KeyRotation(NamedTuple):
    """How a layer turns its keys by their position."""

    inverse_frequencies_E: Tensor
    """Radians per position of the pairs that are turned, float32."""
    scaling: float = 1.0
    """Factor on the channels that are turned."""
    first_channel: int = 0
    """Channels before it, and those behind the last pair, are left alone."""
    is_interleaved: bool = False
    """Pairs are neighbours, instead of channels half of the turned ones apart."""


class KeyExpansion(NamedTuple):
    """The way from latents to keys, as kernels read it. Pairs are filled up to a power of two."""

    up_KJCE: Tensor
    """float16; the rotation's factor is in it."""
    mean_KJE: Tensor
    """float32, likewise."""
    channels_JE: Tensor
    """int32: the channel of a head that each is, -1 where a pair only fills up."""
    frequencies_E: Tensor
    """float32, 0 for pairs that are not turned."""
    dim: int
    """Channels of a head."""


def key_expansion(
    up_CF: Tensor, mean_F: Tensor, *, num_kv_heads: int, rotation: KeyRotation | None
) -> KeyExpansion:
    """To be made once for a layer, on the device of its cache.

    Raises: ValueError for heads that do not divide the numbers, or of an odd number of channels.
    """
    dim, rest = divmod(len(mean_F), num_kv_heads)
    if rest or dim % 2:
        raise ValueError(f"{len(mean_F)} numbers are not {num_kv_heads} heads of even dimension")
    device = up_CF.device
    channels_JE = _pairs(dim, rotation)
    num_turned = 0 if rotation is None else len(rotation.inverse_frequencies_E)
    num_pairs = max(_LEAST_PAIRS, triton.next_power_of_2(dim // 2))
    factor_E = torch.ones(dim // 2, device=device)
    frequencies_E = torch.zeros(num_pairs, device=device)
    if rotation is not None:
        factor_E[:num_turned] = rotation.scaling
        frequencies_E[:num_turned] = rotation.inverse_frequencies_E
    places_JE = channels_JE.to(device)
    up_CKJE = up_CF.float().unflatten(1, (num_kv_heads, dim))[:, :, places_JE] * factor_E
    mean_KJE = mean_F.float().unflatten(0, (num_kv_heads, dim))[:, places_JE] * factor_E
    fill = (0, num_pairs - dim // 2)
    return KeyExpansion(
        torch.nn.functional.pad(up_CKJE, fill).permute(1, 2, 0, 3).half().contiguous(),
        torch.nn.functional.pad(mean_KJE, fill).contiguous(),
        torch.nn.functional.pad(places_JE, fill, value=-1).to(torch.int32).contiguous(),
        frequencies_E,
        dim,
    )


def _pairs(dim: int, rotation: KeyRotation | None) -> Tensor:
    """The channels of each pair, those that are turned first."""
    if rotation is None:
        return torch.arange(dim).view(2, dim // 2)
    first, num_turned = rotation.first_channel, len(rotation.inverse_frequencies_E)
    last = first + 2 * num_turned
    if last > dim:
        raise ValueError(f"{last} channels are turned of heads that have {dim}")
    turned = torch.arange(first, last)
    pairs = turned.view(-1, 2).T if rotation.is_interleaved else turned.view(2, -1)
    others = torch.cat([torch.arange(first), torch.arange(last, dim)]).view(2, -1)
    return torch.cat([pairs, others], dim=1)
