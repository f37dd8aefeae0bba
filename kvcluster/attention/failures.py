"""What goes wrong on a rank with the cache of one sequence ends that sequence, and no other.

Whatever is done for one part of a step, and nothing else, runs inside `contain`. Where it raises,
the part has failed: the rank goes on with numbers that mean nothing but have their shapes, so that
it takes part in every message that the others wait for. Rows of other parts never read them. The
rank's answer names the sequence, all ranks leave it out of later steps, and the engine ends it. Its
half-written blocks are in its own table: they come free with it, and are zeroed.

Not contained, so that it ends the ring: what several parts or ranks share (a message between ranks,
a kernel over rows of many parts, the model's layers), because there is no telling whom it concerns;
and what says that the rank itself is broken, `BROKEN`.
"""

import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

import torch

from kvcluster.attention.part import SequencePart
from kvcluster.errors import RankLost
from kvcluster.log import get_logger

BROKEN: Final = (RankLost, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)
"""The ring is gone, memory is short, or the device's state is not known any more."""

READING: Final = "reading the cache"
"""What parts of a step do in several places."""

_FRAMES: Final = 6

log = get_logger(__name__)


class PartFailure(NamedTuple):
    """What failed first of a part."""

    doing: str
    kind: str = ""
    """Class of the exception, if there was one. Its message may quote the cache, and is kept
    nowhere."""


class Raised:
    """For callers that have one part alone: what fails is raised."""

    def has(self, part: SequencePart) -> bool:  # noqa: ARG002
        return False

    @contextmanager
    def contain(self, part: SequencePart, doing: str) -> Iterator[None]:  # noqa: ARG002
        yield


class PartFailures(Raised):
    """The parts of one step that failed on this rank."""

    def __init__(self, parts: Iterable[SequencePart]) -> None:
        """`parts`: those that may fail. The others are whole: what goes wrong with them is raised,
        since not every rank's answer is waited for that could tell of it."""
        self._may_fail = frozenset(parts)
        self.found: dict[SequencePart, PartFailure] = {}

    def has(self, part: SequencePart) -> bool:
        """Whether something of the part has failed in this step."""
        return part.whole in self.found

    @contextmanager
    def contain(self, part: SequencePart, doing: str) -> Iterator[None]:
        """The block ends where it raises, and what follows it is done all the same. No message may
        be sent or awaited inside. `doing`: what the block does, for the error."""
        try:
            yield
        except BROKEN:
            raise
        except Exception as error:
            if part.whole not in self._may_fail:
                raise
            kind = type(error).__name__
            log.error("part_failed", phase=doing, error=kind, source=places(error))
            self.found.setdefault(part.whole, PartFailure(doing, kind))


RAISED: Final = Raised()


def places(error: Exception) -> str:
    """Where it was raised, innermost last, without what it says."""
    frames = traceback.extract_tb(error.__traceback__)[-_FRAMES:]
    return " ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
