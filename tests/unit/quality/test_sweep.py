"""Policies are scored one after another against one exact pass, and a broken-off sweep goes on."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvcluster.errors import ConfigError
from kvcluster.model.loader import LoadedModel
from kvcluster.quality.measure import recall_score, strict_policy, text_score
from kvcluster.quality.needles import NeedleDocument, Question
from kvcluster.quality.served import ServedPolicy, codecs_of, served_policies
from kvcluster.quality.strict import ExactTokens, LayerCodecs
from kvcluster.quality.sweep import ReadOnce, earlier_report, keep_in, read_once, sweep
from kvcluster.quality.sweep_records import SweepReport, read_report, write_report
from kvcluster.quality.texts import Purpose, Text
from tests.architectures import VOCAB_SIZE
from tests.unit.quality.toys import tiny_model

BLOCK_SIZE = 16
FIRST = 20
EXACT_TOKENS = ExactTokens(block_size=BLOCK_SIZE, lag=1)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def exact(model: LoadedModel) -> ReadOnce:
    texts = [(text(name), tokens(seed)) for seed, name in enumerate(("one", "two"))]
    return exact_pass(model, texts, [document()])


def exact_pass(
    model: LoadedModel,
    texts: list[tuple[Text, Tensor]],
    documents: list[NeedleDocument],
    exact_recent_tokens: int = BLOCK_SIZE,
) -> ReadOnce:
    return read_once(
        model,
        texts,
        documents,
        block_size=BLOCK_SIZE,
        exact_recent_tokens=exact_recent_tokens,
        first_scored=FIRST,
    )


def policies(model: LoadedModel, *names: str) -> list[ServedPolicy]:
    return served_policies(names, codecs_of(model, None), model.spec, EXACT_TOKENS)


def text(name: str) -> Text:
    return Text(name=name, purpose=Purpose.EVALUATION, content=name)


def tokens(seed: int, num_tokens: int = 90) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (num_tokens,), generator=generator)


def document() -> NeedleDocument:
    places = range(40, 60)
    return NeedleDocument(
        name="toy",
        token_ids=tuple(tokens(7).tolist()),
        questions=tuple(
            Question(key=str(p), value="", depth=p / 90, answer_from=p, answer_to=p + 1)
            for p in places
        ),
    )


def swept(
    model: LoadedModel, exact: ReadOnce, *names: str, report: SweepReport | None = None
) -> tuple[SweepReport, list[SweepReport]]:
    kept: list[SweepReport] = []
    start = report or SweepReport(subject=exact.subject)
    return sweep(model, exact, policies(model, *names), start, keep=kept.append), kept


def test_scores_are_those_of_each_policy_alone(model: LoadedModel, exact: ReadOnce) -> None:
    report, _ = swept(model, exact, "int4", "int2")

    codecs = codecs_of(model, None).layers("int2")
    alone = strict_policy("int2", lambda layer: LayerCodecs(*codecs[layer]), EXACT_TOKENS)
    assert [score.policy for score in report.scores] == ["int4", "int2"]
    assert report.scores[1].texts == tuple(text_score(model, alone, t) for t in exact.texts)
    assert report.scores[1].recall == (recall_score(model, alone, exact.documents[0]),)


def test_every_policy_is_kept_before_the_next_one_begins(
    model: LoadedModel, exact: ReadOnce
) -> None:
    report, kept = swept(model, exact, "int4", "int2")

    assert [len(each.scores) for each in kept] == [1, 2]
    assert kept[-1] == report


def test_policies_of_the_report_are_not_measured_again(model: LoadedModel, exact: ReadOnce) -> None:
    first, _ = swept(model, exact, "int4")

    second, kept = swept(model, exact, "int4", "int2", "int4", report=first)

    assert len(kept) == 1
    assert second.scores[0] == first.scores[0]
    assert [score.policy for score in second.scores] == ["int4", "int2"]


def test_texts_of_different_lengths_are_refused(model: LoadedModel) -> None:
    with pytest.raises(ValueError, match=r"one length, got \[80, 90\]"):
        exact_pass(model, [(text("one"), tokens(0)), (text("two"), tokens(1, 80))], [])


def test_a_sweep_goes_on_from_its_file(model: LoadedModel, exact: ReadOnce, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    begun = earlier_report(path, exact.subject)

    report = sweep(model, exact, policies(model, "int4"), begun, keep=keep_in(path))

    assert earlier_report(path, exact.subject) == report
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]


def test_a_file_about_other_texts_is_not_gone_on_with(
    model: LoadedModel, exact: ReadOnce, tmp_path: Path
) -> None:
    path = tmp_path / "report.json"
    write_report(path, SweepReport(subject=exact.subject))
    other = exact_pass(model, [(text("one"), tokens(0))], [])

    with pytest.raises(ConfigError, match="other texts"):
        earlier_report(path, other.subject)


def test_a_file_about_other_exact_tokens_is_not_gone_on_with(
    model: LoadedModel, exact: ReadOnce, tmp_path: Path
) -> None:
    path = tmp_path / "report.json"
    write_report(path, SweepReport(subject=exact.subject))
    pairs = [(each.text, each.token_ids_T) for each in exact.texts]
    other = exact_pass(model, pairs, [document()], exact_recent_tokens=0)

    with pytest.raises(ConfigError, match="exact tokens"):
        earlier_report(path, other.subject)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"subject": 3}'])
def test_a_file_that_is_no_report_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(content)

    with pytest.raises(ConfigError, match="no report of a sweep"):
        read_report(path)


def test_a_missing_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_report(tmp_path / "none.json")


def test_means_over_texts_weigh_texts_alike_and_name_the_worst(
    model: LoadedModel, exact: ReadOnce
) -> None:
    report, _ = swept(model, exact, "int2")
    [score] = report.scores
    increases = [each.perplexity_increase_percent.value for each in score.texts]

    assert score.perplexity_increase_percent is not None
    assert score.perplexity_increase_percent.value == pytest.approx(sum(increases) / 2)
    assert score.worst_text is not None
    assert score.worst_text.perplexity_increase_percent.value == max(increases)
    assert score.kl is not None
    assert score.kl.value > 0
    assert score.top1_agreement is not None
    assert score.storage == score.texts[0].storage
    assert score.num_found_by_exact == score.recall[0].num_found_by_exact


def test_a_sweep_without_texts_has_no_perplexity(model: LoadedModel) -> None:
    exact = exact_pass(model, [], [document()])

    [score] = swept(model, exact, "int4")[0].scores

    assert score.perplexity_increase_percent is None
    assert score.worst_text is None
    assert score.storage == score.recall[0].storage
