"""Who is told what becomes of contexts, so that they can be on disk too."""

from typing import Protocol

from kvcluster.engine.context import Context


class ContextKeeper(Protocol):
    """Every method returns at once, and acts later."""

    def note_built(self, context: Context) -> None:
        """All of its tokens are computed, and its blocks are there."""
        ...

    def note_changed(self, context: Context) -> None:
        """Its name, pin or expiry is another."""
        ...

    def drop(self, context: Context) -> None:
        """It is being deleted: unset `disk.is_clear` until nothing is on disk of it, then call
        `Contexts.forget_deleted`."""
        ...


class NoDisk:
    """There is none: contexts end with the engine."""

    def note_built(self, context: Context) -> None:
        pass

    def note_changed(self, context: Context) -> None:
        pass

    def drop(self, context: Context) -> None:
        pass
