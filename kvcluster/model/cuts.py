"""Where a text can be cut so that encoding the two sides apart gives the ids of the whole.

A cut is safe when nothing that a tokenizer does can reach across it: no added token, no
normaliser rule, no match or look-ahead of the pre-tokenizer, no merge. `safe_cuts` proves this
for kinds of places from the tokenizer's own parts; what it does not recognise counts as unsafe.
"""

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import Any, Final

from tokenizers import AddedToken, Tokenizer


class Cut(Enum):
    """A kind of place. Letters are Unicode category L, symbols are P and S."""

    WORD = "letter | space letter"
    LETTER_LINE = "letter | newline"
    SYMBOL_LINE = "symbol | newline"
    LINE_START = "newline | letter"


ALL_CUTS: Final = frozenset(Cut)


@dataclass(frozen=True, kw_only=True, slots=True)
class SafeCuts:
    """The kinds of cut that are exact for one tokenizer."""

    kinds: frozenset[Cut]
    drops_space: bool = False
    """The tokenizer puts a space before every text: the one after a WORD cut must be left out."""

    def last(self, text: str, start: int) -> int | None:
        """The last safe place in `text` at or after `start`, at least 1; None: there is none.

        A place needs one character on its left and up to two on its right to be recognised.
        """
        end = len(text)
        while end > start:
            begin = max(start, end - _WINDOW_CHARACTERS)
            places = [match.start() for match in _CANDIDATE.finditer(text, begin, end)]
            for place in reversed(places):
                if place and kind_at(text, place) in self.kinds:
                    return place
            end = begin
        return None


NO_CUTS: Final = SafeCuts(kinds=frozenset())

_WINDOW_CHARACTERS: Final = 4096
_CANDIDATE: Final = re.compile(r" |\n|(?<=\n)[^\s]")


def kind_at(text: str, place: int) -> Cut | None:
    """The kind of the cut between text[place - 1] and text[place]."""
    left, right = text[place - 1], text[place]
    if right == "\n":
        if left.isalpha():
            return Cut.LETTER_LINE
        return Cut.SYMBOL_LINE if unicodedata.category(left)[0] in "PS" else None
    if right == " " and left.isalpha() and text[place + 1 : place + 2].isalpha():
        return Cut.WORD
    return Cut.LINE_START if left == "\n" and right.isalpha() else None


def safe_cuts(tokenizer: Tokenizer) -> SafeCuts:
    """The cuts that are proven exact for this tokenizer, perhaps none."""
    normal = _normalizer_rules(_stages(tokenizer.normalizer, "normalizers"))
    added = list(tokenizer.get_added_tokens_decoder().values())
    kinds = normal.kinds & _kinds_of_added_tokens(added, normal)
    reach = _pre_tokenizer_reach(_stages(tokenizer.pre_tokenizer, "pretokenizers"), normal)
    kinds &= reach.independent
    unsplit = kinds - reach.split
    kinds -= unsplit - _kinds_of_merges(tokenizer, unsplit, normal.space)
    return SafeCuts(kinds=kinds, drops_space=normal.has_prefix)


@dataclass(frozen=True, slots=True)
class _Normalization:
    """What the normaliser does at a cut."""

    kinds: frozenset[Cut]
    space: str = " "
    has_prefix: bool = False


@dataclass(frozen=True, slots=True)
class _Reach:
    """What the pre-tokenizer does at a cut."""

    independent: frozenset[Cut]
    """Both sides are split alike with and without the other side."""
    split: frozenset[Cut]
    """The cut is between two pre-tokens."""
    space: str


def _stages(part: Any, children: str) -> list[dict[str, Any]]:
    """The rules of a normaliser or pre-tokenizer, sequences flattened."""
    if part is None:
        return []
    return list(_flattened(json.loads(part.__getstate__()), children))


