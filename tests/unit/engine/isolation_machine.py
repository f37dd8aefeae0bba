"""Three tenants generate, store, fork, continue, offload, restore, evict and delete in any order,
over three tiers, while operators publish prefixes, change shares, destroy keys and restart.

The oracle is a list of what each tenant has sent and got. What is reported as cached has to be in
it, every answer is that of the tokens that were asked about, and after every operation each tier's
books are exact: those of the GPUs are the pools', those of the host and the disk the files'. `seen`
counts each path's positive control: a run in which a path found nothing proves nothing.
"""

from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from functools import wraps
from typing import Any, ClassVar

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from kvcluster.cache.tier import TierShare
from kvcluster.engine.api import FinishReason
from kvcluster.engine.context import Context
from kvcluster.engine.context_api import ContextRequest, ContextState
from kvcluster.errors import (
    ClusterOverloaded,
    ContextNotFound,
    ContextTooLong,
    QuotaExceeded,
    SpillError,
)
from kvcluster.tenancy.limits import UNLIMITED, Tier
from kvcluster.types import PUBLISHED, TenantId
from tests.fake_engine import VOCAB_SIZE, packed, sampling
from tests.fake_ring import expected_output
from tests.unit.engine.three_tiers import TENANTS, Sizes, ThreeTiers

COMMON = [position * position % (VOCAB_SIZE - 1) + 1 for position in range(40)]
OPERATIONS = 50
"""Of each example."""
CONTROLS = {
    *("hit", "published hit", "context", "fork", "evicted", "deleted", "refused to others"),
    *("offloaded to host", "offloaded to disk", "moved to disk", "left the host"),
    *("restored from host", "restored from disk", "found on disk", "erased", "restarted"),
}
FLOOR_BYTES = 2_000
"""Little more than a context takes, so that the second one of a tenant is borrowed in part."""

NO_ROOM = (QuotaExceeded, ContextTooLong, ClusterOverloaded)

tenants = st.sampled_from(TENANTS)
ids = st.sampled_from(["a", "b", "c"])
lengths = st.integers(0, len(COMMON))
owns = st.lists(st.integers(1, 5), min_size=1, max_size=9)
picks = st.integers(0, 99)
policies = st.sampled_from(["exact", "half"])
rarely = st.sampled_from([False] * 11 + [True])

Body = Callable[..., Coroutine[Any, Any, None]]


def acting(body: Body) -> Callable[..., None]:
    """A rule in the machine's event loop, run until nothing is left to do."""

    @wraps(body)
    def run(machine: "IsolationMachine", **drawn: Any) -> None:
        machine.run(body(machine, **drawn))

    return run


