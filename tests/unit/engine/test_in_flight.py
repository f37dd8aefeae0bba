import math

import pytest

from kvcluster.engine.draft import PlannedStep
from kvcluster.engine.in_flight import StepsInFlight
from kvcluster.engine.plan import (
    SampledToken,
    ScoredTokens,
    Scoring,
    SequenceFailure,
    SequenceStep,
    StepPlan,
    StepResult,
)
from kvcluster.engine.request import Request
from kvcluster.errors import RankLost
from kvcluster.types import GenerationId, Policy, SequenceId
from tests.fake_engine import request


def part(sequence: int, *, samples: bool) -> SequenceStep:
    return SequenceStep(sequence, 4, 2, bytes(8), (), 6, samples=samples)


def steps(*plans: StepPlan) -> StepsInFlight:
    made = StepsInFlight(vocab_size=10)
    owner = Request(GenerationId("g"), request(), Policy(), arrival=1)
    for plan in plans:
        made.add(PlannedStep(plan, (owner,) * len(plan.sequences)), now=float(plan.step))
    return made


PLAN = StepPlan(
    epoch=1,
    step=1,
    sequences=(part(1, samples=False), part(2, samples=True), part(3, samples=True)),
)
ANSWER = (SampledToken(2, 6, 7), SampledToken(3, 6, 8))


def test_each_part_gets_its_own_token() -> None:
    settled = steps(PLAN).settle(StepResult(1, 1, ANSWER), now=5.0)

    tokens = [sampled.token_id if sampled else None for _, _, sampled, _ in settled.parts()]
    assert tokens == [None, 7, 8]


@pytest.mark.parametrize(
    ("epoch", "step", "sampled"),
    [
        (2, 1, ANSWER),
        (1, 2, ANSWER),
        (1, 1, ANSWER[:1]),
        (1, 1, ANSWER[::-1]),
        (1, 1, (*ANSWER, SampledToken(4, 6, 1))),
        (1, 1, (SampledToken(2, 5, 7), ANSWER[1])),
        (1, 1, (SampledToken(2, 6, 10), ANSWER[1])),
        (1, 1, (SampledToken(2, 6, -1), ANSWER[1])),
    ],
)
def test_an_answer_that_is_not_exactly_the_plans_means_a_lost_rank(
    epoch: int, step: int, sampled: tuple[SampledToken, ...]
) -> None:
    in_flight = steps(PLAN)

    with pytest.raises(RankLost):
        in_flight.settle(StepResult(epoch, step, sampled), now=5.0)


def scoring_plan() -> StepPlan:
    asked = SequenceStep(1, 4, 4, bytes(16), (), 9, samples=False, scoring=Scoring(5, 9, 0))
    return StepPlan(epoch=1, step=1, sequences=(asked, part(2, samples=True)))


def test_the_scores_of_a_part_may_come_in_pieces() -> None:
    pieces = (ScoredTokens(1, 5, (-1.0, -2.0)), ScoredTokens(1, 7, (-3.0, -4.0)))

    settled = steps(scoring_plan()).settle(StepResult(1, 1, ANSWER[:1], pieces), now=5.0)

    assert [scored for _, _, _, scored in settled.parts()] == [pieces, ()]


@pytest.mark.parametrize(
    "scored",
    [
        (),
        (ScoredTokens(1, 5, (-1.0, -2.0, -3.0)),),
        (ScoredTokens(1, 6, (-1.0, -2.0, -3.0, -4.0)),),
        (ScoredTokens(1, 7, (-3.0, -4.0)), ScoredTokens(1, 5, (-1.0, -2.0))),
        (ScoredTokens(1, 5, (-1.0,)), ScoredTokens(1, 7, (-2.0, -3.0, -4.0))),
        (ScoredTokens(1, 5, (-1.0,) * 5),),
        (ScoredTokens(2, 5, (-1.0,) * 4),),
        (ScoredTokens(1, 5, (-1.0,) * 4), ScoredTokens(2, 5, (-1.0,))),
    ],
)
def test_scores_that_are_not_exactly_the_plans_mean_a_lost_rank(
    scored: tuple[ScoredTokens, ...],
) -> None:
    in_flight = steps(scoring_plan())

    with pytest.raises(RankLost, match="scored"):
        in_flight.settle(StepResult(1, 1, ANSWER[:1], scored), now=5.0)


