"""Prompts are cut into parts that join to the same prompt."""

from array import array
from collections.abc import AsyncIterator, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcluster.errors import InvalidField
from kvcluster.router.convert import PromptPart
from kvcluster.router.prompt import Prompt, PromptIds, num_tokens_in, parts_of, whole


async def cut(
    prompt: Prompt | None = None, prompt_ids: PromptIds | None = None, part_bytes: int = 16
) -> list[PromptPart]:
    return [part async for part in parts_of(prompt, prompt_ids, part_bytes=part_bytes)]


@given(st.text(max_size=200), st.integers(4, 40))
async def test_parts_of_text_follow_each_other_and_are_small_and_whole(
    text: str, part_bytes: int
) -> None:
    parts = await cut(text, part_bytes=part_bytes)

    assert "".join(part.chunk.text for part in parts) == text
    assert [part.chunk.offset for part in parts] == [0, *(part.end for part in parts)][:-1]
    assert all(0 < len(part.raw) <= part_bytes for part in parts)


@given(st.lists(st.integers(0, 2**32 - 1), max_size=100), st.integers(4, 40))
async def test_parts_of_ids_follow_each_other_and_are_small_and_whole(
    ids: list[int], part_bytes: int
) -> None:
    parts = await cut(prompt_ids=ids, part_bytes=part_bytes)

    assert b"".join(part.raw for part in parts) == array("I", ids).tobytes()
    assert [part.chunk.offset for part in parts] == [0, *(part.end for part in parts)][:-1]
    assert all(0 < len(part.raw) <= part_bytes for part in parts)


async def test_all_forms_of_ids_are_the_same() -> None:
    ids = list(range(20))
    packed = array("I", ids).tobytes()

    async def streamed() -> AsyncIterator[bytes]:
        yield packed[:12]
        yield packed[12:]

    def pieces() -> Iterator[list[int]]:
        yield ids[:1]
        yield ids[1:]

    forms = [ids, tuple(ids), array("Q", ids), packed, bytearray(packed), streamed(), pieces()]

    joined = [b"".join(part.raw for part in await cut(prompt_ids=form)) for form in forms]

    assert joined == [packed] * len(forms)


async def test_a_prompt_is_taken_no_faster_than_its_parts_are() -> None:
    taken = []

    def pieces() -> Iterator[str]:
        for number in range(3):
            taken.append(number)
            yield str(number)

    parts = parts_of(pieces(), None)
    await anext(parts)

    assert taken == [0]


@pytest.mark.parametrize(("prompt", "ids"), [(None, None), ("a", [1])])
async def test_exactly_one_prompt_must_be_given(prompt: str | None, ids: list[int] | None) -> None:
    with pytest.raises(InvalidField, match="either"):
        await cut(prompt, ids)


async def test_text_that_is_no_unicode_is_refused_before_it_is_sent() -> None:
    with pytest.raises(InvalidField, match="UTF-8"):
        await cut("\ud800")


def test_the_length_is_known_unless_the_ids_are_still_coming() -> None:
    assert num_tokens_in([1, 2, 3]) == 3
    assert num_tokens_in(bytes(8)) == 2
    assert num_tokens_in(memoryview(array("I", [1, 2, 3]))) == 3
    assert num_tokens_in(iter([b""])) is None
    assert num_tokens_in(None) is None


def test_a_whole_prompt_is_one_part() -> None:
    assert whole("abc", None).raw == b"abc"
    assert whole(None, [1]).raw == b"\x01\0\0\0"
