"""Documents with needles hold each fact once in the text and once at the end, at known places."""

from dataclasses import replace
from itertools import pairwise

import pytest

from kvcluster.model.tokenizer import TextTokenizer
from kvcluster.quality.needles import STYLES, NeedleDocument, NeedleStyle, needle_document
from kvcluster.quality.texts import Purpose, Text
from tests.unit.quality.toys import character_tokenizer

HAYSTACK = Text(
    name="counting",
    purpose=Purpose.EVALUATION,
    content="\n\n".join(f"Paragraph {n} says nothing of note, {n} times." for n in range(400)),
)
EVALUATION = [style for style in STYLES if style.purpose is Purpose.EVALUATION]
CALIBRATION = [style for style in STYLES if style.purpose is Purpose.CALIBRATION]
NUM_TOKENS = 4000


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return character_tokenizer()


def document(
    tokenizer: TextTokenizer, style: NeedleStyle = EVALUATION[0], seed: int = 0
) -> NeedleDocument:
    return needle_document(
        tokenizer, style, HAYSTACK, num_tokens=NUM_TOKENS, num_needles=4, seed=seed
    )


def text_of(tokenizer: TextTokenizer, token_ids: tuple[int, ...]) -> str:
    decoder = tokenizer.output_decoder()
    return "".join(decoder.push(token_id) for token_id in token_ids) + decoder.finish()


@pytest.mark.parametrize("style", EVALUATION, ids=lambda style: style.name)
def test_a_document_has_exactly_the_tokens_asked_for(
    tokenizer: TextTokenizer, style: NeedleStyle
) -> None:
    found = document(tokenizer, style)

    assert len(found.token_ids) == NUM_TOKENS
    assert found.token_ids.count(0) == 1
    assert found.token_ids[0] == 0


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.name)
def test_every_fact_stands_in_the_text_and_after_its_question(
    tokenizer: TextTokenizer, style: NeedleStyle
) -> None:
    haystack = replace(HAYSTACK, purpose=style.purpose)
    found = needle_document(
        tokenizer, style, haystack, num_tokens=NUM_TOKENS, num_needles=4, seed=0
    )

    text = text_of(tokenizer, found.token_ids)
    for question in found.questions:
        fact = style.fact(question.key, question.value)
        assert fact.startswith(f"{style.sentence(question.key)} {question.value}.")
        assert text.count(fact) == 2
        assert text.count(question.value) == fact.count(question.value) * 2
        asked = text_of(tokenizer, found.token_ids[: question.answer_from])
        answer = text_of(tokenizer, found.token_ids[question.answer_from : question.answer_to])
        assert asked.endswith(style.sentence(question.key))
        assert answer == f" {question.value}"


def test_depths_are_where_the_facts_stand_and_spread_evenly(tokenizer: TextTokenizer) -> None:
    style = EVALUATION[0]
    found = document(tokenizer, style)

    text = text_of(tokenizer, found.token_ids[1:])
    depths = sorted(question.depth for question in found.questions)
    for question in found.questions:
        fact = style.fact(question.key, question.value)
        # One character is one token, and one token comes before the text.
        assert round(question.depth * NUM_TOKENS) == text.index(fact) + 1
    gaps = [after - before for before, after in pairwise(depths)]
    assert min(gaps) > 0.15
    assert max(gaps) < 0.3


def test_a_fact_is_mentioned_again_by_the_last_word_of_its_key() -> None:
    [style] = [style for style in STYLES if style.name == "name"]

    fact = style.fact("owner of the windmill is Ingrid", "Schmidt")

    assert fact == (
        "The owner of the windmill is Ingrid Schmidt. Remember the name: Ingrid Schmidt. "
        "The owner of the windmill is Ingrid Schmidt."
    )


def test_the_fact_nearest_to_the_questions_is_asked_for_first(tokenizer: TextTokenizer) -> None:
    depths = [question.depth for question in document(tokenizer).questions]

    assert depths == sorted(depths, reverse=True)


def test_equal_seeds_give_equal_documents_and_others_do_not(tokenizer: TextTokenizer) -> None:
    assert document(tokenizer, seed=3) == document(tokenizer, seed=3)
    assert document(tokenizer, seed=3).token_ids != document(tokenizer, seed=4).token_ids


def test_calibration_and_evaluation_share_no_template_key_or_value() -> None:
    assert CALIBRATION
    assert EVALUATION
    for mine in CALIBRATION:
        for theirs in EVALUATION:
            assert mine.template != theirs.template
            assert set(mine.keys).isdisjoint(theirs.keys)
            assert set(mine.values).isdisjoint(theirs.values)
            assert not mine.again or mine.again != theirs.again
            assert words(" ".join(mine.keys)).isdisjoint(words(" ".join(theirs.keys)))
            assert mine.opening != theirs.opening
            assert mine.asking != theirs.asking


def words(text: str) -> set[str]:
    return {word.lower() for word in text.split() if len(word) > 3}


def test_a_calibration_style_is_refused_in_an_evaluation_text(tokenizer: TextTokenizer) -> None:
    with pytest.raises(ValueError, match="not for evaluation"):
        document(tokenizer, CALIBRATION[0])


def test_too_few_tokens_are_refused_with_the_number_needed(tokenizer: TextTokenizer) -> None:
    with pytest.raises(ValueError, match=r"need \d+ tokens") as refused:
        needle_document(tokenizer, EVALUATION[0], HAYSTACK, num_tokens=100, num_needles=4, seed=0)

    needed = int(str(refused.value).split("need ")[1].split()[0])
    fitting = needle_document(
        tokenizer, EVALUATION[0], HAYSTACK, num_tokens=needed, num_needles=4, seed=0
    )
    assert len(fitting.token_ids) == needed


def test_a_haystack_that_is_too_short_is_refused(tokenizer: TextTokenizer) -> None:
    with pytest.raises(ValueError, match="too short"):
        needle_document(
            tokenizer,
            EVALUATION[0],
            replace(HAYSTACK, content="little"),
            num_tokens=NUM_TOKENS,
            num_needles=1,
            seed=0,
        )


@pytest.mark.parametrize("num_needles", [0, 99])
def test_more_needles_than_keys_are_refused(tokenizer: TextTokenizer, num_needles: int) -> None:
    with pytest.raises(ValueError, match="keys"):
        needle_document(
            tokenizer,
            EVALUATION[0],
            HAYSTACK,
            num_tokens=NUM_TOKENS,
            num_needles=num_needles,
            seed=0,
        )
