"""The packed decode kernel for Hopper: what it computes, with NumPy (`gluon_interpreter`)."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from kvcluster_kernels import packed_gluon_launch
from kvcluster_kernels.combine import combine_plain
from kvcluster_kernels.integer_decode import IntegerPages, codes_of
from kvcluster_kernels.packed_gluon_launch import Codes
from kvcluster_kernels.paging import Attention, DecodeSettings, PagedRows, Partial
from kvcluster_kernels.rotated_decode import RotatedPages, code_bits
from torch import Tensor

from kvcluster.codec.quantized import ChannelQuantizer, TokenQuantizer
from tests.kernels import test_integer_decode, test_rotated_decode
from tests.kernels.decode_cases import RAGGED, Batch
from tests.kernels.gluon_interpreter import Kernel

BLOCKS = replace(RAGGED, lengths=(110, 0, 1, 123), block_size=64)
CPU = torch.device("cpu")
ATTENTION = Attention(scale=0.1)
WINDOW = Attention(scale=0.1, softcap=5.0, window=100)

_kernel = cache(Kernel)


def integers(
    q_RTHD: Tensor,
    keys: IntegerPages,
    values: IntegerPages,
    rows: PagedRows,
    attention: Attention,
    settings: DecodeSettings | None,
) -> Partial:
    """`decode_integers` with this kernel."""
    splits = packed_gluon_launch.splits(
        q_RTHD, keys.planes, values.planes, codes_of(q_RTHD, keys, values), rows, attention,
        settings, kernel=_kernel(),
    )  # fmt: skip
    return combine_plain(splits, num_tokens=q_RTHD.shape[1])


def rotated(
    q_RTHD: Tensor,
    keys: RotatedPages,
    values: RotatedPages,
    rotation_DD: Tensor,
    rows: PagedRows,
    attention: Attention,
    settings: DecodeSettings | None,
) -> Partial:
    """`decode_rotated` with this kernel."""
    bits = code_bits(keys, q_RTHD.shape[3])
    codes = Codes(bits, bits, rotated_q_RTHD=(q_RTHD.float() @ rotation_DD.T).contiguous())
    splits = packed_gluon_launch.splits(
        q_RTHD, keys.planes, values.planes, codes, rows, attention, settings, kernel=_kernel()
    )
    found = combine_plain(splits, num_tokens=q_RTHD.shape[1])
    return found._replace(out_RTHD=found.out_RTHD @ rotation_DD)


def check_integers(
    batch: Batch,
    keys: ChannelQuantizer,
    values: TokenQuantizer,
    attention: Attention = ATTENTION,
    settings: DecodeSettings | None = None,
) -> None:
    test_integer_decode.check(batch, keys, values, CPU, attention, settings, decode=integers)


@pytest.mark.parametrize("scale_bits", [16, 8])
@pytest.mark.parametrize(
    ("bits", "group"), [(8, 64), (4, 64), (4, 16), (3, 64), (3, 32), (2, 32), (2, 16)]
)
def test_integers_of_every_width_and_group(
    bits: int, group: int, scale_bits: int, interpreted: torch.device
) -> None:
    keys = ChannelQuantizer(bits, group=group, scale_bits=scale_bits)

    check_integers(BLOCKS, keys, TokenQuantizer(bits, group=group, scale_bits=scale_bits))


@pytest.mark.parametrize("dim", [128, 256])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_every_head_size(bits: int, dim: int, interpreted: torch.device) -> None:
    batch = replace(BLOCKS, dim_k=dim, dim_v=dim)

    check_integers(batch, ChannelQuantizer(bits), TokenQuantizer(bits))


def test_keys_and_values_of_different_widths(interpreted: torch.device) -> None:
    batch = replace(BLOCKS, dim_k=128, dim_v=64)

    check_integers(batch, ChannelQuantizer(4), TokenQuantizer(3, group=32))


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_blocks_of_128_tokens(bits: int, interpreted: torch.device) -> None:
    batch = replace(BLOCKS, block_size=128, lengths=(200, 0, 130))

    check_integers(batch, ChannelQuantizer(bits, group=64), TokenQuantizer(bits, group=32))


@pytest.mark.parametrize("num_tokens", [4, 8, 16])
def test_several_query_tokens_with_a_window(num_tokens: int, interpreted: torch.device) -> None:
    batch = replace(BLOCKS, num_tokens=num_tokens, has_positions=True, lengths=(110, 0, 70))

    check_integers(batch, ChannelQuantizer(4), TokenQuantizer(4), WINDOW)


@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_any_number_of_splits_and_blocks_ahead(num_stages: int, interpreted: torch.device) -> None:
    batch = replace(BLOCKS, lengths=(600, 0, 64, 300))
    settings = DecodeSettings(num_stages=num_stages, num_splits=3)

    check_integers(batch, ChannelQuantizer(4), TokenQuantizer(4), settings=settings)


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("dim", [64, 128])
def test_rotated_vectors_of_every_width(dim: int, bits: int, interpreted: torch.device) -> None:
    batch = replace(BLOCKS, dim_k=dim, dim_v=dim)

    test_rotated_decode.check(batch, bits, CPU, decode=rotated)


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_rotated_keys_without_a_mean(bits: int, interpreted: torch.device) -> None:
    test_rotated_decode.check(BLOCKS, bits, CPU, centred=False, decode=rotated)


def test_rotated_vectors_and_several_query_tokens(interpreted: torch.device) -> None:
    batch = replace(BLOCKS, num_tokens=4, has_positions=True, lengths=(110, 0, 70))

    test_rotated_decode.check(batch, 3, CPU, WINDOW, decode=rotated)
