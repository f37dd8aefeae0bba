"""A model's layers for one row, in seven kernels each: decode of a single sequence.

One row through a layer is products that read each weight once, with so little between them that
kernels of their own for norms, rotations and activations take longer than what they do. This serves
models whose layers are those of Llama; whatever else a model does is found out by comparing.

Shape letters: E hidden dimension, H query heads, X heads of queries, keys and values, D head
dimension, V vocabulary, T tokens, K KV heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

import torch
from kvcluster_kernels.row_products import Norm, gated_product, products
from kvcluster_kernels.row_products_plain import rotated
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvcluster.model.attention_hook import forward
from kvcluster.model.loader import LoadedModel
from kvcluster.types import ModelSpec

_LAYERS: Final = frozenset({"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer"})
"""Classes of transformers: two norms of root mean squares, rotated heads, a gate of SiLU."""
_ACTIVATIONS: Final = frozenset({"SiLU", "SiLUActivation"})
_RELATIVE_ERROR: Final = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
"""As `probe` has it: rounding is below, anything else that a layer may do is above."""


class TurningAttention(Protocol):
    """Attention of single rows, whose heads it turns to their positions."""

    def attend_turning(self, layer: int, qkv_RXD: Tensor, cos_RD: Tensor, sin_RD: Tensor) -> Tensor:
        """out_RHD. `qkv_RXD`: the heads of queries, then of keys, then of values."""
        ...


class _Layer(NamedTuple):
    """The weights of one layer."""

    attention_norm: Norm
    qkv: tuple[Tensor, ...]
    qkv_biases: tuple[Tensor, ...] | None
    out_EX: Tensor
    mlp_norm: Norm
    gate_NE: Tensor
    up_NE: Tensor
    down_EN: Tensor


@dataclass(frozen=True, kw_only=True)
class RowLayers:
    """One model, whose weights it shares. Raises what kernels raise."""

    embedding_VE: Tensor
    rotary: nn.Module
    layers: Sequence[_Layer]
    head_dim: int
    norm: Norm
    head_VE: Tensor

    @torch.inference_mode()
    def forward(
        self, token_ids_1: Tensor, positions_1: Tensor, attention: TurningAttention
    ) -> Tensor:
        """logits_1V of one row, float32, as `attention_hook.forward` computes them."""
        x_E = self.embedding_VE.index_select(0, token_ids_1)[0]
        cos_1D, sin_1D = (x[0] for x in self.rotary(x_E, positions_1[None]))
        for index, layer in enumerate(self.layers):
            qkv = products(x_E, layer.qkv, norm=layer.attention_norm, biases_N=layer.qkv_biases)
            heads_1XD = qkv.view(1, -1, self.head_dim)
            out_1HD = attention.attend_turning(index, heads_1XD, cos_1D, sin_1D)
            x_E = products(out_1HD.reshape(-1), (layer.out_EX,), residual_N=x_E)
            inner = gated_product(x_E, layer.gate_NE, layer.up_NE, norm=layer.mlp_norm)
            x_E = products(inner, (layer.down_EN,), residual_N=x_E)
        logits_V = products(x_E, (self.head_VE,), norm=self.norm, out_dtype=torch.float32)
        return logits_V[None]


def row_layers(model: LoadedModel) -> RowLayers | None:
    """None for a model with layers of another kind, or that gives something else."""
    module = model.module
    if not isinstance(module, PreTrainedModel):
        return None
    found = _read(module, model.spec)
    return found if found is not None and _gives_the_same(found, model) else None


def _read(module: PreTrainedModel, spec: ModelSpec) -> RowLayers | None:
    decoder: Any = module.get_decoder()  # type: ignore[no-untyped-call]
    layers = getattr(decoder, "layers", ())
    embedding: Any = module.get_input_embeddings()
    head: Any = module.get_output_embeddings()  # type: ignore[no-untyped-call]
    is_plain = (
        all(type(layer).__name__ in _LAYERS for layer in layers)
        and len(layers) == len(spec.layers)
        and all(geometry.kv_layer is None for geometry in spec.layers)
        and type(embedding) is nn.Embedding
        and type(head) is nn.Linear
        and head.bias is None
    )
    if not is_plain:
        return None
    read = [_read_layer(layer) for layer in layers]
    if not read or None in read:
        return None
    [head_dim, *others] = {(each.key_dim, each.value_dim) for each in spec.layers}
    if others or head_dim[0] != head_dim[1]:
        return None
    return RowLayers(
        embedding_VE=embedding.weight,
        rotary=decoder.rotary_emb,
        layers=[layer for layer in read if layer is not None],
        head_dim=head_dim[0],
        norm=_norm(decoder.norm),
        head_VE=head.weight,
    )


def _read_layer(layer: Any) -> _Layer | None:
    attention, mlp = layer.self_attn, layer.mlp
    qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
    linear = (*qkv, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    biases = tuple(each.bias for each in qkv if each.bias is not None)
    is_plain = (
        all(type(each) is nn.Linear for each in linear)
        and all(each.bias is None for each in linear[len(qkv) :])
        and len(biases) in (0, len(qkv))
        and type(mlp.act_fn).__name__ in _ACTIVATIONS
    )
    if not is_plain:
        return None
    return _Layer(
        attention_norm=_norm(layer.input_layernorm),
        qkv=tuple(each.weight for each in qkv),
        qkv_biases=biases or None,
        out_EX=attention.o_proj.weight,
        mlp_norm=_norm(layer.post_attention_layernorm),
        gate_NE=mlp.gate_proj.weight,
        up_NE=mlp.up_proj.weight,
        down_EN=mlp.down_proj.weight,
    )


def _norm(module: Any) -> Norm:
    return Norm(module.weight, float(module.variance_epsilon))


class _OwnValues:
    """Attention of a row that sees itself alone, either way; keeps the queries and keys."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self.seen: list[Tensor] = []

    def attend(
        self,
        layer: int,
        q_THD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        sinks_H: Tensor | None,  # noqa: ARG002
    ) -> Tensor:
        self.seen += [q_THD[0].float(), k_TKD[0].float()]
        geometry = self._spec.layers[layer]
        return v_TKD.repeat_interleave(geometry.num_query_heads // geometry.num_kv_heads, dim=1)

    def attend_turning(self, layer: int, qkv_RXD: Tensor, cos_RD: Tensor, sin_RD: Tensor) -> Tensor:
        geometry = self._spec.layers[layer]
        heads = [geometry.num_query_heads, geometry.num_kv_heads, geometry.num_kv_heads]
        turned_XD = rotated(qkv_RXD[0], cos_RD[0], sin_RD[0], sum(heads[:2]))
        q_HD, k_KD, v_KD = torch.split(turned_XD, heads)
        return self.attend(layer, q_HD[None], k_KD[None], v_KD[None], None)


def _gives_the_same(found: RowLayers, model: LoadedModel) -> bool:
    """Whether one row comes out as the model's own code has it."""
    device = model.device
    token_ids_1 = torch.tensor([model.spec.vocab_size // 2], device=device)
    positions_1 = torch.tensor([min(1000, model.spec.max_context_tokens - 1)], device=device)
    rows_1 = torch.zeros(1, dtype=torch.int64, device=device)
    own, ours = _OwnValues(model.spec), _OwnValues(model.spec)
    logits_1V = forward(model.module, token_ids_1, positions_1, rows_1, own)
    our_logits_1V = found.forward(token_ids_1, positions_1, ours)
    largest = _RELATIVE_ERROR.get(model.module.dtype, 0.0)
    pairs = zip((*own.seen, logits_1V), (*ours.seen, our_logits_1V), strict=True)
    return all(
        float(torch.linalg.vector_norm(mine - theirs))
        <= largest * float(torch.linalg.vector_norm(theirs))
        for theirs, mine in pairs
    )