class IsolationMachine(ThreeTiers, RuleBasedStateMachine):
    """`sent`: by tenant and policy, the sequences whose blocks it may be given."""

    operations: ClassVar[list[int]] = [0]
    seen: ClassVar[Counter[str]] = Counter()

    @initialize(
        num_blocks=st.sampled_from([40, 64, 200]),
        num_ranks=st.integers(1, 3),
        host_bytes=st.sampled_from([10_000, 12_000, 40_000]),
        disk_bytes=st.sampled_from([20_000, 100_000]),
    )
    def build(self, num_blocks: int, num_ranks: int, host_bytes: int, disk_bytes: int) -> None:
        floor = TierShare(floor_bytes=FLOOR_BYTES)
        self.open(Sizes(num_blocks, num_ranks, host_bytes, disk_bytes), {TENANTS[0]: floor})
        self.sent: dict[tuple[TenantId, str], list[list[int]]] = {}
        self.contexts: dict[tuple[TenantId, str], list[int]] = {}
        self.written: dict[tuple[TenantId, str], list[int]] = {}
        """Of each context, its tokens when it was last on disk as it was."""

    @rule(askers=st.permutations(TENANTS), length=lengths, own=owns, policy=policies)
    @acting
    async def generate(
        self, askers: list[TenantId], length: int, own: list[int], policy: str
    ) -> None:
        """Insert and look up, and another one the same after it."""
        prompt = [*COMMON[:length], *own]
        for tenant in askers[:2]:
            mine = self.shared(tenant, policy, prompt)
            public = self.shared(PUBLISHED, policy, prompt)
            cached = self.answered(tenant, prompt, prompt, policy, policy=policy)
            assert cached <= max(mine, public), "it was given what it never sent"
            self.seen["hit"] += 0 < cached <= mine
            self.seen["published hit"] += cached > mine

    @rule(
        tenant=tenants, name=ids, length=lengths, own=owns, policy=policies, durable=st.booleans()
    )
    @acting
    async def upload(
        self,
        tenant: TenantId,
        name: str,
        length: int,
        own: list[int],
        policy: str,
        durable: bool,
    ) -> None:
        """A context, or more of one, which is offloaded then."""
        await self.store(tenant, name, [*COMMON[:length], *own], policy, durable=durable)

    @rule(name=ids, length=lengths, policy=policies)
    @acting
    async def fill(self, name: str, length: int, policy: str) -> None:
        """All of them upload, which takes what memory there is."""
        for place, tenant in enumerate(TENANTS):
            await self.store(tenant, name, [*COMMON[:length], place + 1], policy)

    @rule(pick=picks, own=owns)
    @acting
    async def read(self, pick: int, own: list[int]) -> None:
        tenant, name = self.picked(pick)
        tokens, used = self.contexts.get((tenant, name)), self.host_use()
        if tokens is None or not await self.brought(tenant, name):
            return
        await self.quiet()
        self.check_floors(tenant, used)
        context = self.known(tenant, name)
        if context.state is ContextState.ACTIVE:
            whole = [*tokens, *own]
            cached = self.answered(tenant, own, whole, str(context.policy), context=name)
            self.seen["context"] += cached > 0

    @rule(pick=picks, other=tenants)
    @acting
    async def reach(self, pick: int, other: TenantId) -> None:
        """Another tenant names it."""
        tenant, name = self.picked(pick)
        if (tenant, name) in self.contexts and (other, name) not in self.contexts:
            assert is_refused(lambda: self.fake.engine.contexts.find(other, name))
            assert is_refused(lambda: self.fake.submit([1], tenant=other, context=name))
            self.seen["refused to others"] += 1

    @rule(pick=picks, new=ids, keep=st.integers(0, 30))
    @acting
    async def fork(self, pick: int, new: str, keep: int) -> None:
        tenant, name = self.picked(pick)
        tokens = self.contexts.get((tenant, name))
        if tokens is None or (tenant, new) in self.contexts:
            return
        if not await self.brought(tenant, name):
            return
        parent = self.known(tenant, name)
        if parent.state is not ContextState.ACTIVE:
            return
        keep = min(keep, len(tokens))
        request = ContextRequest(tenant=tenant, context_id=new)
        try:
            made = self.fake.engine.contexts.fork(parent, request, keep)
        except NO_ROOM:
            return
        await self.quiet()
        self.contexts[tenant, new] = tokens[: keep or None]
        assert list(made.tokens) == self.contexts[tenant, new]
        self.seen["fork"] += made.state is ContextState.ACTIVE

    @rule(pick=picks)
    @acting
    async def delete(self, pick: int) -> None:
        tenant, name = self.picked(pick)
        if self.contexts.pop((tenant, name), None) is not None:
            await self.remove(self.known(tenant, name))
            self.seen["deleted"] += 1

    @rule(tenant=tenants, count=st.integers(1, 40))
    @acting
    async def evict(self, tenant: TenantId, count: int) -> None:
        cache = self.fake.engine.prefixes.cache(tenant)
        before = len(cache)
        cache.evict(0, count)
        self.seen["evicted"] += len(cache) < before

    @rule(
        tenant=tenants,
        tier=st.sampled_from([Tier.HOST, Tier.DISK]),
        has_floor=st.booleans(),
        limit=st.sampled_from([UNLIMITED, 9_000, 15_000]),
        weight=st.integers(1, 3),
    )
    @acting
    async def share(
        self, tenant: TenantId, tier: Tier, has_floor: bool, limit: int, weight: int
    ) -> None:
        """What an operator gives it. A lower limit has contexts leave the host."""
        self.shares[tenant][tier] = TierShare(
            floor_bytes=FLOOR_BYTES * has_floor, limit_bytes=limit, weight=weight
        )
        await self.push()

    @rule(tenant=tenants, pick=rarely)
    @acting
    async def erase(self, tenant: TenantId, pick: bool) -> None:
        """Its data key is destroyed, and with it all that was sealed under it."""
        if not pick:
            return
        sealed = {
            context.id for context in self.of(tenant) if context.host.spill or context.disk.spill
        }
        self.keys[tenant] += 1
        await self.push()
        await self.quiet()
        for name in sealed:
            del self.contexts[tenant, name]
            self.seen["erased"] += 1
        assert not [context for context in self.of(tenant) if context.id in sealed]

    @rule(pick=rarely)
    @acting
    async def restart(self, pick: bool) -> None:
        """Every process ends: what is on disk is found, in the state in which it was written last,
        and nothing else."""
        if not pick:
            return
        kept = {
            context.key: self.written[context.key]
            for tenant in TENANTS
            for context in self.of(tenant)
            if context.is_on_disk or context.disk.spill is not None
        }
        await self.stores.stop()
        self.seen["found on disk"] += len(kept)
        self.seen["restarted"] += 1
        self.contexts, self.sent = kept, {}
        await self.start()
        for (tenant, name), tokens in kept.items():
            context = self.known(tenant, name)
            assert list(context.tokens) == tokens
            self.note(tenant, str(context.policy), tokens)

    @rule(length=st.integers(4, len(COMMON)), policy=policies)
    @acting
    async def publish(self, length: int, policy: str) -> None:
        if (PUBLISHED, policy) not in self.contexts:
            await self.store(PUBLISHED, policy, COMMON[:length], policy, pinned=True)

    @rule(policy=policies)
    @acting
    async def withdraw(self, policy: str) -> None:
        if self.contexts.pop((PUBLISHED, policy), None) is not None:
            await self.remove(self.known(PUBLISHED, policy))
            self.sent.pop((PUBLISHED, policy), None)

    @invariant()
    def books_are_exact(self) -> None:
        if not hasattr(self, "fake"):
            return
        self.operations[0] += 1
        self.check_books()
        on_disk = (each for tenant in TENANTS for each in self.of(tenant) if each.is_on_disk)
        self.written |= {each.key: list(each.tokens) for each in on_disk}
        assert {context.key for tenant in (*TENANTS, PUBLISHED) for context in self.of(tenant)} == {
            *self.contexts
        }

    def teardown(self) -> None:
        if not hasattr(self, "folder"):
            return
        try:
            if not self.has_failed:
                self.run(self.end())
        finally:
            self.close()

    async def end(self) -> None:
        for tenant, name in self.contexts:
            await self.remove(self.known(tenant, name))
        assert self.fake.num_leaked == 0
        assert not any(self.num_bytes_in(tier) for tier in self.tiers)

    def answered(
        self, tenant: TenantId, prompt: list[int], whole: list[int], kept: str, **fields: object
    ) -> int:
        """Run a request, whose answer must be that of `whole`; returns its cached tokens. `kept`:
        the policy under which its blocks are."""
        try:
            generation = self.fake.submit(prompt, 3, tenant=tenant, **fields)
        except NO_ROOM:
            return 0
        self.fake.run()
        finished = self.fake.finished(generation)
        if finished.reason is not FinishReason.LENGTH:
            assert finished.error_kind in {error.__name__ for error in NO_ROOM}
            # What it had computed before it was given up is its tenant's all the same.
            self.note(tenant, kept, whole)
            return 0
        output = self.fake.output(generation)
        assert output == expected_output(
            whole, sampling(), max_output_tokens=3, spec=self.fake.spec
        )
        self.note(tenant, kept, [*whole, *output])
        return finished.usage.cached_input_tokens

    async def brought(self, tenant: TenantId, name: str) -> bool:
        """Have a context on the GPUs, if it is off them and fits: what is read is its own."""
        context = self.known(tenant, name)
        num_read, source = len(self.ranks.reads), Tier.HOST if context.is_on_host else Tier.DISK
        try:
            await self.driven(self.stores.bring(context))
        except NO_ROOM:
            return False
        except SpillError as error:
            raise AssertionError("what was offloaded cannot be restored") from error
        for owner in self.ranks.reads[num_read:]:
            assert (owner.tenant, owner.context) == (tenant, name), "it was read another's"
            self.seen[f"restored from {source.value}"] += 1
        return True

    async def store(
        self, tenant: TenantId, name: str, tokens: list[int], policy: str, **fields: object
    ) -> None:
        request = ContextRequest(
            tenant=tenant,
            context_id=name,
            policy=policy,
            **fields,  # type: ignore[arg-type]
        )
        contexts = self.fake.engine.contexts
        if (tenant, name) in self.contexts and not await self.brought(tenant, name):
            return
        try:
            context = contexts.open(request)
        except NO_ROOM:
            return
        context.disk.is_awaited = request.durable
        with suppress(*NO_ROOM):
            contexts.append(context, packed(tokens))
        if not len(context.received):
            await self.remove(context)
            return
        tokens = list(context.received)
        contexts.complete(context)
        on_host, used = self.on_host(), self.host_use()
        await self.quiet()
        self.check_floors(tenant, used)
        if context.state is not ContextState.ACTIVE or context.message:
            self.contexts.pop((tenant, name), None)
            await self.remove(context)
            return
        self.contexts[tenant, name] = tokens
        self.note(tenant, str(context.policy), tokens)
        self.see_moves(context, on_host)

    def see_moves(self, stored: Context, before: Sequence[Context]) -> None:
        """Count where it has gone, and where others have for it."""
        self.seen["offloaded to host"] += stored.is_on_host
        self.seen["offloaded to disk"] += stored.is_on_disk
        for left in before:
            if left is not stored and not left.is_on_host:
                self.seen["left the host"] += 1
                self.seen["moved to disk"] += left.is_on_disk

    def picked(self, pick: int) -> tuple[TenantId, str]:
        """One of the tenants' contexts, or the name of none."""
        keys = sorted(key for key in self.contexts if key[0] != PUBLISHED)
        return keys[pick % len(keys)] if keys else (TENANTS[0], "a")

    def known(self, tenant: TenantId, name: str) -> Context:
        """A context that has to be there."""
        found = [context for context in self.of(tenant) if context.id == name]
        assert found, "a context is lost"
        return found[0]

    def note(self, tenant: TenantId, policy: str, tokens: list[int]) -> None:
        self.sent.setdefault((tenant, policy), []).append(tokens)

    def shared(self, tenant: TenantId, policy: str, prompt: Sequence[int]) -> int:
        """Tokens of the prompt that the tenant may have computed before."""
        sent = self.sent.get((tenant, policy), [])
        return max((_common(prompt, tokens) for tokens in sent), default=0)

    async def remove(self, context: Context) -> None:
        self.fake.engine.contexts.delete(context)
        await self.quiet()
        assert not self.fake.engine.contexts.knows(context)


def is_refused(ask: Callable[[], object]) -> bool:
    """Like a name of nobody's."""
    try:
        ask()
    except ContextNotFound:
        return True
    return False


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def counted(operations: int, *, shrinks: bool = True) -> Counter[str]:
    """Run about so many operations; returns what was seen, and their number."""
    own = {"operations": [0], "seen": Counter(dict.fromkeys(CONTROLS, 0))}
    fresh = type("Counted", (IsolationMachine,), own)
    run_state_machine_as_test(
        fresh,
        settings=settings(
            max_examples=operations * 6 // (5 * OPERATIONS),
            stateful_step_count=OPERATIONS,
            deadline=None,
            database=None,
            derandomize=True,
            report_multiple_bugs=False,
            # A fault that is there on purpose need not be made small.
            phases=[Phase.generate, Phase.shrink] if shrinks else [Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
    return fresh.seen + Counter({"operations": fresh.operations[0]})
