from contextlib import nullcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcluster.engine import upload as uploads
from kvcluster.engine.api import TextChunk, TokenChunk
from kvcluster.engine.upload import PromptUpload, RawChunk, check_vocabulary, raw_chunk
from kvcluster.errors import InvalidField, RequestIdConflict, UploadStalled
from tests.fake_engine import CharacterTokenizer, packed, request


def uploaded(text: str, *, is_complete: bool = True) -> PromptUpload:
    made = PromptUpload(request(request_id="r"))
    made.add(raw_chunk(TextChunk(0, text)))
    made.is_complete = is_complete
    return made


def cut(content: str, size: int) -> list[RawChunk]:
    return [
        raw_chunk(TextChunk(start, content[start : start + size]))
        for start in range(0, len(content), size)
    ]


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


@given(size=st.integers(1, 40), first_size=st.integers(1, 40), different=st.integers(-1, 39))
def test_a_retry_is_equal_however_it_is_cut_and_never_when_a_character_differs(
    size: int, first_size: int, different: int
) -> None:
    content = "".join(map(chr, range(65, 105)))
    sent = content if different < 0 else content[:different] + "~" + content[different + 1 :]
    upload = PromptUpload(request(request_id="r"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uploads, "DIGEST_STRIDE_BYTES", 7)
        for chunk in cut(content, first_size):
            upload.add(chunk)
        upload.is_complete = True
        retry = upload.add_retry()
        with nullcontext() if different < 0 else pytest.raises(RequestIdConflict):
            for chunk in cut(sent, size):
                upload.compare(retry, chunk)
            upload.finish_retry(retry)

    assert upload.has_retries is (different >= 0)


def test_a_difference_is_found_at_the_next_end_of_a_stride() -> None:
    content = "x" * uploads.DIGEST_STRIDE_BYTES
    upload = uploaded(content, is_complete=False)

    with pytest.raises(RequestIdConflict):
        upload.compare(upload.add_retry(), raw_chunk(TextChunk(0, "y" + content[1:])))


@pytest.mark.parametrize("text", ["", "hello", "hello_world"])
def test_a_retry_that_is_shorter_or_differs_is_a_conflict_at_its_end(text: str) -> None:
    upload = uploaded("hello world")
    retry = upload.add_retry()
    upload.compare(retry, raw_chunk(TextChunk(0, text)))

    with pytest.raises(RequestIdConflict):
        upload.finish_retry(retry)


def test_the_same_bytes_as_ids_are_another_prompt() -> None:
    upload = uploaded("abcd")

    with pytest.raises(RequestIdConflict):
        upload.compare(upload.add_retry(), raw_chunk(TokenChunk(0, b"abcd")))


def test_an_equal_retry_takes_over_where_the_feeder_stopped() -> None:
    upload = uploaded("hello", is_complete=False)
    retry = upload.add_retry()
    assert not upload.leave(0)
    head, rest = raw_chunk(TextChunk(0, "hello world")).split(upload.end)
    upload.compare(retry, head)

    upload.take_over(retry)

    assert (upload.feeder, rest.prompt_chunk()) == (retry, TextChunk(5, " world"))


def test_a_retry_that_differs_in_the_open_stride_never_takes_over() -> None:
    upload = uploaded("hello", is_complete=False)
    retry = upload.add_retry()
    upload.leave(0)
    upload.compare(retry, raw_chunk(TextChunk(0, "jello")))

    with pytest.raises(RequestIdConflict):
        upload.take_over(retry)


def test_a_prompt_is_given_up_when_its_last_upload_leaves() -> None:
    upload = uploaded("hello", is_complete=False)
    retry = upload.add_retry()

    assert [upload.leave(0), upload.leave(retry)] == [False, True]


def test_a_retry_that_leaves_changes_nothing_for_the_feeder() -> None:
    upload = uploaded("hello", is_complete=False)

    assert not upload.leave(upload.add_retry())


def test_nobody_takes_over_a_chunk_that_was_taken_in_half() -> None:
    upload = uploaded("hello", is_complete=False)
    upload.add_retry()
    upload.is_broken = True

    assert upload.leave(0)


def test_an_upload_that_is_over_is_not_compared() -> None:
    with pytest.raises(UploadStalled, match="given up"):
        uploaded("hello").retry(7)


def test_tokens_are_split_at_a_position() -> None:
    head, rest = raw_chunk(TokenChunk(4, packed([1, 2, 3]))).split(5)

    assert head.prompt_chunk() == TokenChunk(4, packed([1]))
    assert rest.prompt_chunk() == TokenChunk(5, packed([2, 3]))


async def test_text_is_encoded_as_it_comes_and_the_rest_at_the_end() -> None:
    upload = PromptUpload(request())
    tokenizer = CharacterTokenizer()

    first = await upload.encode(TextChunk(0, "ab"), tokenizer)
    second = await upload.encode(TextChunk(2, "cd"), tokenizer)

    assert (first, second, await upload.finish()) == (
        packed([ord("a")]),
        packed([ord("b"), ord("c")]),
        packed([ord("d")]),
    )


async def test_long_text_is_encoded_the_same() -> None:
    upload = PromptUpload(request())
    text = "x" * (2 * uploads.THREAD_MIN_CHARS)

    ids = await upload.encode(TextChunk(0, text), CharacterTokenizer())

    assert ids + await upload.finish() == packed([ord("x")] * len(text))


async def test_text_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(InvalidField, match="no tokenizer"):
        await PromptUpload(request()).encode(TextChunk(0, "x"), None)
