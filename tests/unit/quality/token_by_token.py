"""Attention over a cache that drops tokens, token by token: what the tensors are compared with."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvcluster.codec.array import ArrayCodec
from kvcluster.quality.strict import ExactTokens, LayerCodecs
from kvcluster.retention.attention_mass import UNIT
from kvcluster.retention.base import RetentionPolicy
from kvcluster.retention.candidates import Candidates, Queries
from kvcluster.retention.scored import ScoredRetention
from kvcluster.retention.window import WindowRetention
from kvcluster.selection.base import BlockSelection, Rows, reads, summaries
from kvcluster.types import LayerGeometry
from tests.unit.quality.toys import Same
from tests.unit.retention.definitions import expected, mass

SIZE = 4
EXACT = ExactTokens(block_size=SIZE)


def geometry(window: int | None = None, softcap: float | None = None) -> LayerGeometry:
    return LayerGeometry(
        num_query_heads=4,
        num_kv_heads=2,
        key_dim=8,
        value_dim=8,
        scale=0.4,
        window=window,
        softcap=softcap,
    )


class Inputs(NamedTuple):
    q_THD: Tensor
    k_TKD: Tensor
    v_TKD: Tensor


def random_inputs(layer: LayerGeometry, num_tokens: int) -> Inputs:
    generator = torch.Generator().manual_seed(num_tokens)

    def random(num_heads: int, dim: int) -> Tensor:
        return 2 * torch.randn(num_tokens, num_heads, dim, generator=generator)

    return Inputs(
        random(layer.num_query_heads, layer.key_dim),
        random(layer.num_kv_heads, layer.key_dim),
        random(layer.num_kv_heads, layer.value_dim),
    )


class Halving(Same):
    """Once more encoded, once more halved: shows how often that was."""

    def decode(self, planes: Sequence[Tensor], positions_BS: Tensor) -> Tensor:
        return planes[0] / 2


class Token(NamedTuple):
    """One head's token as it is read."""

    position: int
    k_D: Tensor
    v_D: Tensor
    mass: float = 0.0


def encoded(rows_OD: Tensor, codec: ArrayCodec | None, start: int) -> Tensor:
    if codec is None:
        return rows_OD
    positions_BS = torch.arange(start, start + len(rows_OD))[None]
    return codec.decode(codec.encode(rows_OD[None, None], positions_BS), positions_BS)[0, 0]


def sealed(before: list[Token], after: list[Token], codecs: LayerCodecs) -> list[Token]:
    """One head's list with its whole blocks but the first encoded, where their tokens changed."""
    read = after[:]
    for start in range(SIZE, len(after) - SIZE + 1, SIZE):
        block = slice(start, start + SIZE)
        if [t.position for t in before[block]] == [t.position for t in after[block]]:
            continue
        k_OD = encoded(torch.stack([t.k_D for t in after[block]]), codecs.keys, start)
        v_OD = encoded(torch.stack([t.v_D for t in after[block]]), codecs.values, start)
        read[block] = [
            t._replace(k_D=k_D, v_D=v_D)
            for t, k_D, v_D in zip(after[block], k_OD, v_OD, strict=True)
        ]
    return read


def attended(
    layer: LayerGeometry, q_D: Tensor, tokens: list[Token], sink: float | None = None
) -> Tensor:
    logits_S = torch.stack([t.k_D for t in tokens]) @ q_D * layer.scale
    if layer.softcap is not None:
        logits_S = layer.softcap * torch.tanh(logits_S / layer.softcap)
    values_SD = torch.stack([t.v_D for t in tokens])
    if sink is not None:
        logits_S = torch.cat((logits_S, torch.tensor([sink])))
        values_SD = torch.cat((values_SD, torch.zeros_like(values_SD[:1])))
    return torch.softmax(logits_S, dim=0) @ values_SD


