"""The contexts of an engine as its callers see them: a `ContextBackend`, in the engine process.

Adds to `Contexts` what needs waiting: uploads that are taken over, back-pressure, text that becomes
tokens, and acts that end on the ranks.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from weakref import WeakKeyDictionary

from kvcluster.engine.api import GenerationRequest, PromptChunk, TextChunk
from kvcluster.engine.context import Context
from kvcluster.engine.context_api import (
    ContextChange,
    ContextRecord,
    ContextRequest,
    ContextState,
    OpenedContext,
)
from kvcluster.engine.context_checks import context_not_found, not_ready, upload_over
from kvcluster.engine.context_stores import ContextStores
from kvcluster.engine.engine import Engine
from kvcluster.engine.request import TOKEN_BYTES, Request
from kvcluster.engine.upload import PromptUpload, RawChunk, check_vocabulary, raw_chunk
from kvcluster.errors import ContextNotFound, InvalidField, PromptCorrupt, UploadStalled
from kvcluster.tenancy.limits import TenantLimits
from kvcluster.types import TenantId


@dataclass(slots=True)
class _Upload:
    """The upload that feeds a context."""

    build: Request | None
    """What it adds to."""
    number: int = 0
    is_durable: bool = False
    text: PromptUpload = field(
        default_factory=lambda: PromptUpload(GenerationRequest(model="", max_output_tokens=1))
    )
    """Encodes text, and holds back what the next chunk may change."""
    is_text: bool | None = None
    pending: bytes = b""
    """Tokens of text that came, and that the context could not take yet: they are next."""

    @property
    def is_complete(self) -> bool:
        return self.build is not None and self.build.is_prompt_complete


class ContextService:
    """Everything of `ContextBackend`, on one engine."""

    def __init__(
        self, engine: Engine, stores: ContextStores | None, *, wake: Callable[[], None]
    ) -> None:
        """`stores`: keep contexts off the GPUs too. `wake` tells whoever runs the engine that it
        has changed."""
        self._engine = engine
        self._contexts = engine.contexts
        self._stores = stores
        self._wake = wake
        self._uploads: WeakKeyDictionary[Context, _Upload] = WeakKeyDictionary()
        """The last one of each context."""
        self._numbers = count(1)

    async def open_context(self, request: ContextRequest) -> OpenedContext:
        if self._engine.refusal is not None:
            raise self._engine.refusal
        if request.durable and (self._stores is None or not self._stores.has_disk):
            raise InvalidField(
                "context.durable",
                "this server keeps no contexts on disk: leave it out, or set spill.folder there",
            )
        await self._wait_known()
        with suppress(ContextNotFound):
            await self._bring(self._contexts.find(request.tenant, request.context_id))
        context = self._contexts.open(request)
        if request.durable:
            context.disk.is_awaited = True
        upload = self._uploads.get(context)
        if upload is None or upload.build is not context.build:
            upload = self._uploads[context] = _Upload(context.build)
        # An encoder goes on where it has stopped; whoever fed it before may do so no more.
        upload.number, upload.is_durable = next(self._numbers), request.durable
        context.changed.notify()
        return OpenedContext(upload=upload.number, record=self._contexts.record(context))

    async def append_context(
        self, tenant: TenantId, context_id: str, upload: int, chunk: PromptChunk
    ) -> None:
        context = self._live(tenant, context_id)
        feeding = self._feeding(context, upload)
        async with feeding.text.lock:
            self._feeding(context, upload)
            await self._take(context, feeding, raw_chunk(chunk))
        self._wake()
        while context.build is not None and not self._contexts.room(context):
            await context.changed.wait()
            self._feeding(self._live(tenant, context_id), upload)

    async def finish_context(self, tenant: TenantId, context_id: str, upload: int) -> ContextRecord:
        context = self._live(tenant, context_id)
        feeding = self._feeding(context, upload)
        async with feeding.text.lock:
            self._feeding(context, upload)
            # The one before it may have been complete, and have lost its caller.
            if not feeding.is_complete:
                feeding.pending += await feeding.text.finish()
                self._add_pending(context, feeding)
                self._contexts.complete(context)
        self._wake()
        await self._built(context)
        if feeding.is_durable:
            await self._save(context)
        return self._contexts.record(context)

    async def get_context(self, tenant: TenantId, context_id: str) -> ContextRecord:
        await self._wait_known()
        return self._contexts.record(self._contexts.find(tenant, context_id))

    async def list_contexts(self, tenant: TenantId) -> tuple[ContextRecord, ...]:
        await self._wait_known()
        records = []
        for context in self._contexts.of(tenant):
            records.append(self._contexts.record(context))
            # Each looks at all blocks of a context: steps are planned meanwhile.
            await asyncio.sleep(0)
        return tuple(records)

    async def update_context(
        self,
        tenant: TenantId,
        context_id: str,
        change: ContextChange,
        *,
        etag: str,
        limits: TenantLimits,
    ) -> ContextRecord:
        await self._wait_known()
        context = self._live(tenant, context_id)
        context.limits = limits
        self._contexts.update(context, change, etag=etag)
        self._wake()
        if self._stores is not None and context.is_on_disk:
            await self._stores.wait_saved(context)
        return self._contexts.record(context)

    async def fork_context(
        self, tenant: TenantId, context_id: str, new_id: str, num_tokens: int, limits: TenantLimits
    ) -> ContextRecord:
        await self._wait_known()
        await self._bring(self._live(tenant, context_id))
        parent = self._live(tenant, context_id)
        request = ContextRequest(tenant=tenant, context_id=new_id, limits=limits)
        context = self._contexts.fork(parent, request, num_tokens)
        self._wake()
        await self._built(context)
        return self._contexts.record(context)

    async def delete_context(self, tenant: TenantId, context_id: str, etag: str) -> None:
        await self._wait_known()
        context = self._contexts.find(tenant, context_id)
        self._contexts.delete(context, etag=etag)
        self._uploads.pop(context, None)
        self._wake()
        while self._contexts.knows(context):
            await context.changed.wait()
            if context.disk.error is not None and not context.disk.is_clear:
                raise context.disk.error

    def _live(self, tenant: TenantId, context_id: str) -> Context:
        """Raises: ContextNotFound, also for one that is being deleted."""
        context = self._contexts.find(tenant, context_id)
        if context.state is ContextState.DELETING:
            raise context_not_found()
        return context

    def _feeding(self, context: Context, upload: int) -> _Upload:
        found = self._uploads.get(context)
        if found is None or found.number != upload:
            raise _taken_over()
        if context.build is None and not found.is_complete:
            raise upload_over(context)
        return found

    async def _take(self, context: Context, feeding: _Upload, raw: RawChunk) -> None:
        if feeding.is_text not in (None, raw.is_text):
            raise InvalidField("prompt", "text and token ids cannot be mixed in one upload")
        feeding.is_text = raw.is_text
        new = _beyond(context, raw)
        chunk = new.prompt_chunk()
        if not isinstance(chunk, TextChunk):
            check_vocabulary(chunk.packed_ids, self._engine.parts.spec.vocab_size)
            self._contexts.append(context, chunk.packed_ids)
            return
        self._add_pending(context, feeding)
        # What an encoder was given it cannot give back: the text has come, whatever is said of its
        # tokens.
        feeding.pending = await feeding.text.encode(chunk, self._engine.parts.tokenizer)
        context.received_bytes += new.end - new.start
        self._add_pending(context, feeding)

    def _add_pending(self, context: Context, feeding: _Upload) -> None:
        """Raises: as `Contexts.append`; then they stay pending."""
        if self._uploads.get(context) is not feeding:
            raise _taken_over()
        self._contexts.append(context, feeding.pending)
        feeding.pending = b""

    async def _wait_known(self) -> None:
        """Return when the contexts that are on disk can be found."""
        if self._stores is not None:
            await self._stores.wait_known()

    async def _bring(self, context: Context) -> None:
        """Have it in the ranks' memory, if it is off the GPUs. Raises: as `ContextStores.bring`."""
        if self._stores is not None:
            await self._stores.bring(context)

    async def _built(self, context: Context) -> None:
        """Return when nothing is left to compute. Raises: ContextNotReady, ContextNotFound."""
        while context.build is not None:
            await context.changed.wait()
        if not self._contexts.knows(context) or context.state is ContextState.DELETING:
            raise context_not_found()
        if context.message:
            raise not_ready(context)

    async def _save(self, context: Context) -> None:
        """Return when it is on disk. Raises: what kept it from there."""
        if self._stores is not None:
            await self._stores.wait_saved(context)
            if not context.is_on_disk and context.disk.error is not None:
                raise context.disk.error


