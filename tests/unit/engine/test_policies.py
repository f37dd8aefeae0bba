"""Which policy a request gets, and what this model refuses, before anything is kept of it."""

import asyncio

import pytest

from kvcluster.engine.api import Admitted
from kvcluster.engine.policies import choose_policy
from kvcluster.engine.service import EngineService
from kvcluster.errors import ConfigError, InvalidField, PolicyUnsupported
from kvcluster.policy import Menu, Method, Parameter, PlugPoint
from kvcluster.policy_bounds import MeasuredRecipe
from kvcluster.types import Policy, TenantId
from tests.fake_engine import FakeCluster, model_spec, request
from tests.unit.engine.serving import RingExecutor

RED = TenantId("red")
MENU = Menu(
    (
        Method(plug_point=PlugPoint.CODEC, name="int4", meaning="4 bits"),
        Method(
            plug_point=PlugPoint.CODEC,
            name="latent",
            meaning="projections",
            parameters=(Parameter(name="r", meaning="rank", default=0.5, lowest=0, highest=1),),
        ),
        Method(plug_point=PlugPoint.RETENTION, name="window", meaning="the last tokens"),
    )
)


def recipe(policy: str, ratio: float) -> MeasuredRecipe:
    return MeasuredRecipe(
        policy=policy, ratio=ratio, perplexity_increase=0.004, perplexity_error=0.001, recall=1.0
    )


def cluster(**fields: object) -> FakeCluster:
    return FakeCluster(menu=MENU, encoded_per_page={"int4": (32,)}, **fields)  # type: ignore[arg-type]


def chosen(fake: FakeCluster, **fields: object) -> tuple[str, str]:
    found = choose_policy(request(**fields), fake.engine.parts)
    return str(found.policy), found.source


def test_a_request_comes_before_its_tenant_before_the_model_before_exact() -> None:
    model_and_tenant = cluster(default_policy="int4", tenant_policies={RED: "window"})

    assert chosen(model_and_tenant, tenant=RED, policy="latent") == ("latent", "request")
    assert chosen(model_and_tenant, tenant=RED) == ("exact + window", "tenant")
    assert chosen(model_and_tenant, tenant=TenantId("blue")) == ("int4", "model")
    assert chosen(cluster()) == ("exact", "deployment")


@pytest.mark.parametrize("policy", ["", "  "])
def test_an_empty_policy_takes_the_default_whole(policy: str) -> None:
    fake = cluster(default_policy="int4 + window")

    assert chosen(fake, policy=policy) == ("int4 + window", "model")
    assert chosen(fake, policy="window") == ("exact + window", "request")


def test_a_request_can_ask_for_exact_where_the_default_is_not() -> None:
    assert chosen(cluster(default_policy="int4"), policy="exact") == ("exact", "request")


def test_the_first_event_tells_policy_source_and_bound() -> None:
    fake = cluster(recipes=(recipe("int4", 3.8),))

    first = fake.events(fake.engine.submit(request(policy="auto:ppl<=0.50%")))[0]

    assert isinstance(first, Admitted)
    assert (first.policy, first.policy_source) == ("int4", "request")
    assert first.policy_bound == "auto: ppl<=0.5%"


def test_a_policy_that_is_named_has_no_bound() -> None:
    fake = cluster()

    first = fake.events(fake.engine.submit(request(policy="int4")))[0]

    assert isinstance(first, Admitted)
    assert (first.policy, first.policy_bound) == ("int4", "")


def test_a_bound_passes_over_what_this_deployment_does_not_offer() -> None:
    recipes = (recipe("gone", 9.0), recipe("latent:r=2", 8.0), recipe("latent", 7.0))
    fake = cluster(recipes=(*recipes, recipe("int4", 3.8)), refused={"latent": "no bases"})

    assert chosen(fake, policy="auto: ppl<=1%") == ("int4", "request")


