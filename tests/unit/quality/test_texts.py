"""The texts are long, always the same, and have nothing in common."""

import numpy as np
import pytest

from kvcluster.quality.texts import (
    SHINGLE,
    TEXT_NAMES,
    Purpose,
    Text,
    load_texts,
    shingles,
    without_passages,
)

PANGRAM = "The quick brown fox jumps over the lazy dog while the five boxing wizards look on"


@pytest.fixture(scope="module")
def texts() -> tuple[Text, ...]:
    return load_texts()


def test_there_are_two_texts_to_calibrate_and_at_least_four_to_evaluate(
    texts: tuple[Text, ...],
) -> None:
    purposes = [text.purpose for text in texts]

    assert tuple(text.name for text in texts) == TEXT_NAMES
    assert purposes.count(Purpose.CALIBRATION) == 2
    assert purposes.count(Purpose.EVALUATION) >= 4


def test_every_text_is_long_enough_for_forty_thousand_tokens(texts: tuple[Text, ...]) -> None:
    # Both models of the quality table take under five characters a token of these texts.
    assert min(len(text.content) for text in texts) > 5 * 40_000


def test_texts_are_the_same_each_time(texts: tuple[Text, ...]) -> None:
    assert load_texts() == texts


def test_no_two_texts_share_a_passage(texts: tuple[Text, ...]) -> None:
    earlier = np.empty(0, dtype=np.uint64)
    for text in texts:
        hashes = shingles(text.content)
        places = np.minimum(np.searchsorted(earlier, hashes), max(0, len(earlier) - 1))
        assert not len(earlier) or not (earlier[places] == hashes).any()
        earlier = np.sort(np.concatenate((earlier, hashes)))


def test_there_is_a_hash_for_each_passage_and_equal_passages_have_equal_hashes() -> None:
    hashes = shingles(f"{PANGRAM} {PANGRAM}")

    assert len(hashes) == 2 * len(PANGRAM) + 1 - SHINGLE + 1
    assert hashes[0] == hashes[len(PANGRAM) + 1]
    assert len(set(hashes.tolist())) == len(PANGRAM) + 1


def test_a_text_without_passages_loses_the_lines_that_it_shares_and_no_others() -> None:
    taken = np.sort(shingles(PANGRAM))

    left = without_passages(f"first\n{PANGRAM}.\nlast\n", taken)

    assert left == "first\nlast\n"


def test_a_text_shorter_than_a_passage_shares_none() -> None:
    assert without_passages("short", np.sort(shingles(PANGRAM))) == "short"


def test_digests_tell_texts_apart(texts: tuple[Text, ...]) -> None:
    assert len({text.digest for text in texts}) == len(texts)
