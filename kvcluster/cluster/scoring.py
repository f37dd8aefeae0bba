"""Rows of one rank that score prompt tokens, and what they say.

Shape letters: R rows that score, V vocabulary, N most likely tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcluster.attention.part import SequencePart
from kvcluster.engine.plan import ScoredTokens, SequenceStep
from kvcluster.model.scorer import score


@dataclass(frozen=True)
class ScoredPiece:
    """Rows of this rank that score consecutive tokens of a sequence."""

    sequence: int
    first: int
    """Position of the first of these tokens."""
    rows_R: Tensor
    wanted_R: Tensor
    """Their ids."""
    num_top: int


def scored_by(step: SequenceStep, part: SequencePart, rank: int) -> list[range]:
    """Positions of the tokens that a rank's rows score, piece by piece."""
    scoring = step.scoring
    if scoring is None:
        return []
    scored = (
        range(max(piece.start + 1, scoring.first), min(piece.end + 1, scoring.below))
        for piece in part.pieces
        if piece.rank == rank
    )
    return [positions for positions in scored if positions]


def scored_pieces(
    step: SequenceStep, part: SequencePart, token_ids: Tensor, num_top: int
) -> list[ScoredPiece]:
    """What this rank's rows of a part, whose tokens have these ids, are to score."""
    scoring = step.scoring
    if scoring is None:
        return []
    positions_T = part.positions(part.rank)
    following = torch.cat([token_ids[1:], torch.tensor([scoring.next_id])])
    pieces = []
    for scored in scored_by(step, part, part.rank):
        first_row = int(torch.searchsorted(positions_T, scored.start - 1))
        rows_R = torch.arange(first_row, first_row + len(scored)) + part.row_offset
        begin = scored.start - 1 - step.start
        wanted_R = following[begin : begin + len(scored)]
        pieces.append(ScoredPiece(step.sequence, scored.start, rows_R, wanted_R, num_top))
    return pieces


def scores(pieces: Sequence[ScoredPiece], logits_RV: Tensor) -> list[ScoredTokens]:
    """Of the rows of the pieces, one piece after the other."""
    found = []
    by_piece = torch.split(logits_RV, [len(piece.rows_R) for piece in pieces])
    for piece, logits_piece in zip(pieces, by_piece, strict=True):
        given = score(logits_piece, piece.wanted_R.to(logits_RV.device), piece.num_top)
        found.append(
            ScoredTokens(
                piece.sequence,
                piece.first,
                tuple(given.logprobs_R.tolist()),
                tuple(given.top_ids_RN.flatten().tolist()),
                tuple(given.top_logprobs_RN.flatten().tolist()),
            )
        )
    return found
