"""Scores of a policy are those of the model's own logits, and the exact policy costs nothing."""

import math

import msgspec
import pytest
import torch
from torch import Tensor

from kvcluster.model.loader import LoadedModel
from kvcluster.quality import passes
from kvcluster.quality.measure import (
    EXACT,
    MeasuredPolicy,
    found,
    measure,
    score_recall,
    score_text,
    strict_policy,
    text_tokens,
)
from kvcluster.quality.needles import NeedleDocument, Question
from kvcluster.quality.passes import final_states, logits_of
from kvcluster.quality.records import QualityReport, TextScore, from_json, to_json
from kvcluster.quality.retained import RetainedAttention
from kvcluster.quality.strict import ExactTokens, LayerCodecs, StrictAttention
from kvcluster.quality.texts import Purpose, Text
from kvcluster.retention.full import FullRetention
from kvcluster.selection.block_sparse import BlockSparse
from tests.architectures import VOCAB_SIZE
from tests.unit.quality.toys import Coarse, Same, character_tokenizer, tiny_model

TEXT = Text(name="noise", purpose=Purpose.EVALUATION, content="a text " * 100)
EXACT_TOKENS = ExactTokens(block_size=8)
COARSE = strict_policy("coarse", lambda _layer: LayerCodecs(Coarse(), Coarse()), EXACT_TOKENS)
SAME = strict_policy("same", lambda _layer: LayerCodecs(Same(), Same()), EXACT_TOKENS)
FIRST = 20

# Some thousand float32 roundings: the tiny models' logits are about 10.
ATOL = 1e-4


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny_model("llama")


def tokens(num_tokens: int = 90) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(3, VOCAB_SIZE, (num_tokens,), generator=generator)


def all_logits(model: LoadedModel, policy: MeasuredPolicy, token_ids_T: Tensor) -> Tensor:
    rows_T = torch.arange(len(token_ids_T))
    return model.forward(token_ids_T, rows_T, rows_T, policy.attention(model.spec))


