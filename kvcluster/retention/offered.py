"""The retention policies that a cluster serves, as the policy language names them. No torch: the
engine counts by them.
"""

from typing import Final

from kvcluster.policy import Method, Parameter, PlugPoint, parse_choice
from kvcluster.retention.full import FullRetention
from kvcluster.retention.window import WindowRetention

WINDOW: Final = Method(
    plug_point=PlugPoint.RETENTION,
    name=WindowRetention.name,
    meaning="the first block and the latest tokens, by whole blocks",
    parameters=(
        Parameter(
            name="recent",
            meaning="tokens, a multiple of the block size",
            default=4096,
            lowest=1,
        ),
    ),
)
RETENTION_METHODS: Final = (
    Method(plug_point=PlugPoint.RETENTION, name=FullRetention.name, meaning="every token"),
    WINDOW,
)


def recent_blocks(retention: str, block_size: int) -> int | None:
    """W, where a row in block j reads block 0 and the blocks after j - W; None: it reads all.

    Raises: InvalidField for text that names no retention; ValueError for a window that is not
    whole blocks.
    """
    choice = parse_choice(retention, RETENTION_METHODS)
    if choice.name != WindowRetention.name:
        return None
    window = WindowRetention(recent=int(choice.arguments["recent"]), block_size=block_size)
    return window.num_blocks
