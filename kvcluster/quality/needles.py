"""Documents with facts hidden in real text, and the same facts asked for at the end.

A fact is a sentence about a key that ends in a value; a question is the same sentence up to the
value. Small base models answer this form, because it only wants a copy. All questions of a
document stand one after another, each with its right answer, so that one forward pass scores all:
an answer is found if each of its tokens is the most likely one, which is when greedy decoding
gives it.

Styles for calibration and for evaluation have no template, key or value in common.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from kvcluster.model.tokenizer import TextTokenizer
from kvcluster.quality.texts import Purpose, Text

_NUM_STARTS: Final = 16
"""Places in the haystack where documents of different seeds may start."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NeedleStyle:
    """How facts are worded, and what they are about."""

    name: str
    purpose: Purpose
    opening: str
    """Says at the start of the document what is to be remembered."""
    asking: str
    """Introduces the questions."""
    template: str
    """A sentence with {key} that breaks off where a space and the value follow."""
    keys: tuple[str, ...]
    first_value: int
    """Values are numbers from here up to ten times this, less one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One fact, and where the answer stands among the document's tokens."""

    key: str
    value: str
    depth: float
    """Place of the fact: 0 at the first token, 1 at the last one."""
    answer_from: int
    answer_to: int
    """Positions of the answer's tokens: from the first to before this one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NeedleDocument:
    """Token ids and the questions among them, in the order of asking."""

    name: str
    token_ids: tuple[int, ...]
    questions: tuple[Question, ...]


def needle_document(
    tokenizer: TextTokenizer,
    style: NeedleStyle,
    haystack: Text,
    *,
    num_tokens: int,
    num_needles: int,
    seed: int,
) -> NeedleDocument:
    """A document of exactly `num_tokens`, its facts spread evenly over the depths.

    Equal arguments give equal documents.
    Raises: ValueError if style and haystack have different purposes, or the facts do not fit into
    the tokens, the style's keys or the haystack.
    """
    if style.purpose != haystack.purpose:
        raise ValueError(f"style {style.name} is not for {haystack.purpose} texts")
    if not 1 <= num_needles <= len(style.keys):
        raise ValueError(f"style {style.name} has 1 to {len(style.keys)} keys, not {num_needles}")
    choice = random.Random(f"{style.name}:{seed}")
    facts = _facts(style, num_needles, choice)
    encode = _Encoder(tokenizer)
    asked = _asked(encode, style, choice.sample(facts, num_needles))
    needles = [encode(f"{_sentence(style, key)} {value}.\n\n") for key, value in facts]
    start = [*encode.prefix, *encode(f"{style.opening}\n\n")]
    num_hay = num_tokens - len(start) - sum(map(len, needles)) - len(asked.ids)
    num_hay -= len(encode.suffix)
    if num_hay < 0:
        raise ValueError(f"{num_needles} facts and questions need {num_tokens - num_hay} tokens")
    paragraphs = _hay(encode, haystack, num_hay, choice.randrange(_NUM_STARTS))
    ids, places = _with_needles(start, paragraphs, needles)
    depths = {key: place / num_tokens for (key, _), place in zip(facts, places, strict=True)}
    questions = tuple(
        Question(
            key=key,
            value=value,
            depth=depths[key],
            answer_from=len(ids) + first,
            answer_to=len(ids) + last,
        )
        for key, value, first, last in asked.answers
    )
    return NeedleDocument(
        name=f"{style.name}/{haystack.name}/{num_tokens}/{seed}",
        token_ids=(*ids, *asked.ids, *encode.suffix),
        questions=questions,
    )


class _Encoder:
    """Encodes pieces of a document without the special tokens that frame a prompt."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        framing, framed = self._framed(""), self._framed("a")
        num_before = 0
        while num_before < len(framing) and framing[num_before] == framed[num_before]:
            num_before += 1
        self.prefix = framing[:num_before]
        self.suffix = framing[num_before:]

    def __call__(self, text: str) -> list[int]:
        ids = self._framed(text)
        return ids[len(self.prefix) : len(ids) - len(self.suffix)]

    def _framed(self, text: str) -> list[int]:
        encoder = self._tokenizer.prompt_encoder()
        return [*encoder.push(text), *encoder.finish()]


@dataclass(frozen=True, slots=True)
class _Asked:
    ids: list[int]
    answers: list[tuple[str, str, int, int]]
    """(key, value, first token of the answer, token after it), counted in `ids`."""


def _facts(style: NeedleStyle, num_needles: int, choice: random.Random) -> list[tuple[str, str]]:
    keys = choice.sample(style.keys, num_needles)
    values = choice.sample(range(style.first_value, 10 * style.first_value), num_needles)
    return [(key, str(value)) for key, value in zip(keys, values, strict=True)]


