"""Which backend gets a call."""

import pytest

from kvcluster.engine.api import GenerationRequest
from kvcluster.errors import InvalidField, ModelNotFound, RankLost
from kvcluster.router.routing import Routes
from tests.unit.router.fake_backend import FakeBackend, model_spec


async def test_the_least_loaded_backend_is_taken() -> None:
    busy, idle = FakeBackend(), FakeBackend()
    await busy.open(GenerationRequest(model="echo", max_output_tokens=1))
    routes = Routes([busy, idle])
    await routes.refresh()

    route = await routes.resolve("echo")

    assert route.backend is idle


async def test_a_backend_that_is_not_ready_is_the_last_choice() -> None:
    starting, busy = FakeBackend(), FakeBackend()
    starting.is_ready = False
    await busy.open(GenerationRequest(model="echo", max_output_tokens=1))

    route = await Routes([starting, busy]).resolve("echo")

    assert route.backend is busy


async def test_one_request_id_always_meets_the_same_backend() -> None:
    backends = [FakeBackend() for _ in range(4)]
    routes = Routes(backends)
    first = [await routes.resolve("echo", request_id=str(number)) for number in range(40)]
    for backend in backends[:2]:
        await backend.open(GenerationRequest(model="echo", max_output_tokens=1))
    await routes.refresh()

    second = [await routes.resolve("echo", request_id=str(number)) for number in range(40)]

    assert first == second
    assert len({id(route.backend) for route in first}) == len(backends)


async def test_a_model_that_is_not_served_is_answered_with_those_that_are() -> None:
    routes = Routes([FakeBackend(model_spec("one")), FakeBackend(model_spec("two"))])

    with pytest.raises(ModelNotFound, match="served: one, two"):
        await routes.resolve("three")


async def test_no_name_is_enough_for_one_model_only() -> None:
    one, two = FakeBackend(model_spec("one")), FakeBackend(model_spec("two"))

    assert (await Routes([one]).resolve("")).model == "one"
    with pytest.raises(InvalidField, match="several"):
        await Routes([one, two]).resolve("")


async def test_a_lost_backend_does_not_hide_the_others() -> None:
    lost, other = FakeBackend(model_spec("one")), FakeBackend(model_spec("two"))
    lost.status_failure = RankLost("rank 0 was lost")
    routes = Routes([lost, other])

    assert [status.model.name for status in await routes.models()] == ["two"]
    assert routes.is_ready


async def test_without_any_backend_a_call_may_be_tried_again() -> None:
    routes = Routes([])

    with pytest.raises(RankLost) as raised:
        await routes.resolve("")

    assert raised.value.retry_after_s == 1.0
    assert not routes.is_ready
