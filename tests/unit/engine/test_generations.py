import math

import pytest

from kvcluster.engine.generation import Generation
from kvcluster.engine.generations import Generations
from kvcluster.engine.request import Request
from kvcluster.engine.stream import OutputText
from kvcluster.errors import GenerationNotFound
from kvcluster.types import GenerationId, Policy, TenantId
from tests.fake_engine import model_spec, request


def add(generations: Generations, name: str, *, arrival: int, tenant: str = "red") -> Generation:
    spec = request(tenant=TenantId(tenant))
    generation = Generation(
        Request(GenerationId(name), spec, Policy(), arrival),
        OutputText(None, ()),
        model_spec(),
        now=0.0,
        unix_s=0.0,
    )
    generations.active[generation.id] = generation
    return generation


def test_an_ended_generation_is_found_until_it_expires() -> None:
    generations = Generations(max_retained=9)
    ended = add(generations, "a", arrival=1)
    ended.expires_at = 5.0
    generations.retain(ended)
    assert generations.next_expiry == 5.0

    generations.expire(4.9)
    assert generations.find(ended.id) is ended
    generations.expire(5.0)
    with pytest.raises(GenerationNotFound, match="'a'"):
        generations.find(ended.id)
    assert generations.next_expiry == math.inf


def test_the_first_ended_makes_room_when_too_many_are_kept() -> None:
    generations = Generations(max_retained=1)
    first = add(generations, "a", arrival=1)
    second = add(generations, "b", arrival=2)
    generations.retain(second)
    generations.retain(first)

    assert generations.knows(first.id)
    assert not generations.knows(second.id)
    assert (generations.num_known, generations.num_retained) == (1, 1)


def test_a_tenant_that_ends_many_makes_room_of_its_own() -> None:
    generations = Generations(max_retained=4)
    kept = [add(generations, f"b{index}", arrival=index, tenant="blue") for index in range(2)]
    for generation in kept:
        generations.retain(generation)
    flood = [add(generations, f"r{index}", arrival=9 + index) for index in range(50)]
    for generation in flood:
        generations.retain(generation)

    assert all(generations.knows(each.id) for each in (*kept, *flood[-2:]))
    assert (generations.num_known, len(generations.records(TenantId("red")))) == (4, 2)


def test_ended_generations_of_one_tenant_are_forgotten() -> None:
    generations = Generations(max_retained=9)
    red, blue = add(generations, "a", arrival=1), add(generations, "b", arrival=2, tenant="blue")
    generations.retain(red)
    generations.retain(blue)
    generations.forget(TenantId("red"))
    generations.forget(TenantId("nobody"))

    assert generations.tenants() == {"blue"}
    assert not generations.knows(red.id)


def test_unfinished_generations_never_expire() -> None:
    generations = Generations(max_retained=1)
    active = add(generations, "a", arrival=1)
    generations.expire(1e12)

    assert generations.find(active.id) is active


def test_records_are_the_tenants_own_newest_first() -> None:
    generations = Generations(max_retained=9)
    oldest = add(generations, "a", arrival=1)
    add(generations, "b", arrival=2, tenant="blue")
    add(generations, "c", arrival=3)
    generations.retain(oldest)

    records = generations.records(TenantId("red"))
    assert [record.generation for record in records] == ["c", "a"]
