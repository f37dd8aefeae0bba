"""Which rows that choose their blocks go through kernels, and why others do not, for people."""

from typing import Final

from kvcluster.attention.chosen_reasons import SURVIVORS, reason_against
from kvcluster.attention.kernel_attention import DTYPES
from kvcluster.selection.block_sparse import BlockSparse
from kvcluster.selection.estimated import Estimated
from kvcluster.selection.quest import Quest
from kvcluster.types import LayerGeometry

_METHODS: Final = (BlockSparse, Estimated, Quest)
_BLOCK_TOKENS: Final = 64
_LATENT_DIM: Final = 512
_ROTARY_DIM: Final = 64


def chosen_lines() -> dict[str, str]:
    """Of blocks of 64 tokens: what serves the rows of the output, each of which reads blocks of its
    own, and tiles of the prompt."""
    names = ", ".join(method.name for method in _METHODS)
    in_prompt = ", ".join(method.name for method in _METHODS if method.chooses_in_prompt)
    dtypes = " and ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
    heads = _geometry(128, 128)
    latent = _geometry(_LATENT_DIM + _ROTARY_DIM, _LATENT_DIM, num_kv_heads=1)
    wide = reason_against(latent, block_size=_BLOCK_TOKENS, has_tiles=True)
    unread = reason_against(
        heads, block_size=_BLOCK_TOKENS, has_rows=True, unread_codec="what is named in torch above"
    )
    short = reason_against(heads, block_size=_BLOCK_TOKENS // 8)
    rows = reason_against(latent, block_size=_BLOCK_TOKENS, has_rows=True)
    assert rows is None, "latent attention is decoded by a kernel"
    return {
        "chosen blocks, decode": f"kernels pick and read them for {names} in {dtypes}, over exact "
        "blocks, latent attention and all codecs that kernels of decode read",
        "chosen blocks, prefill": f"kernels read lists for {in_prompt} in {dtypes}; encoded blocks "
        "are restored first",
        "chosen blocks in torch": f"prefill of latent attention: {wide}; decode: {unread}; "
        f"{short}; with tokens kept by score: {SURVIVORS}",
    }


def _geometry(key_dim: int, value_dim: int, *, num_kv_heads: int = 2) -> LayerGeometry:
    return LayerGeometry(
        num_query_heads=8,
        num_kv_heads=num_kv_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        values_in_keys=num_kv_heads == 1,
        scale=1.0,
    )
