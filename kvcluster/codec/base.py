"""Stored tokens as they travel between ranks."""

from typing import NamedTuple

from torch import Tensor


class EncodedKV(NamedTuple):
    """Tokens of one layer in the form in which they are kept, sent and moved."""

    planes: tuple[Tensor, ...]
    """Exact tokens: k_KSD and, unless it is part of that, v_KSD. Then the planes of encoded
    blocks, the keys' first."""
