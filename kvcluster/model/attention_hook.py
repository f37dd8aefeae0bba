"""The way from a transformers model to our attention, in the process of one rank.

transformers calls one registered function for every attention layer and passes it the model's
keyword arguments. So the state of a forward pass travels as a keyword argument, and this module
holds none.

Shapes: T tokens packed over sequences (batch size is always 1), H query heads, K KV heads,
D head dimension, R rows with logits, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from kvcluster.model.mla import latent_form

IMPLEMENTATION: Final = "kvcluster"
"""Name of the attention implementation that a model must be set to before `forward`."""


class LayerAttention(Protocol):
    """Attention of one forward pass over all its layers, wherever their keys are."""

    def attend(
        self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, sinks_H: Tensor | None
    ) -> Tensor:
        """Attend the pass's tokens to their sequences' past and to themselves; keep K and V.

        `layer` is the index in `ModelSpec.layers`, in the order of the calls: each layer is
        called once in a pass. Keys already carry their rotary position. A layer that reads the K
        and V of another (`LayerGeometry.kv_layer`) gets those. The tensors are views that the
        model may reuse after the call. Returns out_THD (D of the values), q's dtype.
        """
        ...


@dataclass(slots=True)
class AttentionPass:
    """One forward pass on its way through the layers."""

    attention: LayerAttention
    num_layers_done: int = 0


@torch.compiler.disable  # type: ignore[untyped-decorator]
def kvcluster_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _attention_mask: Tensor | None,
    *,
    kvcluster_pass: AttentionPass,
    s_aux: Tensor | None = None,
    **_rules: Any,
) -> tuple[Tensor, None]:
    """Called by every attention layer with [1, heads, T, D] tensors; gives [1, T, H, D]. A layer of
    `mla.keep_latents` brings queries that are still to be multiplied.

    Scale, window and soft-cap come with each call too, but were read once by `probe`: the
    attention knows them from the layer's geometry.
    """
    layer = kvcluster_pass.num_layers_done
    kvcluster_pass.num_layers_done = layer + 1
    latent = latent_form(module)
    if latent is not None:
        query = latent.absorbed(query)
    out_THD = kvcluster_pass.attention.attend(
        layer, query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1), s_aux
    )
    if latent is not None:
        out_THD = latent.expanded(out_THD)
    # Some models take a view of the result that only contiguous memory allows.
    return out_THD.contiguous().unsqueeze(0), None


@torch.inference_mode()
def forward(
    module: PreTrainedModel,
    token_ids_T: Tensor,
    positions_T: Tensor,
    logit_rows_R: Tensor,
    attention: LayerAttention,
) -> Tensor:
    """Run the model on packed tokens of any number of sequences, in any order.

    `token_ids_T`, `positions_T` and `logit_rows_R` (indices into T) are int64 on the model's
    device; T is at least 1, R may be 0. Calls `attention` once per layer. The model must be set
    to `IMPLEMENTATION`. Returns logits_RV, float32.
    """
    return differentiable_forward(module, token_ids_T, positions_T, logit_rows_R, attention)


def differentiable_forward(
    module: PreTrainedModel,
    token_ids_T: Tensor,
    positions_T: Tensor,
    logit_rows_R: Tensor,
    attention: LayerAttention,
) -> Tensor:
    """`forward` under the caller's gradient mode; the tensors that `attention` sees may be kept
    for a backward pass."""
    output = module(
        input_ids=token_ids_T.unsqueeze(0),
        position_ids=positions_T.unsqueeze(0),
        use_cache=False,
        logits_to_keep=logit_rows_R,
        kvcluster_pass=AttentionPass(attention),
    )
    logits_RV: Tensor = output.logits[0]
    return logits_RV.float()


# No mask function is registered under this name: transformers then builds no mask and does not
# look for packed sequences either, which would cost a device synchronisation in every pass.
AttentionInterface.register(IMPLEMENTATION, kvcluster_attention)