def test_a_recipe_is_served_under_its_canonical_text() -> None:
    fake = cluster(recipes=(recipe("latent:r=0.50+window", 3.8),))

    assert chosen(fake, policy="auto: ratio>=2") == ("latent + window", "request")


def test_a_policy_that_the_model_cannot_serve_is_refused_with_the_reason() -> None:
    fake = cluster(refused={"latent:r=0.25": "it has no calibration"})

    with pytest.raises(PolicyUnsupported) as info:
        fake.engine.submit(request(policy="latent: r=25%"))

    assert info.value.message == (
        "policy: latent:r=0.25 cannot be served with fake: it has no calibration"
    )
    assert info.value.metadata["policy"] == "latent:r=0.25"
    assert (fake.engine.num_known, fake.num_leaked) == (0, 0)


def test_a_bound_without_measurements_is_refused_and_nothing_is_kept() -> None:
    fake = cluster()

    with pytest.raises(PolicyUnsupported, match="kvcluster calibrate"):
        fake.engine.submit(request(policy="auto: ppl<=1%"))
    assert fake.engine.num_known == 0


def test_a_refusal_disturbs_no_neighbour() -> None:
    fake, alone = cluster(refused={"latent": "no bases"}), cluster()
    prompt = list(range(1, 21))
    generation = fake.submit(prompt)
    fake.step()
    for policy in ("latent", "int3", "int4 +"):
        with pytest.raises((InvalidField, PolicyUnsupported)):
            fake.submit(prompt, policy=policy)
    fake.run()

    expected = alone.submit(prompt)
    alone.run()
    assert fake.output(generation) == alone.output(expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"default_policy": "int5"}, r"^default_policy: at character 1: .* \(in 'int5'\)$"),
        ({"default_policy": "latent"}, r"^default_policy: .*no bases \(in 'latent'\)$"),
        ({"default_policy": "auto: ppl<=1%"}, "^default_policy: auto: .*`kvcluster calibrate`"),
        ({"tenant_policies": {RED: "int4 +"}}, "^tenant_policies.red: .*at character 7"),
    ],
)
def test_an_engine_does_not_start_with_a_default_that_it_cannot_serve(
    fields: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        cluster(refused={"latent": "no bases"}, **fields)


async def test_an_estimate_has_the_policy_and_its_bytes_also_of_what_is_refused() -> None:
    fake = cluster(spec=model_spec(max_context_tokens=1000), default_policy="int4")
    service = EngineService(fake.engine, RingExecutor(fake, asyncio.Event()), nodes=["a", "b"])

    exact, encoded, refused, unknown = [
        await service.estimate(request(1, input_tokens=tokens, policy=policy))
        for tokens, policy in ((600, "exact"), (600, ""), (2000, ""), (600, "int5"))
    ]

    assert (exact.policy, encoded.policy, refused.policy, unknown.policy) == (
        ("exact", "int4", "int4", "")
    )
    # 150 blocks of 4 tokens: 2 stay exact, 149 are encoded, 32 of them in a page of 8 exact ones.
    assert encoded.kv_bytes * 150 == exact.kv_bytes * (2 + 5 * 8)
    assert (refused.reason, unknown.reason) == ("CONTEXT_TOO_LONG", "INVALID_FIELD")


async def test_the_status_tells_what_is_offered_and_the_default() -> None:
    fake = cluster(default_policy="int4")
    service = EngineService(fake.engine, RingExecutor(fake, asyncio.Event()), nodes=["a", "b"])

    status = await service.status()

    assert [method.name for method in status.menu.at(PlugPoint.CODEC)] == [
        "exact",
        "int4",
        "latent",
    ]
    assert status.default_policy == Policy(codec="int4")


def test_the_default_of_the_model_is_known() -> None:
    assert cluster(default_policy="int4").engine.default_policy == Policy(codec="int4")
    assert cluster().engine.default_policy == Policy()