def scored(model: LoadedModel, policy: MeasuredPolicy) -> TextScore:
    [score] = score_text(model, [policy], TEXT, tokens(), first_scored=FIRST)
    return score


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "deepseek_v3"])
def test_states_and_head_give_the_logits_of_one_whole_pass(name: str) -> None:
    model = tiny_model(name)

    states_TE = final_states(model, tokens(40), COARSE.attention(model.spec))

    expected_TV = all_logits(model, COARSE, tokens(40))
    torch.testing.assert_close(logits_of(model, states_TE), expected_TV, rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_an_exact_pass_gives_the_logits_of_transformers_itself(name: str) -> None:
    model = tiny_model(name)
    logits_TV = all_logits(model, EXACT, tokens(40))

    model.module.set_attn_implementation("eager")
    with torch.inference_mode():
        expected_TV = model.module(input_ids=tokens(40)[None], use_cache=False).logits[0]

    torch.testing.assert_close(logits_TV, expected_TV, rtol=0, atol=ATOL)


def test_a_lossless_policy_costs_nothing(model: LoadedModel) -> None:
    score = scored(model, SAME)

    assert abs(score.nll_increase.value) < ATOL
    assert abs(score.perplexity_increase_percent.value) < 100 * ATOL
    assert abs(score.kl.value) < ATOL
    assert score.top1_agreement.value == 1


def test_scores_are_those_of_the_logits_of_the_scored_tokens(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "_SLICE_LOGITS", 7 * VOCAB_SIZE)
    score = scored(model, COARSE)

    rows = slice(FIRST - 1, -1)
    exact_RV = all_logits(model, EXACT, tokens())[rows].double().log_softmax(dim=-1)
    coarse_RV = all_logits(model, COARSE, tokens())[rows].double().log_softmax(dim=-1)
    wanted_R1 = tokens()[FIRST:, None]
    exact_nll = -exact_RV.gather(1, wanted_R1).mean().item()
    increase = -coarse_RV.gather(1, wanted_R1).mean().item() - exact_nll
    kl = (exact_RV.exp() * (exact_RV - coarse_RV)).sum(dim=-1).mean().item()
    agreement = (exact_RV.argmax(dim=-1) == coarse_RV.argmax(dim=-1)).double().mean().item()
    assert score.exact_nll == pytest.approx(exact_nll, abs=ATOL)
    assert score.nll_increase.value == pytest.approx(increase, abs=ATOL)
    assert score.perplexity_increase_percent.value == pytest.approx(
        100 * math.expm1(increase), rel=1e-2
    )
    assert score.kl.value == pytest.approx(kl, abs=ATOL)
    assert score.kl.value > 0.01
    assert score.top1_agreement.value == pytest.approx(agreement)
    assert 0 < agreement < 1


def test_policies_measured_together_score_as_each_alone(model: LoadedModel) -> None:
    together = list(score_text(model, [SAME, COARSE], TEXT, tokens(), first_scored=FIRST))

    assert together == [scored(model, SAME), scored(model, COARSE)]


def test_storage_counts_every_layer(model: LoadedModel) -> None:
    storage = scored(model, COARSE).storage

    assert storage.stored.num_tokens == 90
    elements = sum(layer.kv_elements_per_token for layer in model.spec.layers)
    assert storage.stored.encoded_elements == 10 * 8 * elements
    assert storage.stored.exact_elements == (8 + 2) * elements
    assert storage.payload_ratio == 2


def test_a_score_says_how_many_keys_were_read(model: LoadedModel) -> None:
    block_sparse = MeasuredPolicy(
        name="sparse",
        attention=lambda spec: RetainedAttention(
            spec,
            FullRetention(),
            exact=EXACT_TOKENS,
            selection=BlockSparse(local=1, sinks=0, block_size=8),
        ),
    )

    # A query of 90 reads the keys of its own block of 8, up to itself.
    num_read = sum(place % 8 + 1 for place in range(90))
    assert scored(model, block_sparse).read_share == num_read / (90 * 91 / 2)
    assert scored(model, COARSE).read_share == 1


@pytest.mark.parametrize("first_scored", [0, 90])
def test_a_first_token_that_cannot_be_scored_is_refused(
    model: LoadedModel, first_scored: int
) -> None:
    with pytest.raises(ValueError, match="first_scored"):
        list(score_text(model, [SAME], TEXT, tokens(), first_scored=first_scored))


def test_more_tokens_than_the_model_reads_are_refused(model: LoadedModel) -> None:
    with pytest.raises(ValueError, match="reads at most 512"):
        list(score_text(model, [SAME], TEXT, tokens(513), first_scored=FIRST))


def document(token_ids: list[int], answers: list[tuple[int, int]]) -> NeedleDocument:
    return NeedleDocument(
        name="toy",
        token_ids=tuple(token_ids),
        questions=tuple(
            Question(key=str(first), value="", depth=0.5, answer_from=first, answer_to=last)
            for first, last in answers
        ),
    )


def test_an_answer_is_found_if_and_only_if_greedy_decoding_gives_each_of_its_tokens(
    model: LoadedModel,
) -> None:
    ids = tokens(30).tolist()
    for place in range(20, 23):
        ids[place] = int(all_logits(model, EXACT, torch.tensor(ids[:place]))[-1].argmax())
    toy = document(ids, [(20, 23), (20, 21), (21, 24), (10, 12)])
    wrong_after = int(all_logits(model, EXACT, torch.tensor(ids[:23]))[-1].argmax()) != ids[23]

    states_TE = final_states(model, torch.tensor(ids), EXACT.attention(model.spec))

    assert wrong_after
    assert found(model, states_TE, toy) == [True, True, False, False]


def test_recall_counts_what_the_policy_finds_of_what_the_exact_cache_finds(
    model: LoadedModel,
) -> None:
    ids = tokens(60)
    exact_T = all_logits(model, EXACT, ids).argmax(dim=-1)
    coarse_T = all_logits(model, COARSE, ids).argmax(dim=-1)
    # Answers of one token: as many places as there are after which the text is as it is.
    toy = document(ids.tolist(), [(place, place + 1) for place in range(1, 60)])

    [score] = score_recall(model, [COARSE], toy)

    by_exact, by_coarse = exact_T[:-1] == ids[1:], coarse_T[:-1] == ids[1:]
    assert score.num_found == int(by_coarse.sum())
    assert score.num_found_by_exact == int(by_exact.sum())
    assert score.num_found_of_exact == int((by_exact & by_coarse).sum())
    assert [needle.is_found for needle in score.needles] == by_coarse.tolist()
    assert score.storage.payload_ratio == 2


def test_a_report_survives_json(model: LoadedModel) -> None:
    report = QualityReport(
        model="toy",
        weights_digest="0",
        tokenizer_digest="0",
        dtype="float32",
        device="cpu",
        texts=(scored(model, COARSE),),
        recall=tuple(score_recall(model, [COARSE], document(tokens(30).tolist(), [(9, 11)]))),
    )

    assert from_json(to_json(report)) == report


def test_json_that_is_no_report_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        from_json(b'{"model": 3}')


def test_the_exact_policy_keeps_everything(model: LoadedModel) -> None:
    attention = EXACT.attention(model.spec)

    assert isinstance(attention, StrictAttention)
    assert scored(model, EXACT).storage.ratio == 1


def test_a_measurement_has_a_score_for_each_policy_on_each_text_and_document(
    model: LoadedModel,
) -> None:
    toy = document(tokens(30).tolist(), [(9, 11)])

    report = measure(
        model,
        character_tokenizer(),
        [SAME, COARSE],
        [TEXT],
        [toy, toy],
        num_tokens=80,
        first_scored=FIRST,
    )

    assert [(score.policy, score.num_tokens) for score in report.texts] == [
        ("same", 80),
        ("coarse", 80),
    ]
    assert [score.policy for score in report.recall] == ["same", "coarse"] * 2
    assert report.texts[0].text_digest == TEXT.digest
    assert report.model == model.spec.name


def test_a_text_is_read_as_long_as_the_model_can(model: LoadedModel) -> None:
    report = measure(model, character_tokenizer(), [SAME], [TEXT], [], first_scored=FIRST)

    assert report.texts[0].num_tokens == model.spec.max_context_tokens


def test_the_tokens_of_a_text_begin_as_a_prompt_does() -> None:
    assert text_tokens(character_tokenizer(), TEXT, 10).tolist()[0] == 0


def test_a_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="has 701 tokens, not 800"):
        text_tokens(character_tokenizer(), TEXT, 800)
