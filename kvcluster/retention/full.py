"""Retention `full`: every token stays."""

from dataclasses import dataclass
from typing import ClassVar

from kvcluster.retention.base import Need


@dataclass(frozen=True, kw_only=True)
class FullRetention:
    """Drops nothing."""

    name: ClassVar[str] = "full"
    needs: ClassVar[Need] = Need.NOTHING

    def num_held(self, num_tokens: int) -> int:
        """See `RetentionPolicy`."""
        return num_tokens
