"""Which ways of storing a block have a kernel for rows of decode, for people: each is asked for."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import torch
from kvcluster_kernels.latent_gluon_launch import COLUMNS, RANKS, format_against
from torch import Tensor

from kvcluster.attention.latent_cache import LatentCache
from kvcluster.attention.packed_keys import packed_pages
from kvcluster.codec.array import ArrayCodec, BlockShape
from kvcluster.codec.basis import Basis
from kvcluster.codec.latent import LatentKeys, LatentStorage, LatentValues
from kvcluster.codec.method import CodecModel, LayerCodec
from kvcluster.codec.plain_methods import PLAIN
from kvcluster.types import EXACT, LayerGeometry, ModelSpec

_CPU: Final = torch.device("cpu")
_BLOCK_TOKENS: Final = 64
_HEADS: Final = 2
_DIM: Final = 128
_RANK: Final = 64
_STORAGES: Final = {
    "16 bits": LatentStorage(),
    **{f"{bits} bits": LatentStorage(bits) for bits in (8, 4, 3, 2)},
    **{f"{bits} rotated bits": LatentStorage(bits, is_rotated=True) for bits in (4, 3, 2)},
}
"""How latents can be written."""
_FOUR_BITS: Final = "4 bits"
_GEOMETRY: Final = LayerGeometry(
    num_query_heads=_HEADS, num_kv_heads=_HEADS, key_dim=_DIM, value_dim=_DIM, scale=1.0
)
_SPEC: Final = ModelSpec(
    name="",
    layers=(_GEOMETRY,),
    vocab_size=1,
    max_context_tokens=1,
    eos_token_ids=(),
    dtype="bfloat16",
    bytes_per_element=2,
    weights_digest="",
    tokenizer_digest="",
)


def decode_lines() -> dict[str, str]:
    """What kernels read, then what is read in torch, of heads of 128 and blocks of 64 tokens."""
    plain = dict(_plain())
    values = dict(_values())
    alone = [name for name, codec in plain.items() if is_served(codec)]
    mixed = [
        f"{keys}:values={'|'.join(others)}"
        for keys in plain
        if (others := [other for other in plain if _is_mixture(plain, keys, other)])
    ]
    latents = [name for name in _STORAGES if is_served(_beside_latents(_values_of(name), name))]
    beside = [name for name, codec in values.items() if is_served(_beside_latents(codec))]
    rotated = values["rotated3"]
    in_gluon = [name for name in _STORAGES if _is_for_hopper(_beside_latents(rotated, name))]
    beside_in_gluon = [
        name for name, codec in values.items() if _is_for_hopper(_beside_latents(codec))
    ]
    in_torch = [name for name in values if name not in beside]
    return {
        "decode": f"kernels for {', '.join(('exact', 'latent attention', *alone, *mixed))}",
        "decode of latents": f"kernels for keys as latents of {', '.join(latents)}; beside values "
        f"that are {', '.join(beside)}",
        "decode of latents on Hopper": f"a kernel of its own for latents of {', '.join(in_gluon)} "
        f"beside {', '.join(beside_in_gluon)}, of ranks that {RANKS} divides, for up to {COLUMNS} "
        "query rows of a KV head; the portable one for others",
        "decode in torch": "keys and values of two kinds that are not named above"
        + "".join(f", {name} values beside latents" for name in in_torch)
        + "".join(f", {name}" for name in plain if name not in alone),
    }


def _is_mixture(plain: Mapping[str, LayerCodec], keys: str, values: str) -> bool:
    return keys != values and is_served(LayerCodec(plain[keys].keys, plain[values].values))


def is_served(codec: LayerCodec) -> bool:
    """Whether a kernel reads blocks written so."""
    shape = BlockShape(_HEADS, _BLOCK_TOKENS, _DIM)
    planes = (_room(codec.keys, shape), _room(codec.values, shape))
    return packed_pages(codec, planes, _GEOMETRY, _BLOCK_TOKENS) is not None


def _is_for_hopper(codec: LayerCodec) -> bool:
    """Whether blocks written so are read by the kernel for Hopper, where there is one."""
    shape = BlockShape(_HEADS, _BLOCK_TOKENS, _DIM)
    planes = (_room(codec.keys, shape), _room(codec.values, shape))
    cache = packed_pages(codec, planes, _GEOMETRY, _BLOCK_TOKENS)
    return (
        isinstance(cache, LatentCache)
        and format_against(cache.keys, cache.expansion, cache.values) is None
    )


def _room(codec: ArrayCodec, shape: BlockShape) -> Sequence[Tensor]:
    return [torch.empty((1, 1, *plane.shape), dtype=plane.dtype) for plane in codec.planes(shape)]


def _plain() -> Iterator[tuple[str, LayerCodec]]:
    model = CodecModel(spec=_SPEC, device=_CPU)
    for name, method in PLAIN.items():
        if name != EXACT:
            yield name, method.with_defaults(model)[0]


def _values() -> Iterator[tuple[str, ArrayCodec]]:
    """What values beside latents can be."""
    yield EXACT, PLAIN[EXACT].with_defaults(CodecModel(spec=_SPEC, device=_CPU))[0].values
    yield from ((name, codec.values) for name, codec in _plain())
    yield "latents", _values_of(_FOUR_BITS)


def _beside_latents(values: ArrayCodec, name: str = _FOUR_BITS) -> LayerCodec:
    keys = LatentKeys(
        _basis(), num_heads=_HEADS, rank=_RANK, rotation=None, storage=_STORAGES[name]
    )
    return LayerCodec(keys, values)


def _values_of(name: str) -> LatentValues:
    return LatentValues(_basis(), num_heads=_HEADS, rank=_RANK, storage=_STORAGES[name])


def _basis() -> Basis:
    width = _HEADS * _DIM
    return Basis(
        mean_F=torch.zeros(width),
        down_FC=torch.zeros(width, _RANK),
        up_CF=torch.zeros(_RANK, width),
        spectrum_F=torch.ones(width, dtype=torch.float64),
    )