def _flattened(stage: dict[str, Any], children: str) -> Iterable[dict[str, Any]]:
    if stage["type"] != "Sequence":
        yield stage
        return
    for child in stage[children]:
        yield from _flattened(child, children)


def _normalizer_rules(stages: Sequence[dict[str, Any]]) -> _Normalization:
    kinds, space, prefix = ALL_CUTS, " ", ""
    for stage in stages:
        match stage:
            case {"type": "NFC" | "NFD" | "Lowercase" | "StripAccents"}:
                pass
            case {"type": "NFKC" | "NFKD"}:
                # Some letters become a space and a mark: that would lengthen the line's end.
                kinds -= {Cut.LINE_START}
            case {"type": "Replace", "pattern": {"String": " "}, "content": str(content)}:
                space = content
            case {"type": "Prepend", "prepend": str(content)}:
                prefix = content
            case _:
                return _Normalization(frozenset())
    if prefix:
        # "▁" before each text and "▁" for a space: a text without its first space has the same
        # normal form as the same text inside a longer one.
        kinds = kinds & {Cut.WORD} if prefix == space else frozenset()
        return _Normalization(kinds, space, has_prefix=True)
    return _Normalization(kinds, space)


def _kinds_of_added_tokens(tokens: Iterable[AddedToken], normal: _Normalization) -> frozenset[Cut]:
    broken: set[Cut] = set()
    for token in tokens:
        content = token.content
        if token.single_word:
            return frozenset()
        starts, ends = content[:1].isalpha(), content[-1:].isalpha()
        if normal.has_prefix and (starts or ends or content[:1].isspace()):
            return frozenset()
        if token.lstrip and starts:
            broken.add(Cut.LINE_START)
        if token.lstrip and content[:1].isspace():
            return frozenset()
        if token.rstrip:
            broken |= {Cut.WORD, Cut.LETTER_LINE} if ends else {Cut.SYMBOL_LINE}
        broken |= _kinds_inside(content, " ") | _kinds_inside(content, normal.space)
    return ALL_CUTS - broken


def _kinds_inside(content: str, space: str) -> set[Cut]:
    """Kinds of cut that could lie within this text. Of WORD only its first two characters count,
    since a token may end there."""
    found: set[Cut] = set()
    for left, right in pairwise(content):
        if right == "\n" and not left.isspace():
            found |= {Cut.LETTER_LINE} if left.isalpha() else {Cut.SYMBOL_LINE}
        if right == space[0] and left.isalpha():
            found.add(Cut.WORD)
        if left == "\n" and right.isalpha():
            found.add(Cut.LINE_START)
    return found


