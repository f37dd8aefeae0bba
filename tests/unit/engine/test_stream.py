import asyncio
import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvcluster.engine.api import Finished, FinishReason, GenerationEvent, Output, Usage
from kvcluster.engine.stream import EventLog, OutputText, Signal
from kvcluster.errors import ResumeExpired
from kvcluster.types import GenerationId

USAGE = Usage(
    input_tokens=1, cached_input_tokens=0, output_tokens=1, kv_bytes=0, kv_bytes_uncompressed=0
)
END = Finished(reason=FinishReason.STOP, usage=USAGE)


def output(index: int) -> Output:
    return Output(index=index, text="", token_ids=(index,))


def log(num_outputs: int) -> EventLog:
    made = EventLog(GenerationId("g"))
    for index in range(num_outputs):
        made.append(output(index))
    return made


async def collect(events: EventLog, after: int) -> list[GenerationEvent]:
    return [event async for batch in events.follow(after) for event in batch]


class Pieces:
    """A decoder whose token i is piece i."""

    def __init__(self, pieces: list[str], rest: str = "") -> None:
        self.pieces = pieces
        self.rest = rest

    def push(self, token_id: int) -> str:
        return self.pieces[token_id]

    def finish(self) -> str:
        return self.rest


def shown(pieces: list[str], *stop: str, rest: str = "") -> tuple[str, str]:
    """All text of the pieces, and the stop string that ended it."""
    text = OutputText(Pieces(pieces, rest), stop)
    parts: list[str] = []
    for token_id in range(len(pieces)):
        piece = text.push(token_id)
        parts.append(piece.text)
        if piece.stop_sequence:
            return "".join(parts), piece.stop_sequence
    piece = text.finish()
    return "".join(parts) + piece.text, piece.stop_sequence


def test_events_are_numbered_from_one_without_gaps() -> None:
    assert [event.sequence for event in log(3).after(0)] == [1, 2, 3]


def test_a_replay_starts_after_any_event() -> None:
    assert [event.sequence for event in log(5).after(3)] == [4, 5]
    assert log(5).after(5) == ()


@pytest.mark.parametrize("sequence", [-1, 6])
def test_a_replay_from_outside_the_log_is_refused(sequence: int) -> None:
    with pytest.raises(ResumeExpired, match="1 to 5"):
        log(5).after(sequence)


def test_nothing_follows_the_last_event() -> None:
    ended = log(1)
    ended.append(END)

    with pytest.raises(ValueError, match="finished"):
        ended.append(output(1))


async def test_readers_at_different_places_all_get_every_event() -> None:
    events = log(2)
    readers = [asyncio.create_task(collect(events, after)) for after in (0, 1, 2)]
    await asyncio.sleep(0)
    events.append(output(2))
    await asyncio.sleep(0)
    events.append(END)

    sequences = [[event.sequence for event in await reader] for reader in readers]

    assert sequences == [[1, 2, 3, 4], [2, 3, 4], [3, 4]]


async def test_following_a_finished_log_ends_at_once() -> None:
    events = log(1)
    events.append(END)

    assert await collect(events, 2) == []


async def test_a_signal_wakes_all_who_wait_and_nobody_later() -> None:
    signal = Signal()
    waiting = [asyncio.create_task(signal.wait()) for _ in range(3)]
    await asyncio.sleep(0)
    signal.notify()
    await asyncio.gather(*waiting)

    later = asyncio.create_task(signal.wait())
    await asyncio.sleep(0)
    assert not later.done()
    later.cancel()


def test_without_stop_strings_text_is_shown_at_once() -> None:
    text = OutputText(Pieces(["he", "", "llo"]), ())

    assert [text.push(token_id).text for token_id in range(3)] == ["he", "", "llo"]


def test_without_a_tokenizer_there_is_no_text() -> None:
    text = OutputText(None, ())

    assert text.push(5).text == ""
    assert text.finish().text == ""


def test_text_is_held_back_while_it_could_begin_a_stop_string() -> None:
    text = OutputText(Pieces(["a<", "e", "nx"]), ("<end>",))

    assert [text.push(token_id).text for token_id in range(3)] == ["a", "", "<enx"]


def test_text_is_cut_before_the_stop_string() -> None:
    assert shown(["one <e", "nd> two"], "<end>") == ("one ", "<end>")


def test_held_text_is_shown_when_the_tokens_end() -> None:
    assert shown(["one <en"], "<end>") == ("one <en", "")


def test_a_stop_string_may_be_completed_by_the_rest_of_the_decoder() -> None:
    assert shown(["one <en"], "<end>", rest="d>!") == ("one ", "<end>")


def test_the_stop_string_that_is_complete_first_wins() -> None:
    assert shown(["abcd"], "abcd", "bc") == ("a", "bc")


@given(
    text=st.text("ab<", max_size=30),
    stop=st.lists(st.text("ab<", min_size=1, max_size=4), max_size=4),
    cuts=st.lists(st.integers(0, 30), max_size=10),
)
@example(text="aab", stop=["ab"], cuts=[2])
def test_the_division_into_tokens_does_not_matter(
    text: str, stop: list[str], cuts: list[int]
) -> None:
    places = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    pieces = [text[start:end] for start, end in itertools.pairwise(places)]

    assert shown(pieces, *stop) == shown(list(text), *stop)


@given(text=st.text("ab<", max_size=30), stop=st.lists(st.text("ab<", min_size=1, max_size=4)))
def test_no_text_is_lost_and_no_stop_string_is_shown(text: str, stop: list[str]) -> None:
    seen, stop_sequence = shown(list(text), *stop)

    assert text.startswith(seen + stop_sequence)
    assert not any(word in seen for word in stop)
    assert bool(stop_sequence) == any(word in text for word in stop)
