"""What the ranks say becomes one result."""

from kvcluster.engine.plan import (
    EncodingError,
    RankAnswer,
    SampledToken,
    ScoredTokens,
    SequenceStep,
    StepPlan,
    result_of,
)


def test_tokens_come_in_the_plan_s_order_and_every_rank_s_measurements_are_kept() -> None:
    steps = tuple(
        SequenceStep(sequence, 0, 1, b"", (), num_prompt_tokens=1, samples=True)
        for sequence in (5, 3, 4)
    )
    answers = [
        RankAnswer(
            (SampledToken(3, 1, 30),),
            (ScoredTokens(4, 7, (-1.0,)), ScoredTokens(5, 1, (-2.0,))),
            (EncodingError(3, 1.0, 2.0),),
        ),
        RankAnswer(
            (SampledToken(5, 1, 50),),
            (ScoredTokens(4, 3, (-3.0,)),),
            (EncodingError(3, 4.0, 8.0),),
        ),
    ]

    result = result_of(StepPlan(1, 7, sequences=steps), answers)

    assert (result.epoch, result.step) == (1, 7)
    assert [token.sequence for token in result.sampled] == [5, 3]
    assert [(tokens.sequence, tokens.first) for tokens in result.scored] == [(5, 1), (4, 3), (4, 7)]
    assert result.errors == (EncodingError(3, 1.0, 2.0), EncodingError(3, 4.0, 8.0))