# Alternatives of the regular expressions that tokenizers split by. None of them can match a
# letter and the space after it, or a newline and the letter after it; those in the two small sets
# below reach across other cuts. Sources: GPT-2, cl100k, o200k, Llama 3, Qwen, Tekken, DeepSeek.
_MARKED_UPPER: Final = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_MARKED_LOWER: Final = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SUFFIX: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_KNOWN_ALTERNATIVES: Final = frozenset(
    {
        *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", _SUFFIX),
        *(r" ?\p{L}+", r"\p{L}+", r"[^\r\n\p{L}\p{N}]?\p{L}+"),
        r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+",
        *(
            rf"[^\r\n\p{{L}}\p{{N}}]?{_MARKED_UPPER}{a}{_MARKED_LOWER}{b}{suffix}"
            for a, b in (("*", "+"), ("+", "*"))
            for suffix in ("", _SUFFIX + "?")
        ),
        *(r" ?\p{N}+", r"\p{N}", r"\p{N}+", r"\p{N}{1,3}"),
        *(r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"),
        r" ?[\p{P}\p{S}]+[\r\n]*",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        *(r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"),
    }
)
_REACHES_NEWLINES: Final = re.compile(r"\[\\r\\n/?\]\*$")
_GPT2_PATTERN: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _pre_tokenizer_reach(stages: Sequence[dict[str, Any]], normal: _Normalization) -> _Reach:
    reach = _Reach(normal.kinds, frozenset(), normal.space)
    for stage in stages:
        step = _stage_reach(stage, reach.space)
        # Once a cut is between two pieces, later stages see each side by itself.
        reach = _Reach(
            reach.independent & (step.independent | reach.split),
            reach.split | (step.split & reach.independent),
            step.space,
        )
    return reach


def _stage_reach(stage: dict[str, Any], space: str) -> _Reach:
    nothing: frozenset[Cut] = frozenset()
    match stage:
        case {"type": "Digits" | "Punctuation"}:
            return _Reach(ALL_CUTS, nothing, space)
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}:
            return _pattern_reach(_GPT2_PATTERN if use_regex else "", space)
        case {"type": "Split", "pattern": {"String": " "}} if space != " ":
            return _Reach(ALL_CUTS, nothing, space)
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"} if (
            not stage["invert"] and space == " "
        ):
            return _pattern_reach(pattern, space)
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Removed"} if (
            stage["invert"] and space == " "
        ):
            return _pattern_reach(pattern, space)
        case {"type": "Metaspace", "replacement": mark} if stage.get("split", True):
            kinds = ALL_CUTS if stage.get("prepend_scheme") == "never" else {Cut.WORD}
            return _Reach(frozenset(kinds), frozenset({Cut.WORD}), mark)
        case {"type": "Metaspace", "replacement": mark, "prepend_scheme": "never"}:
            return _Reach(ALL_CUTS, nothing, mark)
        case {"type": "Metaspace", "replacement": mark}:
            return _Reach(frozenset({Cut.WORD}), nothing, mark)
    return _Reach(nothing, nothing, space)


def _pattern_reach(pattern: str, space: str) -> _Reach:
    alternatives = _alternatives(pattern)
    if any(alternative not in _KNOWN_ALTERNATIVES for alternative in alternatives):
        return _Reach(frozenset(), frozenset(), space)
    broken: set[Cut] = set()
    if any(_REACHES_NEWLINES.search(alternative) for alternative in alternatives):
        broken.add(Cut.SYMBOL_LINE)
    for alternative in alternatives:
        if alternative == r"\s*[\r\n]+":
            break
        if alternative == r"\s+(?!\S)":
            # It leaves the last blank of a line's end to the next match, but only where a
            # letter follows: it must see that letter.
            broken.add(Cut.LINE_START)
    kinds = ALL_CUTS - broken
    return _Reach(kinds, kinds if r"\s+" in alternatives else frozenset(), space)


def _alternatives(pattern: str) -> list[str]:
    """Split a regular expression at the bars that are outside of groups and classes."""
    parts, depth, in_class, start = [], 0, False, 0
    escaped = False
    for index, character in enumerate(pattern):
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        elif in_class:
            in_class = character != "]"
        elif character == "[":
            in_class = True
        elif character in "()":
            depth += 1 if character == "(" else -1
        elif character == "|" and depth == 0:
            parts.append(pattern[start:index])
            start = index + 1
    return [*parts, pattern[start:]] if pattern else []


def _kinds_of_merges(tokenizer: Tokenizer, kinds: frozenset[Cut], space: str) -> frozenset[Cut]:
    """Of the cuts inside a pre-token, those that no merge can cross: no token has the two
    characters side by side, so the merges of the two sides never meet."""
    model = tokenizer.model
    if not kinds or type(model).__name__ != "BPE":
        return frozenset()
    if model.dropout or model.ignore_merges:
        return frozenset()
    if model.continuing_subword_prefix or model.end_of_word_suffix:
        return frozenset()
    crossed: set[Cut] = set()
    for token in tokenizer.get_vocab(with_added_tokens=False):
        if "\n" in token or space in token[1:]:
            crossed |= _kinds_inside(token, space)
    return kinds - crossed
