"""The cases of the interpreter, and larger ones, with decode kernels compiled for the GPU."""

from dataclasses import replace

import pytest
import torch
from kvcluster_kernels.decode import decode
from kvcluster_kernels.paging import Attention, DecodeSettings

from kvcluster.codec.quantized import ChannelQuantizer, TokenQuantizer
from tests.kernels.decode_cases import (
    EXACT_BATCHES,
    RAGGED,
    Batch,
    draw_exact,
    draw_queries,
    draw_rows,
)
from tests.kernels.test_decode import check as check_exact
from tests.kernels.test_float8_decode import check as check_float8
from tests.kernels.test_integer_decode import check as check_integers
from tests.kernels.test_rotated_decode import check as check_rotated

pytestmark = pytest.mark.gpu

ATTENTION = Attention(scale=0.1)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LONG = Batch(
    lengths=(5_011, 0, 1, 2_048),
    skipped=7,
    num_heads=32,
    num_kv_heads=4,
    dim_k=128,
    dim_v=128,
    block_size=64,
    page_blocks=8,
    dtype=torch.bfloat16,
)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("batch", EXACT_BATCHES.values(), ids=EXACT_BATCHES)
def test_exact_cases(batch: Batch, dtype: torch.dtype, gpu: torch.device) -> None:
    check_exact(replace(batch, dtype=dtype), ATTENTION, gpu)


@pytest.mark.parametrize("num_tokens", [1, 8, 16])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_long_exact_rows(dim: int, num_tokens: int, gpu: torch.device) -> None:
    batch = replace(LONG, dim_k=dim, dim_v=dim, num_tokens=num_tokens)

    check_exact(replace(batch, has_positions=num_tokens > 1), ATTENTION, gpu)


@pytest.mark.parametrize("window", [1, 1000])
def test_windows_and_capped_scores(window: int, gpu: torch.device) -> None:
    batch = replace(LONG, num_tokens=4, has_positions=True)

    check_exact(batch, Attention(scale=0.1, softcap=5.0, window=window), gpu)


@pytest.mark.parametrize("settings", [DecodeSettings(tile=32), DecodeSettings(tile=128)])
def test_tiles_of_another_length(settings: DecodeSettings, gpu: torch.device) -> None:
    check_exact(LONG, ATTENTION, gpu, settings)


@pytest.mark.parametrize("num_tokens", [1, 8])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_float8(dim: int, num_tokens: int, gpu: torch.device) -> None:
    batch = replace(LONG, dim_k=dim, dim_v=dim, num_tokens=num_tokens)

    check_float8(replace(batch, has_positions=num_tokens > 1), gpu, ATTENTION)


@pytest.mark.parametrize("scale_bits", [16, 8])
@pytest.mark.parametrize(
    ("bits", "group"), [(8, 64), (4, 64), (4, 32), (3, 64), (3, 16), (2, 32), (2, 16)]
)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_integers(dim: int, bits: int, group: int, scale_bits: int, gpu: torch.device) -> None:
    keys = ChannelQuantizer(bits, group=group, scale_bits=scale_bits)
    values = TokenQuantizer(bits, group=group, scale_bits=scale_bits)

    check_integers(replace(LONG, dim_k=dim, dim_v=dim), keys, values, gpu)


PORTABLE = DecodeSettings(num_warps=2, programs_per_processor=4, is_portable=True)


@pytest.mark.parametrize(("bits", "group"), [(8, 64), (4, 64), (2, 32)])
def test_integers_on_any_gpu(bits: int, group: int, gpu: torch.device) -> None:
    keys, values = ChannelQuantizer(bits, group=group), TokenQuantizer(bits, group=group)

    check_integers(LONG, keys, values, gpu, settings=PORTABLE)


@pytest.mark.parametrize("bits", [4, 2])
def test_rotated_vectors_on_any_gpu(bits: int, gpu: torch.device) -> None:
    check_rotated(LONG, bits, gpu, ATTENTION, PORTABLE)


@pytest.mark.parametrize(("bits", "num_tokens"), [(8, 2), (3, 2), (8, 4), (8, 16), (4, 16), (2, 4)])
def test_integers_of_several_query_tokens(bits: int, num_tokens: int, gpu: torch.device) -> None:
    batch = replace(LONG, num_tokens=num_tokens, has_positions=True)

    check_integers(batch, ChannelQuantizer(bits), TokenQuantizer(bits), gpu)


@pytest.mark.parametrize("num_tokens", [1, 2])
@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("dim", [64, 128])
def test_rotated_vectors(dim: int, bits: int, num_tokens: int, gpu: torch.device) -> None:
    batch = replace(LONG, dim_k=dim, dim_v=dim, num_tokens=num_tokens)

    check_rotated(replace(batch, has_positions=num_tokens > 1), bits, gpu, ATTENTION)


def test_integers_of_heads_of_96_and_several_query_tokens(gpu: torch.device) -> None:
    batch = replace(LONG, dim_k=96, dim_v=96, num_tokens=8, has_positions=True)

    check_integers(batch, ChannelQuantizer(4), TokenQuantizer(4, group=32), gpu)


@pytest.mark.parametrize("num_stages", [2, 4])
def test_integers_with_other_settings(num_stages: int, gpu: torch.device) -> None:
    settings = DecodeSettings(num_stages=num_stages, programs_per_processor=2)

    check_integers(LONG, ChannelQuantizer(4), TokenQuantizer(4), gpu, settings=settings)


def test_a_captured_launch_reads_the_lengths_of_each_replay(gpu: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = draw_rows(LONG, generator, gpu)
    q_RTHD = draw_queries(LONG, generator, gpu)
    pages = draw_exact(LONG, rows, generator, gpu)
    decode(q_RTHD, pages, rows, ATTENTION)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = decode(q_RTHD, pages, rows, ATTENTION)
    graph.replay()
    before = captured.lse_RTH.clone()
    rows.ends_R[0] = 3_000

    graph.replay()

    alone = decode(q_RTHD, pages, rows, ATTENTION)
    assert torch.equal(captured.out_RTHD, alone.out_RTHD)
    assert not torch.equal(captured.lse_RTH[0], before[0])


def test_a_short_block_size(gpu: torch.device) -> None:
    check_exact(replace(RAGGED, dtype=torch.bfloat16), ATTENTION, gpu)
    check_float8(replace(RAGGED, dtype=torch.bfloat16), gpu, ATTENTION)