def _taken_over() -> UploadStalled:
    return UploadStalled("another upload took over: ask how far it is, and go on there")


def _beyond(context: Context, raw: RawChunk) -> RawChunk:
    """What of a chunk has not come before. Raises: PromptCorrupt for a gap, or for tokens that are
    not those which came before."""
    received = context.received_bytes if raw.is_text else len(context.received)
    unit = "bytes of text" if raw.is_text else "tokens"
    metadata = {"received": str(received)}
    if context.is_appended_to and raw.is_text and raw.start < received:
        raise PromptCorrupt(
            f"context {context.id} is there already, with {received} bytes of text: append to it, "
            "or use another id",
            metadata=metadata,
        )
    if raw.start > received or (raw.is_text and raw.start < received):
        raise PromptCorrupt(
            f"a chunk starts at {raw.start}, but {received} {unit} have come: go on there",
            metadata=metadata,
        )
    if raw.start == received:
        return raw
    before, new = raw.split(min(received, raw.end))
    known = context.received[before.start : before.end].tobytes()
    if known != before.raw[: len(before.raw) // TOKEN_BYTES * TOKEN_BYTES]:
        raise PromptCorrupt(
            f"tokens {before.start} to {before.end} are not those that came before: use another id",
            metadata=metadata,
        )
    return new
