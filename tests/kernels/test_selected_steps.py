"""What a selection reads through kernels is what it reads as it is defined."""

import pytest
import torch

from kvcluster.attention import decode_selected, kernel_selected
from kvcluster.types import Route
from tests import thread_ring
from tests.kernels.selected_cases import (
    BLOCK_SPARSE,
    BOUNDED,
    ESTIMATED,
    QUEST,
    Sequences,
    compare,
)
from tests.kernels.test_latent_steps import counted
from tests.kernels.test_steps import (
    EXACT_ATOL,
    PACKED_ATOL,
    InterpretedAttention,
    Setting,
    in_torch,
)

LATENT_ATTENTION = Setting(dim=48, latent_dim=32, num_alike=0)
WIDE = Setting(block_size=64, num_alike=0)
UNCAPPED = Setting(num_alike=1)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "case",
    [
        Sequences(QUEST, chunks=(2, 1.97), num_decoded=3, setting=UNCAPPED),
        Sequences(QUEST, "int4"),
        Sequences(QUEST, "rotated4"),
        Sequences(QUEST, "latent:r=0.5,bits=4,values=int4"),
        Sequences(QUEST, setting=LATENT_ATTENTION),
    ],
    ids=str,
)
def test_rows_of_steps_that_can_be_recorded_read_their_blocks(
    case: Sequences, monkeypatch: pytest.MonkeyPatch, interpreted: torch.device
) -> None:
    tables = counted(monkeypatch, decode_selected, "row_tables")

    compare(case, InterpretedAttention, in_torch, atol(case))

    assert len(tables) > 0


@pytest.mark.timeout(300)
def test_rows_that_come_and_go_leave_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, interpreted: torch.device
) -> None:
    """What lies on the device of rows of other widths is there no more."""
    monkeypatch.setattr(decode_selected, "_LEAST_WIDTH", 1)
    case = Sequences(QUEST, num_decoded=2, shorter_first=True)

    compare(case, InterpretedAttention, in_torch, EXACT_ATOL)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "case",
    [
        Sequences(QUEST, beside="exact"),
        Sequences(QUEST, "int4:values=rotated4", beside="int8"),
        Sequences(QUEST, num_ranks=2),
        Sequences(QUEST, "fp8", num_again=3),
    ],
    ids=str,
)
def test_rows_of_other_steps_read_their_blocks(
    case: Sequences, monkeypatch: pytest.MonkeyPatch, interpreted: torch.device
) -> None:
    monkeypatch.setattr(thread_ring, "TIMEOUT_S", 280.0)
    tables = counted(monkeypatch, kernel_selected, "row_tables")
    bounds = counted(monkeypatch, kernel_selected, "largest_bounds")

    compare(case, InterpretedAttention, in_torch, atol(case))

    assert len(tables) > 0
    # Rows of the prompt among them are compared as they are defined.
    assert (len(bounds) > 0) == (case.num_again == 0)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "case",
    [
        Sequences(BLOCK_SPARSE),
        Sequences(BLOCK_SPARSE, "int8"),
        Sequences(BLOCK_SPARSE, "latent:r=0.5,bits=4,values=rotated3", setting=WIDE),
        Sequences(ESTIMATED),
        Sequences(ESTIMATED, "int4"),
        Sequences(ESTIMATED, "rotated4", num_again=3),
        Sequences(BOUNDED, "int4:values=rotated4"),
        Sequences(BOUNDED, num_ranks=2, route=Route.PASS_Q),
    ],
    ids=str,
)
def test_tiles_that_choose_read_their_lists(
    case: Sequences, monkeypatch: pytest.MonkeyPatch, interpreted: torch.device
) -> None:
    monkeypatch.setattr(thread_ring, "TIMEOUT_S", 280.0)
    tiles = counted(monkeypatch, kernel_selected, "sparse_prefill")
    tables = counted(monkeypatch, kernel_selected, "row_tables")

    compare(case, InterpretedAttention, in_torch, atol(case))

    assert len(tiles) > 0
    assert len(tables) > 0


def atol(case: Sequences) -> float:
    return EXACT_ATOL if case.codec == "exact" else PACKED_ATOL
