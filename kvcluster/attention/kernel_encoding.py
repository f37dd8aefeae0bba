"""Blocks go into a cache's pages by kernels, to the byte as the codecs write them.

Shape letters: B blocks, K KV heads, S tokens of a block, D head dimension.
"""

from collections.abc import Callable, Sequence

from kvcluster_kernels.encode_blocks import Blocks
from kvcluster_kernels.encode_floats import encode_float8
from kvcluster_kernels.encode_integers import IntegerFormat, encode_integers
from torch import Tensor

from kvcluster.codec.array import ArrayCodec
from kvcluster.codec.float8 import Float8
from kvcluster.codec.quantized import ChannelQuantizer, TokenQuantizer

EncodeBlocks = Callable[[Blocks], None]


def block_encoder(codec: ArrayCodec, planes: Sequence[Tensor], axis: int) -> EncodeBlocks | None:
    """The launch that writes blocks of this codec into its planes of a whole pool; None: there is
    no kernel for it. `axis`: numbers along which groups lie, tokens of a block for keys and
    channels for values."""
    if isinstance(codec, Float8):
        values, scale = planes
        return lambda blocks: encode_float8(blocks, (values, scale), is_transposed=codec.transposed)
    if isinstance(codec, ChannelQuantizer | TokenQuantizer):
        group = min(codec.group, axis)
        if group & (group - 1):
            return None
        form = IntegerFormat(
            codec.bits,
            codec.group,
            codec.scale_bits,
            codec.spans,
            is_transposed=isinstance(codec, TokenQuantizer),
        )
        return lambda blocks: encode_integers(blocks, form, tuple(planes))
    return None
