"""A transformer that retrieves by construction: its weights are written down, not trained.

Given `... A B ... A` it predicts B, at any distance up to a million tokens, so whatever it misses
was lost by a codec, a retention, a selection or a merge. It is an ordinary Llama of two layers
with one head each and no MLP.

Every token t has a code u_t, a random unit vector. The residual stream has four parts,

    [u of this token | 1 | u of the token before | u of the token found],

of which the embedding writes the first two. Each part has norm 1, so the stream's norm is known
before each layer, sqrt(2) and then sqrt(3), and the weights of RMSNorm just undo the division.

Layer 1 copies the code of the token before. Its queries and keys are constants in the fast pairs
of the rotary embedding, the query turned back by one position: with frequencies f_i and weights
w_i the logit at distance d is the sum of w_i * cos(f_i * (d - 1)), whose only peak is at d = 1. The
frequencies fall geometrically from 1 to below 1 / (a million), so no other distance comes near.

Layer 2 is an induction head. Key: code of the token before, plus m * c; query: beta times the
token's own code; value: the code. c is a unit vector on a few channels, the same for all keys, as
in keys of trained models: it shifts all logits of a query alike, but a codec that does not take it
away spends its bits on it. The codes stand in the pairs that turn by less than 0.02 in a million
positions. With N other keys and noise of deviation s that a codec adds to the logits, the key
looked for gets the weight 1 / (1 + N * exp((beta**2 / C + s**2) / 2 - beta)).

Shape letters: V vocabulary, E hidden dimension, D head dimension, C channels of a code, F fast
pairs.
"""

import math
import random
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer

from kvcluster.quality.needles import NeedleDocument, Question

MAX_TOKENS: Final = 1 << 20
_ROPE_THETA: Final = 1e24
_FAST: Final = 2e-7
"""Frequencies from here on tell positions apart. Slower ones hardly turn within `MAX_TOKENS`."""
_SLOW: Final = 1.1e-8
"""Frequencies up to this one turn codes by less than 0.02 within `MAX_TOKENS`."""
_PEAK: Final = 24.0
"""Logit that each fast pair gives to the token before; the fastest gives twice as much, for it
alone tells neighbours apart."""
_MEAN_CHANNELS: Final = 4
_NORM_EPSILON: Final = 1e-6


