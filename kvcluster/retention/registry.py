"""The retention policies that exist. Adding one is a file and a line here."""

from collections.abc import Callable, Mapping
from typing import Final

from kvcluster.retention.base import RetentionPolicy
from kvcluster.retention.full import FullRetention
from kvcluster.retention.heavy_hitters import HeavyHitters
from kvcluster.retention.key_diversity import KeyDiversity
from kvcluster.retention.snap import Snap
from kvcluster.retention.window import WindowRetention

METHODS: Final[Mapping[str, Callable[..., RetentionPolicy]]] = {
    method.name: method
    for method in (FullRetention, WindowRetention, HeavyHitters, Snap, KeyDiversity)
}
"""By the name in a policy: a frozen dataclass whose fields are its parameters."""
