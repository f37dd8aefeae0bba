"""Sampling draws from the distribution that the parameters describe, and from nothing else."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kvcluster.model.sampler import (
    NO_TOKEN,
    SequenceSampling,
    TokenChoice,
    gumbel_noise,
    kept_tokens,
    likeliest_tokens,
    sample,
)
from kvcluster.types import SamplingParams

VOCAB_SIZE = 3000
"""More than the tokens that the sampler sorts at first."""


def logits(seed: int, *, spread: float = 2.0) -> Tensor:
    return spread * torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(seed))


def choose(logits_V: Tensor, params: SamplingParams, position: int = 10) -> TokenChoice:
    (choice,) = sample(logits_V[None], [SequenceSampling(params)], [position])
    return choice


def test_greedy_takes_the_likeliest_token() -> None:
    logits_V = logits(0)

    assert choose(logits_V, SamplingParams()).token_id == int(logits_V.argmax())


@pytest.mark.parametrize("spread", [0.1, 2.0, 8.0])
@pytest.mark.parametrize("top_k", [0, 1, 40])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.3, 1e-6])
@pytest.mark.parametrize("min_p", [0.0, 0.05, 1.0])
def test_filters_keep_the_tokens_that_transformers_keeps(
    spread: float, top_k: int, top_p: float, min_p: float
) -> None:
    params = SamplingParams(temperature=0.7, top_k=top_k, top_p=top_p, min_p=min_p)
    logits_V = logits(1, spread=spread)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.7)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))

    token_ids_C, logits_C = kept_tokens(logits_V / params.temperature, params)

    expected_V = warpers(torch.zeros(1, 1, dtype=torch.int64), logits_V[None])[0]
    found_V = torch.full_like(expected_V, -math.inf).index_copy(0, token_ids_C, logits_C)
    torch.testing.assert_close(found_V, expected_V, atol=0, rtol=0)


def test_ties_with_the_last_of_top_k_are_kept() -> None:
    token_ids_C, _ = kept_tokens(
        torch.tensor([1.0, 2.0, 1.0, 0.0]), SamplingParams(temperature=1.0, top_k=2)
    )

    assert sorted(token_ids_C.tolist()) == [0, 1, 2]


def test_repetition_penalty_is_that_of_transformers() -> None:
    logits_V, prompt, output = logits(2), [5, 9, 9, 70], [9, 2000]
    params = SamplingParams(temperature=1.0, repetition_penalty=1.3, seed=3)
    state = SequenceSampling(params, num_prompt_tokens=4)
    state.append(prompt)
    state.append(output)

    (choice,) = sample(logits_V[None], [state], [6])

    processor = RepetitionPenaltyLogitsProcessor(1.3)
    expected_V = processor(torch.tensor([prompt + output]), logits_V[None].clone())[0]
    assert choice == choose(expected_V, SamplingParams(temperature=1.0, seed=3), position=6)


def test_presence_and_frequency_count_the_output_only() -> None:
    logits_V = torch.zeros(8)
    logits_V[3], logits_V[4], logits_V[5] = 1.0, 1.05, 0.9
    params = SamplingParams(presence_penalty=0.02, frequency_penalty=0.011)
    state = SequenceSampling(params, num_prompt_tokens=3)
    state.append([3, 3, 3])
    chosen = []
    for position in range(3, 9):
        (choice,) = sample(logits_V[None], [state], [position])
        chosen.append(choice.token_id)
        state.append([choice.token_id])

    # 4 loses 0.031 to its first use and 0.011 to each later one; 3 was only in the prompt.
    assert chosen == [4, 4, 4, 3, 4, 4]


def test_output_that_was_appended_before_the_boundary_was_known_is_counted_as_output() -> None:
    """A preempted sequence is computed again: its output comes as part of one long append."""
    params = SamplingParams(presence_penalty=5.0)
    state = SequenceSampling(params)
    state.append([1, 2, 3, 4])
    state.num_prompt_tokens = 2

    (choice,) = sample(torch.tensor([[0.0, 3.0, 2.0, 9.0, 8.0]]), [state], [4])

    assert choice.token_id == 3
    assert state.counts(torch.zeros(5)).num_output_V.tolist() == [0, 0, 0, 1, 1]


def test_tokens_are_not_kept_when_no_penalty_is_set() -> None:
    state = SequenceSampling(SamplingParams(temperature=1.0))

    state.append(range(1_000_000))

    assert len(state._uncounted) == 0


def test_logit_bias_moves_a_token() -> None:
    logits_V = torch.tensor([1.0, 0.0, 0.0])

    assert choose(logits_V, SamplingParams(logit_bias=((2, 1.5),))).token_id == 2


def test_the_end_is_not_sampled_before_the_minimum() -> None:
    logits_V = torch.tensor([0.0, 9.0, 8.0, 1.0])
    params = SamplingParams(min_output_tokens=2, stop_token_ids=(2,))
    state = SequenceSampling(params, end_token_ids=(1,), num_prompt_tokens=10)

    chosen = [sample(logits_V[None], [state], [position])[0].token_id for position in (10, 11, 12)]

    assert chosen == [3, 3, 1]


def test_logprobs_are_of_the_distribution_before_everything_else() -> None:
    logits_V = logits(4)
    params = SamplingParams(temperature=2.0, top_k=1, logit_bias=((7, 100.0),), logprobs=3)

    choice = choose(logits_V, params)

    logprobs_V = logits_V.log_softmax(dim=-1)
    assert choice.token_id == 7
    assert choice.logprob == float(logprobs_V[7])
    assert [token_id for token_id, _ in choice.top] == logits_V.topk(3).indices.tolist()
    assert choice.top[0][1] == float(logprobs_V.max())


def test_zero_logprobs_give_the_chosen_one_alone() -> None:
    choice = choose(logits(5), SamplingParams(logprobs=0))

    assert choice.logprob is not None
    assert choice.top == ()


def test_the_logits_are_left_unchanged() -> None:
    logits_V = logits(6)
    before = logits_V.clone()

    choose(logits_V, SamplingParams(temperature=0.5, logit_bias=((1, 2.0),), min_output_tokens=9))

    torch.testing.assert_close(logits_V, before, atol=0, rtol=0)


def test_a_choice_is_the_same_in_any_batch() -> None:
    rows = torch.stack([logits(seed) for seed in range(8)])
    states = [
        SequenceSampling(SamplingParams(temperature=0.5 + seed / 8, top_p=0.9, seed=seed))
        for seed in range(8)
    ]
    positions = [100 + row for row in range(8)]

    together = sample(rows, states, positions)

    alone = [
        sample(rows[row][None], [states[row]], [positions[row]])[0] for row in reversed(range(8))
    ]
    assert together == alone[::-1]


def test_another_seed_or_position_is_another_draw() -> None:
    logits_V = torch.zeros(VOCAB_SIZE)

    drawn = {
        choose(logits_V, SamplingParams(temperature=1.0, seed=seed), position).token_id
        for seed, position in itertools.product((0, 1, -1, 2**63), range(25))
    }

    # Of 100 draws among 3000 tokens about 98 differ; below 85 is less likely than 1e-20.
    assert len(drawn) > 85


def test_draws_have_the_frequencies_of_the_softmax() -> None:
    """Chi-square over 5,000 positions of one seed; fixed seeds, so it passes always or never."""
    logits_V = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -2.0])
    num_draws, temperature = 5_000, 1.5
    noise = torch.stack(
        [gumbel_noise(7, position, torch.arange(6)) for position in range(num_draws)]
    )
    drawn = (logits_V.double() / temperature + noise).argmax(dim=-1)
    counts = torch.bincount(drawn, minlength=6).double()

    expected = num_draws * (logits_V.double() / temperature).softmax(dim=-1)

    chi_square = float(((counts - expected) ** 2 / expected).sum())
    # 5 degrees of freedom: 15.1 is exceeded once in a hundred seeds.
    assert chi_square < 15.1


def test_draws_are_those_of_the_noise_that_the_frequencies_were_tested_with() -> None:
    logits_V = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -2.0])
    params = SamplingParams(temperature=1.5, seed=7)

    drawn = [choose(logits_V, params, position).token_id for position in range(50)]

    expected = [
        int((logits_V.double() / 1.5 + gumbel_noise(7, position, torch.arange(6))).argmax())
        for position in range(50)
    ]
    assert drawn == expected


def test_noise_is_that_of_splitmix64_in_plain_integers() -> None:
    token_ids = [0, 1, 2, 999_999]

    noise = gumbel_noise(2**64 - 5, 1_000_000, torch.tensor(token_ids)).tolist()

    assert noise == pytest.approx([plain_noise(2**64 - 5, 1_000_000, i) for i in token_ids])


def plain_noise(seed: int, position: int, token_id: int) -> float:
    mask, gamma = (1 << 64) - 1, 0x9E3779B97F4A7C15

    def mix(value: int) -> int:
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        return value ^ (value >> 31)

    state = mix((mix(seed) + position * gamma) & mask)
    bits = mix((state + (token_id + 1) * gamma) & mask)
    return -math.log(-math.log(((bits >> 12) + 0.5) / 2**52))


def test_a_filtered_token_does_not_change_which_other_is_drawn() -> None:
    logits_V = logits(8)
    free = choose(logits_V, SamplingParams(temperature=1.0, seed=5)).token_id
    other = int(logits_V.argmin())
    assert free != other

    barred = choose(logits_V, SamplingParams(temperature=1.0, seed=5, logit_bias=((other, -1e9),)))

    assert barred.token_id == free


@pytest.mark.parametrize("unknown", [slice(None), slice(7, 8)])
@pytest.mark.parametrize("infinite", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_k=5),
        SamplingParams(temperature=0.7, top_p=0.9),
        SamplingParams(temperature=0.7, min_p=0.1),
        SamplingParams(temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.2),
    ],
)
def test_logits_that_are_no_numbers_do_not_end_the_step_for_others(
    params: SamplingParams, infinite: float, unknown: slice
) -> None:
    logits_V = logits(0)
    logits_V[unknown] = infinite

    assert 0 <= choose(logits_V, params).token_id < VOCAB_SIZE


@pytest.mark.parametrize("unknown", [math.nan, math.inf])
def test_there_is_no_likeliest_token_where_logits_are_no_numbers(unknown: float) -> None:
    rows = torch.stack([logits(0), logits(1), logits(2), torch.full((VOCAB_SIZE,), -math.inf)])
    rows[1, 7] = unknown
    rows[2, 7] = -math.inf

    likeliest = likeliest_tokens(rows).tolist()

    assert likeliest == [int(rows[0].argmax()), NO_TOKEN, int(rows[2].argmax()), NO_TOKEN]


@pytest.mark.parametrize("temperature", [1e-31, 1e-45, 1e-300])
@pytest.mark.parametrize("filters", [{}, {"top_k": 1}, {"min_p": 0.5}, {"top_p": 0.5}])
def test_the_coldest_temperatures_draw_the_likeliest_token(
    filters: dict[str, float], temperature: float
) -> None:
    """Their float32 is zero, by which no logit can be divided."""
    logits_V = logits(0) + 20
    params = SamplingParams(temperature=temperature, **filters)  # type: ignore[arg-type]

    assert choose(logits_V, params).token_id == int(logits_V.argmax())


def test_the_strongest_penalty_at_the_coldest_temperature_still_gives_a_token() -> None:
    """Logits over an infinite float32 are zero, and zero over zero is no number."""
    params = SamplingParams(temperature=1e-300, repetition_penalty=1e300, top_k=1)
    state = SequenceSampling(params)
    state.append(range(VOCAB_SIZE))

    (choice,) = sample(logits(0).abs()[None], [state], [VOCAB_SIZE])

    assert 0 <= choice.token_id < VOCAB_SIZE


def test_no_rows_give_no_choices() -> None:
    assert sample(torch.empty(0, VOCAB_SIZE), [], []) == []
