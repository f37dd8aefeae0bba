"""What a policy selects of survivors, on any number of ranks, is what its definition selects."""

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvcluster.codec.registry import STORAGE_MENU
from kvcluster.policy import parse_policy
from kvcluster.retention.offered import SCORED
from kvcluster.types import EXACT, Policy, Route
from tests.codec_models import EVERY_STORAGE, LATENT, MIXES_HEADS
from tests.distributed import test_selection
from tests.distributed.test_survivors import (
    METHODS,
    SHARING,
    VALUES_IN_KEYS,
    Serving,
    check,
    defined,
    served,
)
from tests.distributed.test_survivors import ORDINARY as MODEL
from tests.reference_group import ReferenceGroup

SELECTIONS = (
    *test_selection.SELECTIONS[:4],
    "quest:tokens=48,sinks=0,local=1",
    "quest:tokens=48",
)
SERVING = Serving(3, num_prompt_tokens=150, chunk=48, num_decoded=30)
"""Chunks of whole blocks; epochs end in the prompt and in the output."""


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize(
    ("codec", "retention"), [(EXACT, METHODS[1]), *(("int4", method) for method in METHODS)]
)
def test_every_selection_of_survivors_is_served_as_it_is_defined(
    codec: str, retention: str, selection: str
) -> None:
    check(Policy(codec=codec, retention=retention, selection=selection), SERVING)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_rows_read_less_than_all_survivors(selection: str) -> None:
    policy = Policy(codec="int4", retention=METHODS[0], selection=selection)

    ours = served(policy, SERVING, MODEL)

    everything = defined(Policy(codec="int4", retention=METHODS[0]), 180, SERVING, MODEL)
    differs_T = (ours[0] - everything[0])[-16:].abs().amax(dim=(1, 2)) > 1e-3
    assert bool(differs_T.all())


@pytest.mark.parametrize(
    ("codec", "selection"), list(zip(LATENT, SELECTIONS, strict=True)), ids=str
)
def test_shared_survivors_that_are_latents_are_selected_as_defined(
    codec: str, selection: str
) -> None:
    retention = f"{METHODS[0]},heads=shared"

    check(Policy(codec=codec, retention=retention, selection=selection), SERVING)


@pytest.mark.parametrize("selection", SELECTIONS[::2])
@pytest.mark.parametrize("codec", [EXACT, "int4"])
def test_survivors_whose_values_are_in_their_keys_are_selected_as_defined(
    codec: str, selection: str
) -> None:
    policy = Policy(codec=codec, retention=METHODS[0], selection=selection)

    check(policy, SERVING, VALUES_IN_KEYS)


@pytest.mark.parametrize("selection", SELECTIONS[1::2])
@pytest.mark.parametrize("codec", [EXACT, "int4"])
def test_survivors_that_layers_share_are_selected_as_defined(codec: str, selection: str) -> None:
    policy = Policy(codec=codec, retention=METHODS[0], selection=selection)

    check(policy, SERVING, SHARING)


def test_a_selection_that_surely_reads_everything_changes_nothing() -> None:
    policy = Policy(codec="int4", retention=METHODS[0])
    selecting = Policy(codec="int4", retention=METHODS[0], selection="quest:tokens=192")

    ours = served(selecting, SERVING, MODEL)

    assert all(map(torch.equal, ours, served(policy, SERVING, MODEL)))


def test_output_that_is_computed_again_reads_what_it_read() -> None:
    """As after a preemption: what was decoded row by row is now part of a prefill."""
    policy = Policy(codec="int4", retention=METHODS[0], selection="quest:tokens=48")
    serving = Serving(2, num_prompt_tokens=90, chunk=32, num_decoded=80)
    model = MODEL.model
    model.recorded.clear()
    group = ReferenceGroup(
        model.loaded, num_ranks=2, block_size=serving.block_size, codecs=MODEL.codecs
    )
    group.start(7, [3] * 90, policy, output=[5] * 75)
    for size in (32, 32, 32, 32, 32, 5):
        group.run({7: size}, owners=[1, 0])
    for _ in range(5):
        group.run({7: 1}, owners=[0])

    for layer, wanted_THD in enumerate(defined(policy, 170, serving, MODEL)):
        ours_THD = torch.stack([model.recorded[layer, position] for position in range(170)])
        # As in `check`.
        torch.testing.assert_close(ours_THD, wanted_THD, rtol=0, atol=2e-5)


@st.composite
def servings(draw: st.DrawFn) -> Serving:
    size = draw(st.sampled_from([8, 16, 32]))
    return Serving(
        num_ranks=draw(st.integers(1, 4)),
        num_prompt_tokens=draw(st.integers(1, 200)),
        chunk=draw(st.integers(1, 6)) * size,
        num_decoded=draw(st.integers(0, 34)),
        route=draw(st.sampled_from(list(Route))),
        turn=draw(st.integers(0, 3)),
        exact_blocks=draw(st.sampled_from([0, 1, 3])),
        block_size=size,
    )


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    storage=st.sampled_from(EVERY_STORAGE),
    method=st.sampled_from([method.name for method in SCORED]),
    budget=st.sampled_from([0.05, 0.3, 0.6, 1.0]),
    recent=st.sampled_from([0.0, 0.5, 1.0]),
    heads=st.sampled_from(["own", "shared"]),
    epoch_blocks=st.integers(1, 4),
    selection=st.sampled_from(test_selection.SELECTIONS),
    serving=servings(),
)
def test_chunks_and_ranks_change_nothing(
    storage: str,
    method: str,
    budget: float,
    recent: float,
    heads: str,
    epoch_blocks: int,
    selection: str,
    serving: Serving,
) -> None:
    epoch = epoch_blocks * serving.block_size
    heads = "shared" if storage in MIXES_HEADS else heads
    arguments = f"budget={budget},recent={recent},heads={heads},epoch={epoch}"
    if method == "snap":
        arguments += f",queries={epoch // 2}"
    policy = msgspec.structs.replace(
        parse_policy(storage, STORAGE_MENU),
        retention=f"{method}:{arguments}",
        selection=selection,
    )
    check(policy, serving)