def _sentence(style: NeedleStyle, key: str) -> str:
    return style.template.format(key=key)


def _asked(encode: _Encoder, style: NeedleStyle, facts: list[tuple[str, str]]) -> _Asked:
    ids = encode(f"{style.asking}\n\n")
    answers = []
    for key, value in facts:
        question = encode(_sentence(style, key))
        answered = encode(f"{_sentence(style, key)} {value}")
        whole = encode(f"{_sentence(style, key)} {value}.\n\n")
        if answered[: len(question)] != question or whole[: len(answered)] != answered:
            raise ValueError(f"the tokenizer joins the value {value} with the words around it")
        answers.append((key, value, len(ids) + len(question), len(ids) + len(answered)))
        ids += whole
    return _Asked(ids, answers)


def _hay(encode: _Encoder, haystack: Text, num_tokens: int, start: int) -> list[list[int]]:
    """Paragraphs of exactly so many tokens; the last one may be cut."""
    paragraphs = haystack.content.split("\n\n")
    first = start * len(paragraphs) // _NUM_STARTS
    taken: list[list[int]] = []
    wanted = num_tokens
    for paragraph in _turned(paragraphs, first):
        if not wanted:
            return taken
        taken.append(encode(f"{paragraph}\n\n")[:wanted])
        wanted -= len(taken[-1])
    if wanted:
        raise ValueError(f"haystack {haystack.name} is {wanted} tokens too short")
    return taken


def _turned(paragraphs: list[str], first: int) -> Iterator[str]:
    yield from paragraphs[first:]
    yield from paragraphs[:first]


def _with_needles(
    start: list[int], paragraphs: list[list[int]], needles: list[list[int]]
) -> tuple[list[int], list[int]]:
    """The document up to the questions, and the position of each needle's first token."""
    ids = list(start)
    places: list[int] = []
    num_hay = sum(map(len, paragraphs))
    num_passed = 0
    for paragraph in [*paragraphs, []]:
        # Needle i comes at the first end of a paragraph past its share of the haystack.
        while len(places) < len(needles) and (
            num_passed * len(needles) >= (len(places) + 0.5) * num_hay or not paragraph
        ):
            places.append(len(ids))
            ids += needles[len(places) - 1]
        ids += paragraph
        num_passed += len(paragraph)
    return ids, places


STYLES: Final = (
    NeedleStyle(
        name="combination",
        purpose=Purpose.CALIBRATION,
        opening="Some animals have a locker. Learn the combination of each.",
        asking="These were the combinations:",
        template="Note that the combination of the locker of the {key} is",
        keys=(
            "otter", "falcon", "badger", "lizard", "camel", "walrus", "beetle", "heron", "jackal",
            "moose", "panther", "sparrow", "tortoise", "weasel", "zebra", "dolphin",
        ),
        first_value=10_000,
    ),
    NeedleStyle(
        name="invoice",
        purpose=Purpose.CALIBRATION,
        opening="Several trades have sent a bill. Keep the amounts in mind.",
        asking="To sum up the bills:",
        template="On the bill from the {key} stands the amount of",
        keys=(
            "baker", "carpenter", "plumber", "tailor", "mason", "printer", "gardener", "painter",
            "potter", "roofer", "miller", "butcher", "weaver", "glazier", "cobbler", "saddler",
        ),
        first_value=100_000,
    ),
    # Keys of several different words: SmolLM2-135M mixes facts up that differ in one name alone.
    NeedleStyle(
        name="number",
        purpose=Purpose.EVALUATION,
        opening="Important numbers are hidden inside this text. Memorize them.",
        asking="Here are all the numbers again.",
        template="The {key} is",
        keys=(
            "pass key", "vault code", "phone number", "account number", "door code",
            "serial number", "magic word", "zip code", "house number",
            "lucky number", "bus line", "price of gold", "ship weight", "tower height",
        ),
        first_value=20_000,
    ),
    NeedleStyle(
        name="station",
        purpose=Purpose.EVALUATION,
        opening="Every weather station in this document has a reading. Remember it.",
        asking="Readings of the weather stations:",
        template="{key} reported a value of",
        keys=(
            "Paris in spring", "The northern lighthouse", "Old Boston harbour", "Mount Kenya",
            "Siberia by night", "A ship near Iceland", "The Sahara camp", "Tokyo airport",
            "Lake Victoria", "The Amazon outpost", "Castle hill in Vienna", "Polar base seven",
        ),
        first_value=200_000,
    ),
)  # fmt: skip
"""All styles. Values of different styles have different numbers of digits or first digits."""
