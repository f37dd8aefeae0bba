"""The selections that exist. Adding one is a file and a line here."""

from collections.abc import Callable, Mapping
from typing import Final

from kvcluster.selection.base import BlockSelection
from kvcluster.selection.block_sparse import BlockSparse
from kvcluster.selection.estimated import Estimated
from kvcluster.selection.quest import Quest

METHODS: Final[Mapping[str, Callable[..., BlockSelection]]] = {
    method.name: method for method in (BlockSparse, Estimated, Quest)
}
"""By the name in a policy: a frozen dataclass whose fields are its parameters."""
