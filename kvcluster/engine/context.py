"""One context inside the engine: its tokens, the names of its blocks, and the upload under way."""

import math
from array import array
from dataclasses import dataclass

from kvcluster.cache.block_keys import BlockKeys
from kvcluster.cache.spill import SealedContext
from kvcluster.engine.context_api import ContextRequest, ContextState
from kvcluster.engine.request import Request
from kvcluster.engine.stream import Signal
from kvcluster.errors import KvClusterError
from kvcluster.types import Policy, TenantId


@dataclass(slots=True, eq=False)
class SealedCopy:
    """Mutable: what is known of a context's files in one tier off the GPUs."""

    spill: SealedContext | None = None
    """None: there are none."""
    version: int = 0
    """The `content_version` that they hold."""
    error: KvClusterError | None = None
    """Why what should be there is not, or is still."""

    @property
    def num_bytes(self) -> int:
        return 0 if self.spill is None else self.spill.num_bytes


@dataclass(slots=True, eq=False)
class OnDisk(SealedCopy):
    """The same on disk."""

    is_awaited: bool = False
    """Whoever uploads waits until it is on disk."""
    is_clear: bool = True
    """Nothing is off the GPUs, or will be, of a context that is being deleted: it may be
    forgotten."""


class Context:
    """Mutable record of one context. `Contexts` alone changes it."""

    def __init__(
        self, request: ContextRequest, *, uid: str, policy: Policy, keys: BlockKeys, unix_s: float
    ) -> None:
        self.tenant: TenantId = request.tenant
        self.id = request.context_id
        self.uid = uid
        self.policy = policy
        self.display_name = request.display_name
        self.pinned = request.pinned
        self.limits = request.limits
        """The tenant's, when it last changed the context."""
        self.state = ContextState.CREATING
        """ACTIVE stands for DEGRADED too: which of the two, its blocks say."""
        self.message = ""
        self.tokens = array("I")
        """That generations begin with."""
        self.keys = keys
        """Names of their whole blocks."""
        self.build: Request | None = None
        """Computes more of it; its tokens begin with the context's."""
        self.expire_time_s: float | None = None
        self.expires_at = math.inf
        """The same on the monotonic clock."""
        self.stalls_at = math.inf
        """On the monotonic clock: when an upload that nobody goes on with is given up."""
        self.create_time_s = self.update_time_s = self.last_access_time_s = unix_s
        self.version = 1
        self.squared_error = self.squared_size = 0.0
        """Sums of `EncodingError` over its own builds."""
        self.received_bytes = self.kept_bytes = 0
        """Of text, over all uploads; the second without those of an upload under way."""
        self.content_version = 0
        """Of its tokens: another number after every upload."""
        self.host = SealedCopy()
        self.disk = OnDisk()
        self.is_zeroed = False
        """Its blocks are gone from memory; set when it is being deleted."""
        self.changed = Signal()
        """Notified when the state changes, and when more tokens may be taken."""

    @property
    def key(self) -> tuple[TenantId, str]:
        return self.tenant, self.id

    @property
    def etag(self) -> str:
        return f"{self.uid[:8]}.{self.version}"

    @property
    def can_be_read(self) -> bool:
        """Whether it has blocks that this model knows: not what was found on disk and is another's,
        or damaged, nor what is being deleted."""
        return self.state in (ContextState.CREATING, ContextState.ACTIVE)

    @property
    def is_on_host(self) -> bool:
        """All of its tokens, as they are now, are in the host's memory."""
        return self._holds(self.host)

    @property
    def is_on_disk(self) -> bool:
        """All of its tokens, as they are now, are on disk."""
        return self._holds(self.disk)

    def _holds(self, copy: SealedCopy) -> bool:
        return copy.spill is not None and copy.version == self.content_version

    @property
    def received(self) -> "array[int]":
        """All tokens so far, those of an upload under way included."""
        return self.tokens if self.build is None else self.build.tokens

    @property
    def is_open(self) -> bool:
        """An upload is under way, and more may come."""
        return self.build is not None and not self.build.is_prompt_complete

    @property
    def is_empty(self) -> bool:
        """It was begun, and nothing has come."""
        return self.is_open and not (self.received or self.received_bytes)

    @property
    def is_appended_to(self) -> bool:
        """An upload is under way to what generations begin with already. Nobody can go on with it
        but who began it: another appends to what there was before."""
        return self.is_open and self.state is ContextState.ACTIVE

    @property
    def due_at(self) -> float:
        """When something ends by itself, on the monotonic clock."""
        return min(self.expires_at, self.stalls_at)

    @property
    def attention_error(self) -> float:
        """As `Usage.attention_error`."""
        if not self.squared_size:
            return 0.0
        return math.sqrt(self.squared_error / self.squared_size)

    def is_computed(self, block_size: int) -> bool:
        """Whether the build has nothing left to do."""
        build = self.build
        if build is None or not build.is_prompt_complete:
            return False
        return build.num_computed >= len(build.tokens) // block_size * block_size

    def schedule_expiry(self, now: float, unix_s: float, *, upload_grace_s: float) -> None:
        """Set `expires_at` and `stalls_at` from the time of now on both clocks. `upload_grace_s`:
        how long an upload may stand still."""
        self.expires_at = math.inf
        if self.expire_time_s is not None:
            self.expires_at = now + self.expire_time_s - unix_s
        self.stalls_at = now + upload_grace_s if self.is_open else math.inf

    def note_change(self, unix_s: float) -> None:
        """Something that a record shows is different now."""
        self.version += 1
        self.update_time_s = unix_s
        self.changed.notify()
