"""The protocol of a retention policy: which tokens of a live request survive."""

from typing import Protocol


class RetentionPolicy(Protocol):
    """Decides, from positions alone, which tokens no later query may read.

    Policies that need scores will extend this; those that do not stay as simple as this.
    """

    name: str

    def first_kept(self, num_tokens: int) -> int:
        """Of `num_tokens` tokens, all before this position are dropped. Never decreases."""
        ...
