"""Every task makes documents of one shape, whose answers stand where they say and can be read from
the text before the questions."""

import re
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvcluster.model.tokenizer import TextTokenizer
from kvcluster.quality.held_out import task_documents
from kvcluster.quality.needles import STYLES, NeedleDocument
from kvcluster.quality.tasks import _FIRST_WORDS, _SECOND_WORDS, TASKS
from kvcluster.quality.texts import Purpose, Text
from tests.unit.quality.toys import character_tokenizer

NUMBERED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def spelled(number: int) -> str:
    """A word of its own for each number."""
    return "".join(NUMBERED[int(digit)] for digit in str(number))


HAYSTACK = Text(
    name="counting",
    purpose=Purpose.EVALUATION,
    content="\n\n".join(
        f"Paragraph {n} says nothing of note, as every other one.\n"
        f"Its only purpose is that somebody could read the word {spelled(n)} in it."
        for n in range(300)
    ),
)
NUM_TOKENS = 9000

on_every_task = pytest.mark.parametrize("name", TASKS)


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return character_tokenizer()


def text_of(tokenizer: TextTokenizer, token_ids: tuple[int, ...]) -> str:
    decoder = tokenizer.output_decoder()
    return "".join(decoder.push(token_id) for token_id in token_ids) + decoder.finish()


def body_of(tokenizer: TextTokenizer, document: NeedleDocument) -> str:
    """The text before the first answer."""
    first = min(question.answer_from for question in document.questions)
    return text_of(tokenizer, document.token_ids[:first])


def answers_of(document: NeedleDocument, key: str) -> list[str]:
    return [question.value for question in document.questions if question.key == key]


