"""A rank on a GPU with a model of random weights and a cache that is filled without a prompt.

For benchmarks: what a step costs depends on what lies in the cache by its size alone.
"""

import time
from array import array
from collections.abc import Callable, Sequence
from typing import Final

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvcluster.attention.implementation import Implementation, implementation_for
from kvcluster.attention.ring import LoneRing
from kvcluster.cache.store import KVStore, Piece
from kvcluster.cluster.runner import StepRunner
from kvcluster.cluster.running_step import RunningStep, StepBefore
from kvcluster.codec.array import consecutive
from kvcluster.engine.plan import NewBlock, SampledToken, SequenceStart, SequenceStep, StepPlan
from kvcluster.model.codecs import load_codecs
from kvcluster.model.loader import LoadedModel
from kvcluster.model.probe import probe
from kvcluster.types import EXACT, NO_BLOCK, PAGE_BLOCKS, ModelSpec, Policy, SamplingParams

BLOCK_SIZE: Final = 64
EXACT_BLOCKS: Final = 4
"""Blocks before a row's own that it reads exact, as `CacheConfig` has it."""
_FILL_BLOCKS: Final = 256
"""Blocks that are encoded at a time."""


def llama_1b(max_tokens: int) -> LlamaConfig:
    """The shape of Llama 3.2 1B."""
    return LlamaConfig(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=max_tokens,
        tie_word_embeddings=True,
    )


def llama_8b(max_tokens: int) -> LlamaConfig:
    """The shape of Llama 3.1 8B."""
    return LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=max_tokens,
        tie_word_embeddings=False,
    )


