import hashlib
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcluster.engine import upload as uploads
from kvcluster.engine.api import TextChunk, TokenChunk
from kvcluster.engine.upload import ContentDigest, PromptUpload, check_vocabulary, raw_chunk
from kvcluster.errors import InvalidField, RequestIdConflict
from tests.fake_engine import CharacterTokenizer, packed, request


def digest(pieces: list[bytes], stride_bytes: int) -> list[bytes]:
    made = ContentDigest(stride_bytes=stride_bytes)
    for piece in pieces:
        made.update(piece)
    made.finish()
    return made.strides


def uploaded(text: str) -> PromptUpload:
    made = PromptUpload(request(request_id="r"))
    made.add(raw_chunk(TextChunk(0, text)))
    made.is_complete = True
    made.finish()
    return made


def test_offsets_count_utf8_bytes_of_text_and_tokens_of_ids() -> None:
    assert raw_chunk(TextChunk(3, "né")).end == 6
    assert raw_chunk(TokenChunk(3, packed([1, 2]))).end == 5


def test_text_without_a_utf8_form_is_refused() -> None:
    with pytest.raises(InvalidField, match="surrogate"):
        raw_chunk(TextChunk(0, "\ud800"))


def test_ids_that_are_not_whole_are_refused() -> None:
    with pytest.raises(InvalidField, match="4 bytes a token"):
        raw_chunk(TokenChunk(0, bytes(7)))


def test_an_id_outside_the_vocabulary_is_refused() -> None:
    check_vocabulary(packed([0, 99]), 100)
    check_vocabulary(b"", 100)

    with pytest.raises(InvalidField, match="got 4294967295"):
        check_vocabulary(packed([3, 2**32 - 1]), 100)


@given(content=st.binary(max_size=40), cuts=st.lists(st.integers(0, 40)), stride=st.integers(1, 12))
def test_digests_do_not_depend_on_how_the_content_is_cut(
    content: bytes, cuts: list[int], stride: int
) -> None:
    places = [0, *sorted(min(cut, len(content)) for cut in cuts), len(content)]
    pieces = [content[start:end] for start, end in pairwise(places)]

    whole = digest([content], stride)

    assert digest(pieces, stride) == whole
    assert whole[0] == hashlib.blake2b(content[:stride], digest_size=16).digest()


def test_a_copy_that_is_equal_is_accepted_and_forgotten() -> None:
    upload = uploaded("hello world")
    upload.add_copy()
    for offset, text in ((0, "hel"), (3, "lo world")):
        chunk = raw_chunk(TextChunk(offset, text))
        copy = upload.copy_at(chunk)
        assert copy is not None
        copy.add(chunk)
        upload.compare(copy)
    upload.finish_copy()

    assert upload.copies == []


@pytest.mark.parametrize("text", ["hello", "hello worlds", "hello_world"])
def test_a_copy_that_differs_is_a_conflict(text: str) -> None:
    upload = uploaded("hello world")
    upload.add_copy()
    copy = upload.copies[0]
    copy.add(raw_chunk(TextChunk(0, text)))

    with pytest.raises(RequestIdConflict):
        upload.finish_copy()
    assert upload.copies == []


def test_a_copy_that_is_longer_is_a_conflict_before_its_end() -> None:
    upload = uploaded("hello world")
    upload.add_copy()
    upload.copies[0].add(raw_chunk(TextChunk(0, "hello worlds")))

    with pytest.raises(RequestIdConflict):
        upload.compare(upload.copies[0])


def test_the_same_bytes_as_ids_are_another_prompt() -> None:
    upload = uploaded("abcd")
    upload.add_copy()
    upload.copies[0].add(raw_chunk(TokenChunk(0, b"abcd")))
    upload.copies[0].end = upload.end

    with pytest.raises(RequestIdConflict):
        upload.finish_copy()


def test_a_chunk_continues_the_upload_itself_before_any_copy() -> None:
    upload = PromptUpload(request())
    upload.add_copy()

    assert upload.copy_at(raw_chunk(TextChunk(0, "x"))) is None


def test_only_so_many_copies_are_compared() -> None:
    upload = uploaded("x")
    for _ in range(uploads.MAX_COPIES + 5):
        upload.add_copy()

    assert len(upload.copies) == uploads.MAX_COPIES


async def test_text_is_encoded_as_it_comes_and_the_rest_at_the_end() -> None:
    upload = PromptUpload(request())
    tokenizer = CharacterTokenizer()

    first = await upload.encode(TextChunk(0, "ab"), tokenizer)
    second = await upload.encode(TextChunk(2, "cd"), tokenizer)

    assert (first, second, upload.finish()) == (
        packed([ord("a")]),
        packed([ord("b"), ord("c")]),
        packed([ord("d")]),
    )


async def test_long_text_is_encoded_the_same() -> None:
    upload = PromptUpload(request())
    text = "x" * (2 * uploads.THREAD_MIN_CHARS)

    ids = await upload.encode(TextChunk(0, text), CharacterTokenizer())

    assert ids + upload.finish() == packed([ord("x")] * len(text))


async def test_text_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(InvalidField, match="no tokenizer"):
        await PromptUpload(request()).encode(TextChunk(0, "x"), None)
