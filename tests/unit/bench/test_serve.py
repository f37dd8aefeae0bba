"""What a client saw of a generation becomes numbers beside their targets."""

import pytest
from transformers import LlamaConfig

from kvcluster.bench import serve
from kvcluster.bench.serve import Served, ServeSettings
from kvcluster.errors import ConfigError


def test_the_first_tokens_are_left_out_of_the_time_of_one() -> None:
    slow = [10.0 + index for index in range(24)]
    steady = [40.0 + 0.005 * index for index in range(41)]

    served = Served([*slow, *steady])

    assert served.first_token_s == 10.0
    assert served.token_ms == pytest.approx(5.0)


def test_one_token_that_came_late_is_in_the_mean_and_not_in_the_median() -> None:
    times = [0.005 * index for index in range(64)]

    served = Served([*times, times[-1] + 1.0])

    assert served.median_token_ms == pytest.approx(5.0)
    assert served.token_ms == pytest.approx((39 * 5.0 + 1000.0) / 40)


def test_a_run_says_how_to_repeat_it() -> None:
    settings = ServeSettings(shape="8b", lengths=(4096, 131_072), policies=("int4",), num_ranks=2)

    assert settings.command == (
        "python -m kvcluster.bench.serve --shape 8b --length 4096 --length 131072 "
        "--policy int4 --ranks 2 --chunk 12672 --tokens 512"
    )


def test_targets_are_those_of_the_shape_on_one_rank() -> None:
    served = Served([1.2 + 0.009 * index for index in range(96)])
    model = LlamaConfig()

    measured = {
        num_ranks: serve._measurements(
            ServeSettings(shape="8b", num_ranks=num_ranks), model, "exact", 32_768, served
        )
        for num_ranks in (1, 2)
    }

    assert [each.meets_target for each in measured[1]] == [True, True, False, True]
    assert [each.at_most for each in measured[1]] == [1.173 * 1.05, None, 8.09, None]
    assert all(each.meets_target for each in measured[2])


def test_without_a_gpu_the_benchmark_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "query_gpu", lambda _field: None)

    with pytest.raises(ConfigError, match="no CUDA device"):
        serve.run()
