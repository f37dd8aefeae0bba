"""The survivors of one layer, compacted and encoded.

Each KV head has a list of its survivors in order of position, which is made anew at the end of
every epoch: survivors that are dropped leave it, and the survivors of the epoch that ends join it.
The list is cut into blocks from its start. Whole blocks but the first are encoded; what was encoded
before is encoded again from what the codec restored, but a block of a head in which no token
changed keeps its bytes. So a token is encoded first when its epoch ends, and nothing is read that
is not stored.

Shape letters: S candidates, J survivors, B blocks, O tokens of a block, K KV heads, D head
dimension.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvcluster.codec.array import ArrayCodec, BlockShape
from kvcluster.quality.strict import ExactTokens, KeysValues, LayerCodecs, restored
from kvcluster.retention.base import Heads
from kvcluster.retention.candidates import Candidates, Queries
from kvcluster.retention.scored import ScoredRetention, survivors
from kvcluster.types import LayerGeometry


class SurvivorList(NamedTuple):
    """As many tokens for each head, and its own ones, in order of position."""

    kv: KeysValues
    """As they are read."""
    positions_KJ: Tensor
    mass_KJ: Tensor
    """See `Candidates`."""

    @classmethod
    def empty(cls, like: KeysValues) -> "SurvivorList":
        none_KJ = torch.zeros(len(like.k_KTD), 0, dtype=torch.int64, device=like.k_KTD.device)
        return cls(like.rows(0, 0), none_KJ, none_KJ)


def cut(
    retention: ScoredRetention, kept: SurvivorList, own: KeysValues, readers: Sequence[Queries]
) -> SurvivorList:
    """The survivors, not encoded anew, when the epoch of these keys ends. `readers`: the queries
    of each layer that reads them."""
    first, last = readers[0].first, readers[0].last
    own_S = torch.arange(first, last, device=own.k_KTD.device)
    own_KS = own_S.expand(len(kept.positions_KJ), -1)
    readable = kept.kv.followed_by(own)
    candidates = Candidates(
        torch.cat((kept.positions_KJ, own_KS), dim=1),
        readable.k_KTD,
        torch.cat((kept.mass_KJ, torch.zeros_like(own_KS)), dim=1),
    )
    chosen = survivors(retention, candidates, readers, last)
    place_KJ = chosen.kept_KS.nonzero()[:, 1].reshape(len(own_KS), -1)

    def taken(x_KSD: Tensor) -> Tensor:
        return x_KSD.gather(1, place_KJ[..., None].expand(-1, -1, x_KSD.shape[2]))

    return SurvivorList(
        KeysValues(taken(readable.k_KTD), taken(readable.v_KTD)),
        candidates.positions_KS.gather(1, place_KJ),
        chosen.mass_KS.gather(1, place_KJ),
    )


def sealed(
    kept: SurvivorList,
    before: SurvivorList,
    codecs: LayerCodecs,
    geometry: LayerGeometry,
    exact: ExactTokens,
    heads: Heads = Heads.OWN,
) -> SurvivorList:
    """The survivors as they are read once their blocks are encoded. `before` is the list that they
    replace. Codecs are told the tokens' positions where heads share them, else their places."""
    size = exact.block_size
    encoded = encoded_blocks(kept.positions_KJ.shape[1], exact)
    positions_J = kept.positions_KJ[0] if heads is Heads.SHARED else None
    stored = stored_as(kept.kv, codecs, geometry, encoded, size, positions_J)
    if stored is kept.kv:
        return kept
    same_KJ1 = _in_same_block(before.positions_KJ, kept.positions_KJ, size)[..., None]
    return kept._replace(
        kv=KeysValues(*(torch.where(same_KJ1, x, y) for x, y in zip(kept.kv, stored, strict=True)))
    )


def encoded_blocks(num_survivors: int, exact: ExactTokens) -> range:
    """The blocks of a survivors' list that are encoded."""
    return range(int(exact.exact_sinks), num_survivors // exact.block_size)


def stored_as(
    written: KeysValues,
    codecs: LayerCodecs,
    geometry: LayerGeometry,
    blocks: range,
    block_size: int,
    positions_T: Tensor | None = None,
) -> KeysValues:
    """What is read once these blocks are encoded; the very same object where none is.
    `positions_T`: see `restored`.

    Raises: ValueError as `restored`."""
    if codecs == LayerCodecs(None, None) or not blocks:
        return written

    def read(x_KTD: Tensor, codec: ArrayCodec | None) -> Tensor:
        if codec is None:
            return x_KTD
        return restored(x_KTD, codec, blocks, block_size, positions_T)

    k_KTD = read(written.k_KTD, codecs.keys)
    if geometry.values_in_keys:
        return KeysValues(k_KTD, k_KTD[..., : geometry.value_dim])
    return KeysValues(k_KTD, read(written.v_KTD, codecs.values))


def block_bytes(codec: ArrayCodec | None, shape: BlockShape) -> int:
    """Bytes of one encoded block; 0 without a codec."""
    return 0 if codec is None else sum(plane.num_bytes for plane in codec.planes(shape))


def _in_same_block(before_KJ: Tensor, after_KJ: Tensor, block_size: int) -> Tensor:
    """same_KJ: whether a token's block was whole before, with the same tokens."""
    num_whole = min(before_KJ.shape[1], after_KJ.shape[1]) // block_size * block_size
    is_equal_KJ = before_KJ[:, :num_whole] == after_KJ[:, :num_whole]
    is_equal_KBO = is_equal_KJ.reshape(len(after_KJ), -1, block_size)
    same_KJ = torch.zeros_like(after_KJ, dtype=torch.bool)
    same_KJ[:, :num_whole] = is_equal_KBO.all(dim=2).repeat_interleave(block_size, dim=1)
    return same_KJ
