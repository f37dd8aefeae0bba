"""The retention policies that exist. Adding one is a file and a line here."""

from collections.abc import Callable, Mapping
from typing import Final

from kvcluster.policy import parse_choice
from kvcluster.retention.base import RetentionPolicy
from kvcluster.retention.full import FullRetention
from kvcluster.retention.heavy_hitters import HeavyHitters
from kvcluster.retention.key_diversity import KeyDiversity
from kvcluster.retention.offered import RETENTION_METHODS, scored_arguments
from kvcluster.retention.scored import ScoredRetention
from kvcluster.retention.snap import Snap
from kvcluster.retention.window import WindowRetention

METHODS: Final[Mapping[str, Callable[..., RetentionPolicy]]] = {
    method.name: method
    for method in (FullRetention, WindowRetention, HeavyHitters, Snap, KeyDiversity)
}
"""By the name in a policy: a frozen dataclass whose fields are its parameters."""

_SCORED: Final[Mapping[str, Callable[..., ScoredRetention]]] = {
    HeavyHitters.name: HeavyHitters,
    Snap.name: Snap,
    KeyDiversity.name: KeyDiversity,
}


def scored_retention(retention: str, block_size: int) -> ScoredRetention | None:
    """The method by score that a policy's retention names; None: it is none by score.

    Raises: InvalidField for text that names no retention; ValueError, saying what to give, for
    arguments that do not fit these blocks.
    """
    choice = parse_choice(retention, RETENTION_METHODS)
    if choice.name not in _SCORED:
        return None
    return _SCORED[choice.name](**scored_arguments(choice), block_size=block_size)
