"""Multi-head latent attention (MLA): the cache holds the latent and the rotary key of a token.

An attention module of this kind (DeepSeek-V2, arXiv 2405.04434, section 2.1) computes of each token
a latent c and one rotary key r for all heads, and expands them right before it attends, with two
halves W_K and W_V of one projection per head: keys [W_K c, r], values W_V c. As

    [q_nope, q_rope] . [W_K c, r] = [W_K^T q_nope, q_rope] . [c, r]
    sum_s p_s W_V c_s = W_V sum_s p_s c_s

nothing needs to be expanded (appendix C there: both matrices are absorbed). What the hook gets is
one KV head with the key [c, r], whose first numbers c are its value; the query is multiplied before
attention and the output after it.

transformers (5.17 and 5.23) keeps the expansion in a method of its own, `expand_kv`, alike in every
model of this kind. Of these we serve axk1, deepseek_v2, deepseek_v3, glm4_moe_lite, longcat_flash,
minicpm3 and youtu; the others are refused for what else they do (sparse or linear attention).
`keep_latents` puts a `LatentForm` in the method's place, in each module by itself; everything else,
rotation included, stays the model's own code. A module without that method, or in which it computes
something else, is served as any other: its heads are cached expanded.

Attention over latents multiplies longer vectors (DeepSeek-V3: 576 and 512 numbers instead of 192
and 128), which costs a prefill 3.4 times the multiplications. Decoding is bound by the bytes read.

Shape letters: T tokens, H query heads, C latent dimension, N dimension of a key without rotation,
R rotated dimensions, V dimension of a value head.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

_METHOD: Final = "expand_kv"
_PARAMETERS: Final = ["kv_nope", "k_rot"]
_RELATIVE_ERROR: Final = 0.05
"""Largest norm of the difference of two expansions of random latents over their norm. Rounding is
below 0.01 in any dtype; another layout of heads or halves gives about 1."""


@dataclass(frozen=True, slots=True, eq=False)
class LatentForm:
    """What stands for `expand_kv` in one attention module."""

    config: PreTrainedConfig
    """The module's: says which attention it is set to."""
    implementations: frozenset[str]
    """Those that take latents. With another one the module attends as it always did."""
    expand: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    """The module's own method."""
    projection: nn.Linear
    """Weight [H * (N + V), C], no bias."""
    unrotated_dim: int
    value_head_dim: int

    def __call__(self, latent_1xTC: Tensor, rotary_1xTR: Tensor) -> tuple[Tensor, Tensor]:
        """Key and value of one head, [1, 1, T, C + R] and the first C of it; or what the module
        itself would give."""
        if self.config._attn_implementation not in self.implementations:
            return self.expand(latent_1xTC, rotary_1xTR)
        key_1xTD = torch.cat((latent_1xTC, rotary_1xTR), dim=-1)
        return key_1xTD, key_1xTD[..., : latent_1xTC.shape[-1]]

    def absorbed(self, query_1HTD: Tensor) -> Tensor:
        """The queries that meet latents: [1, H, T, N + R] becomes [1, H, T, C + R]."""
        q_1HTN, q_1HTR = query_1HTD.tensor_split([self.unrotated_dim], dim=-1)
        key_up_HNC, _ = self._up()
        return torch.cat((q_1HTN @ key_up_HNC, q_1HTR), dim=-1)

    def expanded(self, out_THC: Tensor) -> Tensor:
        """out_THV of weighted sums of latents."""
        _, value_up_HVC = self._up()
        return torch.einsum("thc,hvc->thv", out_THC, value_up_HVC)

    def defined(self, latent_1xTC: Tensor, rotary_1xTR: Tensor) -> tuple[Tensor, Tensor]:
        """What `expand` must give: key [1, H, T, N + R] and value [1, H, T, V]."""
        key_up_HNC, value_up_HVC = self._up()
        key_1HTN = latent_1xTC @ key_up_HNC.transpose(1, 2)
        rotary_1HTR = rotary_1xTR.expand(-1, key_1HTN.shape[1], -1, -1)
        value_1HTV = latent_1xTC @ value_up_HVC.transpose(1, 2)
        return torch.cat((key_1HTN, rotary_1HTR), dim=-1), value_1HTV

    def _up(self) -> tuple[Tensor, Tensor]:
        # Views, taken anew: the module's weights may be moved.
        weight = self.projection.weight
        heads = weight.view(-1, self.unrotated_dim + self.value_head_dim, weight.shape[1])
        key_up_HNC, value_up_HVC = heads.tensor_split([self.unrotated_dim], dim=1)
        return key_up_HNC, value_up_HVC


def keep_latents(module: PreTrainedModel, *implementations: str) -> None:
    """Have the attention modules that expand latents hand them to these attention implementations
    as they are. Mutates those modules, not their classes; twice is as once."""
    for part in module.modules():
        if latent_form(part) is None:
            form = _find_form(part, frozenset(implementations))
            if form is not None:
                setattr(part, _METHOD, form)


def latent_form(module: nn.Module) -> LatentForm | None:
    """What `keep_latents` put into an attention module."""
    form = vars(module).get(_METHOD)
    return form if isinstance(form, LatentForm) else None


def _find_form(part: nn.Module, implementations: frozenset[str]) -> LatentForm | None:
    """None where the module's expansion is not known to be the one above."""
    expand = getattr(part, _METHOD, None)
    projection = getattr(part, "kv_b_proj", None)
    config = getattr(part, "config", None)
    sizes = [
        getattr(part, name, None)
        for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")
    ]
    if (
        not callable(expand)
        or list(inspect.signature(expand).parameters) != _PARAMETERS
        # A subclass may keep its weight in another form.
        or type(projection) is not nn.Linear
        or projection.bias is not None
        or not isinstance(config, PreTrainedConfig)
        or not all(isinstance(size, int) and size > 0 for size in sizes)
    ):
        return None
    unrotated_dim, rotary_dim, value_head_dim, latent_dim = sizes
    num_rows, width = projection.weight.shape
    if width != latent_dim or num_rows % (unrotated_dim + value_head_dim):
        return None
    form = LatentForm(
        config=config,
        implementations=implementations,
        expand=expand,
        projection=projection,
        unrotated_dim=unrotated_dim,
        value_head_dim=value_head_dim,
    )
    return form if _expands_as_defined(form, rotary_dim) else None


@torch.inference_mode()
def _expands_as_defined(form: LatentForm, rotary_dim: int) -> bool:
    weight = form.projection.weight
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(1, 1, 3, weight.shape[1] + rotary_dim, generator=generator)
    latent, rotary = torch.split(random.to(weight), [weight.shape[1], rotary_dim], dim=-1)
    try:
        own = form.expand(latent, rotary)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError):
        return False
    return len(own) == 2 and all(
        x.shape == y.shape
        and float((x - y).float().norm()) <= _RELATIVE_ERROR * float(y.float().norm())
        for x, y in zip(own, form.defined(latent, rotary), strict=True)
    )
