"""The retention policies that a cluster serves, as the policy language names them. No torch: the
engine counts by them.
"""

from collections.abc import Callable, Mapping
from typing import Final

from kvcluster.policy import Choice, Method, Parameter, PlugPoint, Value, parse_choice
from kvcluster.retention.base import Budgeted, Heads, SumsOfAllQueries, SumsOfLastQueries
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
_BUDGETED: Final = (
    Parameter(
        name="budget",
        meaning="share of the tokens that stays",
        default=0.2,
        lowest=0.0,
        highest=1.0,
        is_lowest_open=True,
    ),
    Parameter(
        name="recent",
        meaning="share of those that are the latest ones, whatever their score",
        default=0.5,
        lowest=0.0,
        highest=1.0,
    ),
    Parameter(
        name="heads",
        meaning="each KV head keeps its own tokens, or all heads of a layer share them",
        default=Heads.OWN.value,
        choices=tuple(heads.value for heads in Heads),
    ),
    Parameter(
        name="epoch",
        meaning="tokens between two choices, a multiple of the block size",
        default=512,
        lowest=1,
    ),
)
SCORED: Final = (
    Method(
        plug_point=PlugPoint.RETENTION,
        name="heavy_hitters",
        meaning="the tokens that all queries so far look at most",
        parameters=_BUDGETED,
    ),
    Method(
        plug_point=PlugPoint.RETENTION,
        name="snap",
        meaning="the tokens that the last queries look at, and what stands around them",
        parameters=(
            *_BUDGETED,
            Parameter(
                name="queries", meaning="last queries of an epoch that count", default=32, lowest=1
            ),
        ),
    ),
    Method(
        plug_point=PlugPoint.RETENTION,
        name="key_diversity",
        meaning="the tokens whose keys are unlike the others",
        parameters=_BUDGETED,
    ),
)
"""Those that keep a share of the tokens, the best by some score."""
_COUNTED: Final[Mapping[str, Callable[..., Budgeted]]] = {
    "heavy_hitters": SumsOfAllQueries,
    "snap": SumsOfLastQueries,
    "key_diversity": Budgeted,
}
"""What each of these is to those who count: the base of its method, which has the same fields."""
RETENTION_METHODS: Final = (
    Method(plug_point=PlugPoint.RETENTION, name=FullRetention.name, meaning="every token"),
    WINDOW,
    *SCORED,
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


def budgeted(retention: str, block_size: int) -> Budgeted | None:
    """How many tokens a retention by score keeps, and when; None: it is none by score.

    Raises: InvalidField for text that names no retention; ValueError for epochs that are not whole
    blocks, and other arguments that do not fit them.
    """
    choice = parse_choice(retention, RETENTION_METHODS)
    if choice.name not in _COUNTED:
        return None
    return _COUNTED[choice.name](**scored_arguments(choice), block_size=block_size)


def scored_arguments(choice: Choice) -> dict[str, Value | Heads]:
    """The fields of a method by score, as a policy names them."""
    arguments: dict[str, Value | Heads] = dict(choice.arguments)
    epoch_tokens, heads = arguments.pop("epoch"), Heads(str(arguments.pop("heads")))
    return {**arguments, "heads": heads, "epoch_tokens": epoch_tokens}
