"""Sequences that choose what they read, through kernels and in torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcluster.attention.implementation import Implementation
from kvcluster.cache.store import KVStore
from kvcluster.types import Policy, Route
from tests.codec_models import calibrated_codecs
from tests.kernels.test_steps import RecordingModel, Setting
from tests.reference_group import ReferenceGroup

QUEST = "quest:tokens={tokens},sinks=0,local=1"
BLOCK_SPARSE = "block_sparse:local=1,stride=3,random=1,seed=3"
ESTIMATED = "estimated:share=0.4,local=1"
BOUNDED = "estimated:share=0.3,sinks=0,local=1,by=bound"
ONE_LAYER = Setting(num_alike=0)
"""Which has a cap."""


@dataclass(frozen=True)
class Sequences:
    """Some sequences of one policy, and how they are served. Sizes are in blocks."""

    selection: str
    codec: str = "exact"
    chunks: tuple[float, ...] = (2, 2.25)
    """Of the first one's prompt."""
    num_decoded: int = 1
    shorter_first: bool = False
    """Before each row of both there is one of the shorter sequence alone."""
    num_again: int = 0
    """Output tokens that are computed again in the last chunk."""
    beside: str | None = None
    """Codec of a sequence that reads everything, instead of one more of the same."""
    num_ranks: int = 1
    route: Route = Route.PASS_KV
    setting: Setting = ONE_LAYER

    def __str__(self) -> str:
        shares = [self.selection.partition(":")[0], self.codec, self.setting.dtype, self.num_ranks]
        shares += [f"beside {self.beside}"] * (self.beside is not None)
        return " ".join(map(str, shares)) + (" again" if self.num_again else "")

    @property
    def policy(self) -> Policy:
        selection = self.selection.format(tokens=3 * self.setting.block_size)
        return Policy(codec=self.codec, selection=selection)


def outputs(
    case: Sequences, implementation: Callable[[KVStore], Implementation]
) -> dict[tuple[int, ...], Tensor]:
    """What attention gave in each step and layer, by the positions of a rank's rows."""
    size = case.setting.block_size
    model = RecordingModel(case.setting, max_tokens=10 * size, window=None)
    group = ReferenceGroup(
        model.loaded,
        num_ranks=case.num_ranks,
        block_size=size,
        exact_blocks=1,
        implementation=implementation,
        codecs=calibrated_codecs(model.spec, case.setting.device),
    )
    ranks = range(case.num_ranks)
    sizes = [int(chunk * size) for chunk in case.chunks]
    sizes[-1] += case.num_again
    num_prompt = sum(sizes) - case.num_again
    group.start(0, [1] * num_prompt, case.policy, output=[5] * case.num_again)
    other = case.policy if case.beside is None else Policy(codec=case.beside)
    group.start(1, [1] * (3 * size), other)
    for step, num_tokens in enumerate(sizes):
        _run(model, group, {0: num_tokens, **({1: 3 * size} if step == 1 else {})}, ranks, case)
    for step in range(case.num_decoded):
        if case.shorter_first:
            _run(model, group, {1: 1}, [0], case)
        _run(model, group, {0: 1, 1: 1}, [step % case.num_ranks], case)
    return model.calls


def _run(
    model: RecordingModel,
    group: ReferenceGroup,
    chunks: dict[int, int],
    owners: Sequence[int],
    case: Sequences,
) -> None:
    model.num_steps += 1
    group.run(chunks, owners=owners, route=case.route)


def compare(
    case: Sequences,
    by_kernels: Callable[[KVStore], Implementation],
    in_torch: Callable[[KVStore], Implementation],
    atol: float,
) -> None:
    found, plain = (outputs(case, implementation) for implementation in (by_kernels, in_torch))
    assert found.keys() == plain.keys()
    for call, out_THD in plain.items():
        torch.testing.assert_close(found[call], out_THD, rtol=0, atol=atol)
