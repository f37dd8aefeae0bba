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

NUM_STARTS: Final = 16
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
    values: tuple[str, ...]
    again: str = ""
    """More mentions of the fact, with {key}, {value} and {tail}, the last word of the key."""

    def sentence(self, key: str) -> str:
        """The question: the fact up to the space before its value."""
        return self.template.format(key=key)

    def fact(self, key: str, value: str) -> str:
        """All that the document says about the key."""
        return f"{self.sentence(key)} {value}{self.rest(key, value)}".rstrip()

    def rest(self, key: str, value: str) -> str:
        """What follows the value, up to the end of the paragraph."""
        tail = key.rsplit(" ", maxsplit=1)[-1]
        again = self.again.format(key=key, tail=tail, value=value)
        return f". {again}".rstrip() + "\n\n"


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """One question with its right answer, as it stands at the end of a document."""

    key: str
    question: str
    """Up to the space before the answer; may be empty where a list goes on."""
    answer: str
    after: str = ".\n\n"
    passage: int = 0
    """Which passage tells the answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Script:
    """What a document says beside its haystack."""

    name: str
    opening: str
    passages: tuple[str, ...]
    """Spread evenly over the haystack, in this order."""
    asking: str
    questions: tuple[Asked, ...]


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
    keys = choice.sample(style.keys, num_needles)
    values = choice.sample(style.values, num_needles)
    questions = [
        Asked(
            key=key,
            question=style.sentence(key),
            answer=value,
            after=style.rest(key, value),
            passage=passage,
        )
        for passage, (key, value) in enumerate(zip(keys, values, strict=True))
    ]
    script = Script(
        name=document_name(style.name, haystack, num_tokens, seed),
        opening=style.opening,
        passages=tuple(style.fact(key, value) for key, value in zip(keys, values, strict=True)),
        asking=style.asking,
        # Small models miss the farthest facts unless the near ones, asked for first, show how.
        questions=tuple(reversed(questions)),
    )
    return placed_document(tokenizer, script, haystack, num_tokens, choice)


def document_name(kind: str, haystack: Text, num_tokens: int, seed: int) -> str:
    """Of a document that these make."""
    return f"{kind}/{haystack.name}/{num_tokens}/{seed}"


def placed_document(
    tokenizer: TextTokenizer, script: Script, haystack: Text, num_tokens: int, choice: random.Random
) -> NeedleDocument:
    """A document whose haystack begins anywhere. Raises: ValueError as `scripted_document`."""
    start = choice.randrange(NUM_STARTS)
    return scripted_document(tokenizer, script, haystack, num_tokens=num_tokens, start=start)


def scripted_document(
    tokenizer: TextTokenizer, script: Script, haystack: Text, *, num_tokens: int, start: int
) -> NeedleDocument:
    """A document of exactly `num_tokens`; its haystack begins at `start` of `NUM_STARTS` places.

    Raises: ValueError if script or haystack do not fit into the tokens, or the tokenizer joins an
    answer with the words around it.
    """
    encode = PieceEncoder(tokenizer)
    asked = _encoded(encode, script)
    passages = [encode(f"{passage}\n\n") for passage in script.passages]
    opening = [*encode.prefix, *encode(f"{script.opening}\n\n")]
    num_hay = num_tokens - len(opening) - sum(map(len, passages)) - len(asked.ids)
    num_hay -= len(encode.suffix)
    if num_hay < 0:
        raise ValueError(
            f"{script.name}: passages and questions need {num_tokens - num_hay} tokens"
        )
    paragraphs = _hay(encode, haystack, num_hay, start)
    ids, places = _with_passages(opening, paragraphs, passages)
    questions = tuple(
        Question(
            key=question.key,
            value=question.answer,
            depth=places[question.passage] / num_tokens if places else 0.0,
            answer_from=len(ids) + first,
            answer_to=len(ids) + last,
        )
        for question, (first, last) in zip(script.questions, asked.spans, strict=True)
    )
    return NeedleDocument(
        name=script.name,
        token_ids=(*ids, *asked.ids, *encode.suffix),
        questions=questions,
    )


class PieceEncoder:
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
class _Encoded:
    ids: list[int]
    spans: list[tuple[int, int]]
    """First token of each answer and the token after it, counted in `ids`."""


def _encoded(encode: PieceEncoder, script: Script) -> _Encoded:
    ids = encode(f"{script.asking}\n\n")
    spans = []
    for asked in script.questions:
        question = encode(asked.question)
        answered = encode(f"{asked.question} {asked.answer}")
        whole = encode(f"{asked.question} {asked.answer}{asked.after}")
        if answered[: len(question)] != question or whole[: len(answered)] != answered:
            raise ValueError(f"the tokenizer joins {asked.answer} with the words around it")
        spans.append((len(ids) + len(question), len(ids) + len(answered)))
        ids += whole
    return _Encoded(ids, spans)


def _hay(encode: PieceEncoder, haystack: Text, num_tokens: int, start: int) -> list[list[int]]:
    """Paragraphs of exactly so many tokens; the last one may be cut."""
    taken: list[list[int]] = []
    wanted = num_tokens
    for paragraph in paragraphs_from(haystack, start):
        if not wanted:
            return taken
        taken.append(encode(f"{paragraph}\n\n")[:wanted])
        wanted -= len(taken[-1])
    if wanted:
        raise ValueError(f"haystack {haystack.name} is {wanted} tokens too short")
    return taken


def paragraphs_from(haystack: Text, start: int) -> Iterator[str]:
    """All paragraphs once, beginning at `start` of `NUM_STARTS` places."""
    paragraphs = haystack.content.split("\n\n")
    first = start * len(paragraphs) // NUM_STARTS
    yield from paragraphs[first:]
    yield from paragraphs[:first]


def _with_passages(
    opening: list[int], paragraphs: list[list[int]], passages: list[list[int]]
) -> tuple[list[int], list[int]]:
    """The document up to the questions, and the position of each passage's first token."""
    ids = list(opening)
    places: list[int] = []
    num_hay = sum(map(len, paragraphs))
    num_passed = 0
    for paragraph in [*paragraphs, []]:
        # Passage i comes at the first end of a paragraph past its share of the haystack.
        while len(places) < len(passages) and (
            num_passed * len(passages) >= (len(places) + 0.5) * num_hay or not paragraph
        ):
            places.append(len(ids))
            ids += passages[len(places) - 1]
        ids += paragraph
        num_passed += len(paragraph)
    return ids, places


