"""The standard error of a mean over tokens tells how far the mean is off."""

import math

import pytest
import torch

from kvcluster.quality.spans import mean_over_spans


def test_the_mean_is_over_tokens() -> None:
    x_T = torch.arange(700.0)

    assert mean_over_spans(x_T).value == pytest.approx(349.5)


def test_one_span_has_no_standard_error() -> None:
    assert mean_over_spans(torch.ones(256)).standard_error is None


def test_no_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        mean_over_spans(torch.empty(0))


def test_of_independent_tokens_the_error_is_the_textbook_one() -> None:
    generator = torch.Generator().manual_seed(0)
    x_T = 3 * torch.randn(256 * 1000, generator=generator)

    error = mean_over_spans(x_T).standard_error

    assert error is not None
    # 1000 spans estimate a deviation to 1 / sqrt(2000), 2.2 %: four times that.
    assert error == pytest.approx(3 / math.sqrt(len(x_T)), rel=0.09)


def test_of_tokens_that_are_alike_the_error_is_that_of_their_groups() -> None:
    generator = torch.Generator().manual_seed(1)
    groups = torch.randn(16 * 1000, generator=generator)

    error = mean_over_spans(groups.repeat_interleave(16)).standard_error

    assert error is not None
    assert error == pytest.approx(1 / math.sqrt(len(groups)), rel=0.09)


def test_a_short_last_span_counts_by_its_length() -> None:
    x_T = torch.cat((torch.full((256,), 1.0), torch.full((256,), 3.0)))
    extended_T = torch.cat((x_T, torch.tensor([100.0])))

    both, three = mean_over_spans(x_T), mean_over_spans(extended_T)

    assert both.standard_error == pytest.approx(1.0)
    mean = float(extended_T.mean())
    sums = (256 * (1 - mean), 256 * (3 - mean), 100 - mean)
    expected = math.sqrt(sum(part**2 for part in sums) * 3 / 2) / 513
    assert three.standard_error == pytest.approx(expected)
