"""What is counted as idle as users come and go is what looking at every block finds."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvcluster.cache.block_keys import BlockKey
from kvcluster.cache.block_pool import BlockPool
from kvcluster.cache.block_table import BlockTable
from kvcluster.cache.exact_region import ExactRegion
from kvcluster.cache.held_forms import HeldForms
from kvcluster.cache.partition import Partition
from kvcluster.cache.prefix_cache import PrefixCache
from kvcluster.types import DEFAULT_TENANT, EXACT, Rank
from tests.unit.cache.test_prefix_cache import named

CODEC, PER_PAGE, BLOCK = "int4", 24, 4
RANKS, GROUPS = 2, 2
FORMS = {
    EXACT: HeldForms((None, 6), BLOCK),
    CODEC: HeldForms((None, 6), BLOCK, codec=CODEC, region=ExactRegion(1)),
}
prompts = st.lists(st.sampled_from([1, 1, 2]), min_size=1, max_size=5).map(
    lambda blocks: [token for token in blocks for _ in range(BLOCK)]
)
codecs, ranks = st.sampled_from(sorted(FORMS)), st.integers(0, RANKS - 1)


class IdleMachine(RuleBasedStateMachine):
    """Sequences of one tenant come, are kept, are adopted by others, and go."""

    @initialize()
    def build(self) -> None:
        self.partition = Partition(
            [[BlockPool(64) for _ in range(GROUPS)] for _ in range(RANKS)],
            tenant=DEFAULT_TENANT,
            encoded_per_page=lambda _codec: [PER_PAGE] * GROUPS,
        )
        self.cache = PrefixCache(self.partition)
        self.tables: list[BlockTable] = []
        self.known: list[list[BlockKey]] = [[]]

    @rule(prompt=prompts, codec=codecs, rank=ranks, stays=st.booleans())
    def compute(self, prompt: list[int], codec: str, rank: int, stays: bool) -> None:
        keys, tokens = named(prompt)
        table, forms = BlockTable(GROUPS, codec), FORMS[codec]
        if all(self.partition.append(table, Rank(rank)) for _ in keys.keys):
            # The keys of a codec's blocks are others, as they are in an engine.
            names = [codec.encode() + key for key in keys.keys]
            self.cache.keep(names, tokens, table, forms, len(names))
            self.known.append(names)
        self.tables.append(table)
        if not stays:
            self.leave(len(self.tables) - 1)

    @rule(prompt=prompts, codec=codecs)
    def adopt(self, prompt: list[int], codec: str) -> None:
        keys, tokens = named(prompt)
        blocks = self.cache.match([codec.encode() + key for key in keys.keys], tokens)
        table = BlockTable(GROUPS, codec)
        for entry in self.cache.usable(blocks, FORMS[codec], len(blocks)):
            if self.cache.shared.adopt(table, entry) is None:
                break
        self.tables.append(table)

    @rule(which=st.integers(0, 99))
    def leave(self, which: int) -> None:
        if self.tables:
            self.partition.release_all(self.tables.pop(which % len(self.tables)))

    @rule(which=st.integers(0, 99), holder=st.sampled_from("ab"), pinned=st.booleans())
    def hold(self, which: int, holder: str, pinned: bool) -> None:
        self.cache.hold(self.known[which % len(self.known)], holder, pinned=pinned)

    @rule(which=st.integers(0, 99), holder=st.sampled_from("ab"))
    def let_go(self, which: int, holder: str) -> None:
        self.cache.let_go(self.known[which % len(self.known)], holder)

    @rule(group=st.integers(0, GROUPS - 1), count=st.integers(1, 9))
    def evict(self, group: int, count: int) -> None:
        """Gives what was promised."""
        idle, used = self.cache.idle_units()[group], self.partition.used(group)
        self.cache.evict(group, count)
        if self.partition.used(group) > used - min(idle, count):
            assert self.cache.idle_units()[group] == 0, "it said that it could be had"

    @rule(which=st.integers(0, 99))
    def drop(self, which: int) -> None:
        first = self.cache.first_unheld(self.known[which % len(self.known)])
        for codec, entry in [] if first is None else self.cache.drop_tree(first):
            self.cache.shared.release(codec, entry)

    @rule()
    def clear(self) -> None:
        self.cache.clear()

    @invariant()
    def the_count_is_exact(self) -> None:
        if hasattr(self, "cache"):
            self.cache.check()
            if not self.tables and not len(self.cache):
                assert self.cache.idle_units() == (0,) * GROUPS
                assert self.partition.num_used == 0


IdleMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestIdleBlocks = IdleMachine.TestCase


def test_idle_blocks_of_a_codec_count_as_what_they_take() -> None:
    machine = IdleMachine()
    machine.build()
    machine.compute([1] * 5 * BLOCK, CODEC, 1, stays=False)

    # Exact: the first and the last one; encoded: three, of which a page holds 24 in 8 blocks' room.
    assert machine.cache.idle_units() == (2 + 3 // 3, 1)
    assert machine.cache.idle_on_ranks()[0] == 0
