"""Names of blocks that collide, by force: tokens and what came before them are compared, so nothing
of another prompt is read, of the same tenant or of another."""

from hashlib import blake2b

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcluster.cache.block_keys import BlockKeys
from kvcluster.cache.prefix_cache import PrefixCache
from kvcluster.config import CacheConfig, EngineConfig
from kvcluster.engine.api import FinishReason
from kvcluster.types import DEFAULT_TENANT, TenantId
from tests.unit.engine.test_prefixes import PROMPT, alone, cached, cluster, ran

TENANTS = (DEFAULT_TENANT, TenantId("blue"), TenantId("red"))
blocks = st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=8)


@pytest.fixture(params=[0, 1, 2, 4], ids=lambda bits: f"{bits} bits")
def bits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Names have so many bits, and all tenants have one secret: collisions within and across."""
    monkeypatch.setattr(
        BlockKeys,
        "_digest",
        lambda _self, content: bytes(
            [blake2b(content, digest_size=1).digest()[0] & ((1 << request.param) - 1)]
        ),
    )
    return int(request.param)


def test_prompts_whose_blocks_have_one_name_all_get_their_own_tokens(bits: int) -> None:
    fake = cluster()

    @settings(max_examples=60, deadline=None)
    @given(prompts=st.lists(st.tuples(blocks, st.sampled_from(TENANTS)), min_size=2, max_size=6))
    def compare(prompts: list[tuple[list[int], TenantId]]) -> None:
        for numbers, tenant in prompts:
            prompt = [token for number in numbers for token in [number] * 4] + [9]
            generation = fake.submit(prompt, tenant=tenant)
            fake.run()
            assert fake.reason(generation) is FinishReason.LENGTH
            assert fake.output(generation) == alone(fake, prompt)

    compare()


def test_another_tenants_equal_prompt_is_not_cached_though_its_blocks_have_the_same_names(
    bits: int,
) -> None:
    fake = cluster()
    ran(fake, PROMPT)

    # The control: the tenant itself finds at least the first block, which took its name first.
    assert ran(fake, PROMPT) >= 4
    other = fake.submit(PROMPT, tenant=TenantId("blue"))
    fake.run()
    assert cached(fake, other) == 0


@pytest.mark.parametrize(
    "second",
    [
        pytest.param([2] * 4 + [1] * 4, id="the same blocks in another order"),
        pytest.param([3] * 4 + [2] * 4, id="the same block after another"),
        pytest.param([1] * 4 + [3] * 4, id="another block after the same"),
        pytest.param([1] * 8, id="a block after itself"),
    ],
)
def test_a_block_is_read_only_where_it_was_computed(
    second: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BlockKeys, "_digest", lambda _self, content: content[-16:-15])
    fake = cluster(
        cache=CacheConfig(block_size=4, exact_recent_tokens=0),
        config=EngineConfig(prefill_chunk_tokens=8, shard_min_tokens=1000),
    )
    ran(fake, [1] * 4 + [2] * 4 + [9])

    num_equal = 4 if second[:4] == [1] * 4 else 0
    assert ran(fake, [*second, 9]) == num_equal
    assert ran(fake, [1] * 4 + [2] * 4 + [9]) == 8


def test_without_looking_at_what_came_before_the_ring_notices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The control: the fake ring refuses blocks of other tokens."""
    monkeypatch.setattr(BlockKeys, "_digest", lambda _self, content: content[-16:-15])
    monkeypatch.setattr(
        PrefixCache,
        "match",
        lambda self, keys, _tokens, start=0: [
            self._blocks[key] for key in keys[start:] if key in self._blocks
        ],
    )
    fake = cluster()
    ran(fake, [1] * 4 + [2] * 4 + [9])

    with pytest.raises(AssertionError):
        ran(fake, [2] * 4 + [1] * 4 + [9])
