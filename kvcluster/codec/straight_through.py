"""A latent whose basis can be trained: what `LatentValues` stores and restores, with a gradient.

The forward value is that of the codec, with the quantizer it has. Rounding has no slope, so the
gradient goes through it as if it were not there: the straight-through estimator (Bengio, Leonard
and Courville 2013, arXiv 1308.3432, section 4). `up` sees the latents as they are stored.

Shape letters: B blocks, S tokens of a block, F numbers of a token (heads side by side), C latent
dimension, R directions that were fitted.
"""

import torch
from torch import Tensor

from kvcluster.codec.basis import Basis
from kvcluster.codec.latent import LatentValues
from kvcluster.codec.rounding import MAX_HALF


class TrainableLatent:
    """Starts as the basis of a codec, and may move to any combination of the directions that were
    fitted beside it.

    The fitted directions are where the numbers of a token have no correlation and where errors
    count alike (`codec/calibration.py`). Parameters are offsets in them, in units of the standard
    deviation of the last direction that is stored: an optimizer that moves all its parameters as
    far (Adam) then does as much to the error with each. In the channels themselves, of very
    different size and correlated, it would do far more harm than good.
    """

    def __init__(self, codec: LatentValues, fitted: Basis) -> None:
        """`fitted` has the codec's basis as its prefix, and R directions, at least as many."""
        rank = codec.rank
        size_R = fitted.sizes()
        self._stored = codec.stored
        self._fitted = fitted
        self._rank = rank
        self._size_R = size_R
        self._unit = size_R[rank - 1].clone()
        num_fitted = fitted.rank
        self.down_RC = torch.zeros(num_fitted, rank, device=size_R.device).requires_grad_()
        self.up_CR = torch.zeros(rank, num_fitted, device=size_R.device).requires_grad_()
        self.shift_R = torch.zeros(num_fitted, device=size_R.device).requires_grad_()

    def parameters(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the way down, of the way up, and of the mean: leaves that an optimizer may change."""
        return self.down_RC, self.up_CR, self.shift_R

    def basis(self) -> Basis:
        """As it is now, in new memory without a gradient. Its spectrum is that of the start."""
        with torch.no_grad():
            mean_F, down_FC, up_CF = self._matrices()
            return Basis(
                mean_F=mean_F.clone(),
                down_FC=down_FC.contiguous(),
                up_CF=up_CF.contiguous(),
                spectrum_F=self._fitted.spectrum_F,
            )

    def restored(self, x_BSF: Tensor, positions_BS: Tensor) -> Tensor:
        """x_BSF, float32, as it is read from its encoded blocks."""
        mean_F, down_FC, up_CF = self._matrices()
        x_BSF = x_BSF.float().clamp(-MAX_HALF, MAX_HALF)
        latent_BSC = (x_BSF - mean_F) @ down_FC
        with torch.no_grad():
            latent_B1SC = latent_BSC[:, None]
            planes = self._stored.encode(latent_B1SC, positions_BS)
            error_B1SC = self._stored.decode(planes, positions_BS) - latent_B1SC
        return (latent_BSC + error_B1SC[:, 0]) @ up_CF + mean_F

    def _matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        fitted, rank = self._fitted, self._rank
        relative_R = self._unit / self._size_R
        shift_F = (self.shift_R * relative_R) @ fitted.up_CF
        down_FC = fitted.down_FC @ (self.down_RC * relative_R[:rank])
        up_CF = (self.up_CR * relative_R) @ fitted.up_CF
        return (
            fitted.mean_F + shift_F,
            fitted.down_FC[:, :rank] + down_FC,
            fitted.up_CF[:rank] + up_CF,
        )
