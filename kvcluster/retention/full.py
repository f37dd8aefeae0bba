"""Retention `full`: every token stays."""


class FullRetention:
    """Drops nothing."""

    name = "full"

    def first_kept(self, num_tokens: int) -> int:  # noqa: ARG002
        return 0
