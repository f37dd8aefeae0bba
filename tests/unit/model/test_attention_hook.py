"""The hook runs every served architecture with our attention and changes none of its answers."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcluster.model.attention_hook import IMPLEMENTATION, forward
from kvcluster.model.probe import probe
from kvcluster.model.reference_attention import ReferenceAttention
from kvcluster.types import LayerGeometry
from tests.architectures import VOCAB_SIZE, tiny_models

ARCHITECTURES = tiny_models()
NUM_TOKENS = 40
"""More than the windows of the tiny models."""

# Float32 sums in another order: errors of a few units in the last place of logits around 1.
ROUNDING = {"atol": 2e-5, "rtol": 2e-5}


def prompt(seed: int, num_tokens: int = NUM_TOKENS) -> Tensor:
    return torch.randint(VOCAB_SIZE, (num_tokens,), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def eager_logits(model: PreTrainedModel, token_ids_T: Tensor) -> Tensor:
    """What the model says by itself."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    logits_TV: Tensor = model(input_ids=token_ids_T[None], use_cache=False).logits[0]
    model.set_attn_implementation(before)
    return logits_TV


def run(
    model: PreTrainedModel,
    layers: tuple[LayerGeometry, ...],
    token_ids_T: Tensor,
    pieces: list[Tensor],
) -> Tensor:
    attention = ReferenceAttention(layers)
    logits_TV = torch.empty(len(token_ids_T), VOCAB_SIZE)
    for positions in pieces:
        attention.begin(positions)
        rows = torch.arange(len(positions))
        logits_TV[positions] = forward(model, token_ids_T[positions], positions, rows, attention)
    return logits_TV


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_in_one_piece_are_those_of_eager_attention(name: str) -> None:
    model = ARCHITECTURES[name]()
    layers = probe(model)
    token_ids_T = prompt(seed=1)

    logits_TV = run(model, layers, token_ids_T, [torch.arange(NUM_TOKENS)])

    torch.testing.assert_close(logits_TV, eager_logits(model, token_ids_T), **ROUNDING)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_of_a_zigzag_chunk_and_single_tokens_are_those_of_eager_attention(name: str) -> None:
    model = ARCHITECTURES[name]()
    layers = probe(model)
    token_ids_T = prompt(seed=2)
    first = torch.arange(30)
    zigzag = torch.cat((first[:8], first[22:], first[8:22].flip(0)))

    logits_TV = run(model, layers, token_ids_T, [zigzag, *torch.arange(30, NUM_TOKENS).split(1)])

    torch.testing.assert_close(logits_TV, eager_logits(model, token_ids_T), **ROUNDING)


def test_two_sequences_packed_into_one_pass_do_not_see_each_other() -> None:
    model = ARCHITECTURES["gemma3"]()
    layers = probe(model)
    one, other = prompt(seed=3, num_tokens=20), prompt(seed=4, num_tokens=25)
    attention = PackedAttention(ReferenceAttention(layers), ReferenceAttention(layers), len(one))

    logits_TV = forward(
        model,
        torch.cat((one, other)),
        torch.cat((torch.arange(20), torch.arange(25))),
        torch.arange(45),
        attention,
    )

    alone = torch.cat((eager_logits(model, one), eager_logits(model, other)))
    torch.testing.assert_close(logits_TV, alone, **ROUNDING)


class PackedAttention:
    """Two sequences in one pass: the first `split` rows are the one's, the rest the other's."""

    def __init__(self, one: ReferenceAttention, other: ReferenceAttention, split: int) -> None:
        self.one, self.other, self.split = one, other, split

    def attend(
        self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, sinks_H: Tensor | None
    ) -> Tensor:
        outs = []
        for half, rows in (
            (self.one, slice(0, self.split)),
            (self.other, slice(self.split, None)),
        ):
            half.begin(torch.arange(len(q_THD[rows])))
            outs.append(half.attend(layer, q_THD[rows], k_TKD[rows], v_TKD[rows], sinks_H))
        return torch.cat(outs)


def test_only_the_asked_rows_have_logits() -> None:
    model = ARCHITECTURES["llama"]()
    attention = ReferenceAttention(probe(model))
    token_ids_T = prompt(seed=5)
    attention.begin(torch.arange(NUM_TOKENS))

    logits_RV = forward(
        model, token_ids_T, torch.arange(NUM_TOKENS), torch.tensor([39, 7]), attention
    )

    expected = eager_logits(model, token_ids_T)[[39, 7]]
    torch.testing.assert_close(logits_RV, expected, **ROUNDING)


def test_a_pass_without_logits_gives_no_rows() -> None:
    model = ARCHITECTURES["gemma2"]()
    attention = ReferenceAttention(probe(model))
    attention.begin(torch.arange(4))

    logits_RV = forward(
        model, prompt(seed=6, num_tokens=4), torch.arange(4), torch.arange(0), attention
    )

    assert logits_RV.shape == (0, VOCAB_SIZE)


def test_logits_are_float32_for_a_half_precision_model() -> None:
    model = ARCHITECTURES["qwen3"]().to(torch.bfloat16)
    attention = ReferenceAttention(probe(model))
    attention.begin(torch.arange(4))

    logits_RV = forward(
        model, prompt(seed=7, num_tokens=4), torch.arange(4), torch.tensor([3]), attention
    )

    assert logits_RV.dtype == torch.float32


def test_layers_are_called_in_the_order_of_the_geometry() -> None:
    model = ARCHITECTURES["gpt_oss"]()
    layers = probe(model)
    attention = RecordedAttention(layers)
    attention.reference.begin(torch.arange(4))

    forward(model, prompt(seed=8, num_tokens=4), torch.arange(4), torch.arange(1), attention)

    assert attention.calls == [0, 1, 2]


class RecordedAttention:
    def __init__(self, layers: tuple[LayerGeometry, ...]) -> None:
        self.reference = ReferenceAttention(layers)
        self.calls: list[int] = []

    def attend(
        self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, sinks_H: Tensor | None
    ) -> Tensor:
        self.calls.append(layer)
        return self.reference.attend(layer, q_THD, k_TKD, v_TKD, sinks_H)


def test_the_model_stays_set_to_our_attention_after_the_probe() -> None:
    model = ARCHITECTURES["olmo2"]()

    probe(model)

    assert model.config._attn_implementation == IMPLEMENTATION
