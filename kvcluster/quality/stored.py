"""How many bytes a compressed cache of one sequence takes, beside a bfloat16 one."""

from typing import Final

import msgspec

EXACT_BYTES: Final = 2
"""Of one uncompressed element: bfloat16, whatever type the measurement computes in."""


class StoredBytes(msgspec.Struct, frozen=True, kw_only=True):
    """What is stored after a whole sequence, over all layers, as its last token reads it.

    Counts what the last token's layers can still see: blocks that left a window are gone from the
    compressed cache and from the one it is compared with. Blocks that are not full count the
    tokens they hold.
    """

    num_tokens: int = 0
    """Of the sequence."""
    exact_elements: int = 0
    """Keys and values that are not encoded: sink block, open block, blocks of the lag, layers
    without a codec."""
    encoded_elements: int = 0
    encoded_bytes: int = 0
    """Of all planes, scales included."""
    dropped_elements: int = 0
    """Keys and values of tokens that retention dropped."""

    def __add__(self, other: "StoredBytes") -> "StoredBytes":
        """Both together, for two layers of one sequence."""
        return StoredBytes(
            num_tokens=max(self.num_tokens, other.num_tokens),
            exact_elements=self.exact_elements + other.exact_elements,
            encoded_elements=self.encoded_elements + other.encoded_elements,
            encoded_bytes=self.encoded_bytes + other.encoded_bytes,
            dropped_elements=self.dropped_elements + other.dropped_elements,
        )

    @property
    def total_bytes(self) -> int:
        return self.encoded_bytes + EXACT_BYTES * self.exact_elements

    @property
    def bytes_per_token(self) -> float:
        return self.total_bytes / self.num_tokens

    @property
    def bits_per_element(self) -> float:
        """Over all elements that are kept, exact ones included."""
        return 8 * self.total_bytes / (self.exact_elements + self.encoded_elements)

    @property
    def ratio(self) -> float:
        """Of the bfloat16 cache of all tokens to this one, exact blocks included in both."""
        elements = self.exact_elements + self.encoded_elements + self.dropped_elements
        return EXACT_BYTES * elements / self.total_bytes

    @property
    def payload_bits_per_element(self) -> float:
        """Over encoded elements alone; 16 when there are none."""
        if not self.encoded_elements:
            return 8.0 * EXACT_BYTES
        return 8 * self.encoded_bytes / self.encoded_elements

    @property
    def payload_ratio(self) -> float:
        """Of the bfloat16 cache to this one, over encoded elements alone."""
        return 8 * EXACT_BYTES / self.payload_bits_per_element