def by_epochs(
    layer: LayerGeometry,
    inputs: Inputs,
    retention: ScoredRetention,
    codecs: LayerCodecs,
    sinks_H: Tensor | None = None,
) -> tuple[Tensor, list[list[list[int]]]]:
    """The definition: outputs, and the survivors' positions of each head after each epoch."""
    num_tokens = len(inputs.q_THD)
    sharing = layer.num_query_heads // layer.num_kv_heads
    out_THD = torch.zeros(num_tokens, layer.num_query_heads, layer.value_dim)
    lists: list[list[Token]] = [[] for _ in range(layer.num_kv_heads)]
    history = []
    for first in range(0, num_tokens, retention.epoch_tokens):
        last = min(first + retention.epoch_tokens, num_tokens)
        readable = [
            lists[head]
            + [Token(p, inputs.k_TKD[p, head], inputs.v_TKD[p, head]) for p in range(first, last)]
            for head in range(layer.num_kv_heads)
        ]
        for query in range(first, last):
            for head in range(layer.num_query_heads):
                seen = [t for t in readable[head // sharing] if t.position <= query]
                sink = None if sinks_H is None else float(sinks_H[head])
                out_THD[query, head] = attended(layer, inputs.q_THD[query, head], seen, sink)
        if last == num_tokens:
            break
        candidates = Candidates(
            torch.tensor([[t.position for t in tokens] for tokens in readable]),
            torch.stack([torch.stack([t.k_D for t in tokens]) for tokens in readable]),
            torch.tensor([[round(t.mass / UNIT) for t in tokens] for tokens in readable]),
        )
        queries = Queries(inputs.q_THD[first:last], first, layer, sinks_H)
        kept = expected(retention, candidates, queries, last)
        for head, tokens in enumerate(readable):
            given = mass(candidates, queries, head)
            after = [
                t._replace(mass=t.mass + given[t.position])
                for t in tokens
                if t.position in kept[head]
            ]
            lists[head] = sealed(lists[head], after, codecs)
        history.append([[t.position for t in tokens] for tokens in lists])
    return out_THD, history


def blocks_by_position(
    layer: LayerGeometry,
    inputs: Inputs,
    retention: RetentionPolicy,
    codecs: LayerCodecs,
    selection: BlockSelection | None,
    exact: ExactTokens = EXACT,
    num_prompt_tokens: int = 0,
) -> Tensor:
    """The definition for tokens that stay where they are, as a loop over queries and heads."""
    num_tokens, sharing = len(inputs.q_THD), layer.num_query_heads // layer.num_kv_heads
    last_block = (num_tokens - 1) // SIZE
    read = []
    for head in range(layer.num_kv_heads):
        written = [(inputs.k_TKD[p, head], inputs.v_TKD[p, head]) for p in range(num_tokens)]
        tokens = [Token(p, k_D, v_D) for p, (k_D, v_D) in enumerate(written)]
        for block in range(1, last_block - exact.lag):
            span = slice(block * SIZE, (block + 1) * SIZE)
            k_OD = encoded(inputs.k_TKD[span, head], codecs.keys, span.start)
            v_OD = encoded(inputs.v_TKD[span, head], codecs.values, span.start)
            tokens[span] = map(Token, range(span.start, span.stop), k_OD, v_OD)
        read.append(tokens)
    own_T = torch.arange(num_tokens) // SIZE
    blocks_B = torch.arange(last_block + 1)
    readable_TB = blocks_B <= own_T[:, None]
    if isinstance(retention, WindowRetention):
        readable_TB &= (blocks_B == 0) | (blocks_B > own_T[:, None] - retention.recent // SIZE)
    reads_GTB = readable_TB[None]
    if selection is not None:
        is_prompt_T = torch.arange(num_tokens) < num_prompt_tokens
        rows = Rows(inputs.q_THD, own_T, readable_TB, is_prompt_T)
        keys = summaries(inputs.k_TKD.transpose(0, 1), SIZE, selection.needs)
        reads_GTB = reads(selection, 0, layer, rows, keys)
    out_THD = torch.zeros(num_tokens, layer.num_query_heads, layer.value_dim)
    for query in range(num_tokens):
        for head in range(layer.num_query_heads):
            kv_head, seen = head // sharing, []
            for p in range(query + 1):
                if not reads_GTB[head * len(reads_GTB) // layer.num_query_heads, query, p // SIZE]:
                    continue
                is_near = p // SIZE >= query // SIZE - exact.lag
                exact_token = Token(p, inputs.k_TKD[p, kv_head], inputs.v_TKD[p, kv_head])
                seen.append(exact_token if is_near else read[kv_head][p])
            out_THD[query, head] = attended(layer, inputs.q_THD[query, head], seen)
    return out_THD
