"""Orders the directions of fitted bases by what losing them costs the predictions.

A fitted basis weighs errors by what is known in one layer: the queries, and W_o. How much an error
changes the predictions, which go through softmax and all the layers after, is to second order the
Fisher information: half of E[(g . e)^2] nats for an error e, with g the gradient of the negative
log-likelihood of a token drawn from the model's own prediction. Weighing low-rank factors so is due
to FWSVD (Hsu et al. 2022, arXiv 2207.00112), there with one weight a row; here with the whole
matrix G = E[g g^T] over the numbers of a token in all layers that share a latent.

In the coordinates z of a fitted basis of full rank, numbers have no correlation and variance 1. The
best projection of rank C is then the one on the leading eigenvectors U of G: down U and U^T up.

Shape letters: T tokens, R directions that were fitted, F numbers of a token (heads side by side).
"""

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from kvcluster.codec.basis import Basis
from kvcluster.codec.refined import Array
from kvcluster.quality.student import Student

PRIOR_SHARE: Final = 0.01
"""Of the whole weight: that of the fitted order, for directions in which the texts' gradients
happened to be small."""


class FisherSums:
    """Second moments of gradients in the directions of bases, over texts."""

    def __init__(self, student: Student, fitted: Mapping[tuple[range, Array], Basis]) -> None:
        self._student = student
        self._bases = {unit.name: fitted[unit.name] for unit in student.units}
        self._sums: dict[tuple[range, Array], Tensor] = {}

    def add(self, gradients: Mapping[tuple[range, Array], Tensor]) -> None:
        """g_TF of each unit, keys as before rotation."""
        for name, g_TF in gradients.items():
            h_TR = g_TF.double() @ self._bases[name].up_CF.to(g_TF.device).double().T
            moment_RR = h_TR.T @ h_TR
            before = self._sums.get(name)
            self._sums[name] = moment_RR if before is None else before + moment_RR

    def bases(self, prior_share: float = PRIOR_SHARE) -> dict[tuple[range, Array], Basis]:
        """The same directions in a better order: each new one is a combination of the old ones."""
        return {
            name: _ordered(basis, self._sums[name], prior_share)
            for name, basis in self._bases.items()
        }


def _ordered(fitted: Basis, moment_RR: Tensor, prior_share: float) -> Basis:
    prior_R = fitted.sizes().to(moment_RR).square()
    share = prior_share * moment_RR.trace() / prior_R.sum()
    values_R, vectors_RR = torch.linalg.eigh(moment_RR + torch.diag(share * prior_R))
    values_R, vectors_RR = values_R.flip(0).clamp_min(0), vectors_RR.flip(1)
    down_FR, up_RF = fitted.down_FC.to(moment_RR), fitted.up_CF.to(moment_RR)
    return Basis(
        mean_F=fitted.mean_F,
        down_FC=(down_FR @ vectors_RR).float().cpu(),
        up_CF=(vectors_RR.T @ up_RF).float().cpu(),
        spectrum_F=values_R.cpu(),
    )
