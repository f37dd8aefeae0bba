"""Pooled heads are admitted only where their measured cost is within the bound."""

import pytest

from kvcluster.config import EngineConfig
from kvcluster.engine.policies import choose_policy
from kvcluster.errors import ConfigError, PolicyUnsupported
from kvcluster.policy import Menu, Method, Parameter, PlugPoint
from kvcluster.policy_bounds import MeasuredRecipe
from tests.fake_engine import FakeCluster, request

MENU = Menu(
    (
        Method(
            plug_point=PlugPoint.SHARING,
            name="pooled",
            meaning="fewer heads",
            parameters=(Parameter(name="heads", meaning="that are left", default=1, lowest=1),),
        ),
        Method(plug_point=PlugPoint.CODEC, name="int4", meaning="4 bits"),
        Method(plug_point=PlugPoint.RETENTION, name="window", meaning="the last tokens"),
    )
)


def recipe(policy: str, increase: float, ratio: float = 12.0) -> MeasuredRecipe:
    return MeasuredRecipe(
        policy=policy,
        ratio=ratio,
        perplexity_increase=increase,
        perplexity_error=0.002,
        recall=1.0,
    )


def cluster(
    *recipes: MeasuredRecipe, default_policy: str = "", refused: str = "", **config: object
) -> FakeCluster:
    return FakeCluster(
        menu=MENU,
        encoded_per_page={"int4": (32,), "pooled + int4": (32,), "pooled + exact": (16,)},
        recipes=recipes,
        default_policy=default_policy,
        refused={refused: "for another reason"} if refused else {},
        config=EngineConfig(prefill_chunk_tokens=16, shard_min_tokens=16, **config),  # type: ignore[arg-type]
    )


def chosen(fake: FakeCluster, policy: str) -> str:
    return str(choose_policy(request(policy=policy), fake.engine.parts).policy)


def refusal(fake: FakeCluster, policy: str) -> str:
    with pytest.raises(PolicyUnsupported) as info:
        chosen(fake, policy)
    return info.value.message


def test_what_was_not_measured_is_refused_and_the_way_to_measure_it_told() -> None:
    message = refusal(cluster(recipe("int4", 0.001)), "int4 + pooled")

    assert message.startswith("policy: pooled + int4 cannot be served with fake: pooled heads ruin")
    assert "`kvcluster calibrate --policy 'pooled + int4'`" in message
    assert "--set engine.admit_unmeasured_pooling=true" in message


def test_what_was_measured_over_the_bound_is_refused_with_its_cost() -> None:
    message = refusal(cluster(recipe("pooled + int4", 0.183)), "pooled + int4")

    assert "+18.30% with it (± 0.20%), over the bound of 1.00%" in message
    assert "--set engine.max_pooling_loss" in message


def test_what_was_measured_within_the_bound_is_served() -> None:
    assert chosen(cluster(recipe("pooled+int4", 0.01)), "pooled + int4") == "pooled + int4"


def test_the_operator_can_raise_the_bound() -> None:
    fake = cluster(recipe("pooled + int4", 0.183), max_pooling_loss=0.2)

    assert chosen(fake, "pooled + int4") == "pooled + int4"


def test_the_operator_can_admit_what_was_not_measured_but_not_so_what_is_too_costly() -> None:
    fake = cluster(recipe("pooled + int4", 0.183), admit_unmeasured_pooling=True)

    assert chosen(fake, "pooled:heads=2 + int4") == "pooled:heads=2 + int4"
    assert "over the bound" in refusal(fake, "pooled + int4")


def test_a_measurement_of_other_heads_or_another_codec_counts_for_nothing() -> None:
    fake = cluster(recipe("pooled:heads=2 + int4", 0.001), recipe("pooled", 0.001))

    assert "has not been measured" in refusal(fake, "pooled + int4")


def test_a_retention_is_admitted_with_the_cost_of_all_tokens_or_its_own() -> None:
    alone = recipe("pooled + int4", 0.001)

    assert chosen(cluster(alone), "pooled + int4 + window") == "pooled + int4 + window"
    costly = cluster(alone, recipe("pooled + int4 + window", 0.5))
    assert "over the bound" in refusal(costly, "pooled + int4 + window")


def test_a_recipe_that_is_not_on_the_menu_counts_for_nothing() -> None:
    fake = cluster(recipe("pooled + int5", 0.001), recipe("pooled + int4", 0.001))

    assert chosen(fake, "pooled + int4") == "pooled + int4"
    assert "has not been measured" in refusal(fake, "pooled")


def test_what_the_model_cannot_have_is_refused_for_that_reason() -> None:
    fake = cluster(refused="pooled + int4", admit_unmeasured_pooling=True)

    assert "for another reason" in refusal(fake, "pooled + int4")


def test_policies_that_pool_nothing_are_not_asked_for_measurements() -> None:
    assert chosen(cluster(), "int4 + window") == "int4 + window"


def test_a_bound_passes_over_what_is_not_admitted() -> None:
    recipes = (recipe("pooled + int4", 0.183), recipe("int4", 0.002, ratio=3.8))

    assert chosen(cluster(*recipes), "auto: ppl<=50%") == "int4"
    assert chosen(cluster(*recipes, max_pooling_loss=0.2), "auto: ppl<=50%") == "pooled + int4"


def test_an_engine_does_not_start_with_a_default_that_is_not_admitted() -> None:
    with pytest.raises(ConfigError, match=r"^default_policy: .*has not been measured"):
        cluster(default_policy="pooled + int4")


@pytest.mark.parametrize("policy", ["pooled + int4", "pooled"])
def test_pooled_requests_hold_encoded_blocks_and_give_them_back(policy: str) -> None:
    fake = cluster(admit_unmeasured_pooling=True)
    before = [rank.num_free for rank in fake.partition.statistics().ranks]

    generation = fake.submit(list(range(1, 41)), policy=policy)
    fake.step()
    held = fake.partition.num_used
    fake.run()

    assert held > 0
    assert fake.output(generation)
    assert [rank.num_free for rank in fake.partition.statistics().ranks] == before
