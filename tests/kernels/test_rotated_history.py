"""Prefill over histories of rotated vectors against its definition in float64, in Triton's
interpreter."""

from dataclasses import replace

import pytest
import torch
from kvcluster_kernels.packed_history import prefill_history

from tests.kernels.decode_cases import Batch
from tests.kernels.rotated_history_cases import check, rotated_arguments

BATCH = Batch(lengths=(190,), num_heads=4, num_kv_heads=2, dim_k=64, dim_v=64, block_size=64)


@pytest.mark.parametrize("is_centred", [False, True])
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_every_width(bits: int, is_centred: bool, interpreted: torch.device) -> None:
    check(BATCH, bits, interpreted, is_centred=is_centred)


def test_wide_heads(interpreted: torch.device) -> None:
    check(replace(BATCH, dim_k=128, dim_v=128), 4, interpreted, is_centred=True)


def test_what_rows_saw_before(interpreted: torch.device) -> None:
    check(BATCH, 4, interpreted, is_carried=True)


def test_a_history_in_pieces(interpreted: torch.device) -> None:
    check(BATCH, 3, interpreted, is_centred=True, is_carried=True, workspace_bytes=1)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"num_keys": 999}, "do not fit"), ({"rotation_DD": torch.eye(32)}, "a rotation")],
    ids=["keys", "rotation"],
)
def test_arguments_that_do_not_fit_are_refused_with_the_reason(
    change: dict[str, object], words: str, interpreted: torch.device
) -> None:
    q_THD, history, _ = rotated_arguments(BATCH, 4, 5, interpreted, is_centred=False)

    with pytest.raises(ValueError, match=words):
        prefill_history(q_THD, history._replace(**change), scale=0.1)
