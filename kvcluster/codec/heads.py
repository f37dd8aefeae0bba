"""Which codecs can hold another token in each head of a slot."""

from collections.abc import Iterable

from kvcluster.codec.array import ArrayCodec, BlockShape
from kvcluster.codec.latent import LatentKeys
from kvcluster.types import LayerGeometry


def check_kept_apart(
    codecs: Iterable[tuple[ArrayCodec | None, ArrayCodec | None]],
    layers: Iterable[LayerGeometry],
    block_size: int,
) -> None:
    """Check that heads can keep tokens of their own: the codecs of keys and values of all layers
    that have no window of the model's own.

    Raises: ValueError as `check_single_heads`.
    """
    for (keys, values), geometry in zip(codecs, layers, strict=True):
        if geometry.window is None:
            check_single_heads(keys, values, geometry, block_size)


def check_single_heads(
    keys: ArrayCodec | None, values: ArrayCodec | None, geometry: LayerGeometry, block_size: int
) -> None:
    """Check that a layer's codecs (None: exact) write each head by itself, whatever its position.

    Raises: ValueError that says what to ask for instead.
    """
    stored = [("keys", keys, geometry.key_dim)]
    if not geometry.values_in_keys:
        stored.append(("values", values, geometry.value_dim))
    for array, codec, dim in stored:
        if codec is None:
            continue
        shape = BlockShape(geometry.num_kv_heads, block_size, dim)
        mixes_heads = any(plane.shape[0] != shape.num_heads for plane in codec.planes(shape))
        if mixes_heads or isinstance(codec, LatentKeys):
            raise ValueError(
                f"the {array} of all heads of a token are written together, as latents or pooled, "
                "and with heads=own each head keeps tokens of its own: ask for heads=shared, or "
                "for a codec of single heads"
            )
