"""The contexts of one engine, sans-IO: built by requests of their own, read by generations.

A context holds tokens; its blocks are those of the prefix cache under the tokens' names, counted as
held so that they outlive others, and for ever while it is pinned. So forks share blocks, a context
whose blocks were given up is computed again by the next generation on it, and nothing here can give
a generation blocks of other tokens.
"""

import math
from array import array
from collections.abc import Iterator

from kvcluster.cache.block_keys import BlockKeys
from kvcluster.engine.api import CacheMode, GenerationRequest, PolicySource
from kvcluster.engine.context import Context
from kvcluster.engine.context_api import (
    ContextChange,
    ContextRecord,
    ContextRequest,
    ContextState,
)
from kvcluster.engine.context_build import build_request, generation_for, generation_of
from kvcluster.engine.context_checks import (
    being_computed,
    check_begun_with,
    check_continued,
    check_count,
    check_etag,
    check_model,
    check_name,
    context_not_found,
    expiry,
    not_storable,
    unreadable,
    upload_over,
)
from kvcluster.engine.context_keeper import ContextKeeper, NoDisk
from kvcluster.engine.context_pins import Pins
from kvcluster.engine.context_record import record_of
from kvcluster.engine.parts import EngineParts
from kvcluster.engine.policies import ChosenPolicy, choose_policy
from kvcluster.engine.prefix_keys import PrefixKeys
from kvcluster.engine.prompts import Prompts
from kvcluster.engine.request import Request
from kvcluster.engine.scheduler import Scheduler
from kvcluster.errors import InvalidField, KvClusterError, ResourceExists
from kvcluster.types import PUBLISHED, GenerationId, Policy, TenantId

MAX_CONTEXTS = 1000
"""Of one tenant: their tokens stay in the engine's memory."""


