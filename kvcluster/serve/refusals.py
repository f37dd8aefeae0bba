"""Which policies a model cannot have, and why."""

from functools import lru_cache

from kvcluster.cache.encoded_pages import blocks_per_page
from kvcluster.cache.exact_region import check_in_steps
from kvcluster.codec.heads import check_kept_apart
from kvcluster.codec.model_codecs import MAX_KEPT, ModelCodecs
from kvcluster.retention.base import Heads
from kvcluster.retention.offered import recent_blocks
from kvcluster.retention.registry import scored_retention
from kvcluster.selection.registry import build_selection
from kvcluster.types import EXACT, ModelSpec, Policy


class PolicyChecks:
    """What the parts of a policy say of one model and block size."""

    def __init__(self, spec: ModelSpec, block_size: int, layouts: ModelCodecs) -> None:
        self._spec = spec
        self._block_size = block_size
        self._layouts = layouts
        self._count_once = lru_cache(MAX_KEPT)(self._count_blocks)

    def encoded_per_page(self, storage: str) -> tuple[int, ...]:
        """Encoded blocks of a page, by KV group. Raises: ValueError for blocks that cannot be
        encoded so."""
        return self._count_once(storage)

    def refusal(self, policy: Policy) -> str | None:
        """Why the model cannot have the policy; None: it can."""
        try:
            recent_blocks(policy.retention, self._block_size)
            build_selection(policy.selection, self._block_size)
            if policy.storage != EXACT:
                self.encoded_per_page(policy.storage)
                if self._layouts.joins_layers(policy.storage):
                    check_in_steps(policy)
            self._check_survivors(policy)
        except ValueError as reason:
            return str(reason)
        return None

    def _count_blocks(self, storage: str) -> tuple[int, ...]:
        return blocks_per_page(self._spec, self._layouts.layers(storage), self._block_size)

    def _check_survivors(self, policy: Policy) -> None:
        method = scored_retention(policy.retention, self._block_size)
        if method is None:
            return
        if policy.storage == EXACT or method.heads is not Heads.OWN:
            return
        codecs = self._layouts.layers(policy.storage)
        check_kept_apart(codecs, self._spec.layers, self._block_size)
