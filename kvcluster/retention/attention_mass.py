"""How much attention tokens get from queries, summed so that no order of summing shows.

Probabilities are taken under the LSE over the keys of all ranks: under a rank's own, tokens of a
rank with few good keys would count too much. Logits are float64, since float32 rounds differently
from one batch shape to the next, and that would now and then change a survivor. Each probability
becomes a whole number of `UNIT`s before it is added to others.

Shape letters: T query tokens, S keys, H query heads, K KV heads, G query heads of a KV head, D head
dimension.
"""

import math
from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from kvcluster.retention.candidates import Candidates, Queries
from kvcluster.retention.ranks import Ranks
from kvcluster.retention.top_k import PADDING

UNIT: Final = 2.0**-32
"""Of the whole attention of one query head. 2^31 of them fit into an int64."""
_TILE_ELEMENTS: Final = 1 << 23
"""Logits that are held at one time."""


def attention_mass(candidates: Candidates, queries: Queries, ranks: Ranks) -> Tensor:
    """mass_KS: int64, what the queries give each token, summed over the heads of its KV head."""
    lse_HT = torch.cat(
        [torch.logsumexp(logits_HTS, dim=-1) for logits_HTS in _logits(candidates, queries)], dim=1
    )
    parts = ranks.gather(lse_HT)
    if queries.sinks_H is not None:
        parts = [*parts, queries.sinks_H.double()[:, None].expand_as(lse_HT)]
    # Gathered, not added: every rank then computes the very same number.
    lse_HT = torch.logsumexp(torch.stack(parts), dim=0)
    mass_KS = torch.zeros_like(candidates.mass_KS)
    first = 0
    for logits_HTS in _logits(candidates, queries):
        _, num_rows, num_keys = logits_HTS.shape
        share_HTS = torch.exp(logits_HTS - lse_HT[:, first : first + num_rows, None])
        units_HTS = (share_HTS / UNIT).round().long()
        sharing = len(units_HTS) // len(mass_KS)
        mass_KS += units_HTS.reshape(len(mass_KS), sharing * num_rows, num_keys).sum(dim=1)
        first += num_rows
    return mass_KS


def _logits(candidates: Candidates, queries: Queries) -> Iterator[Tensor]:
    """logits_HTS in float64 of some queries at a time; -inf where a query cannot see a token."""
    num_kv_heads, num_keys = candidates.positions_KS.shape
    num_tokens, num_heads, dim = queries.q_THD.shape
    layer, sharing = queries.layer, num_heads // num_kv_heads
    k_KDS = candidates.k_KSD.double().transpose(1, 2)
    tile = max(1, _TILE_ELEMENTS // max(1, num_heads * num_keys))
    for first in range(0, num_tokens, tile):
        q_tile = queries.q_THD[first : first + tile].double()
        num_rows = len(q_tile)
        # Sizes are spelt out: a rank may hold no token, and then none can be inferred.
        q_KRD = q_tile.transpose(0, 1).reshape(num_kv_heads, sharing * num_rows, dim)
        logits_KGTS = (q_KRD @ k_KDS * layer.scale).reshape(
            num_kv_heads, sharing, num_rows, num_keys
        )
        if layer.softcap is not None:
            logits_KGTS = layer.softcap * torch.tanh(logits_KGTS / layer.softcap)
        positions_T1 = torch.arange(num_rows, device=q_tile.device)[:, None] + queries.first + first
        positions_K1S = candidates.positions_KS[:, None]
        is_hidden_KTS = (positions_K1S > positions_T1) | (positions_K1S == PADDING)
        logits_KGTS = logits_KGTS.masked_fill(is_hidden_KTS[:, None], -math.inf)
        yield logits_KGTS.reshape(num_heads, num_rows, num_keys)
