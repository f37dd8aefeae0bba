"""The selections that a cluster serves, as the policy language names them. No torch: the engine
lists them.
"""

from typing import Final

from kvcluster.policy import Method, Parameter, PlugPoint, parse_choice
from kvcluster.selection.need import Need
from kvcluster.types import Policy

_SINKS: Final = Parameter(
    name="sinks", meaning="first blocks, which are always read", default=1, lowest=0
)
_LOCAL: Final = Parameter(
    name="local",
    meaning="latest blocks, which are always read, the query's own included",
    default=2,
    lowest=1,
)
BLOCK_SPARSE: Final = Method(
    plug_point=PlugPoint.SELECTION,
    name="block_sparse",
    meaning="a fixed pattern of blocks: local, first, strided and random",
    parameters=(
        Parameter(
            name="local",
            meaning="the query's own block and those right before it",
            default=8,
            lowest=1,
        ),
        Parameter(name="sinks", meaning="first blocks", default=1, lowest=0),
        Parameter(
            name="stride",
            meaning="every so many blocks, counted back; 0: none",
            default=0,
            lowest=0,
        ),
        Parameter(name="random", meaning="random blocks, beside the others", default=0, lowest=0),
        Parameter(name="seed", meaning="of the random blocks", default=0, lowest=0),
    ),
)
ESTIMATED: Final = Method(
    plug_point=PlugPoint.SELECTION,
    name="estimated",
    meaning="for each query head, the blocks that look worth reading",
    parameters=(
        Parameter(
            name="share",
            meaning="of the blocks, rounded up",
            default=0.25,
            lowest=0,
            highest=1,
            is_lowest_open=True,
        ),
        _SINKS,
        _LOCAL,
        Parameter(
            name="by",
            meaning="what a block's keys are known by",
            default="mean",
            choices=("mean", "bound"),
        ),
    ),
)
QUEST: Final = Method(
    plug_point=PlugPoint.SELECTION,
    name="quest",
    meaning="for each token of the output, the blocks that could hold its largest logits",
    parameters=(
        Parameter(
            name="tokens",
            meaning="read at most, a multiple of the block size",
            default=2048,
            lowest=1,
        ),
        _SINKS,
        _LOCAL,
    ),
)
SELECTION_METHODS: Final = (
    Method(plug_point=PlugPoint.SELECTION, name=Policy().selection, meaning="all that is kept"),
    BLOCK_SPARSE,
    ESTIMATED,
    QUEST,
)
BY: Final = {"mean": Need.MEANS, "bound": Need.BOUNDS}
"""What `estimated` compares."""


def needs_of(selection: str) -> Need:
    """What is known of each block. Raises: InvalidField for text that names no selection."""
    choice = parse_choice(selection, SELECTION_METHODS)
    if choice.name == ESTIMATED.name:
        return BY[str(choice.arguments["by"])]
    return Need.BOUNDS if choice.name == QUEST.name else Need.NOTHING
