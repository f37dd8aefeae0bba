"""A model whose queries, keys and values depend on the position alone.

Nothing feeds back, so two ways of serving it hand the very same numbers to the cache: what differs
afterwards is attention's own rounding, not a code that fell to the other side because of it.
"""

from typing import cast

import torch
from torch import Tensor

from kvcluster.model.attention_hook import LayerAttention
from kvcluster.model.loader import LoadedModel
from kvcluster.types import LayerGeometry, ModelSpec

VOCAB_SIZE = 11


def latent_geometry(*, window: int | None = None) -> LayerGeometry:
    """Multi-head latent attention: a latent of 16 numbers and a rotary key of 8."""
    return LayerGeometry(
        num_query_heads=4,
        num_kv_heads=1,
        key_dim=24,
        value_dim=16,
        scale=0.2,
        window=window,
        values_in_keys=True,
    )


def geometry(
    *, window: int | None = None, softcap: float | None = None, kv_layer: int | None = None
) -> LayerGeometry:
    return LayerGeometry(
        num_query_heads=4,
        num_kv_heads=2,
        key_dim=16,
        value_dim=16,
        scale=0.25,
        window=window,
        softcap=softcap,
        kv_layer=kv_layer,
    )


class ScriptedModel:
    """`recorded` has what attention gave, by layer and position."""

    def __init__(self, *layers: LayerGeometry, max_tokens: int, seed: int = 0) -> None:
        self.spec = ModelSpec(
            name="scripted",
            layers=layers,
            vocab_size=VOCAB_SIZE,
            max_context_tokens=max_tokens,
            eos_token_ids=(),
            dtype="float32",
            bytes_per_element=4,
            weights_digest="",
            tokenizer_digest="",
        )
        self.device = torch.device("cpu")
        self.recorded: dict[tuple[int, int], Tensor] = {}
        generator = torch.Generator().manual_seed(seed)
        self.script = [_script(layer, max_tokens, generator) for layer in layers]
        for index, layer in enumerate(layers):
            if layer.kv_layer is not None:
                q_THD, _, _ = self.script[index]
                _, k_TKD, v_TKD = self.script[layer.kv_layer]
                self.script[index] = (q_THD, k_TKD, v_TKD)

    @property
    def loaded(self) -> LoadedModel:
        """This model where a loaded one is asked for."""
        return cast(LoadedModel, self)

    def forward(
        self,
        token_ids_T: Tensor,
        positions_T: Tensor,
        logit_rows_R: Tensor,
        attention: LayerAttention,
    ) -> Tensor:
        for layer, qkv in enumerate(self.script):
            q_THD, k_TKD, v_TKD = (x[positions_T] for x in qkv)
            out_THD = attention.attend(layer, q_THD, k_TKD, v_TKD, None)
            for position, out_HD in zip(positions_T.tolist(), out_THD, strict=True):
                self.recorded[layer, position] = out_HD.clone()
        logits_RV = torch.zeros(len(logit_rows_R), VOCAB_SIZE)
        logits_RV[:, 5] = 1.0
        return logits_RV


def _script(
    layer: LayerGeometry, max_tokens: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    q_THD, k_TKD, v_TKD = (
        torch.randn(max_tokens, heads, dim, generator=generator)
        for heads, dim in (
            (layer.num_query_heads, layer.key_dim),
            (layer.num_kv_heads, layer.key_dim),
            (layer.num_kv_heads, layer.value_dim),
        )
    )
    return q_THD, k_TKD, k_TKD[..., : layer.value_dim] if layer.values_in_keys else v_TKD
