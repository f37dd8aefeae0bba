"""Three tenants generate, store, fork, continue, evict and delete in any order, beside prefixes
that operators publish: nobody is given what another one had computed, and every block is counted.

The oracle is a list of what each tenant has sent and got. What is reported as cached has to be in
it. `seen` counts each path's positive control: a run in which a path found nothing proves nothing.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from kvcluster.engine.api import FinishReason
from kvcluster.engine.context import Context
from kvcluster.engine.context_api import ContextRequest, ContextState
from kvcluster.engine.prefixes import Prefixes
from kvcluster.errors import ContextNotFound, ContextTooLong, QuotaExceeded
from kvcluster.types import PUBLISHED, TenantId
from tests.fake_engine import VOCAB_SIZE, FakeCluster, packed, sampling
from tests.fake_ring import expected_output
from tests.unit.engine.test_published_prefixes import cluster

TENANTS = tuple(map(TenantId, ("red", "blue", "green")))
COMMON = [position * position % (VOCAB_SIZE - 1) + 1 for position in range(40)]
OPERATIONS = 50
"""Of each example."""
CONTROLS = {"hit", "published hit", "context", "fork", "evicted", "deleted", "refused to others"}

NO_ROOM = (QuotaExceeded, ContextTooLong)

tenants = st.sampled_from(TENANTS)
ids = st.sampled_from(["a", "b"])
lengths = st.integers(0, len(COMMON))
owns = st.lists(st.integers(1, 5), min_size=1, max_size=9)
policies = st.sampled_from(["exact", "half"])


class IsolationMachine(RuleBasedStateMachine):
    """`sent`: by tenant and policy, the sequences whose blocks it may be given."""

    operations: ClassVar[list[int]] = [0]
    seen: ClassVar[Counter[str]] = Counter()

    @initialize(num_blocks=st.sampled_from([40, 64, 200]), num_ranks=st.integers(1, 3))
    def build(self, num_blocks: int, num_ranks: int) -> None:
        self.fake: FakeCluster = cluster(num_blocks=num_blocks, num_ranks=num_ranks)
        self.sent: dict[tuple[TenantId, str], list[list[int]]] = {}
        self.contexts: dict[tuple[TenantId, str], list[int]] = {}

    @rule(tenant=tenants, length=lengths, own=owns, policy=policies)
    def generate(self, tenant: TenantId, length: int, own: list[int], policy: str) -> None:
        """Insert and look up."""
        prompt = [*COMMON[:length], *own]
        mine, public = self.shared(tenant, policy, prompt), self.shared(PUBLISHED, policy, prompt)
        cached = self.answered(tenant, prompt, prompt, policy, policy=policy)
        assert cached <= max(mine, public), "it was given what it never sent"
        self.seen["hit"] += 0 < cached <= mine
        self.seen["published hit"] += cached > mine

    @rule(tenant=tenants, name=ids, length=lengths, own=owns, policy=policies)
    def upload(self, tenant: TenantId, name: str, length: int, own: list[int], policy: str) -> None:
        """A context, or more of one."""
        self.store(tenant, name, [*COMMON[:length], *own], policy)

    @rule(tenant=tenants, name=ids, own=owns)
    def read(self, tenant: TenantId, name: str, own: list[int]) -> None:
        tokens = self.contexts.get((tenant, name))
        if tokens is None:
            return
        context = self.fake.engine.contexts.find(tenant, name)
        if context.state is ContextState.ACTIVE:
            whole = [*tokens, *own]
            cached = self.answered(tenant, own, whole, str(context.policy), context=name)
            self.seen["context"] += cached > 0

    @rule(tenant=tenants, name=ids, other=tenants)
    def reach(self, tenant: TenantId, name: str, other: TenantId) -> None:
        """Another tenant names it."""
        if (tenant, name) in self.contexts and (other, name) not in self.contexts:
            with pytest.raises(ContextNotFound):
                self.fake.engine.contexts.find(other, name)
            with pytest.raises(ContextNotFound):
                self.fake.submit([1], tenant=other, context=name)
            self.seen["refused to others"] += 1

    @rule(tenant=tenants, name=ids, new=ids, keep=st.integers(0, 30))
    def fork(self, tenant: TenantId, name: str, new: str, keep: int) -> None:
        tokens = self.contexts.get((tenant, name))
        if tokens is None or (tenant, new) in self.contexts:
            return
        parent = self.fake.engine.contexts.find(tenant, name)
        if parent.state is not ContextState.ACTIVE:
            return
        keep = min(keep, len(tokens))
        request = ContextRequest(tenant=tenant, context_id=new)
        try:
            made = self.fake.engine.contexts.fork(parent, request, keep)
        except NO_ROOM:
            return
        self.fake.run()
        self.contexts[tenant, new] = tokens[: keep or None]
        self.seen["fork"] += made.state is ContextState.ACTIVE

    @rule(tenant=tenants, name=ids)
    def delete(self, tenant: TenantId, name: str) -> None:
        if self.contexts.pop((tenant, name), None) is not None:
            self.remove(self.fake.engine.contexts.find(tenant, name))
            self.seen["deleted"] += 1

    @rule(tenant=tenants, count=st.integers(1, 40))
    def evict(self, tenant: TenantId, count: int) -> None:
        cache = self.fake.engine._scheduler.prefixes.cache(tenant)
        before = len(cache)
        cache.evict(0, count)
        self.seen["evicted"] += len(cache) < before

    @rule(length=st.integers(4, len(COMMON)), policy=policies)
    def publish(self, length: int, policy: str) -> None:
        if (PUBLISHED, policy) not in self.contexts:
            self.store(PUBLISHED, policy, COMMON[:length], policy, pinned=True)

    @rule(policy=policies)
    def withdraw(self, policy: str) -> None:
        if self.contexts.pop((PUBLISHED, policy), None) is not None:
            self.remove(self.fake.engine.contexts.find(PUBLISHED, policy))
            self.sent.pop((PUBLISHED, policy), None)

    @invariant()
    def books_are_exact(self) -> None:
        if hasattr(self, "fake"):
            self.operations[0] += 1
            self.fake.check_books()

    def teardown(self) -> None:
        if not hasattr(self, "fake"):
            return
        for tenant, name in self.contexts:
            self.remove(self.fake.engine.contexts.find(tenant, name))
        assert self.fake.num_leaked == 0

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
            return 0
        output = self.fake.output(generation)
        assert output == expected_output(
            whole, sampling(), max_output_tokens=3, spec=self.fake.spec
        )
        self.note(tenant, kept, [*whole, *output])
        return finished.usage.cached_input_tokens

    def store(
        self, tenant: TenantId, name: str, tokens: list[int], policy: str, **fields: object
    ) -> None:
        request = ContextRequest(
            tenant=tenant,
            context_id=name,
            policy=policy,
            **fields,  # type: ignore[arg-type]
        )
        contexts = self.fake.engine.contexts
        try:
            context = contexts.open(request)
        except NO_ROOM:
            return
        with suppress(*NO_ROOM):
            contexts.append(context, packed(tokens))
        if not len(context.received):
            self.remove(context)
            return
        tokens = list(context.received)
        contexts.complete(context)
        self.fake.run()
        if context.state is not ContextState.ACTIVE or context.message:
            self.contexts.pop((tenant, name), None)
            self.remove(context)
            return
        self.contexts[tenant, name] = tokens
        self.note(tenant, str(context.policy), tokens)

    def note(self, tenant: TenantId, policy: str, tokens: list[int]) -> None:
        self.sent.setdefault((tenant, policy), []).append(tokens)

    def shared(self, tenant: TenantId, policy: str, prompt: Sequence[int]) -> int:
        """Tokens of the prompt that the tenant may have computed before."""
        sent = self.sent.get((tenant, policy), [])
        return max((_common(prompt, tokens) for tokens in sent), default=0)

    def remove(self, context: Context) -> None:
        self.fake.engine.contexts.delete(context)
        self.fake.run()
        assert not self.fake.engine.contexts.knows(context)


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
            max_examples=operations * 13 // (10 * OPERATIONS),
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


@pytest.mark.timeout(300)
def test_nobody_is_given_what_another_tenant_had_computed() -> None:
    seen = counted(10_000)

    assert seen["operations"] >= 10_000
    assert {name for name in CONTROLS if seen[name]} == CONTROLS


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_nobody_is_in_a_hundred_thousand_operations() -> None:
    seen = counted(100_000)

    assert seen["operations"] >= 100_000
    assert {name for name in CONTROLS if seen[name]} == CONTROLS


def test_the_machine_finds_a_cache_that_tenants_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """One partition and one secret for everybody."""
    cache = Prefixes.cache
    monkeypatch.setattr(
        Prefixes,
        "cache",
        lambda self, tenant: cache(self, tenant if tenant == PUBLISHED else TENANTS[0]),
    )
    monkeypatch.setattr("kvcluster.engine.prefix_keys.blake2b", lambda _tenant, **_: _Constant())

    with pytest.raises(AssertionError):
        counted(3_000, shrinks=False)


class _Constant:
    def digest(self) -> bytes:
        return bytes(32)
