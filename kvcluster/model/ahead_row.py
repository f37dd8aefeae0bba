"""Names a token that only the device knows."""

from typing import NamedTuple


class AheadRow(NamedTuple):
    """The token of this row of the step before."""

    row: int
