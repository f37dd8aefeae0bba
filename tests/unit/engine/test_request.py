from kvcluster.cache.block_table import BlockTable
from kvcluster.engine.plan import EncodingError
from kvcluster.engine.request import Request, RequestState
from kvcluster.types import GenerationId, Policy, SequenceId
from tests.fake_engine import packed, request


def made(**fields: object) -> Request:
    return Request(GenerationId("g"), request(**fields), Policy(), arrival=1)


def test_while_the_prompt_is_uploaded_only_whole_blocks_before_its_last_token_are_prefilled() -> (
    None
):
    waiting = made()
    ends = []
    for _ in range(9):
        waiting.append_prompt(packed([1]))
        ends.append(waiting.prefill_end(4))

    assert ends == [0, 0, 0, 0, 4, 4, 4, 4, 8]


def test_a_complete_prompt_is_prefilled_to_its_end() -> None:
    waiting = made()
    waiting.append_prompt(packed([1, 2, 3, 4, 5]))
    waiting.is_prompt_complete = True

    assert waiting.prefill_end(4) == 5


def test_tokens_are_kept_in_four_bytes_each_and_given_as_little_endian() -> None:
    waiting = made()
    waiting.append_prompt((258).to_bytes(4, "little") + (7).to_bytes(4, "little"))

    assert list(waiting.tokens) == [258, 7]
    assert waiting.tokens.itemsize == 4
    assert waiting.packed_ids(0, 1) == b"\x02\x01\x00\x00"


def test_preemption_forgets_what_is_computed_but_no_token() -> None:
    running = made()
    running.append_prompt(packed([1, 2]))
    running.is_prompt_complete = True
    running.hold(BlockTable(1), None)
    running.start(SequenceId(1))
    running.num_planned = running.num_computed = 2
    running.has_sampled = True
    running.append_output(9)

    running.preempt()

    assert running.state is RequestState.WAITING
    assert running.sequence is None
    assert (running.num_planned, running.num_computed) == (0, 0)
    assert running.prefill_end(4) == 3
    assert list(running.tokens) == [1, 2, 9]


def test_higher_priority_comes_first_then_earlier_arrival() -> None:
    early, late = made(), made()
    late.arrival = 2
    urgent = made(priority=5)
    urgent.arrival = 3

    assert sorted([late, urgent, early], key=lambda each: each.order) == [urgent, early, late]


def test_no_token_is_planned_beyond_max_output_tokens() -> None:
    running = made(max_output_tokens=2)
    running.hold(BlockTable(1), None)
    running.start(SequenceId(1))
    running.has_sampled = True
    running.num_output_tokens, running.num_pending = 0, 1
    assert running.can_decode

    running.num_output_tokens = 1
    assert not running.can_decode


def test_the_known_length_is_what_was_declared_or_uploaded() -> None:
    waiting = made(input_tokens=10)
    assert waiting.known_length == 10

    undeclared = made()
    undeclared.append_prompt(packed([1, 2, 3]))
    assert undeclared.known_length == 3


def test_the_attention_error_is_of_all_ranks_and_steps_of_the_request_s_own_sequence() -> None:
    running = made()
    running.sequence = SequenceId(3)

    running.count_errors([EncodingError(3, 1.0, 10.0), EncodingError(4, 9.0, 9.0)])
    running.count_errors([EncodingError(3, 3.0, 6.0)])

    assert running.attention_error == 0.5


def test_a_request_of_which_nothing_was_encoded_has_no_attention_error() -> None:
    assert made().attention_error == 0
