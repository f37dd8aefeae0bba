"""`row_products` and `rotated_rows` in PyTorch, in float64 for rows of float64.

Shape letters: E numbers of the row, N numbers of a product, H query heads, K KV heads, X heads of
all three, D head dimension.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import silu

from kvcluster_kernels.row_products import Norm


def products(
    x_E: Tensor,
    weights_NE: Sequence[Tensor],
    *,
    norm: Norm | None = None,
    biases_N: Sequence[Tensor] | None = None,
    residual_N: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """As `row_products.products`."""
    row_E = _wide(x_E) if norm is None else _normed(x_E, norm)
    out_N = torch.cat([weight.to(row_E.dtype) @ row_E for weight in weights_NE])
    if biases_N:
        out_N = out_N + torch.cat([bias.to(row_E.dtype) for bias in biases_N])
    if residual_N is not None:
        out_N = out_N + residual_N
    return out_N.to(out_dtype or x_E.dtype)


def gated_product(x_E: Tensor, gate_NE: Tensor, up_NE: Tensor, *, norm: Norm) -> Tensor:
    """As `row_products.gated_product`."""
    row_E = _normed(x_E, norm)
    gate_N, up_N = (weight.to(row_E.dtype) @ row_E for weight in (gate_NE, up_NE))
    return (silu(gate_N) * up_N).to(x_E.dtype)


def rotated(qkv_XD: Tensor, cos_D: Tensor, sin_D: Tensor, num_rotated: int) -> Tensor:
    """The first `num_rotated` heads turned to their position (RoPE; Su et al. 2021), the others as
    they are."""
    x_XD = _wide(qkv_XD)
    first, second = x_XD.chunk(2, dim=1)
    turned_XD = x_XD * cos_D + torch.cat((-second, first), dim=1) * sin_D
    return torch.cat((turned_XD[:num_rotated], x_XD[num_rotated:])).to(qkv_XD.dtype)


def _normed(x_E: Tensor, norm: Norm) -> Tensor:
    x_E = _wide(x_E)
    return x_E * torch.rsqrt(x_E.square().mean() + norm.epsilon) * norm.weight_E


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
