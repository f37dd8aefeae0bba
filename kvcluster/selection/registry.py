"""The selections that exist. Adding one is a file, a line here and its method in `offered.py`."""

from collections.abc import Callable, Mapping
from typing import Final

from kvcluster.policy import parse_choice
from kvcluster.selection.base import BlockSelection
from kvcluster.selection.block_sparse import BlockSparse
from kvcluster.selection.estimated import Estimated
from kvcluster.selection.offered import SELECTION_METHODS
from kvcluster.selection.quest import Quest

METHODS: Final[Mapping[str, Callable[..., BlockSelection]]] = {
    method.name: method for method in (BlockSparse, Estimated, Quest)
}
"""By the name in a policy: a frozen dataclass whose fields are its parameters."""


def build_selection(selection: str, block_size: int) -> BlockSelection | None:
    """What a choice in the policy language names; None: all that is kept is read.

    Raises: InvalidField for text that names no selection; ValueError, saying what to give, for one
    that blocks of this size cannot have.
    """
    choice = parse_choice(selection, SELECTION_METHODS)
    method = METHODS.get(choice.name)
    return method(block_size=block_size, **choice.arguments) if method is not None else None