def _numbers(first: int) -> tuple[str, ...]:
    """From this one up to ten times it, less one."""
    return tuple(map(str, range(first, 10 * first)))


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
        values=_numbers(10_000),
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
        values=_numbers(100_000),
    ),
    NeedleStyle(
        name="dish",
        purpose=Purpose.CALIBRATION,
        opening="A cook wrote down what each guest ordered.",
        asking="What the guests ordered:",
        template="At table {key} somebody ate",
        again="So {tail} got {value}. At table {key} somebody ate {value}.",
        keys=(
            "one Aurelia", "two Dragomir", "three Philippa", "four Tobias", "five Wilhelmina",
            "six Cornelius", "seven Esperanza", "eight Balthazar", "nine Clementine",
            "ten Ferdinand", "eleven Marguerite", "twelve Nikolai",
        ),
        values=(
            "lasagna", "gazpacho", "moussaka", "tiramisu", "ratatouille", "goulash", "paella",
            "bouillabaisse", "risotto", "sauerkraut", "guacamole", "enchiladas", "couscous",
            "minestrone", "carpaccio", "kimchi",
        ),
    ),
    NeedleStyle(
        name="name",
        purpose=Purpose.EVALUATION,
        opening="Important facts are hidden inside this text. Memorize them.",
        asking="Here are all the facts again.",
        template="The {key}",
        again="Remember the name: {tail} {value}. The {key} {value}.",
        keys=(
            "captain of the ship is Kenji", "mayor of the town is Bartholomew",
            "owner of the windmill is Ingrid", "teacher of chemistry is Fatima",
            "winner of the race is Leopold", "author of the letter is Svetlana",
            "keeper of the lighthouse is Mordecai", "king of the island is Guinevere",
            "doctor on duty is Rashid", "leader of the band is Anneliese",
            "builder of the bridge is Thaddeus", "thief of the crown is Priyanka",
        ),
        values=(
            "Fitzgerald", "Hawthorne", "Rodriguez", "Schneider", "Jefferson", "Montgomery",
            "Churchill", "Sullivan", "Mitchell", "Armstrong", "Hernandez", "Campbell", "Schmidt",
            "Wellington", "Cunningham", "Rosenberg",
        ),
    ),
    NeedleStyle(
        name="signal",
        purpose=Purpose.EVALUATION,
        opening="Secret signals are hidden inside this text. Memorize them.",
        asking="Here are all the signals again.",
        template="The signal {key}",
        again="Send {tail} {value} by radio. The signal {key} {value}.",
        keys=(
            "of the eastern station is Osprey", "to open the gate is Mongoose",
            "for a retreat is Ibex", "of the night watch is Tarantula",
            "that ends the exercise is Cheetah", "of the second fleet is Barracuda",
            "in case of fire is Chameleon", "from the mountain hut is Lynx",
            "before the landing is Scorpion", "of the southern convoy is Albatross",
            "to call the engineers is Wombat", "when the storm is over is Nightingale",
        ),
        values=(
            "Diamond", "Copper", "Silver", "Pearl", "Mercury", "Ruby", "Coral", "Granite",
            "Emerald", "Quartz", "Marble", "Limestone", "Platinum", "Titanium", "Turquoise",
            "Graphite",
        ),
    ),
    NeedleStyle(
        name="code",
        purpose=Purpose.EVALUATION,
        opening="Important codes are hidden inside this text. Memorize them.",
        asking="Here are all the codes again.",
        template="The {key}",
        again="Remember it: {tail} {value}. The {key} {value}.",
        keys=(
            "pass key is Vermilion", "phone number is Magenta", "door code is Chartreuse",
            "serial number is Cobalt", "zip code is Lavender", "flight number is Saffron",
            "house number is Burgundy", "lucky number is Ochre", "bus line is Indigo",
            "vault code is Cerulean", "price of the diamond is Ultramarine",
            "weight of the statue is Sepia",
        ),
        values=_numbers(1_000),
    ),
)  # fmt: skip
"""All styles. Values of different styles have different numbers of digits, or are words of one
style alone. Words for evaluation are of one or two tokens, because SmolLM2-135M misspells longer
ones at a distance; they follow a rare word, because that is what it finds best."""
