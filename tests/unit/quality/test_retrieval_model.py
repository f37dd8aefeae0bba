"""The retrieval model finds every needle by construction, and loses them to the codec that the
noise law says."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kvcluster.codec.quantized import ChannelQuantizer, TokenQuantizer
from kvcluster.codec.rotated import Rotated
from kvcluster.model.loader import LoadedModel, load_model
from kvcluster.quality.measure import EXACT, MeasuredPolicy, score_recall, strict_policy
from kvcluster.quality.needles import NeedleDocument
from kvcluster.quality.retrieval_model import (
    MAX_TOKENS,
    retrieval_document,
    retrieval_model,
    save_retrieval_model,
)
from kvcluster.quality.strict import ExactTokens, LayerCodecs
from kvcluster.types import LayerGeometry

VOCAB_SIZE = 997
HEAD_DIM = 64
NUM_TOKENS = 4096
NUM_NEEDLES = 24
EXACT_TOKENS = ExactTokens(block_size=64)
INT4 = strict_policy(
    "int4", lambda _layer: LayerCodecs(ChannelQuantizer(4), TokenQuantizer(4)), EXACT_TOKENS
)
MILLION = 1_000_000


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return retrieval_model(VOCAB_SIZE, HEAD_DIM, seed=1)


@pytest.fixture(scope="module")
def loaded(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    directory = tmp_path_factory.mktemp("retrieval")
    save_retrieval_model(model, directory)
    return load_model(str(directory), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def document() -> NeedleDocument:
    return retrieval_document(VOCAB_SIZE, num_tokens=NUM_TOKENS, num_needles=NUM_NEEDLES, seed=2)


def num_found(model: LoadedModel, policy: MeasuredPolicy, document: NeedleDocument) -> int:
    [score] = score_recall(model, [policy], document)
    return score.num_found


def layer_2_keys(bits: int) -> MeasuredPolicy:
    """One scale and zero-point for all channels of a token's key."""
    keys = LayerCodecs(TokenQuantizer(bits, group=HEAD_DIM), None)
    return strict_policy("keys", lambda layer: keys if layer == 1 else None, EXACT_TOKENS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_transformers_itself_finds_every_needle(
    document: NeedleDocument, head_dim: int, dtype: torch.dtype
) -> None:
    module = retrieval_model(VOCAB_SIZE, head_dim, seed=1).to(dtype)

    with torch.inference_mode():
        logits_TV = module(input_ids=torch.tensor([document.token_ids])).logits[0]

    for question in document.questions:
        likeliest = int(logits_TV[question.answer_from - 1].argmax())
        assert likeliest == int(question.value)
        assert likeliest == document.token_ids[question.answer_from]


def test_the_exact_cache_and_int4_find_every_needle(
    loaded: LoadedModel, document: NeedleDocument
) -> None:
    assert num_found(loaded, EXACT, document) == NUM_NEEDLES
    assert num_found(loaded, INT4, document) == NUM_NEEDLES


def test_rotated_blocks_find_every_needle(loaded: LoadedModel, document: NeedleDocument) -> None:
    rotated = strict_policy("rotated", lambda _l: LayerCodecs(Rotated(4), Rotated(4)), EXACT_TOKENS)

    assert num_found(loaded, rotated, document) == NUM_NEEDLES


def test_two_bits_a_token_lose_the_needles_for_the_mean_that_keys_share(
    loaded: LoadedModel, document: NeedleDocument, tmp_path: Path
) -> None:
    """The same bits keep every needle where keys share no mean: the bits alone decide nothing."""
    save_retrieval_model(retrieval_model(VOCAB_SIZE, HEAD_DIM, seed=1, shared_mean=0), tmp_path)
    without_mean = load_model(str(tmp_path), dtype="float32", device="cpu")

    assert num_found(loaded, layer_2_keys(2), document) < NUM_NEEDLES / 4
    assert num_found(without_mean, layer_2_keys(2), document) == NUM_NEEDLES


def test_a_needle_that_is_taken_away_is_not_found(
    loaded: LoadedModel, document: NeedleDocument
) -> None:
    """Only the early context tells the answers: they are not in the weights."""
    keys = {int(question.key) for question in document.questions}
    first_answer = min(question.answer_from for question in document.questions)
    token_ids = [
        5 if token_id in keys and place < first_answer - 1 else token_id
        for place, token_id in enumerate(document.token_ids)
    ]
    without = NeedleDocument(
        name="without", token_ids=tuple(token_ids), questions=document.questions
    )

    assert num_found(loaded, EXACT, without) <= 1


def test_every_key_occurs_twice_and_its_value_follows(document: NeedleDocument) -> None:
    assert len(document.token_ids) == NUM_TOKENS
    assert len(document.questions) == NUM_NEEDLES
    for question in document.questions:
        key, value = int(question.key), int(question.value)
        first = round(question.depth * NUM_TOKENS)
        places = [place for place, token in enumerate(document.token_ids) if token == key]
        assert places == [first, question.answer_from - 1]
        assert document.token_ids[first + 1] == value
        assert document.token_ids[question.answer_from] == value
        assert question.answer_to == question.answer_from + 1


def test_needles_spread_over_the_document(document: NeedleDocument) -> None:
    depths = sorted(question.depth for question in document.questions)
    for needle, depth in enumerate(depths):
        # The questions at the end take part of the last share.
        assert (needle - 1) / NUM_NEEDLES < depth < (needle + 1) / NUM_NEEDLES


def test_equal_seeds_give_equal_weights_and_documents() -> None:
    first, again = (retrieval_model(50, 64, seed=3).state_dict() for _ in range(2))
    other = retrieval_model(50, 64, seed=4).state_dict()

    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    documents = [
        retrieval_document(50, num_tokens=90, num_needles=5, seed=seed) for seed in (7, 7, 8)
    ]
    assert documents[0] == documents[1]
    assert documents[0].token_ids != documents[2].token_ids


def test_building_a_model_leaves_the_random_numbers_of_others_alone() -> None:
    torch.manual_seed(6)
    expected = torch.rand(3)

    torch.manual_seed(6)
    retrieval_model(50, 64)

    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(("num_tokens", "num_needles"), [(99, 20), (100, 0), (5000, 997)])
def test_documents_that_cannot_be_are_refused(num_tokens: int, num_needles: int) -> None:
    with pytest.raises(ValueError, match="needles need"):
        retrieval_document(VOCAB_SIZE, num_tokens=num_tokens, num_needles=num_needles, seed=0)


@pytest.mark.parametrize("head_dim", [32, 100])
def test_head_dimensions_that_do_not_hold_the_codes_are_refused(head_dim: int) -> None:
    with pytest.raises(ValueError, match="head_dim"):
        retrieval_model(VOCAB_SIZE, head_dim)


def attended(
    model: LlamaForCausalLM,
    layer: int,
    query_positions_Q: Tensor,
    query_states_QE: Tensor,
    key_states_of: Callable[[slice], Tensor],
) -> Tensor:
    """Attention weights of one layer over keys at a million positions, computed some keys at a
    time. States are what the layer reads before its norm."""
    block = model.model.layers[layer]

    def rotated(projection: torch.nn.Module, x_TE: Tensor, positions_T: Tensor) -> Tensor:
        y_TD = projection(block.input_layernorm(x_TE))
        cos, sin = model.model.rotary_emb(y_TD[None], positions_T[None])
        turned, _ = apply_rotary_pos_emb(y_TD[None, None], y_TD[None, None], cos, sin)
        return turned[0, 0]

    q_QD = rotated(block.self_attn.q_proj, query_states_QE, query_positions_Q).float()
    logits = []
    for first in range(0, MILLION, 1 << 16):
        positions_T = torch.arange(first, min(first + (1 << 16), MILLION))
        states_TE = key_states_of(slice(first, first + len(positions_T)))
        k_TD = rotated(block.self_attn.k_proj, states_TE, positions_T).float()
        logits_QT = q_QD @ k_TD.T / math.sqrt(HEAD_DIM)
        is_future_QT = positions_T[None] > query_positions_Q[:, None]
        logits.append(logits_QT.masked_fill(is_future_QT, -math.inf))
    return torch.cat(logits, dim=1).softmax(dim=1)


QUERIES_Q = torch.tensor([1, 2, 63, 64, 4097, 524_288, 999_983, 999_998, 999_999])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layer_1_attends_to_the_token_before_at_any_of_a_million_positions(
    dtype: torch.dtype,
) -> None:
    module = retrieval_model(VOCAB_SIZE, HEAD_DIM, seed=1).to(dtype)
    embedding_VE = module.model.embed_tokens.weight.detach()

    with torch.inference_mode():
        weight_QT = attended(
            module,
            0,
            QUERIES_Q,
            embedding_VE[: len(QUERIES_Q)],
            lambda keys: embedding_VE[:1].expand(keys.stop - keys.start, -1),
        )

    before_Q = weight_QT[torch.arange(len(QUERIES_Q)), QUERIES_Q - 1]
    assert before_Q.min() > 0.999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layer_2_finds_needles_at_the_far_ends_of_a_million_positions(dtype: torch.dtype) -> None:
    module = retrieval_model(VOCAB_SIZE, HEAD_DIM, seed=1).to(dtype)
    code_dim = (module.model.embed_tokens.weight[0] != 0).sum() - 1
    needles = torch.tensor([1, 2, 1000, 499_999, 999_000])
    num_needles = len(needles)
    generator = torch.Generator().manual_seed(9)
    before_T = torch.randint(num_needles, VOCAB_SIZE, (MILLION,), generator=generator)
    before_T[needles] = torch.arange(num_needles)
    stream_VE = module.model.embed_tokens.weight.detach()
    previous_VE = torch.zeros_like(stream_VE)
    previous_VE[:, code_dim : 2 * code_dim] = stream_VE[:, :code_dim]

    with torch.inference_mode():
        weight_QT = attended(
            module,
            1,
            torch.full((num_needles,), MILLION - 1),
            stream_VE[:num_needles] + previous_VE[num_needles : 2 * num_needles],
            # What else the stream holds is not what layer 2 makes its keys of.
            lambda keys: stream_VE[:1] + previous_VE[before_T[keys]],
        )

    weight_Q = weight_QT[torch.arange(num_needles), needles]
    law = 1 / (1 + MILLION * math.exp(20**2 / (2 * float(code_dim)) - 20))
    assert torch.equal(weight_QT.argmax(dim=1), needles)
    assert weight_Q.mean() > law - 0.2
    assert MILLION < MAX_TOKENS


def test_the_loader_sees_two_plain_layers_of_a_million_tokens_and_no_tokenizer(
    loaded: LoadedModel,
) -> None:
    assert loaded.spec.max_context_tokens == MAX_TOKENS
    assert loaded.spec.tokenizer_digest == ""
    assert loaded.spec.eos_token_ids == ()
    [first, second] = loaded.spec.layers
    assert isinstance(first, LayerGeometry)
    assert first == second
    assert first.key_dim == HEAD_DIM
    assert first.window is None
