import math

import msgspec
import pytest

from kvcluster.cache.block_pool import BlockPool
from kvcluster.cache.partition import Partition
from kvcluster.config import CacheConfig, EngineConfig
from kvcluster.engine import admission
from kvcluster.errors import (
    ClusterOverloaded,
    ContextTooLong,
    DeadlineInfeasible,
    InvalidField,
    ModelNotFound,
    QuotaExceeded,
)
from kvcluster.types import DEFAULT_TENANT, Policy
from tests.fake_engine import VOCAB_SIZE, model_spec, request, sampling

SPEC = model_spec(max_context_tokens=100)
NAN = math.nan


def load(**fields: object) -> admission.Load:
    defaults: dict[str, object] = {
        "num_requests": 0,
        "first_token_s": None,
        "retry_after_s": 3.0,
    }
    return admission.Load(**(defaults | fields))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", NAN),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", NAN),
        ("top_k", -1),
        ("min_p", -0.1),
        ("min_p", 1.0),
        ("min_p", NAN),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", math.inf),
        ("repetition_penalty", NAN),
        ("presence_penalty", 2.1),
        ("presence_penalty", NAN),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", NAN),
        ("seed", -1),
        ("seed", 2**64),
        ("stop", ("",)),
        ("stop", ("a" * 257,)),
        ("stop", tuple("abcdefghijklmnopq")),
        ("stop_token_ids", (VOCAB_SIZE,)),
        ("stop_token_ids", (-1,)),
        ("stop_token_ids", (1,) * 257),
        ("logprobs", -1),
        ("logprobs", 21),
        ("prompt_logprobs", -1),
        ("prompt_logprobs", 21),
        ("min_output_tokens", -1),
        ("logit_bias", ((VOCAB_SIZE, 1.0),)),
        ("logit_bias", ((1, NAN),)),
        ("logit_bias", ((1, math.inf),)),
        ("logit_bias", ((1, 1.0),) * 1025),
    ],
)
def test_a_sampling_value_outside_its_rule_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InvalidField) as info:
        admission.check(request(sampling=sampling(**{field: value})), SPEC)

    assert info.value.metadata["field"] == f"sampling.{field}"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0},
        {"temperature": 100.0, "top_p": 1e-9, "top_k": 10**9, "min_p": 0.999},
        {"repetition_penalty": 1e-3, "presence_penalty": -2.0, "frequency_penalty": 2.0},
        {"stop": tuple("abcdefghijklmnop"), "stop_token_ids": (0, VOCAB_SIZE - 1)},
        {"logprobs": 20, "seed": 2**64 - 1, "min_output_tokens": 10**6},
        {"logit_bias": ((0, -100.0), (5, 100.0))},
    ],
)
def test_the_limits_themselves_are_accepted(fields: dict[str, object]) -> None:
    admission.check(request(sampling=sampling(**fields)), SPEC)


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("max_output_tokens", {"max_output_tokens": 0}),
        ("priority", {"priority": -1}),
        ("priority", {"priority": 101}),
        ("request_id", {"request_id": "x" * 129}),
        ("progress_interval", {"progress_interval_s": 0.0}),
        ("progress_interval", {"progress_interval_s": math.inf}),
        ("progress_interval", {"progress_interval_s": NAN}),
        ("disconnect_grace", {"disconnect_grace_s": -1.0}),
        ("disconnect_grace", {"disconnect_grace_s": NAN}),
        ("disconnect_grace", {"disconnect_grace_s": 1e9}),
        ("deadline", {"deadline_s": NAN}),
        ("deadline", {"deadline_s": math.inf}),
        ("input_tokens", {"input_tokens": 0}),
    ],
)
def test_a_request_field_outside_its_rule_is_refused_by_name(
    field: str, fields: dict[str, object]
) -> None:
    with pytest.raises(InvalidField) as info:
        admission.check(request(**fields), SPEC)

    assert info.value.metadata["field"] == field


def test_another_model_is_not_found() -> None:
    with pytest.raises(ModelNotFound, match="'other' is not served here; 'fake' is"):
        admission.check(msgspec.structs.replace(request(), model="other"), SPEC)


def test_stop_strings_need_a_tokenizer() -> None:
    with pytest.raises(InvalidField, match="no tokenizer"):
        admission.check(request(sampling=sampling(stop=("x",))), model_spec(has_tokenizer=False))


def test_a_declared_prompt_over_the_limit_is_refused_with_by_how_much() -> None:
    with pytest.raises(ContextTooLong, match="cut 12 tokens") as info:
        admission.check(request(12, input_tokens=100), SPEC)

    assert info.value.metadata == {"limit_tokens": "100", "over_tokens": "12"}


def test_an_upload_over_the_limit_is_refused_before_its_end_is_known() -> None:
    admission.check_context(request(10), SPEC, num_prompt_tokens=90, is_complete=False)

    with pytest.raises(ContextTooLong, match="at least 1 tokens"):
        admission.check_context(request(10), SPEC, num_prompt_tokens=91, is_complete=False)


def test_a_request_that_could_never_fit_is_refused_with_numbers() -> None:
    partition = Partition([[BlockPool(3)], [BlockPool(3)]], tenant=DEFAULT_TENANT)

    def check(num_prompt_tokens: int) -> None:
        admission.check_capacity(
            request(5),
            SPEC,
            cache=CacheConfig(block_size=4),
            partition=partition,
            num_prompt_tokens=num_prompt_tokens,
            policy=Policy(),
        )

    # 6 blocks of 4 hold 24 tokens; the last of the 5 output tokens needs no slot.
    check(20)
    with pytest.raises(QuotaExceeded) as info:
        check(21)
    assert info.value.metadata == {
        "quota": "partitions.gpu",
        "used_bytes": "0",
        "needed_blocks": "7",
        "limit_blocks": "6",
        "block_size": "4",
    }


def test_a_full_queue_is_refused_with_retry_advice() -> None:
    config = EngineConfig(max_running=2, max_waiting=3)
    admission.check_load(request(), config, load(num_requests=4))

    with pytest.raises(ClusterOverloaded) as info:
        admission.check_load(request(), config, load(num_requests=5))
    assert info.value.retry_after_s == 3.0


def test_a_deadline_before_the_expected_first_token_is_refused() -> None:
    admission.check_load(request(deadline_s=5.0), EngineConfig(), load(first_token_s=4.0))
    admission.check_load(request(deadline_s=5.0), EngineConfig(), load(first_token_s=None))

    with pytest.raises(DeadlineInfeasible, match=r"expected in 6\.0 s"):
        admission.check_load(request(deadline_s=5.0), EngineConfig(), load(first_token_s=6.0))


def test_a_deadline_that_has_passed_is_refused() -> None:
    with pytest.raises(DeadlineInfeasible):
        admission.check_load(request(deadline_s=0.0), EngineConfig(), load())
