"""Cuts are taken only where this very tokenizer cannot reach across."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram, WordLevel

from kvcluster.model.cuts import ALL_CUTS, Cut, SafeCuts, kind_at, safe_cuts

CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NO_NEWLINE_RUNS = frozenset({Cut.WORD, Cut.LETTER_LINE, Cut.SYMBOL_LINE})

CHARACTERS = "abXY09 \n\t\r.,!'-_<|>\u2581\u00e9\u5b57\u3002\u00a0\u00bd\u2028\u001c\u0301\ufdfa"
RUNS = ("\n\n", "  ", "\r\n", " \n", "\n ", "! \n", "'s", "ab", " ab", "<s>", "\U0001f642")
TEXTS = st.lists(st.sampled_from([*CHARACTERS, *RUNS]), max_size=24).map("".join)


def bpe(merges: Sequence[tuple[str, str]] = (), **options: object) -> Tokenizer:
    """Byte fallback for everything but the characters of TEXTS that merges use."""
    alphabet = [*"abXY09 \n\t\r.,!'-_<|>\u2581\u0120\u010a\u00e9\u5b57\u3002"]
    tokens = [f"<0x{byte:02X}>" for byte in range(256)] + alphabet + [a + b for a, b in merges]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return Tokenizer(BPE(vocab, list(merges), byte_fallback=True, **options))


def byte_level(pattern: str | None = None) -> Tokenizer:
    vocab = {
        token: index for index, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    merges = [
        ("a", "b"),
        ("\u0120", "a"),
        ("\u010a", "\u010a"),
        (".", "\u010a"),
        ("\u0120", "\u010a"),
    ]
    for a, b in merges:
        vocab[a + b] = len(vocab)
    tokenizer = Tokenizer(BPE(vocab, merges))
    if pattern is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    return tokenizer


def llama_legacy() -> Tokenizer:
    """A space before every text, spaces as ▁, no pre-tokenizer."""
    tokenizer = bpe([("a", "b"), ("\u2581", "a"), ("\u2581", "\u2581"), ("\u2581a", "b")])
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    return tokenizer


def gemma() -> Tokenizer:
    tokenizer = bpe([("a", "b"), ("\u2581", "a"), ("\n", "\n"), (".", "."), ("X", "Y")])
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.add_special_tokens([AddedToken("<s>", normalized=False)])
    return tokenizer


def unigram(prepend_scheme: str) -> Tokenizer:
    scores = {"\u2581": -2.0, "a": -3.0, "b": -3.0, "ab": -2.5, "\u2581a": -2.4, "b\u2581": -1.0}
    characters = [*"XY09\n.,!'-_<|>"]
    tokenizer = Tokenizer(
        Unigram([("<unk>", 0.0), *scores.items(), *((c, -4.0) for c in characters)], unk_id=0)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    return tokenizer


SPLIT_BY_DIGITS = byte_level()
SPLIT_BY_DIGITS.pre_tokenizer = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
)
COMPOSED = byte_level(CL100K)
COMPOSED.normalizer = normalizers.NFKC()

TOKENIZERS = {
    "gpt2": (byte_level(), NO_NEWLINE_RUNS),
    "digits": (SPLIT_BY_DIGITS, NO_NEWLINE_RUNS),
    "cl100k": (byte_level(CL100K), ALL_CUTS - {Cut.SYMBOL_LINE}),
    "nfkc": (COMPOSED, frozenset({Cut.WORD, Cut.LETTER_LINE})),
    "gemma": (gemma(), ALL_CUTS),
    "llama_legacy": (llama_legacy(), frozenset({Cut.WORD})),
    "unigram_first": (unigram("first"), frozenset({Cut.WORD})),
    "unigram_never": (unigram("never"), frozenset({Cut.WORD})),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_kinds_found_for_known_tokenizers(name: str) -> None:
    tokenizer, kinds = TOKENIZERS[name]

    assert safe_cuts(tokenizer).kinds == kinds


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=200, deadline=None)
@given(left=TEXTS, right=TEXTS)
def test_both_sides_of_every_safe_cut_encode_as_the_whole(name: str, left: str, right: str) -> None:
    tokenizer, _ = TOKENIZERS[name]
    cuts = safe_cuts(tokenizer)
    text = left + right

    for place in range(1, len(text)):
        if kind_at(text, place) in cuts.kinds:
            first = tokenizer.encode(text[:place], add_special_tokens=False).ids
            second = tokenizer.encode(
                text[place + cuts.drops_space :], add_special_tokens=False
            ).ids
            assert first + second == tokenizer.encode(text, add_special_tokens=False).ids


def with_added(*tokens: AddedToken) -> Tokenizer:
    tokenizer = byte_level(CL100K)
    tokenizer.add_tokens(list(tokens))
    return tokenizer


def with_normalizer(normalizer: normalizers.Normalizer) -> Tokenizer:
    tokenizer = byte_level(CL100K)
    tokenizer.normalizer = normalizer
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer",
    [
        with_added(AddedToken("x", single_word=True)),
        with_normalizer(normalizers.Strip()),
        with_normalizer(normalizers.Replace(Regex(" {2,}"), " ")),
        byte_level(r"\w+(?= b)|\s+|."),
        byte_level(r"\p{L}+ ?|\s+"),
        bpe(ignore_merges=True),
        bpe(end_of_word_suffix="</w>"),
        Tokenizer(WordLevel({"a": 0}, unk_token="a")),
    ],
    ids=[
        "added token that looks at its neighbours",
        "normaliser that strips",
        "normaliser that joins",
        "unknown look-ahead",
        "unknown alternative",
        "whole text looked up",
        "suffix at the end",
        "no merges known",
    ],
)
def test_what_is_not_understood_is_never_cut(tokenizer: Tokenizer) -> None:
    assert safe_cuts(tokenizer).kinds == frozenset()


@pytest.mark.parametrize(
    ("token", "lost"),
    [
        (AddedToken("a b"), {Cut.WORD}),
        (AddedToken("end\n"), {Cut.LETTER_LINE}),
        (AddedToken("\nuser"), {Cut.LINE_START}),
        (AddedToken("user", lstrip=True), {Cut.LINE_START}),
        (AddedToken("end", rstrip=True), {Cut.WORD, Cut.LETTER_LINE}),
        (AddedToken("<|end|>", lstrip=True, rstrip=True), set()),
    ],
    ids=lambda value: value.content.strip() if isinstance(value, AddedToken) else "",
)
def test_an_added_token_that_reaches_across_takes_a_kind_away(
    token: AddedToken, lost: set[Cut]
) -> None:
    found = safe_cuts(with_added(token)).kinds

    assert found == ALL_CUTS - {Cut.SYMBOL_LINE} - lost


def test_a_merge_across_a_cut_takes_its_kind_away() -> None:
    tokenizer = bpe([("a", "\u2581"), ("a", "b")])
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")

    assert safe_cuts(tokenizer).kinds == ALL_CUTS - {Cut.WORD}


def test_the_last_cut_is_found_from_any_start() -> None:
    cuts = SafeCuts(kinds=frozenset({Cut.WORD}))
    text = "ab cd ef  gh"

    assert [cuts.last(text, start) for start in (0, 2, 3, 6)] == [5, 5, 5, None]


def test_a_cut_far_from_the_end_is_found() -> None:
    text = "ab cd" + "." * 10_000

    assert SafeCuts(kinds=ALL_CUTS).last(text, 0) == 2


def test_a_space_at_the_very_end_is_no_cut_yet() -> None:
    assert SafeCuts(kinds=ALL_CUTS).last("ab ", 0) is None


def test_decoders_are_not_looked_at() -> None:
    tokenizer = byte_level()
    tokenizer.decoder = decoders.ByteLevel()

    assert safe_cuts(tokenizer).kinds == NO_NEWLINE_RUNS
