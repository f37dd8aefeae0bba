"""What every array codec checks of its arguments.

Shape letters: B blocks, K KV heads, S tokens of a block, D head dimension.
"""

from collections.abc import Sequence

from torch import Tensor

from kvcluster.codec.array import BlockShape, Plane


def shape_of_blocks(x_BKSD: Tensor, positions_BS: Tensor) -> BlockShape:
    """Shape of one of the given blocks. Raises: ValueError unless each token has a position."""
    if x_BKSD.ndim != 4 or not x_BKSD.is_floating_point():
        raise ValueError(
            "blocks must be a float array [blocks, KV heads, tokens, channels], "
            f"not {x_BKSD.dtype} of shape {tuple(x_BKSD.shape)}"
        )
    if positions_BS.shape != (x_BKSD.shape[0], x_BKSD.shape[2]):
        raise ValueError(
            f"{x_BKSD.shape[0]} blocks of {x_BKSD.shape[2]} tokens need as many positions, not "
            f"shape {tuple(positions_BS.shape)}"
        )
    return BlockShape(*x_BKSD.shape[1:])


def shape_of_stored(x: Tensor) -> BlockShape:
    """Shape of one of the stored blocks, before its planes are checked. Raises: ValueError unless
    there are four axes."""
    if x.ndim != 4:
        raise ValueError(f"a stored block has three axes, not {x.ndim - 1}: {tuple(x.shape)}")
    return BlockShape(*x.shape[1:])


def check_planes(planes: Sequence[Tensor], wanted: Sequence[Plane], positions_BS: Tensor) -> None:
    """Raises: ValueError where an encoded array is not what its plane says."""
    if len(planes) != len(wanted):
        raise ValueError(f"{len(wanted)} planes are wanted, not {len(planes)}")
    num_blocks = positions_BS.shape[0]
    for given, plane in zip(planes, wanted, strict=True):
        if given.shape != (num_blocks, *plane.shape) or given.dtype != plane.dtype:
            raise ValueError(
                f"plane {plane.name} must be {plane.dtype} of shape {(num_blocks, *plane.shape)}, "
                f"not {given.dtype} of shape {tuple(given.shape)}"
            )


def check_multiple(what: str, number: int, divisor: int) -> None:
    """Raises: ValueError unless `number`, which is the `what`, is a multiple of `divisor`."""
    if number < divisor or number % divisor:
        raise ValueError(f"{what} must be a multiple of {divisor}, not {number}")


def check_one_of(what: str, number: int, offered: Sequence[int]) -> None:
    """Raises: ValueError unless `number`, which is the `what`, is offered."""
    if number not in offered:
        raise ValueError(f"{what} must be one of {', '.join(map(str, offered))}, not {number}")
