"""Whatever three tenants insert, look up, evict, fork, offload, restore and delete: what is read is
the reader's own and of its own tokens, and the books of memory and disk are exact.

Blocks hold here what was written into them: the tenant, the policy, and all tokens up to theirs.
"""

from array import array
from typing import ClassVar, NamedTuple

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from kvcluster.cache.block_keys import BlockKeys, Scope
from kvcluster.cache.block_pool import BlockPool
from kvcluster.cache.block_table import BlockTable, TableEntry
from kvcluster.cache.exact_region import ExactRegion
from kvcluster.cache.held_forms import Form, HeldForms
from kvcluster.cache.partitions import CachePartitions
from kvcluster.cache.prefix_cache import PrefixCache
from kvcluster.cache.tier import TierLedger, TierShare
from kvcluster.engine.context import Context
from kvcluster.engine.context_api import ContextRequest
from kvcluster.engine.restored_blocks import RestoredBlocks
from kvcluster.errors import AdmissionError
from kvcluster.types import EXACT, NO_BLOCK, PAGE_BLOCKS, Policy, Rank, TenantId

SIZE, WINDOWS, NUM_RANKS, NUM_BLOCKS = 4, (None, 8), 2, 3 * PAGE_BLOCKS
PER_PAGE = {"int8": (2 * PAGE_BLOCKS, 2 * PAGE_BLOCKS)}
FORMS = {
    EXACT: HeldForms(WINDOWS, SIZE),
    "int8": HeldForms(WINDOWS, SIZE, "int8", ExactRegion(1)),
}
TENANTS = tuple(map(TenantId, ("red", "blue", "green")))
DISK_BYTES, DISK_LIMIT, ENTRY_BYTES = 60, 30, 1
OPERATIONS = 50
"""Of each example."""

tenants = st.sampled_from(TENANTS)
names = st.sampled_from(["one", "two", "three"])
codecs = st.sampled_from(sorted(FORMS))
picks = st.integers(0, 99)
prompts = st.tuples(st.integers(0, 2), st.integers(1, 9)).map(
    lambda drawn: array("I", [drawn[0]] * (SIZE * drawn[1]))
)

Place = tuple[int, int, str, int]
"""Rank, group, codec, block."""
Content = tuple[str, str, bytes]
"""Tenant, codec, tokens."""


class OnDisk(NamedTuple):
    entries: list[list[Content | None]]
    num_bytes: int


