"""How much a tenant has pinned: what no eviction takes away, whether it is in memory now or will be
read from disk."""

from collections.abc import Iterable

from kvcluster.engine.context import Context
from kvcluster.engine.context_checks import check_pinned
from kvcluster.engine.footprint import footprint
from kvcluster.engine.parts import EngineParts


class Pins:
    """Of one engine. Holds nothing."""

    def __init__(self, parts: EngineParts) -> None:
        self._parts = parts

    def check(self, context: Context, num_tokens: int, others: Iterable[Context]) -> None:
        """Whether the context may be pinned at this length. `others`: all contexts of its tenant.

        Raises: QuotaExceeded when they would pin too much together.
        """
        used = sum(
            self._num_bytes(other, len(other.received))
            for other in others
            if other.pinned and other is not context
        )
        check_pinned(used, self._num_bytes(context, num_tokens), context.limits.max_pinned_bytes)

    def _num_bytes(self, context: Context, num_tokens: int) -> int:
        if not context.can_be_read:
            return 0
        block_size = self._parts.cache.block_size
        return footprint(
            context.policy,
            self._parts.spec,
            num_tokens,
            self._parts.partitions.of(context.tenant),
            block_size=block_size,
            chunk_tokens=block_size,
        ).num_bytes