def retrieval_model(
    vocab_size: int,
    head_dim: int = 128,
    *,
    seed: int = 0,
    shared_mean: float = 8.0,
    logit_scale: float = 20.0,
) -> LlamaForCausalLM:
    """The model in float32 on the CPU, in eval mode; equal arguments give equal weights.

    `shared_mean` is m and `logit_scale` is beta. It has no special tokens and no tokenizer.
    Raises: ValueError for a head dimension under 64 or not a multiple of 8.
    """
    if head_dim < 64 or head_dim % 8:
        raise ValueError(f"head_dim: want a multiple of 8, at least 64, got {head_dim}")
    fast_F, slow_C = _channels(head_dim)
    codes_VC = _codes(vocab_size, len(slow_C), seed)
    model = _blank(vocab_size, head_dim, hidden_size=-(-(3 * len(slow_C) + 1) // 64) * 64)
    parts = _Parts(len(slow_C))
    weights = model.model
    with torch.no_grad():
        weights.embed_tokens.weight[:, parts.own] = codes_VC
        weights.embed_tokens.weight[:, parts.one] = 1
        previous, induction = _layers(model)
        _write_previous(previous.self_attn, parts, fast_F)
        _write_induction(induction.self_attn, parts, slow_C, shared_mean, logit_scale)
        norms = (previous.input_layernorm, induction.input_layernorm, weights.norm)
        for squared_norm, norm in enumerate(norms, start=2):
            norm.weight.fill_(math.sqrt(squared_norm / norm.weight.numel() + _NORM_EPSILON))
        model.lm_head.weight[:, parts.found] = logit_scale * codes_VC
    model.train(mode=False)
    return model


def save_retrieval_model(model: LlamaForCausalLM, directory: Path) -> None:
    """Write a directory that `kvcluster.model.loader.load_model` reads. It serves token ids only,
    because it has no tokenizer."""
    model.save_pretrained(directory)


def retrieval_document(
    vocab_size: int, *, num_tokens: int, num_needles: int, seed: int
) -> NeedleDocument:
    """Needles, each a key and a value after it, among random tokens; then each key once more with
    its value, in another order.

    A key occurs nowhere else. Needles are spread evenly, at random places of their share.
    Equal arguments give equal documents.
    Raises: ValueError if the needles do not fit into the tokens or the vocabulary.
    """
    num_hay = num_tokens - 2 * num_needles
    # Two tokens for a needle, and one before it: the first token of all has none before it.
    share = num_hay // max(1, num_needles)
    if not 1 <= num_needles < vocab_size or share < 3:
        raise ValueError(
            f"{num_needles} needles need {5 * num_needles} tokens and a larger vocabulary, "
            f"got {num_tokens} and {vocab_size}"
        )
    choice = random.Random(f"retrieval:{seed}")
    order = choice.sample(range(vocab_size), vocab_size)
    keys, others = order[:num_needles], order[num_needles:]
    token_ids = choice.choices(others, k=num_hay)
    places = []
    for needle, key in enumerate(keys):
        place = needle * share + 1 + choice.randrange(share - 2)
        token_ids[place] = key
        places.append(place)
    questions = []
    for needle in choice.sample(range(num_needles), num_needles):
        place = places[needle]
        value = token_ids[place + 1]
        token_ids += [keys[needle], value]
        questions.append(
            Question(
                key=str(keys[needle]),
                value=str(value),
                depth=place / num_tokens,
                answer_from=len(token_ids) - 1,
                answer_to=len(token_ids),
            )
        )
    return NeedleDocument(
        name=f"retrieval/{num_tokens}/{seed}",
        token_ids=tuple(token_ids),
        questions=tuple(questions),
    )


class _Parts:
    """Where the parts of the residual stream are."""

    def __init__(self, code_dim: int) -> None:
        self.own = slice(0, code_dim)
        self.previous = slice(code_dim, 2 * code_dim)
        self.found = slice(2 * code_dim, 3 * code_dim)
        self.one = 3 * code_dim


def _channels(head_dim: int) -> tuple[Tensor, Tensor]:
    """Frequencies of the fast pairs, and the channels of the slow ones, slowest last. Channels i
    and i + D / 2 are a pair."""
    half = head_dim // 2
    frequencies = torch.tensor([_ROPE_THETA ** (-pair / half) for pair in range(half)])
    slow = torch.nonzero(frequencies <= _SLOW)[:, 0]
    return frequencies[frequencies >= _FAST], torch.stack((slow, slow + half), dim=1).flatten()


def _codes(vocab_size: int, code_dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return nn.functional.normalize(torch.randn(vocab_size, code_dim, generator=generator), dim=1)


def _blank(vocab_size: int, head_dim: int, hidden_size: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=head_dim,
        max_position_embeddings=MAX_TOKENS,
        rms_norm_eps=_NORM_EPSILON,
        rope_parameters={"rope_type": "default", "rope_theta": _ROPE_THETA},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    return model


def _layers(model: LlamaForCausalLM) -> tuple[LlamaDecoderLayer, LlamaDecoderLayer]:
    first, second = model.model.layers
    assert isinstance(first, LlamaDecoderLayer)
    assert isinstance(second, LlamaDecoderLayer)
    return first, second


def _write_previous(attention: LlamaAttention, parts: _Parts, fast_F: Tensor) -> None:
    half = attention.head_dim // 2
    weight_F = torch.full_like(fast_F, _PEAK)
    weight_F[0] *= 2
    # The logits are divided by sqrt(D), and query and key share the factor.
    factor_F = torch.sqrt(weight_F * math.sqrt(attention.head_dim))
    num_fast = len(fast_F)
    attention.q_proj.weight[:num_fast, parts.one] = factor_F * torch.cos(fast_F)
    attention.q_proj.weight[half : half + num_fast, parts.one] = -factor_F * torch.sin(fast_F)
    attention.k_proj.weight[:num_fast, parts.one] = factor_F
    _copy_codes(attention, parts.previous)


def _write_induction(
    attention: LlamaAttention, parts: _Parts, slow_C: Tensor, shared_mean: float, logit_scale: float
) -> None:
    factor = logit_scale * math.sqrt(attention.head_dim)
    attention.q_proj.weight[slow_C, parts.own] = factor * torch.eye(len(slow_C))
    attention.k_proj.weight[slow_C, parts.previous] = torch.eye(len(slow_C))
    mean = shared_mean / math.sqrt(_MEAN_CHANNELS)
    attention.k_proj.weight[slow_C[-_MEAN_CHANNELS:], parts.one] = mean
    _copy_codes(attention, parts.found)


def _copy_codes(attention: LlamaAttention, part: slice) -> None:
    """Values are the tokens' own codes, and the output goes to this part."""
    code_dim = part.stop - part.start
    attention.v_proj.weight[:code_dim, :code_dim] = torch.eye(code_dim)
    attention.o_proj.weight[part, :code_dim] = torch.eye(code_dim)