@on_every_task
@settings(
    max_examples=8,
    deadline=None,
    # The tokenizer is immutable.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(num_tokens=st.integers(7000, 12_000), seed=st.integers(0, 1000))
def test_documents_have_the_tokens_asked_for_and_answers_where_they_say(
    tokenizer: TextTokenizer, name: str, num_tokens: int, seed: int
) -> None:
    document = TASKS[name](tokenizer, HAYSTACK, num_tokens, seed)

    assert len(document.token_ids) == num_tokens
    assert document.token_ids[0] == 0
    assert document.token_ids.count(0) == 1
    assert document.name == f"{name}/{HAYSTACK.name}/{num_tokens}/{seed}"
    end = 0
    for question in document.questions:
        assert end <= question.answer_from < question.answer_to <= num_tokens
        end = question.answer_to
        answer = text_of(tokenizer, document.token_ids[question.answer_from : end])
        assert answer == f" {question.value}"
        assert 0 <= question.depth < 1


@on_every_task
def test_every_answer_stands_in_the_text_before_the_questions(
    tokenizer: TextTokenizer, name: str
) -> None:
    document = TASKS[name](tokenizer, HAYSTACK, NUM_TOKENS, 1)

    body = body_of(tokenizer, document)
    for question in document.questions:
        assert re.search(rf"\b{question.value}\b", body)


@pytest.mark.parametrize(
    "name", ["multi-key", "multi-value", "multi-query", "variable-tracking", "quoted-facts"]
)
def test_depths_are_where_the_answers_are_told(tokenizer: TextTokenizer, name: str) -> None:
    document = TASKS[name](tokenizer, HAYSTACK, NUM_TOKENS, 1)

    body = body_of(tokenizer, document)
    for question in document.questions:
        # One character is one token, and one token comes before the text.
        place = round(question.depth * NUM_TOKENS) - 1
        assert re.search(rf"\b{question.value}\b", body[place : place + 200])


@on_every_task
def test_equal_seeds_give_equal_documents_and_others_do_not(
    tokenizer: TextTokenizer, name: str
) -> None:
    first, again, other = (TASKS[name](tokenizer, HAYSTACK, NUM_TOKENS, seed) for seed in (3, 3, 4))

    assert first == again
    assert first.token_ids != other.token_ids


@on_every_task
def test_calibration_texts_are_refused(tokenizer: TextTokenizer, name: str) -> None:
    """Whoever fits a codec to a task would be judged by what it was fitted to."""
    with pytest.raises(ValueError, match="not for calibration"):
        TASKS[name](tokenizer, replace(HAYSTACK, purpose=Purpose.CALIBRATION), NUM_TOKENS, 0)


@on_every_task
def test_too_few_tokens_are_refused(tokenizer: TextTokenizer, name: str) -> None:
    with pytest.raises(ValueError, match="tokens"):
        TASKS[name](tokenizer, HAYSTACK, 40, 0)


def test_words_of_tasks_are_in_no_style_for_calibration() -> None:
    calibration = [style for style in STYLES if style.purpose is Purpose.CALIBRATION]
    theirs = {
        word.lower() for style in calibration for words in (style.keys, style.values)
        for phrase in words for word in phrase.split()
    }  # fmt: skip

    assert theirs
    assert theirs.isdisjoint(word.lower() for word in (*_FIRST_WORDS, *_SECOND_WORDS))


def test_many_keys_are_told_and_few_are_asked_for(tokenizer: TextTokenizer) -> None:
    document = TASKS["multi-key"](tokenizer, HAYSTACK, NUM_TOKENS, 1)

    told = dict(re.findall(r"A magic pair is (\w+) (\w+)\.\n\n", body_of(tokenizer, document)))
    assert len(told) == 20
    assert len(document.questions) == 4
    for question in document.questions:
        assert told[question.key] == question.value


def test_all_values_of_a_key_are_asked_for_in_the_order_of_the_text(
    tokenizer: TextTokenizer,
) -> None:
    document = TASKS["multi-value"](tokenizer, HAYSTACK, NUM_TOKENS, 1)

    told = re.findall(r"A magic pair is (\w+) (\w+)\.\n\n", body_of(tokenizer, document))
    keys = {question.key for question in document.questions}
    assert len(keys) == 2
    for key in keys:
        assert answers_of(document, key) == [second for first, second in told if first == key]
        assert len(answers_of(document, key)) == 4


def test_one_sentence_asks_for_every_pair(tokenizer: TextTokenizer) -> None:
    document = TASKS["multi-query"](tokenizer, HAYSTACK, NUM_TOKENS, 1)

    told = dict(re.findall(r"A magic pair is (\w+) (\w+)\.\n\n", body_of(tokenizer, document)))
    assert {question.key: question.value for question in document.questions} == told
    assert len(told) == 8


def test_variables_asked_for_are_those_that_the_chain_of_assignments_reaches(
    tokenizer: TextTokenizer,
) -> None:
    document = TASKS["variable-tracking"](tokenizer, HAYSTACK, NUM_TOKENS, 1)

    lines = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\n\n", body_of(tokenizer, document))
    value_of: dict[str, str] = {}
    for name, assigned in lines:
        value_of[name] = value_of.get(assigned, assigned)
    assert len(value_of) == 10
    values = {question.key for question in document.questions}
    assert len(values) == 2
    for value in values:
        assert answers_of(document, value) == [n for n, held in value_of.items() if held == value]


@pytest.mark.parametrize("name", ["common-words", "frequent-words"])
def test_words_asked_for_are_the_commonest_from_the_commonest_on(
    tokenizer: TextTokenizer, name: str
) -> None:
    document = TASKS[name](tokenizer, HAYSTACK, NUM_TOKENS, 1)

    listed = body_of(tokenizer, document).split("\n\n", 1)[1].rsplit("These words", 1)[0].split()
    counts = {word: listed.count(word) for word in set(listed)}
    commonest = sorted(counts, key=lambda word: -counts[word])
    assert [question.value for question in document.questions] == commonest[:5]
    assert counts[commonest[4]] > counts[commonest[5]]


def test_quotes_are_sentences_of_the_text_and_end_in_a_word_that_it_has_once(
    tokenizer: TextTokenizer,
) -> None:
    document = TASKS["quoted-facts"](tokenizer, HAYSTACK, NUM_TOKENS, 1)

    asking = "What does the text above say?"
    body = body_of(tokenizer, document).split(asking)[0]
    text = text_of(tokenizer, document.token_ids)
    for question in document.questions:
        assert len(re.findall(rf"\b{question.value}\b", body)) == 1
        quote = text_of(tokenizer, document.token_ids[: question.answer_to])[-60:]
        assert quote in body
        assert text.count(quote) == 2


def test_there_is_a_document_of_each_task_and_seed_whose_name_tells_the_task(
    tokenizer: TextTokenizer,
) -> None:
    documents = task_documents(tokenizer, [HAYSTACK], num_tokens=NUM_TOKENS, seeds=[4, 5])

    assert [document.name.split("/")[0] for document in documents] == [
        name for name in TASKS for _ in range(2)
    ]
    assert len({document.token_ids for document in documents}) == 2 * len(TASKS)
