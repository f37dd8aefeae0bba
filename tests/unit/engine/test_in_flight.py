import pytest

from kvcluster.engine.in_flight import StepsInFlight
from kvcluster.engine.plan import SampledToken, SequenceStep, StepPlan, StepResult
from kvcluster.engine.request import Request
from kvcluster.engine.scheduler import PlannedStep
from kvcluster.errors import RankLost
from kvcluster.types import GenerationId, Policy
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

    tokens = [sampled.token_id if sampled else None for _, _, sampled in settled.parts()]
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


def test_an_answer_without_a_question_means_a_lost_rank() -> None:
    with pytest.raises(RankLost, match="no step is in flight"):
        steps().settle(StepResult(1, 1, ()), now=5.0)


def test_a_step_is_timed_from_when_it_could_run() -> None:
    """The second plan waits on the ranks until the first is done."""
    in_flight = steps(StepPlan(epoch=1, step=1), StepPlan(epoch=1, step=2))

    first = in_flight.settle(StepResult(1, 1, ()), now=10.0)
    second = in_flight.settle(StepResult(1, 2, ()), now=13.0)

    assert (first.seconds, second.seconds) == (9.0, 3.0)


def test_numbering_begins_again_after_a_reset() -> None:
    in_flight = steps(PLAN)
    in_flight.reset()

    assert (len(in_flight), in_flight.num_planned) == (0, 0)