def test_an_answer_without_a_question_means_a_lost_rank() -> None:
    with pytest.raises(RankLost, match="no step is in flight"):
        steps().settle(StepResult(1, 1, ()), now=5.0)


def test_a_step_is_timed_from_when_it_could_run() -> None:
    """The second plan waits on the ranks until the first is done."""
    in_flight = steps(StepPlan(epoch=1, step=1), StepPlan(epoch=1, step=2))

    first = in_flight.settle(StepResult(1, 1, ()), now=10.0)
    second = in_flight.settle(StepResult(1, 2, ()), now=13.0)

    assert (first.seconds, second.seconds) == (9.0, 3.0)


def test_what_is_in_flight_is_expected_to_be_done_one_after_the_other() -> None:
    in_flight = StepsInFlight(vocab_size=10)
    nothing = in_flight.done_at
    for step, seconds in ((1, 4.0), (2, 0.5)):
        plan = StepPlan(epoch=1, step=step)
        in_flight.add(PlannedStep(plan, (), seconds=seconds), now=float(step))
    both = in_flight.done_at
    in_flight.settle(StepResult(1, 1, ()), now=7.0)

    # The second could not begin before the first was done, at 7 and not at 5.
    assert (nothing, both, in_flight.done_at) == (-math.inf, 5.5, 7.5)


def test_numbering_begins_again_after_a_reset() -> None:
    in_flight = steps(PLAN)
    in_flight.reset()

    assert (len(in_flight), in_flight.num_planned) == (0, 0)


FAILURE = SequenceFailure(3, "encoding blocks", "ValueError")
NEXT = StepPlan(epoch=1, step=2, sequences=(part(2, samples=True), part(3, samples=True)))


def test_a_sequence_that_failed_has_no_token_and_is_waited_for_no_more() -> None:
    in_flight = steps(PLAN, NEXT)

    first = in_flight.settle(StepResult(1, 1, ANSWER[:1], failed=(FAILURE, FAILURE)), now=5.0)
    second = in_flight.settle(StepResult(1, 2, (SampledToken(2, 6, 9),)), now=6.0)

    assert [sampled and sampled.token_id for sampled in first.sampled] == [None, 7, None]
    assert first.failed == {3: FAILURE}
    assert [sampled and sampled.token_id for sampled in second.sampled] == [9, None]
    assert not second.failed


def test_what_a_rank_that_is_ahead_says_of_a_failed_sequence_is_thrown_away() -> None:
    in_flight = steps(PLAN, NEXT)
    in_flight.settle(StepResult(1, 1, ANSWER[:1], failed=(FAILURE,)), now=5.0)

    sampled = (SampledToken(2, 6, 9), SampledToken(3, 6, 1))
    second = in_flight.settle(StepResult(1, 2, sampled, failed=(FAILURE,)), now=6.0)

    assert [sampled and sampled.token_id for sampled in second.sampled] == [9, None]
    assert not second.failed


def test_a_void_sequence_s_token_is_thrown_away() -> None:
    in_flight = steps(PLAN)
    in_flight.void(SequenceId(3))

    settled = in_flight.settle(StepResult(1, 1, ANSWER), now=5.0)

    assert [sampled and sampled.token_id for sampled in settled.sampled] == [None, 7, None]


def test_a_failure_of_a_sequence_that_is_not_in_the_step_is_a_lost_rank() -> None:
    with pytest.raises(RankLost, match="which is not in it"):
        steps(PLAN).settle(
            StepResult(1, 1, ANSWER, failed=(SequenceFailure(9, "encoding blocks", ""),)), now=5.0
        )
