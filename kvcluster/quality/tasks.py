"""Synthetic tasks for long contexts, after RULER (Hsieh et al. 2024, arXiv 2404.06654).

Each task makes a document from a seed, of the same kind as a document with needles: all questions
stand at its end with their right answers, and one forward pass scores them token by token. So
answers have an order here, and where RULER asks for a set of words, the questions fix which comes
first: by place in the text, or by how often a word occurs. A question is found or not; a list of
five words is five questions.

Small base models fail some of these tasks with the exact cache, so a score means something only
beside the exact one.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final

from kvcluster.model.tokenizer import TextTokenizer
from kvcluster.quality.needles import (
    NUM_STARTS,
    Asked,
    NeedleDocument,
    PieceEncoder,
    Script,
    document_name,
    paragraphs_from,
    placed_document,
    scripted_document,
)
from kvcluster.quality.texts import Purpose, Text

Task = Callable[[TextTokenizer, Text, int, int], NeedleDocument]
"""Makes a document of exactly `num_tokens` from (tokenizer, haystack, num_tokens, seed). Equal
arguments give equal documents. Raises: ValueError for a haystack that is not for evaluation or too
short, and for too few tokens."""

_LIST_GOES_ON: Final = ","
_LIST_ENDS: Final = ".\n\n"


def multi_key(
    tokenizer: TextTokenizer, haystack: Text, num_tokens: int, seed: int
) -> NeedleDocument:
    """Many pairs of words, four of which are asked for: the others distract."""
    choice = _choice("multi-key", haystack, seed)
    pairs = _pairs(choice, 20)
    asked = choice.sample(range(len(pairs)), 4)
    script = _script(
        "multi-key",
        (haystack, num_tokens, seed),
        opening=_PAIRS_OPENING,
        passages=_pair_passages(pairs),
        asking="Here are some of the magic pairs again.",
        questions=[
            Asked(
                key=pairs[pair][0],
                question=_pair_sentence(pairs[pair][0]),
                answer=pairs[pair][1],
                passage=pair,
            )
            for pair in asked
        ],
    )
    return placed_document(tokenizer, script, haystack, num_tokens, choice)


def multi_value(
    tokenizer: TextTokenizer, haystack: Text, num_tokens: int, seed: int
) -> NeedleDocument:
    """Two words with four partners each; all partners are asked for, in the order of the text."""
    choice = _choice("multi-value", haystack, seed)
    keys = choice.sample(_FIRST_WORDS, 2)
    partners = choice.sample(_SECOND_WORDS, 8)
    order = choice.sample([*keys] * 4, 8)
    pairs = list(zip(order, partners, strict=True))
    questions = [
        question
        for key in choice.sample(keys, 2)
        for question in _list(
            f"In the order of the text: {_pair_sentence(key)}",
            [(place, second) for place, (first, second) in enumerate(pairs) if first == key],
            key=key,
        )
    ]
    script = _script(
        "multi-value",
        (haystack, num_tokens, seed),
        opening=_PAIRS_OPENING,
        passages=_pair_passages(pairs),
        asking="Here are the magic pairs again.",
        questions=questions,
    )
    return placed_document(tokenizer, script, haystack, num_tokens, choice)


def multi_query(
    tokenizer: TextTokenizer, haystack: Text, num_tokens: int, seed: int
) -> NeedleDocument:
    """Eight pairs of words, all of which are asked for in one sentence."""
    choice = _choice("multi-query", haystack, seed)
    pairs = _pairs(choice, 8)
    order = choice.sample(range(len(pairs)), len(pairs))
    questions = [
        Asked(
            key=pairs[pair][0],
            question=pairs[pair][0] if place == 0 else f" {pairs[pair][0]}",
            answer=pairs[pair][1],
            after=_LIST_ENDS if place == len(pairs) - 1 else _LIST_GOES_ON,
            passage=pair,
        )
        for place, pair in enumerate(order)
    ]
    script = _script(
        "multi-query",
        (haystack, num_tokens, seed),
        opening=_PAIRS_OPENING,
        passages=_pair_passages(pairs),
        asking="Here are all the magic pairs again, in another order:",
        questions=questions,
    )
    return placed_document(tokenizer, script, haystack, num_tokens, choice)


def variable_tracking(
    tokenizer: TextTokenizer, haystack: Text, num_tokens: int, seed: int
) -> NeedleDocument:
    """Two chains of assignments, X1 = 12345 and then X2 = X1 and so on, whose links are spread over
    the text; the variables of each chain are asked for by their value."""
    choice = _choice("variable-tracking", haystack, seed)
    names = choice.sample([a + b + c for a in _LETTERS for b in _LETTERS for c in _LETTERS], 10)
    values = choice.sample(range(10_000, 100_000), 2)
    chains = [names[:5], names[5:]]
    lines: list[tuple[str, str]] = []
    waiting = [
        list(_assignments(chain, value)) for chain, value in zip(chains, values, strict=True)
    ]
    while any(waiting):
        chain = choice.choice([links for links in waiting if links])
        lines.append(chain.pop(0))
    places = {name: place for place, (name, _) in enumerate(lines)}
    questions = [
        question
        for chain, value in zip(chains, values, strict=True)
        for question in _list(
            f"All variables with the value {value} are VAR",
            [(places[name], name) for name in chain],
            key=str(value),
            joined_by=" VAR",
        )
    ]
    script = _script(
        "variable-tracking",
        (haystack, num_tokens, seed),
        opening="Track the chains of variable assignments that are hidden in this text.",
        passages=[line for _, line in lines],
        asking="These are the variables again, each chain from its start.",
        questions=questions,
    )
    return placed_document(tokenizer, script, haystack, num_tokens, choice)


def common_words(
    tokenizer: TextTokenizer, haystack: Text, num_tokens: int, seed: int
) -> NeedleDocument:
    """A list of words, of which five are far more common than the others. The haystack is not
    used, only checked."""
    choice = _choice("common-words", haystack, seed)
    words = choice.sample((*_FIRST_WORDS, *_SECOND_WORDS), 40)
    # Of 150 words the common ones are 40, 30, 20, 15 and 10, and the others one each.
    weights = [40, 30, 20, 15, 10, *[1] * 35]
    return _counted("common-words", tokenizer, haystack, (num_tokens, seed), choice, words, weights)


def frequent_words(
    tokenizer: TextTokenizer, haystack: Text, num_tokens: int, seed: int
) -> NeedleDocument:
    """Made-up words whose frequencies fall with the square of their rank. The haystack is not
    used, only checked."""
    choice = _choice("frequent-words", haystack, seed)
    words = ["".join(choice.sample(_LETTERS.lower(), 6)) for _ in range(30)]
    weights = [max(1, 90 // rank**2) for rank in range(1, 31)]
    name = "frequent-words"
    return _counted(name, tokenizer, haystack, (num_tokens, seed), choice, words, weights)


def quoted_facts(
    tokenizer: TextTokenizer, haystack: Text, num_tokens: int, seed: int
) -> NeedleDocument:
    """Questions about the real text: sentences of it are quoted up to a word that occurs in the
    text just once, which is the answer."""
    choice = _choice("quoted-facts", haystack, seed)
    start = choice.randrange(NUM_STARTS)
    encode = PieceEncoder(tokenizer)
    quotes = _quotes(encode, haystack, start, num_tokens)
    share = len(quotes) // _NUM_QUOTES
    if not share:
        raise ValueError(f"{num_tokens} tokens of {haystack.name} have too few sentences to quote")
    taken = [choice.choice(quotes[n * share : (n + 1) * share]) for n in range(_NUM_QUOTES)]
    script = _script(
        "quoted-facts",
        (haystack, num_tokens, seed),
        opening="Read this text. Questions about it follow.",
        passages=[],
        asking="What does the text above say? It says:",
        questions=[
            Asked(key=answer, question=question, answer=answer, after=_LIST_ENDS)
            for _, question, answer in choice.sample(taken, _NUM_QUOTES)
        ],
    )
    document = scripted_document(tokenizer, script, haystack, num_tokens=num_tokens, start=start)
    opening = [*encode.prefix, *encode(f"{script.opening}\n\n")]
    depths = {answer: (len(opening) + place) / num_tokens for place, _, answer in taken}
    return replace(
        document,
        questions=tuple(replace(asked, depth=depths[asked.value]) for asked in document.questions),
    )


TASKS: Final[Mapping[str, Task]] = {
    "multi-key": multi_key,
    "multi-value": multi_value,
    "multi-query": multi_query,
    "variable-tracking": variable_tracking,
    "common-words": common_words,
    "frequent-words": frequent_words,
    "quoted-facts": quoted_facts,
}
"""All tasks, by the name with which the names of their documents begin."""

_LETTERS: Final = "BCDFGHJKLMNPQRSTVWXZ"
_PAIRS_OPENING: Final = "Magic pairs of words are hidden inside this text. Memorize them."
_NUM_QUOTES: Final = 6
_QUOTED_CHARACTERS: Final = 1_200
"""More than all quotes and what stands around them have. So much of the text's end is not quoted,
for the questions take its place."""
_SENTENCE: Final = re.compile(r"[A-Z][^.!?]{60,140}[.!?](?!\S)")
_RARE: Final = re.compile(r"(?<=[a-z,] )[a-z]{6,14}\b")
"""After a space, which comes with the answer."""
_WORD: Final = re.compile(r"\w+")


def _choice(task: str, haystack: Text, seed: int) -> random.Random:
    if haystack.purpose is not Purpose.EVALUATION:
        raise ValueError(f"task {task} is not for {haystack.purpose} texts")
    return random.Random(f"{task}:{seed}")


def _script(
    task: str,
    made_from: tuple[Text, int, int],
    *,
    opening: str,
    passages: Sequence[str],
    asking: str,
    questions: Sequence[Asked],
) -> Script:
    haystack, num_tokens, seed = made_from
    return Script(
        name=document_name(task, haystack, num_tokens, seed),
        opening=opening,
        passages=tuple(passages),
        asking=asking,
        questions=tuple(questions),
    )


def _pairs(choice: random.Random, number: int) -> list[tuple[str, str]]:
    firsts, seconds = choice.sample(_FIRST_WORDS, number), choice.sample(_SECOND_WORDS, number)
    return list(zip(firsts, seconds, strict=True))


def _pair_passages(pairs: Sequence[tuple[str, str]]) -> list[str]:
    return [f"{_pair_sentence(first)} {second}." for first, second in pairs]


def _pair_sentence(first: str) -> str:
    return f"A magic pair is {first}"


def _list(
    question: str, answers: Sequence[tuple[int, str]], *, key: str, joined_by: str = ""
) -> Iterator[Asked]:
    """One question for each answer of a list: (passage, answer)."""
    for place, (passage, answer) in enumerate(answers):
        yield Asked(
            key=key,
            question=question if place == 0 else joined_by,
            answer=answer,
            after=_LIST_ENDS if place == len(answers) - 1 else _LIST_GOES_ON,
            passage=passage,
        )


def _assignments(chain: Sequence[str], value: int) -> Iterator[tuple[str, str]]:
    """(variable, line) of each link."""
    assigned = str(value)
    for name in chain:
        yield name, f"VAR {name} = {assigned}"
        assigned = f"VAR {name}"


def _counted(
    task: str,
    tokenizer: TextTokenizer,
    haystack: Text,
    size: tuple[int, int],
    choice: random.Random,
    words: Sequence[str],
    weights: Sequence[int],
) -> NeedleDocument:
    """A document of words drawn by weight; the first five are asked for, the commonest first."""
    num_tokens, seed = size
    block = [word for word, weight in zip(words, weights, strict=True) for _ in range(weight)]
    # A token is at least a character, and a word more than one.
    shuffled = [
        " ".join(choice.sample(block, len(block))) for _ in range(num_tokens // len(block) + 1)
    ]
    text = replace(haystack, content="\n\n".join(shuffled))
    script = _script(
        task,
        (haystack, num_tokens, seed),
        opening="Count how often each word occurs in this list.",
        passages=[],
        asking="These words occur most often, the most frequent word first.",
        questions=list(_list("They are", [(0, word) for word in words[:5]], key=task)),
    )
    return scripted_document(tokenizer, script, text, num_tokens=num_tokens, start=0)


def _quotes(
    encode: PieceEncoder, haystack: Text, start: int, num_tokens: int
) -> list[tuple[int, str, str]]:
    """(token where it stands, sentence up to the answer, answer), in order."""
    last_quoted = num_tokens - len(encode(haystack.content[:_QUOTED_CHARACTERS]))
    place = 0
    paragraphs: list[tuple[int, str]] = []
    counts: Counter[str] = Counter()
    for paragraph in paragraphs_from(haystack, start):
        if place >= num_tokens:
            break
        counts.update(_WORD.findall(paragraph))
        paragraphs.append((place, paragraph))
        place += len(encode(f"{paragraph}\n\n"))
    quotes = []
    # The last paragraph may be cut.
    for place, paragraph in paragraphs[:-1]:
        for sentence in _SENTENCE.finditer(paragraph):
            rare = [word for word in _RARE.finditer(sentence[0]) if counts[word[0]] == 1]
            at = place + len(encode(paragraph[: sentence.start()]))
            if rare and at < last_quoted:
                quotes.append((at, sentence[0][: rare[-1].start() - 1], rare[-1][0]))
    return quotes


_FIRST_WORDS: Final = (
    "Zanzibar", "Quixote", "Ptolemy", "Yggdrasil", "Xanadu", "Beowulf", "Minotaur", "Kraken",
    "Valkyrie", "Gargoyle", "Basilisk", "Centaur", "Phoenix", "Griffin", "Banshee", "Cyclops",
    "Leviathan", "Pegasus", "Chimera", "Sphinx", "Golem", "Kelpie", "Manticore", "Wyvern",
)  # fmt: skip
_SECOND_WORDS: Final = (
    "trombone", "bassoon", "mandolin", "accordion", "clarinet", "didgeridoo", "glockenspiel",
    "ukulele", "xylophone", "piccolo", "dulcimer", "harmonica", "oboe", "saxophone", "marimba",
    "bagpipe", "zither", "cello", "timpani", "balalaika", "theremin", "vuvuzela", "lyre", "gong",
)  # fmt: skip
