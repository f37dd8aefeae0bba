"""Codec `exact`: K and V as the model gave them."""

import torch
from torch import Tensor

from kvcluster.codec.base import EncodedKV, KVShape
from kvcluster.types import LayerGeometry


class ExactCodec:
    """Stores K and V unchanged: planes k_KSD and v_KSD in the model's dtype."""

    name = "exact"

    def bytes_per_token(self, geometry: LayerGeometry, bytes_per_element: int) -> float:
        return geometry.kv_elements_per_token * bytes_per_element

    def allocate(self, shape: KVShape, like: Tensor) -> EncodedKV:
        geometry = shape.geometry
        num_slots = shape.num_blocks * shape.block_size
        return EncodedKV(
            tuple(
                torch.zeros(
                    geometry.num_kv_heads, num_slots, dim, dtype=like.dtype, device=like.device
                )
                for dim in (geometry.key_dim, geometry.value_dim)
            )
        )

    def encode(self, pool: EncodedKV, slots_T: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> None:
        k_pool, v_pool = pool.planes
        k_pool.index_copy_(1, slots_T, k_TKD.transpose(0, 1))
        v_pool.index_copy_(1, slots_T, v_TKD.transpose(0, 1))

    def restore(self, encoded: EncodedKV) -> tuple[Tensor, Tensor]:
        k_KSD, v_KSD = encoded.planes
        return k_KSD, v_KSD
