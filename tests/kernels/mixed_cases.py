"""Integer keys beside rotated values, written by the cache's codecs, for tests on CPU and GPU."""

import torch
from kvcluster_kernels import packed_plain
from kvcluster_kernels.decode_plain import attend_tokens
from kvcluster_kernels.integer_decode import IntegerPages
from kvcluster_kernels.mixed_decode import decode_mixed, decode_mixed_plain
from kvcluster_kernels.paging import Attention, PagedRows
from kvcluster_kernels.rotated_decode import RotatedPages

from kvcluster.codec.quantized import ChannelQuantizer
from kvcluster.codec.rotated import Rotated, rotate
from tests.kernels.decode_cases import Batch, Bounds, assert_within, draw_queries, draw_rows
from tests.kernels.packed_cases import draw_packed


def pages(
    codec: ChannelQuantizer, bits: int, batch: Batch, rows: PagedRows
) -> tuple[IntegerPages, RotatedPages]:
    """Values of `bits`."""
    generator = torch.Generator().manual_seed(0)
    planes = draw_packed(codec, batch.dim_k, batch, rows, generator)
    k_high = planes.pop(1) if codec.bits == 3 else None
    values = draw_packed(Rotated(bits, transposed=True), batch.dim_v, batch, rows, generator)
    v_high = values.pop(1) if bits == 3 else None
    return IntegerPages(*planes)._replace(high=k_high), RotatedPages(*values)._replace(high=v_high)


def check(
    batch: Batch,
    codec: ChannelQuantizer,
    bits: int,
    device: torch.device,
    attention: Attention = Attention(scale=0.1),  # noqa: B008
) -> None:
    """The kernel beside its definition."""
    generator = torch.Generator().manual_seed(0)
    rows = draw_rows(batch, generator, device)
    q_RTHD = draw_queries(batch, generator, device)
    rotation_DD = rotate(torch.eye(batch.dim_v)).T.contiguous().to(device)
    k, v = pages(codec, bits, batch, rows)

    found = decode_mixed(q_RTHD, k, v, rotation_DD, rows, attention)

    want = decode_mixed_plain(q_RTHD.double(), k, v, rotation_DD, rows, attention)
    # As of integer keys, and of rotated values: what is rounded of these spreads over the channels
    # that it is rotated back into.
    k_RBKSD = packed_plain.restore_integers(k, rows.blocks_RB, batch.dim_k, torch.float64)
    v_RBKSD = packed_plain.restore_rotated_values(v, rotation_DD.double(), rows.blocks_RB)
    k_RKSD = packed_plain.in_line(k_RBKSD)
    lengths_RKSD = packed_plain.in_line(v_RBKSD.norm(dim=-1, keepdim=True).expand_as(v_RBKSD))
    magnitude = attend_tokens(q_RTHD.double(), k_RKSD, lengths_RKSD, rows, attention)
    bounds = Bounds(q_RTHD, k_RKSD, attention, weights=torch.float16, operands=torch.float16)
    assert_within(found, want, magnitude.out_RTHD, bounds)
