"""Names of full blocks: what two sequences must agree on before one may read the other's blocks.

A block's key is BLAKE2b, keyed with the tenant's secret, over the key of the block before it, its
place and its tokens; the first one follows the key of a scope: model, policy, block size and
namespace. So equal keys mean equal contents up to forced collisions, which is why tokens are
compared as well (`PrefixCache.match`), and the key of one tenant says nothing to another.
"""

import hashlib
import sys
from array import array
from copy import copy
from typing import Final

import msgspec

KEY_BYTES: Final = 32
SECRET_BYTES: Final = 32

BlockKey = bytes


class Scope(msgspec.Struct, frozen=True, array_like=True):
    """What blocks mean and whose they are, beside their tokens."""

    weights_digest: str
    policy: str
    """Canonical: blocks written by one policy are read under no other."""
    block_size: int
    namespace: str
    """Within the tenant: end users of it that must not learn of each other."""


class BlockKeys:
    """The keys of one sequence's full blocks, as its tokens become known. Mutable."""

    def __init__(self, secret: bytes, scope: Scope) -> None:
        """`secret`: the tenant's, `SECRET_BYTES` long."""
        self.scope = scope
        self.block_size = scope.block_size
        self.keys: list[BlockKey] = []
        self._secret = secret
        self._last = self._digest(msgspec.msgpack.encode(scope))

    def copy(self) -> "BlockKeys":
        """The same names so far, to be continued apart."""
        copied = copy(self)
        copied.keys = list(self.keys)
        return copied

    def extend(self, tokens: "array[int]") -> None:
        """Add the keys of the blocks that have become full. `tokens`: all of the sequence."""
        size = self.block_size
        for index in range(len(self.keys), len(tokens) // size):
            place = index.to_bytes(8, "little")
            own = block_tokens(tokens, index, size)
            self._last = self._digest(self._last + place + own)
            self.keys.append(self._last)

    def _digest(self, content: bytes) -> bytes:
        return hashlib.blake2b(content, key=self._secret, digest_size=KEY_BYTES).digest()


def block_tokens(tokens: "array[int]", index: int, block_size: int) -> bytes:
    """The tokens of one full block as little-endian u32."""
    ids = tokens[index * block_size : (index + 1) * block_size]
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tobytes()
