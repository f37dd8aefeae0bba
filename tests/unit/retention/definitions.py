"""Scored retention token by token, as its text says it: what the tensors are compared with."""

import math
from collections.abc import Callable

import torch

from kvcluster.retention.attention_mass import UNIT
from kvcluster.retention.base import Heads
from kvcluster.retention.candidates import Candidates, Queries
from kvcluster.retention.heavy_hitters import HeavyHitters
from kvcluster.retention.key_diversity import KeyDiversity
from kvcluster.retention.scored import ScoredRetention
from kvcluster.retention.snap import Snap


def probabilities(
    candidates: Candidates, queries: Queries, kv_head: int, head: int
) -> list[dict[int, float]]:
    """For each query, in order: its attention probability for each position that it sees."""
    layer, found = queries.layer, []
    for row, q_HD in enumerate(queries.q_THD):
        logits = {}
        for position, k_D in zip(
            candidates.positions_KS[kv_head].tolist(), candidates.k_KSD[kv_head], strict=True
        ):
            if position <= queries.first + row:
                logit = float(q_HD[head].double() @ k_D.double()) * layer.scale
                if layer.softcap is not None:
                    logit = layer.softcap * math.tanh(logit / layer.softcap)
                logits[position] = logit
        total = sum(map(math.exp, logits.values()))
        if queries.sinks_H is not None:
            total += math.exp(float(queries.sinks_H[head]))
        found.append({position: math.exp(x) / total for position, x in logits.items()})
    return found


def mass(candidates: Candidates, queries: Queries, kv_head: int) -> dict[int, float]:
    """What the queries give each position of a KV head."""
    sharing = queries.layer.num_query_heads // queries.layer.num_kv_heads
    given = dict.fromkeys(candidates.positions_KS[kv_head].tolist(), 0.0)
    for head in range(kv_head * sharing, (kv_head + 1) * sharing):
        for seen in probabilities(candidates, queries, kv_head, head):
            for position, share in seen.items():
                given[position] += share
    return given


def _heavy_hitters(
    method: HeavyHitters, candidates: Candidates, queries: Queries, kv_head: int, num_tokens: int
) -> dict[int, float]:
    before = dict(
        zip(
            candidates.positions_KS[kv_head].tolist(),
            (candidates.mass_KS[kv_head] * UNIT).tolist(),
            strict=True,
        )
    )
    return {
        position: (before[position] + given) / len(range(position, num_tokens))
        for position, given in mass(candidates, queries, kv_head).items()
    }


def _snap(
    method: Snap, candidates: Candidates, queries: Queries, kv_head: int, num_tokens: int
) -> dict[int, float]:
    skipped = len(queries.q_THD) - method.queries
    latest = queries._replace(q_THD=queries.q_THD[skipped:], first=queries.first + skipped)
    given = mass(candidates, latest, kv_head)
    ordered = sorted(given)
    return {
        position: max(given[near] for near in ordered[max(0, place - 3) : place + 4])
        for place, position in enumerate(ordered)
    }


def _key_diversity(
    method: KeyDiversity, candidates: Candidates, queries: Queries, kv_head: int, num_tokens: int
) -> dict[int, float]:
    k_SD = candidates.k_KSD[kv_head].double()
    unit_SD = k_SD / k_SD.norm(dim=1, keepdim=True)
    mean_D = unit_SD.mean(dim=0)
    cosine_S = torch.nn.functional.cosine_similarity(unit_SD, mean_D[None], dim=1)
    return dict(zip(candidates.positions_KS[kv_head].tolist(), (-cosine_S).tolist(), strict=True))


_DEFINITIONS: dict[str, Callable[..., dict[int, float]]] = {
    "heavy_hitters": _heavy_hitters,
    "snap": _snap,
    "key_diversity": _key_diversity,
}


def expected(
    method: ScoredRetention, candidates: Candidates, queries: Queries, num_tokens: int
) -> list[set[int]]:
    """The positions that each KV head keeps, by the definition."""
    counts = method.counts(num_tokens)
    scores_of = [
        _DEFINITIONS[method.name](method, candidates, queries, kv_head, num_tokens)
        for kv_head in range(len(candidates.positions_KS))
    ]
    if method.heads is Heads.SHARED:
        together = {p: sum(scores[p] for scores in scores_of) for p in scores_of[0]}
        scores_of = [together] * len(scores_of)
    kept = []
    for scores, positions_S in zip(scores_of, candidates.positions_KS.tolist(), strict=True):
        pinned = set(range(method.block_size)) | set(range(num_tokens - counts.recent, num_tokens))
        others = sorted(set(positions_S) - pinned, key=lambda p: (-scores[p], p))
        kept.append(pinned | set(others[: counts.kept - len(pinned)]))
    return kept
