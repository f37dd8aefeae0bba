"""What a measurement of quality hands back, and its JSON."""

import msgspec

from kvcluster.quality.spans import Mean
from kvcluster.quality.stored import StoredBytes


class Storage(msgspec.Struct, frozen=True, kw_only=True):
    """What a cache takes. Measured through a cluster, the first two numbers are all there is."""

    bytes_per_token: float
    ratio: float
    """Of the uncompressed cache to this one, exact blocks included in both: a bfloat16 one, through
    a cluster one of the model's type."""
    bits_per_element: float | None = None
    payload_bits_per_element: float | None = None
    payload_ratio: float | None = None
    """The same over encoded elements alone."""
    stored: StoredBytes | None = None

    @classmethod
    def of(cls, stored: StoredBytes) -> "Storage":
        return cls(
            stored=stored,
            bytes_per_token=stored.bytes_per_token,
            bits_per_element=stored.bits_per_element,
            ratio=stored.ratio,
            payload_bits_per_element=stored.payload_bits_per_element,
            payload_ratio=stored.payload_ratio,
        )


class TextScore(msgspec.Struct, frozen=True, kw_only=True):
    """One policy on one text, token by token beside the exact cache."""

    policy: str
    text: str
    text_digest: str
    num_tokens: int
    first_scored: int
    """Position of the first token whose prediction counts."""
    exact_nll: float
    """Mean negative log-likelihood with the exact cache, in nats."""
    nll_increase: Mean
    """Mean over tokens of the policy's less the exact cache's, in nats."""
    perplexity_increase_percent: Mean
    kl: Mean | None
    """Of the exact cache's distribution from the policy's, in nats. None: not measured."""
    top1_agreement: Mean
    """Share of tokens for which both find the same token most likely."""
    storage: Storage
    read_share: float = 1.0
    """Keys that queries read, of all that come before them: what a selection leaves of attention's
    work, in layers without a window of the model's own."""


class NeedleScore(msgspec.Struct, frozen=True, kw_only=True):
    """One question."""

    key: str
    depth: float
    is_found: bool
    is_found_by_exact: bool


class RecallScore(msgspec.Struct, frozen=True, kw_only=True):
    """One policy on one document with questions."""

    policy: str
    document: str
    num_tokens: int
    needles: tuple[NeedleScore, ...]
    """Its questions."""
    num_found: int
    num_found_by_exact: int
    num_found_of_exact: int
    """Found by the policy among those that the exact cache finds."""
    storage: Storage

    @property
    def kind(self) -> str:
        """The style of its needles, or the task."""
        return self.document.split("/")[0]


class QualityReport(msgspec.Struct, frozen=True, kw_only=True):
    """All policies on all texts and documents, for one model."""

    model: str
    weights_digest: str
    tokenizer_digest: str
    dtype: str
    """In which the model computed."""
    device: str
    texts: tuple[TextScore, ...]
    recall: tuple[RecallScore, ...]


def to_json(report: QualityReport) -> bytes:
    """The report as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(report), indent=2)


def from_json(encoded: bytes) -> QualityReport:
    """Raises: msgspec.ValidationError, msgspec.DecodeError."""
    return msgspec.json.decode(encoded, type=QualityReport)