def random_model(config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    """A model of this shape, set to our attention."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            module = LlamaForCausalLM(config).eval()  # type: ignore[no-untyped-call]
    finally:
        torch.set_default_dtype(default)
    spec = ModelSpec(
        name="random",
        layers=probe(module),
        vocab_size=config.vocab_size,
        max_context_tokens=config.max_position_embeddings,
        eos_token_ids=(),
        dtype=str(dtype).removeprefix("torch."),
        bytes_per_element=dtype.itemsize,
        weights_digest="",
        tokenizer_digest="",
    )
    return LoadedModel(spec=spec, module=module, device=device)


def matmul_flops(config: LlamaConfig) -> float:
    """Of all layers for one token, without attention and the head."""
    hidden, head_dim = config.hidden_size, _head_dim(config)
    num_kv_heads = config.num_key_value_heads or config.num_attention_heads
    attention = hidden * head_dim * 2 * (config.num_attention_heads + num_kv_heads)
    return 2.0 * config.num_hidden_layers * (attention + 3 * hidden * config.intermediate_size)


def attention_flops(config: LlamaConfig, start: int, num_tokens: int) -> float:
    """Of a chunk's rows over the keys that they see."""
    pairs = num_tokens * start + num_tokens * (num_tokens + 1) / 2
    heads = config.num_attention_heads * _head_dim(config)
    return 4.0 * pairs * heads * config.num_hidden_layers


def _head_dim(config: LlamaConfig) -> int:
    return config.head_dim or config.hidden_size // config.num_attention_heads


class LoneRank:
    """One rank with room for one sequence of `capacity` tokens. `step` runs a plan."""

    def __init__(
        self,
        model: LoadedModel,
        policy: Policy,
        *,
        capacity: int,
        implementation: Callable[[KVStore], Implementation] = implementation_for,
    ) -> None:
        self._model = model
        self._policy = policy
        codecs = load_codecs(model, "")
        num_blocks = capacity // BLOCK_SIZE
        has_codec = policy.storage != EXACT
        # With a codec exact blocks pass through: a chunk's, and those before a row.
        self._num_exact = min(num_blocks, 1024) if has_codec else num_blocks
        pages = -(-self._num_exact // PAGE_BLOCKS)
        self._first_encoded = 0
        if has_codec:
            per_page = _blocks_per_page(model, policy)
            self._first_encoded = pages * per_page
            pages += -(-num_blocks // per_page)
        self.store = KVStore(
            model.spec,
            blocks_per_group=[pages * PAGE_BLOCKS],
            block_size=BLOCK_SIZE,
            like=next(model.module.parameters()),
            codecs=codecs,
        )
        self._runner = StepRunner(
            model=model,
            store=self.store,
            ring=LoneRing(),
            epoch=1,
            exact_blocks=EXACT_BLOCKS,
            implementation=implementation(self.store),
        )
        self.num_tokens = 0
        """Up to the last that was computed."""
        self._num_steps = 0
        self._num_appended = 0
        self._sampled: tuple[SampledToken, ...] = ()

    def step(self, start: int, num_tokens: int, *, ids: Sequence[int] = ()) -> float:
        """Compute positions [start, start + num_tokens): tokens with these ids or, without them,
        the one that was sampled last. Seconds until the last one's successor is known."""
        plan = self._plan(start, num_tokens, ids)
        begin = time.perf_counter()
        self._sampled = self._runner.run(plan, StepBefore(self._sampled)).answer.sampled
        return time.perf_counter() - begin

    def decode(self, num_steps: int) -> tuple[float, list[int]]:
        """Go on from the last step, each step begun before the tokens of the one before are known.
        Seconds a step, and the tokens."""
        begin = time.perf_counter()
        token_ids = []
        running: RunningStep | None = None
        for _ in range(num_steps):
            following = self._runner.begin(self._plan(self.num_tokens, 1, ()), StepBefore())
            if running is not None:
                token_ids += [each.token_id for each in running.outcome().answer.sampled]
            running = following
        if running is not None:
            self._sampled = running.outcome().answer.sampled
            token_ids += [each.token_id for each in self._sampled]
        return (time.perf_counter() - begin) / max(1, num_steps), token_ids

    def _plan(self, start: int, num_tokens: int, ids: Sequence[int]) -> StepPlan:
        started: tuple[SequenceStart, ...] = ()
        if self._num_steps == 0:
            started = (SequenceStart(1, SamplingParams(), self._policy),)
        self._num_steps += 1
        self.num_tokens = start + num_tokens
        return StepPlan(
            1,
            self._num_steps,
            started,
            (
                SequenceStep(
                    sequence=1,
                    start=start,
                    num_tokens=num_tokens,
                    token_ids=array("I", ids).tobytes(),
                    appended=tuple(self._blocks(start + num_tokens)),
                    num_prompt_tokens=start + num_tokens,
                    samples=True,
                ),
            ),
        )

    def fill(self) -> None:
        """Random numbers in all blocks, encoded where they are of a codec: then the same in all
        layers, and again after some blocks."""
        for layer in self._model.spec.storing_layers:
            for plane in self.store.planes(layer):
                plane[: self._num_exact // PAGE_BLOCKS].normal_()
        if self._policy.storage == EXACT:
            return
        geometry, codec = self._model.spec.layers[0], self._policy.storage
        last = self.store.num_blocks(0, codec)
        num_blocks = min(_FILL_BLOCKS, last - self._first_encoded)
        shape = (num_blocks, geometry.num_kv_heads, BLOCK_SIZE)
        like = self.store.planes(0).k_PKSD
        k, v = (
            torch.randn((*shape, dim), dtype=like.dtype, device=like.device)
            for dim in (geometry.key_dim, geometry.value_dim)
        )
        positions_BS = consecutive(torch.arange(num_blocks) * BLOCK_SIZE, BLOCK_SIZE)
        first_ids_B = torch.arange(num_blocks) + self._first_encoded
        self.store.encode(0, codec, first_ids_B, Piece(k, v), positions_BS)
        held = self.store.read_held(0, codec, first_ids_B)
        for layer in self._model.spec.storing_layers:
            for first in range(self._first_encoded, last, num_blocks):
                ids_B = torch.arange(first, min(first + num_blocks, last), device=like.device)
                self.store.write_held(layer, codec, ids_B, [x[: len(ids_B)] for x in held])

    def _blocks(self, end: int) -> list[NewBlock]:
        """Table entries that are lacking up to this position."""
        blocks = []
        while self._num_appended * BLOCK_SIZE < end:
            index = self._num_appended
            has_encoded = self._policy.storage != EXACT and index > 0
            blocks.append(
                NewBlock(
                    0,
                    (index % self._num_exact,),
                    (self._first_encoded + index,) if has_encoded else (NO_BLOCK,),
                )
            )
            self._num_appended += 1
        return blocks


def _blocks_per_page(model: LoadedModel, policy: Policy) -> int:
    probe_store = KVStore(
        model.spec,
        blocks_per_group=[PAGE_BLOCKS],
        block_size=BLOCK_SIZE,
        like=next(model.module.parameters()),
        codecs=load_codecs(model, ""),
    )
    return probe_store.blocks_per_page(0, policy.storage)
