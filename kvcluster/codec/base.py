"""Stored tokens as they travel between ranks."""

from typing import NamedTuple

from torch import Tensor


class EncodedKV(NamedTuple):
    """Tokens of one layer in the form in which they are kept, sent and moved."""

    planes: tuple[Tensor, ...]
    """Each is [KV head, token, ...]."""
