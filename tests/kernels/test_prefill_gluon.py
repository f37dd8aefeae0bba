"""What calls the pipelined prefill kernel serves, as far as a machine without a GPU can tell. What
it computes is tested on one (`test_gpu_prefill.py`), what it becomes in `test_prefill_sm90.py`."""

from dataclasses import replace

import pytest
import torch
from kvcluster_kernels import prefill_gluon
from kvcluster_kernels.prefill_arguments import Causal, Keys

from tests.kernels.prefill_cases import Arguments, Case, arguments

CPU = torch.device("cpu")
SERVED = Case(name="served", key_dim=64, value_dim=64, dtype=torch.bfloat16)


def reason(given: Arguments) -> str | None:
    return prefill_gluon.reason_against(
        given.q_THD,
        given.keys,
        causal=given.causal,
        softcap=given.softcap,
        sinks_H=given.sinks_H,
    )


@pytest.mark.parametrize(
    "case",
    [
        SERVED,
        replace(SERVED, key_dim=128, value_dim=128),
        replace(SERVED, dtype=torch.float16),
        replace(SERVED, causal=Causal(3, 10, 20)),
        replace(SERVED, block_tokens=16, num_keys=64),
        replace(SERVED, is_carried=True),
    ],
    ids=str,
)
def test_there_is_nothing_against_what_it_serves(case: Case) -> None:
    assert reason(arguments(case, CPU)) is None


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (replace(SERVED, dtype=torch.float32), "float32"),
        (replace(SERVED, key_dim=96, value_dim=96), "heads of 96"),
        (replace(SERVED, value_dim=128), "heads of 64 and 128"),
        (replace(SERVED, softcap=5.0), "softcap"),
        (replace(SERVED, has_sinks=True), "sinks"),
        (replace(SERVED, causal=Causal(window=9)), "window"),
        (replace(SERVED, causal=Causal(start=-1)), "before all keys"),
        (replace(SERVED, num_keys=0), "no keys"),
        (replace(SERVED, block_tokens=16, num_keys=65), "not full"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_it_does_not_serve_it_says_with_the_reason(case: Case, words: str) -> None:
    found = reason(arguments(case, CPU))

    assert found is not None
    assert words in found


def test_rows_that_the_copy_engine_cannot_address_are_not_served() -> None:
    given = arguments(SERVED, CPU)
    odd_KSD = torch.zeros(2, 75, 66, dtype=torch.bfloat16)[..., :64]

    found = reason(replace(given, keys=Keys.in_line(odd_KSD, odd_KSD)))

    assert found is not None
    assert "multiples of 16 bytes" in found


def test_the_heads_that_run_together_are_a_divisor_of_all() -> None:
    for num_keys in (1, 1 << 15, 1 << 17, 1 << 20):
        k_PKSD = torch.empty(1, 6, num_keys, 128, dtype=torch.bfloat16, device="meta")

        together = prefill_gluon.heads_at_once(Keys(k_PKSD, k_PKSD, num_keys), 24)

        assert 24 % together == 0
        assert together % 4 == 0, "heads that share keys run together"
