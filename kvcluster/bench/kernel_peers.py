"""Attention by others that a GPU machine may have, for benchmarks of our kernels beside them."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Flash3(NamedTuple):
    """The functions of the `fa3-fwd` wheel that we compare with."""

    attend: Callable[..., Any]
    """Prefill: q, k, v as [batch, tokens, heads, dim]; `causal=`."""
    attend_cached: Callable[..., Any]
    """Decode: `flash_attn_with_kvcache`."""


def flash3() -> Flash3 | None:
    """FlashAttention 3, where its wheel is installed."""
    if find_spec("fa3_fwd_interface") is None:
        return None
    # The wheel renamed its modules, and one of them still imports another by its old name.
    try:
        sys.modules.setdefault("flash_attn_config", import_module("fa3_fwd_config"))
        module = import_module("fa3_fwd_interface")
    except (ImportError, OSError) as error:
        sys.stderr.write(f"FA3 does not load here: {error}\n")
        return None
    return Flash3(module.flash_attn_func, module.flash_attn_with_kvcache)


def decode_peers(
    q_1HTD: Tensor, k_1KSD: Tensor, v_1KSD: Tensor
) -> Mapping[str, Callable[[], object]]:
    """By name: attention of T query tokens over S keys without a mask. bfloat16, one request."""
    aten = torch.ops.aten
    # The query heads that share a KV head as rows of one head: its keys are read once, which is the
    # best that these kernels can do. cuDNN knows grouped heads, and is asked both ways.
    q_1KXD = q_1HTD.reshape(1, k_1KSD.shape[1], -1, q_1HTD.shape[-1])
    peers: dict[str, Callable[[], object]] = {
        "torch flash": lambda: aten._scaled_dot_product_flash_attention(q_1KXD, k_1KSD, v_1KSD),
        "cuDNN": lambda: aten._scaled_dot_product_cudnn_attention(
            q_1KXD, k_1KSD, v_1KSD, attn_bias=None, compute_log_sumexp=True
        ),
        "cuDNN grouped": lambda: aten._scaled_dot_product_cudnn_attention(
            q_1HTD, k_1KSD, v_1KSD, attn_bias=None, compute_log_sumexp=True
        ),
    }
    flash = flash3()
    if flash is not None:
        q_1THD, k_1SKD, v_1SKD = (x.transpose(1, 2) for x in (q_1HTD, k_1KSD, v_1KSD))
        lengths_1 = torch.full((1,), k_1KSD.shape[2], dtype=torch.int32, device=q_1HTD.device)
        peers["FA3"] = lambda: flash.attend_cached(q_1THD, k_1SKD, v_1SKD, cache_seqlens=lengths_1)
    return peers
