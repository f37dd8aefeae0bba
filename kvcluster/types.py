"""Small frozen records that every layer may use. Nothing here does I/O or imports torch.

Records that cross a process boundary are `msgspec.Struct`s: they are encoded as msgpack and
validated when decoded, so nothing of ours is ever unpickled from a socket.
"""

from enum import StrEnum
from typing import NewType

import msgspec

TenantId = NewType("TenantId", str)
GenerationId = NewType("GenerationId", str)
Rank = NewType("Rank", int)
BlockId = NewType("BlockId", int)
SequenceId = NewType("SequenceId", int)
"""One request as the workers know it: a small number, never used twice by a ring group."""

EXACT = "exact"
"""The codec that leaves K and V as the model gave them."""
DEFAULT_TENANT = TenantId("default")
PUBLISHED = TenantId("PUBLISHED")
"""Holds the prefixes that operators publish. No tenant is called so: ids are in small letters."""
PAGE_BLOCKS = 8
"""Exact blocks of a page of cache memory: enough that attention over whole pages runs at full
speed, and that smaller blocks fill a page with little left over."""
NO_BLOCK = BlockId(-1)
"""Stands in a block table where the block has been released (it left the window)."""


class Route(StrEnum):
    """How queries and history meet when they lie on different ranks (DESIGN, attention)."""

    PASS_KV = "pass_kv"
    """Shards travel round the ring, queries stay."""
    PASS_Q = "pass_q"
    """Queries travel, shards stay, partials return."""
    GATHER = "gather"
    """Every rank gets every shard in one go."""


class LayerGeometry(msgspec.Struct, frozen=True, kw_only=True):
    """Shape and rules of one layer's attention, as the model itself applies them."""

    num_query_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    scale: float
    """Factor on q·k before the softmax."""
    window: int | None = None
    """A query at position p sees keys in (p - window, p]; None: all keys up to p."""
    softcap: float | None = None
    """Logits become softcap * tanh(logits / softcap); None: left alone."""
    has_sinks: bool = False
    """The layer adds one learned logit per query head to the softmax's denominator (gpt-oss)."""
    kv_layer: int | None = None
    """The earlier layer whose K and V this one reads, of the same window (Gemma 3n, Gemma 4); None:
    it has its own."""
    values_in_keys: bool = False
    """V is the first value_dim numbers of K, and only K is stored and sent (multi-head latent
    attention)."""

    @property
    def kv_elements_per_token(self) -> int:
        """Numbers that are stored."""
        own_values = 0 if self.values_in_keys else self.value_dim
        return self.num_kv_heads * (self.key_dim + own_values)


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine needs to know of a loaded model: no weights, no torch."""

    name: str
    layers: tuple[LayerGeometry, ...]
    """In the order in which one forward pass runs them."""
    vocab_size: int
    max_context_tokens: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    bytes_per_element: int
    weights_digest: str
    tokenizer_digest: str
    """Empty when the model has no tokenizer: it then serves token ids only."""
    dense_flops_per_token: int = 0
    """Floating-point operations of a token outside attention; 0: not known."""

    @property
    def has_tokenizer(self) -> bool:
        return bool(self.tokenizer_digest)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The distinct windows of the layers, first seen first: one KV group each.

        Layers of one group keep the same tokens, so they share block ids.
        """
        return tuple(dict.fromkeys(layer.window for layer in self.layers))

    @property
    def storing_layers(self) -> tuple[int, ...]:
        """The layers that have K and V of their own."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.kv_layer is None)

    def kv_layer_of(self, layer: int) -> int:
        """The layer whose K and V this one reads: itself, or the one that it shares with."""
        source = self.layers[layer].kv_layer
        return layer if source is None else source

    def readers_of(self, layer: int) -> tuple[int, ...]:
        """The layers that read this one's K and V; none, where it has none of its own."""
        return tuple(i for i in range(len(self.layers)) if self.kv_layer_of(i) == layer)

    def is_last_reader(self, layer: int) -> bool:
        """Whether no later layer reads the K and V that this one reads."""
        source = self.kv_layer_of(layer)
        return all(self.kv_layer_of(i) != source for i in range(layer + 1, len(self.layers)))

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of exact K and V of one token in every layer that stores them."""
        return self.bytes_per_element * sum(
            self.layers[index].kv_elements_per_token for index in self.storing_layers
        )

    def group_of(self, layer: LayerGeometry) -> int:
        return self.windows.index(layer.window)


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """How one request's cache is compressed: one method per plug-point, each as the canonical text
    of its choice (`policy.Choice`)."""

    sharing: str = "own"
    codec: str = EXACT
    retention: str = "full"
    selection: str = "all"

    @property
    def storage(self) -> str:
        """How blocks are written, which is what codecs are looked up by: the codec and, where heads
        are pooled, the sharing. `EXACT` where the model's own K and V are kept."""
        return str(Policy(sharing=self.sharing, codec=self.codec))

    def __str__(self) -> str:
        """Canonical: the codec, and what is not at its default."""
        default = Policy()
        chosen = [
            "" if self.sharing == default.sharing else self.sharing,
            self.codec,
            "" if self.retention == default.retention else self.retention,
            "" if self.selection == default.selection else self.selection,
        ]
        return " + ".join(filter(None, chosen))


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is chosen. `temperature` 0 is greedy. Checked by `admission.check`."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    """0: no limit."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Over prompt and output (CTRL, Keskar et al. 2019, section 4.1)."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    """Presence and frequency count output tokens only, as in the OpenAI API."""
    seed: int = 0
    """Random bits are a function of (seed, position) alone."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    """None: none. n: the chosen token's and the n most likely ones'."""
    prompt_logprobs: int | None = None
    """The same of each prompt token but the first, as what comes before predicts it."""
    min_output_tokens: int = 0
    """End-of-sequence and stop token ids are not sampled before this many output tokens."""
    ignore_eos: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()

    @property
    def counts_tokens(self) -> bool:
        """Whether a penalty is set, so that the next token depends on which came before."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )
