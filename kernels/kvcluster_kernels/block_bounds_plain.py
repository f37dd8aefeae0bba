"""The definition of `block_bounds`. Shape letters: those there."""

from torch import Tensor


def largest_bounds(q_JHD: Tensor, low_KBD: Tensor, high_KBD: Tensor, scale: float) -> Tensor:
    """As `block_bounds.largest_bounds`."""
    q_KGJD = (q_JHD.double() * scale).unflatten(1, (len(low_KBD), -1)).permute(1, 2, 0, 3)
    low_K1DB, high_K1DB = (x.double().transpose(1, 2)[:, None] for x in (low_KBD, high_KBD))
    bound_KGJB: Tensor = q_KGJD.clamp(min=0) @ high_K1DB + q_KGJD.clamp(max=0) @ low_K1DB
    return bound_KGJB.amax(dim=1).float()