class ContextMachine(RuleBasedStateMachine):
    """`memory`: what every block holds; `disk`: what is offloaded of each context."""

    operations: ClassVar[list[int]] = [0]
    counts: ClassVar[dict[str, int]] = {}
    """How often each path was gone to its end."""

    @initialize()
    def begin(self) -> None:
        pools = [[BlockPool(NUM_BLOCKS) for _ in WINDOWS] for _ in range(NUM_RANKS)]
        self.partitions = CachePartitions(
            pools,
            block_bytes=(1, 1),
            encoded_per_page=lambda codec: PER_PAGE[codec],
            exact_recent=1,
        )
        self.partitions.apply({TENANTS[0]: TierShare(floor_bytes=10, limit_bytes=60)})
        self.ledger = TierLedger([DISK_BYTES], unit_bytes=[1])
        self.ledger.apply({tenant: TierShare(limit_bytes=DISK_LIMIT) for tenant in TENANTS})
        self.caches = {tenant: PrefixCache(self.partitions.of(tenant)) for tenant in TENANTS}
        self.memory: dict[Place, Content] = {}
        self.contexts: dict[tuple[TenantId, str], Context] = {}
        self.disk: dict[tuple[TenantId, str], OnDisk] = {}
        self.running: list[tuple[TenantId, BlockTable]] = []
        for place, tenant in enumerate(TENANTS):
            self.insert(tenant, "one", array("I", [place] * SIZE * 5), "int8" if place else EXACT)
            self.offload(place)

    @rule(tenant=tenants, name=names, tokens=prompts, codec=codecs)
    def insert(self, tenant: TenantId, name: str, tokens: "array[int]", codec: str) -> None:
        """A context is uploaded and computed, under a name that may have been another's."""
        self.drop(tenant, name)
        context = self.named(tenant, name, tokens, codec)
        table, partition = BlockTable(len(WINDOWS), codec), self.partitions.of(tenant)
        for index in range(len(context.keys.keys)):
            entry = partition.append(table, Rank(index % NUM_RANKS))
            while entry is None and partition.make_room(table):
                entry = partition.append(table, Rank(index % NUM_RANKS))
            if entry is None:
                partition.release_all(table)
                self.zero()
                return
        self.zero()
        forms = FORMS[codec].at(len(table))
        for index in range(len(table)):
            self.write(context, index, table.entry(index))
            if Form.ENCODED in forms.needs(index):
                partition.release_exact(table, index)
        for group, released in enumerate(forms.released):
            partition.release_below(table, group, released.stop, after=released.start)
        keys = context.keys.keys
        self.caches[tenant].keep(keys, tokens, table, FORMS[codec], len(keys))
        partition.release_all(table)
        self.hold(context)
        assert self.look(context) == len(keys), "what was kept just now is there"
        self.count("insert")

    @rule(tenant=tenants, pick=picks)
    def lookup(self, tenant: TenantId, pick: int) -> None:
        """Tokens that somebody has, asked for by one tenant."""
        theirs = self.picked(pick)
        if theirs is None:
            return
        num_found = self.look(self.named(tenant, "", theirs.tokens, theirs.policy.storage))
        if num_found:
            assert tenant == theirs.tenant or any(
                own.tokens[:SIZE] == theirs.tokens[:SIZE] for own in self.of(tenant)
            ), "what is found is the tenant's own"
            self.count("lookup")

    @rule(tenant=tenants, group=st.integers(0, 1), count=st.integers(1, 40))
    def evict(self, tenant: TenantId, group: int, count: int) -> None:
        before = self.partitions.of(tenant).used(group)
        self.caches[tenant].evict(group, count)
        if self.partitions.of(tenant).used(group) < before:
            self.count("evict")

    @rule(tenant=tenants, count=st.sampled_from([3, 20, 1000]))
    def generate(self, tenant: TenantId, count: int) -> None:
        """A generation takes blocks, which are no cache's."""
        table, partition = BlockTable(len(WINDOWS)), self.partitions.of(tenant)
        for index in range(count):
            if partition.append(table, Rank(index % NUM_RANKS)) is None:
                break
        self.running.append((tenant, table))

    @rule(pick=picks)
    def end(self, pick: int) -> None:
        if self.running:
            tenant, table = self.running.pop(pick % len(self.running))
            self.partitions.of(tenant).release_all(table)

    @rule(pick=picks, other=names, num_blocks=st.integers(1, 9))
    def fork(self, pick: int, other: str, num_blocks: int) -> None:
        parent = self.picked(pick)
        if parent is None or parent.id == other:
            return
        self.drop(parent.tenant, other)
        tokens = parent.tokens[: num_blocks * SIZE]
        self.hold(self.named(parent.tenant, other, tokens, parent.policy.storage))
        self.count("fork")

    @rule(pick=picks)
    def offload(self, pick: int) -> None:
        context = self.picked(pick)
        if context is None:
            return
        tenant, name = context.key
        entries = self.entries_of(context)
        num_bytes = len(context.keys.keys) * ENTRY_BYTES
        used = self.ledger.use(tenant).used_bytes
        if len(entries) < len(context.keys.keys) or not self.ledger.take(tenant, 0, num_bytes):
            assert len(entries) < num_bytes or used + num_bytes > DISK_LIMIT
            return
        if (tenant, name) in self.disk:
            self.ledger.give_back(tenant, 0, self.disk[tenant, name].num_bytes)
        held = [[self.read(entry, group) for group in range(len(WINDOWS))] for entry in entries]
        self.disk[tenant, name] = OnDisk(held, num_bytes)
        self.count("offload")

    @rule(pick=picks, is_spread=st.booleans(), room=st.sampled_from(["as it is", "all", "none"]))
    def restore(self, pick: int, is_spread: bool, room: str) -> None:
        """`room`: what else is in memory of the tenant's: whatever there is, nothing, or as much as
        there is place for."""
        if not self.disk:
            return
        tenant, name = sorted(self.disk)[pick % len(self.disk)]
        context, stored = self.contexts[tenant, name], self.disk[tenant, name]
        forms, cache = FORMS[context.policy.storage], self.caches[tenant]
        if room != "as it is":
            cache.evict(0, 1000)
        if room == "none":
            self.generate(tenant, 1000)
        self.zero()
        was_there = self.look(context)
        used = self.partitions.num_used
        try:
            blocks = RestoredBlocks(
                context, cache, self.partitions.of(tenant), forms, is_spread=is_spread
            )
            while blocks.take(2):
                pass
        except AdmissionError:
            assert self.partitions.num_used <= used, "what is refused takes nothing"
            self.count("refused")
            return
        finally:
            if room == "none":
                self.end(-1)
        self.zero()
        self.read_back(blocks, stored, forms)
        blocks.keep()
        self.hold(context)
        blocks.release()
        assert self.look(context) == len(context.keys.keys), "what was restored is there"
        if was_there < len(context.keys.keys):
            self.count("restore")

    def read_back(self, blocks: RestoredBlocks, stored: OnDisk, forms: HeldForms) -> None:
        """What the ranks do."""
        needs = forms.at(len(stored.entries)).needs
        placed = blocks.stored([b""] * len(stored.entries)).blocks
        for index in blocks.missing:
            block = placed[index]
            entry = TableEntry(Rank(block.rank), block.block_ids, block.encoded_ids)
            for group, content in enumerate(stored.entries[index]):
                place = place_of(entry, group, forms.codec)
                assert (place is None) == (needs(index)[group] is Form.NONE)
                if place is not None:
                    assert content is not None
                    assert place not in self.memory, "it is nobody's"
                    self.memory[place] = content

    @rule(pick=picks)
    def delete(self, pick: int) -> None:
        context = self.picked(pick)
        if context is not None:
            self.drop(*context.key)
            self.count("delete")

    def drop(self, tenant: TenantId, name: str) -> None:
        context = self.contexts.pop((tenant, name), None)
        if context is None:
            return
        cache, keys = self.caches[tenant], context.keys.keys
        cache.let_go(keys, context.uid)
        first = cache.first_unheld(keys)
        for codec, entry in cache.drop_tree(first) if first is not None else ():
            cache.shared.release(codec, entry)
        stored = self.disk.pop((tenant, name), None)
        if stored is not None:
            self.ledger.give_back(tenant, 0, stored.num_bytes)

    @rule(pick=picks)
    def restart(self, pick: int) -> None:
        """All of the memory is lost, and every context that is not on disk with it."""
        if pick % 4:
            return
        self.lose_memory()
        self.memory.clear()
        self.partitions.take_freed()
        self.contexts = {key: self.contexts[key] for key in self.disk}

    @invariant()
    def books_are_exact(self) -> None:
        if not hasattr(self, "ledger"):
            return
        self.operations[0] += 1
        self.zero()
        self.partitions.check()
        self.ledger.check()
        for tenant in TENANTS:
            own = [stored.num_bytes for key, stored in self.disk.items() if key[0] == tenant]
            assert self.ledger.use(tenant).used_bytes == sum(own) <= DISK_LIMIT

    def teardown(self) -> None:
        if hasattr(self, "ledger"):
            self.lose_memory()

    def lose_memory(self) -> None:
        for tenant, table in self.running:
            self.partitions.of(tenant).release_all(table)
        self.running.clear()
        for cache in self.caches.values():
            cache.clear()
        assert self.partitions.num_used == 0

    def named(self, tenant: TenantId, name: str, tokens: "array[int]", codec: str) -> Context:
        keys = BlockKeys(tenant.encode().ljust(32), Scope("model", codec, SIZE, ""))
        keys.extend(tokens)
        request = ContextRequest(tenant=tenant, context_id=name)
        context = Context(request, uid=name, policy=Policy(codec=codec), keys=keys, unix_s=0.0)
        context.tokens = tokens
        return context

    def picked(self, pick: int) -> Context | None:
        """One of all contexts."""
        keys = sorted(self.contexts)
        return self.contexts[keys[pick % len(keys)]] if keys else None

    def of(self, tenant: TenantId) -> list[Context]:
        return [context for context in self.contexts.values() if context.tenant == tenant]

    def hold(self, context: Context) -> None:
        self.contexts[context.key] = context
        self.caches[context.tenant].hold(context.keys.keys, context.uid, pinned=False)

    def entries_of(self, context: Context) -> list[TableEntry]:
        cache, keys = self.caches[context.tenant], context.keys.keys
        blocks = cache.match(keys, context.tokens)
        return cache.usable(blocks, FORMS[context.policy.storage], len(blocks))

    def look(self, context: Context) -> int:
        """How many blocks there are to begin with; each holds what it should."""
        entries, codec = self.entries_of(context), context.policy.storage
        forms = FORMS[codec].at(len(entries))
        for index, entry in enumerate(entries):
            own = (context.tenant, codec, context.tokens[: (index + 1) * SIZE].tobytes())
            for group, form in enumerate(forms.needs(index)):
                assert self.read(entry, group) == (None if form is Form.NONE else own)
        return len(entries)

    def read(self, entry: TableEntry, group: int) -> Content | None:
        """What an entry holds in a group, in the one form that it has there."""
        held = entry.held()[group]
        for codec, block_id in ((EXACT, held.block_id), ("int8", held.encoded_id)):
            if block_id != NO_BLOCK:
                return self.memory[held.rank, group, codec, block_id]
        return None

    def write(self, context: Context, index: int, entry: TableEntry) -> None:
        tokens = context.tokens[: (index + 1) * SIZE].tobytes()
        for group, held in enumerate(entry.held()):
            for codec, block_id in ((EXACT, held.block_id), ("int8", held.encoded_id)):
                if block_id != NO_BLOCK:
                    place = (held.rank, group, codec, block_id)
                    self.memory[place] = (context.tenant, context.policy.storage, tokens)

    def zero(self) -> None:
        for freed in self.partitions.take_freed():
            self.memory.pop((freed.rank, freed.group, freed.codec, freed.block_id), None)

    def count(self, path: str) -> None:
        self.counts[path] = self.counts.get(path, 0) + 1


def place_of(entry: TableEntry, group: int, codec: str) -> Place | None:
    held = entry.held()[group]
    if held.block_id != NO_BLOCK:
        return held.rank, group, EXACT, held.block_id
    if held.encoded_id != NO_BLOCK:
        return held.rank, group, codec, held.encoded_id
    return None


def run(machine: type[ContextMachine], operations: int) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=operations // OPERATIONS + operations // 500,
            stateful_step_count=OPERATIONS,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


PATHS = {"insert", "lookup", "evict", "fork", "offload", "restore", "refused", "delete"}


def check(operations: int) -> None:
    machine = type("Counted", (ContextMachine,), {"operations": [0], "counts": {}})
    run(machine, operations)
    assert machine.operations[0] >= operations
    assert set(machine.counts) == PATHS
    assert min(machine.counts.values()) >= operations // 1000


@pytest.mark.timeout(300)
def test_ten_thousand_operations_read_nothing_of_others_and_leave_exact_books() -> None:
    check(10_000)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_hundred_thousand_operations_read_nothing_of_others() -> None:
    check(100_000)