class Contexts:
    """Finds, builds, changes and deletes contexts. Every method returns at once."""

    def __init__(
        self,
        parts: EngineParts,
        scheduler: Scheduler,
        prompts: Prompts,
        arrivals: Iterator[int],
    ) -> None:
        """`arrivals`: numbers of all requests, in order."""
        self._parts = parts
        self._scheduler = scheduler
        self._prefixes = scheduler.prefixes
        self._prompts = prompts
        self._contexts: dict[tuple[TenantId, str], Context] = {}
        self._building: dict[GenerationId, Context] = {}
        self._arrivals = arrivals
        self._block_size = parts.cache.block_size
        self._pins = Pins(parts)
        self.keeper: ContextKeeper = NoDisk()

    @property
    def next_expiry(self) -> float:
        return min((context.due_at for context in self._contexts.values()), default=math.inf)

    def find(self, tenant: TenantId, context_id: str) -> Context:
        """Raises: ContextNotFound."""
        found = self._contexts.get((tenant, context_id))
        if found is None:
            raise context_not_found()
        return found

    def knows(self, context: Context) -> bool:
        """Whether it is there, or is being deleted."""
        return self._contexts.get(context.key) is context

    def of(self, tenant: TenantId) -> list[Context]:
        """By id."""
        own = [context for context in self._contexts.values() if context.tenant == tenant]
        return sorted(own, key=lambda context: context.id)

    def all(self) -> list[Context]:
        """Of all tenants."""
        return list(self._contexts.values())

    def open(self, request: ContextRequest) -> Context:
        """A context to upload to: a new one, or the one that is there. What an upload that is not
        complete was about to append to it is given up.

        Raises: ModelNotFound, InvalidField, PolicyUnsupported, PermissionDenied, ContextTooLong,
        QuotaExceeded, ContextNotReady. Nothing is kept of one that is refused.
        """
        known = self._contexts.get((request.tenant, request.context_id))
        # One to which nothing has come decides nothing.
        context = self._created(request) if known is None or known.is_empty else known
        check_continued(context)
        context.limits = request.limits
        there = context.tokens if context.is_appended_to else context.received
        self._check(context, max(len(there), request.total_tokens or 1))
        if known is not None and (known.is_appended_to or known.is_empty):
            self._end_build(known, self._build_of(known))
        self._contexts[context.key] = context
        if context.build is None:
            self._build(context, context.tokens)
        self._put_off_expiry(context)
        return context

    def append(self, context: Context, packed_ids: bytes) -> None:
        """Add tokens to the build. Raises: ContextTooLong, QuotaExceeded, ContextNotReady,
        UploadStalled, and adds none."""
        build = self._build_of(context)
        if build.is_prompt_complete:
            if packed_ids:
                raise being_computed(context)
            return
        num_tokens = len(build.tokens) + len(packed_ids) // build.tokens.itemsize
        self._check(context, num_tokens)
        self._prompts.append(build, packed_ids)
        self._put_off_expiry(context)

    def room(self, context: Context) -> int:
        """Tokens that the client should be allowed to send now."""
        return 0 if context.build is None else self._prompts.room(context.build)

    def complete(self, context: Context) -> None:
        """The upload is complete. Raises: InvalidField when it is empty."""
        build = self._build_of(context)
        if not build.tokens:
            raise InvalidField("prompt", "is empty: send at least one token")
        build.is_prompt_complete = True
        self._put_off_expiry(context)
        assert build.prefix is not None
        build.prefix.extend(build.tokens)
        is_there = self._prefixes.held_at(
            context.tenant, build.prefix.blocks, build.tokens, context.policy
        )
        if is_there or context.is_computed(self._block_size):
            self._finish(context, build)

    def planned(self, build: Request) -> None:
        """A step with a part of the build was planned."""
        context = self._building[build.generation]
        # It may have held the client back until now.
        self._put_off_expiry(context)
        context.changed.notify()

    def computed(self, request: Request) -> None:
        """More of a request is computed."""
        context = self._building.get(request.generation)
        if context is not None:
            if context.is_computed(self._block_size):
                self._finish(context, request)
        elif request.checkpoint and request.num_computed >= request.checkpoint:
            request.checkpoint = 0
            read = self._contexts.get((request.spec.tenant, request.spec.context))
            if read is not None and read.state is ContextState.ACTIVE:
                self.hold(read)
                if not (read.is_on_host or read.is_on_disk):
                    self.keeper.note_built(read)

    def fail(self, build: Request, error: KvClusterError) -> None:
        """The build cannot go on. What was there before it stays."""
        context = self._building[build.generation]
        self._end_build(context, build)
        context.message = error.message
        if context.state is ContextState.CREATING:
            context.state = ContextState.FAILED
        context.note_change(self._parts.clock.unix())

    def policy_of(self, spec: GenerationRequest) -> ChosenPolicy | None:
        """The policy of a generation on a context; None: there is no context.

        Raises: ContextNotFound, ContextNotReady, InvalidField when it names another policy.
        """
        if not spec.context:
            return None
        context = self._readable(spec)
        named = choose_policy(spec, self._parts).policy if spec.policy else context.policy
        check_begun_with(context, named, wants_scores=spec.sampling.prompt_logprobs is not None)
        return ChosenPolicy(policy=context.policy, source=PolicySource.REQUEST)

    def num_tokens_before(self, spec: GenerationRequest) -> int:
        """Tokens of the context that a request begins with."""
        return len(self._readable(spec).tokens) if spec.context else 0

    def begin(self, request: Request) -> None:
        """Give a request what it begins with and may share. Raises: as `policy_of`."""
        spec = request.spec
        if not spec.context:
            secrets = (self._parts.secret_of(each) for each in (spec.tenant, PUBLISHED))
            request.prefix = self._prefixes.prefix_of(spec, request.policy, *secrets)
            return
        context = self._readable(spec)
        context.last_access_time_s = self._parts.clock.unix()
        request.tokens.extend(context.tokens)
        request.num_prompt_tokens = request.num_context_tokens = len(context.tokens)
        request.checkpoint = len(context.keys.keys) * self._block_size
        shares = spec.cache_mode is not CacheMode.BYPASS and not spec.cache_namespace
        request.prefix = PrefixKeys(
            context.keys.copy(),
            reads=True,
            writes=spec.cache_mode is CacheMode.READ_WRITE and shares and self._prefixes.is_on,
            most_blocks=None if shares else len(context.keys.keys),
        )

    def update(self, context: Context, change: ContextChange, *, etag: str = "") -> None:
        """Raises: EtagMismatch, InvalidField, QuotaExceeded; then nothing is changed."""
        check_etag(context, etag)
        if change.display_name is not None:
            check_name(change.display_name)
        if change.pinned and not context.pinned:
            self._pins.check(context, len(context.received), self.of(context.tenant))
        now = self._parts.clock.unix()
        if change.keeps_for_ever:
            context.expire_time_s = None
        elif change.ttl_s is not None or change.expire_time_s is not None:
            context.expire_time_s = expiry(change.ttl_s, change.expire_time_s, now)
        if change.display_name is not None:
            context.display_name = change.display_name
        if change.pinned is not None:
            context.pinned = change.pinned
        self.hold(context)
        self._put_off_expiry(context)
        context.note_change(now)
        self.keeper.note_changed(context)

    def fork(self, parent: Context, request: ContextRequest, num_tokens: int) -> Context:
        """A context with the first `num_tokens` of another's, 0 for all.

        Raises: ResourceExists, InvalidField, ContextNotReady, QuotaExceeded.
        """
        if (parent.tenant, request.context_id) in self._contexts:
            raise ResourceExists(f"a context {request.context_id} exists: choose another id")
        if parent.state is not ContextState.ACTIVE:
            raise unreadable(parent)
        if num_tokens > len(parent.tokens):
            raise InvalidField(
                "prefix_tokens", f"want at most {len(parent.tokens)}, got {num_tokens}"
            )
        context = self._created(request, parent.policy)
        self._contexts[context.key] = context
        self._build(context, parent.tokens[: num_tokens or len(parent.tokens)])
        self.complete(context)
        return context

    def delete(self, context: Context, *, etag: str = "") -> None:
        """Begin to delete; `context.changed` is notified when it has been done."""
        check_etag(context, etag)
        if context.state is ContextState.DELETING:
            return
        context.state, context.expires_at = ContextState.DELETING, math.inf
        build, keys = context.build, context.keys.keys
        if build is not None:
            self._end_build(context, build)
            if build.prefix is not None:
                keys = max(keys, build.prefix.blocks.keys, key=len)
        cache = self._prefixes.cache(context.tenant)
        cache.let_go(keys, context.uid)
        dropped = self._prefixes.forget(context.tenant, keys, self._scheduler.running)
        self.keeper.drop(context)
        self._scheduler.zeroing.add(cache.shared, dropped, lambda: self._note_zeroed(context))
        context.note_change(self._parts.clock.unix())

    def expire(self, now: float) -> None:
        """Delete the contexts whose time is over, and give up uploads that nobody goes on with: a
        context that they only append to stays what it was."""
        if now < self.next_expiry:
            return
        for context in tuple(self._contexts.values()):
            if context.stalls_at <= now and not self.room(context):
                # It waits for us.
                self._put_off_expiry(context)
            if context.stalls_at <= now and context.is_appended_to:
                self._end_build(context, self._build_of(context))
            elif context.due_at <= now:
                self.delete(context)

    def lose_ring(self) -> None:
        """The ranks are gone: builds begin again, other blocks are computed when they are read."""
        for context in self._building.values():
            if context.build is not None:
                context.build.num_steps_in_flight = 0

    def record(self, context: Context) -> ContextRecord:
        """A snapshot. Looks at every block."""
        return record_of(context, self._prefixes, self._parts.spec, self._block_size)

    def _created(self, request: ContextRequest, policy: Policy | None = None) -> Context:
        """`policy`: None, as it is asked for, or by default."""
        check_model(request.model, self._parts.spec.name)
        check_name(request.display_name)
        check_count(len(self.of(request.tenant)), MAX_CONTEXTS)
        policy = policy or choose_policy(generation_for(request), self._parts).policy
        if not self._prefixes.is_shareable(policy):
            raise not_storable(policy)
        now = self._parts.clock.unix()
        keys = self._keys(policy, request.tenant)
        uid = self._parts.new_id()
        context = Context(request, uid=uid, policy=policy, keys=keys, unix_s=now)
        context.expire_time_s = expiry(request.ttl_s, request.expire_time_s, now)
        return context

    def _keys(self, policy: Policy, tenant: TenantId) -> BlockKeys:
        return self._prefixes.keys(policy, "", self._parts.secret_of(tenant))

    def _build(self, context: Context, tokens: "array[int]") -> None:
        """Let the ranks compute what these tokens, and those that follow, lack."""
        generation = GenerationId(self._parts.new_id())
        build = build_request(
            context, tokens, generation, next(self._arrivals), self._parts.spec.name
        )
        context.build = build
        self._building[generation] = context
        self._prompts.admit(build)
        self._scheduler.add(build, now=self._parts.clock.monotonic())

    def _finish(self, context: Context, build: Request) -> None:
        context.tokens = build.tokens
        assert build.prefix is not None
        build.prefix.extend(build.tokens)
        context.keys = build.prefix.blocks
        context.squared_error += build.squared_error
        context.squared_size += build.squared_size
        context.kept_bytes = context.received_bytes
        self._end_build(context, build)
        context.state, context.message = ContextState.ACTIVE, ""
        context.content_version += 1
        self.hold(context)
        self._put_off_expiry(context)
        context.note_change(self._parts.clock.unix())
        self.keeper.note_built(context)

    def _end_build(self, context: Context, build: Request) -> None:
        context.build, context.stalls_at = None, math.inf
        context.received_bytes = context.kept_bytes
        del self._building[build.generation]
        self._scheduler.end(build)
        self._prompts.end(build)
        context.changed.notify()

    def _build_of(self, context: Context) -> Request:
        if context.build is None:
            raise upload_over(context)
        return context.build

    def hold(self, context: Context) -> None:
        """Its blocks are there: they outlive those of no context."""
        keys = context.keys.keys
        cache = self._prefixes.cache(context.tenant)
        cache.hold(keys, context.uid, pinned=context.pinned)

    def adopt(self, context: Context) -> None:
        """Take in a context that is on disk. One of its name that is there stays."""
        if context.key not in self._contexts:
            self._contexts[context.key] = context
            self._put_off_expiry(context)

    def _note_zeroed(self, context: Context) -> None:
        context.is_zeroed = True
        self.forget_deleted(context)

    def forget_deleted(self, context: Context) -> None:
        """Forget a context, if it is deleted and gone from all tiers."""
        if context.is_zeroed and context.disk.is_clear:
            self._contexts.pop(context.key, None)
        context.changed.notify()

    def _readable(self, spec: GenerationRequest) -> Context:
        """The context of a request, if it can be read. Raises: as `policy_of`."""
        context = self.find(spec.tenant, spec.context)
        if context.state is not ContextState.ACTIVE:
            raise unreadable(context)
        return context

    def _put_off_expiry(self, context: Context) -> None:
        clock = self._parts.clock
        context.schedule_expiry(
            clock.monotonic(), clock.unix(), upload_grace_s=self._parts.config.retention_s
        )

    def _check(self, context: Context, num_tokens: int) -> None:
        spec = generation_of(context)
        self._prompts.check_length(spec, context.policy, num_tokens)
        if context.pinned:
            self._pins.check(context, num_tokens, self.of(context.tenant))
