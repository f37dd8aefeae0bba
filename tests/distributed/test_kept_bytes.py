"""Usage and admission count the bytes of the tensors that the ranks really keep."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import pytest
import torch

from kvcluster.cache.capacity import blocks_per_group
from kvcluster.cache.encoded_pages import blocks_per_page
from kvcluster.config import ClusterConfig
from kvcluster.engine.api import Finished, GenerationRequest
from kvcluster.engine.kept_beside import KeptBeside
from kvcluster.engine.plan import StepPlan
from kvcluster.model.loader import LoadedModel
from kvcluster.policy import parse_policy
from kvcluster.quality.served import MENU
from kvcluster.types import EXACT, PAGE_BLOCKS, Policy
from tests.architectures import VOCAB_SIZE
from tests.codec_models import plain_codecs
from tests.distributed.test_policies import config
from tests.fake_ring import FakeRing
from tests.served_model import served_model
from tests.thread_executor import ThreadExecutor, hear, running_engine

BLOCK_SIZE = 16
PROMPT_TOKENS = 92
OUTPUT_TOKENS = 9
"""Decoding goes on over the end of an epoch at 96 tokens, before which most is kept."""
NUM_TOKENS = PROMPT_TOKENS + OUTPUT_TOKENS - 1
BY_SCORE = (
    "heavy_hitters:budget=0.4,epoch=32",
    "snap:budget=0.4,epoch=32,queries=9",
    "key_diversity:budget=0.4,epoch=32",
)
RETENTIONS = ("full", "window:recent=48", *BY_SCORE)
SELECTIONS = (
    "all",
    "block_sparse:local=2,stride=3",
    "estimated:share=40%,local=1",
    "estimated:share=0.3,local=1,by=bound",
    "quest:tokens=48",
)
CODECS = (EXACT, "int4", "fp8")


@dataclass
class Watch:
    """What one sequence holds on all ranks, step by step. A ring without tensors follows the plans
    and says which blocks; their bytes, and those of marks and summaries, are the workers' own."""

    executor: ThreadExecutor
    cluster: ClusterConfig
    policy: Policy
    beside: list[int] = field(default_factory=list)
    """Bytes beside the pages after each step."""
    held: list[float] = field(default_factory=list)
    """Those and the blocks', after each step."""

    def __post_init__(self) -> None:
        runner = self.executor.runners[0]
        self._spec, self._store = runner._model.spec, runner._store
        counts = blocks_per_group(self._spec, self.cluster.cache, self.cluster.engine)
        codec = self.policy.storage
        self._per_page: Sequence[int] = ()
        if codec != EXACT:
            layers = plain_codecs(self._spec).layers(codec)
            self._per_page = blocks_per_page(self._spec, layers, BLOCK_SIZE)
        self._ring = FakeRing(
            self._spec,
            block_size=BLOCK_SIZE,
            pool_sizes=[tuple(counts)] * len(self.executor.runners),
            encoded_per_page={codec: self._per_page},
            exact_recent=self.cluster.cache.exact_recent_blocks,
        )
        self.executor.after_step = self.note

    def note(self, plan: StepPlan) -> None:
        """What a plan releases was free, to the engine, when the step before was planned."""
        for release in plan.released:
            self._ring._release(release)
        if self.beside:
            blocks = sum(self._block_bytes(held.group, held.codec) for held in self._ring._users)
            self.held.append(blocks + self.beside[-1])
        self._ring.execute(msgspec.structs.replace(plan, released=()))
        states = [state for runner in self.executor.runners for state in runner._sequences.values()]
        self.beside.append(
            sum(state.selecting.num_bytes for state in states if state.selecting is not None)
            + sum(state.survivors.num_bytes for state in states if state.survivors is not None)
        )

    def _block_bytes(self, group: int, codec: str) -> float:
        """Of the tensors of the group's layers: a block, or its share of an encoded page."""
        exact = 0
        for layer in self._spec.storing_layers:
            if self._spec.group_of(self._spec.layers[layer]) == group:
                planes = self._store.gather(layer, [slice(0, BLOCK_SIZE)]).planes
                exact += sum(plane.nbytes for plane in planes)
        return exact if codec == EXACT else exact * PAGE_BLOCKS / self._per_page[group]


async def watched(loaded: LoadedModel, text: str, num_ranks: int) -> None:
    """Run a generation and hold what the engine says against what the ranks have."""
    cluster, policy = config(num_ranks), parse_policy(text, MENU)
    asked = GenerationRequest(
        model="tiny", max_output_tokens=OUTPUT_TOKENS, input_tokens=PROMPT_TOKENS, policy=text
    )
    generator = torch.Generator().manual_seed(3)
    prompt = torch.randint(3, VOCAB_SIZE, (PROMPT_TOKENS,), generator=generator).tolist()
    async with running_engine(loaded, cluster) as (service, executor):
        watch = Watch(executor, cluster, policy)
        estimate = await service.estimate(asked)
        finished = (await hear(service, await service.open(asked), prompt))[-1]
        # Its first plan says what was free after the last step of the other.
        after = GenerationRequest(model="tiny", max_output_tokens=1)
        await hear(service, await service.open(after), [5])

    assert isinstance(finished, Finished)
    assert len(watch.held) >= OUTPUT_TOKENS
    assert finished.usage.kv_bytes == round(max(watch.held))
    assert max(watch.beside) == KeptBeside(policy, loaded.spec, BLOCK_SIZE).most_bytes(NUM_TOKENS)
    assert finished.usage.kv_bytes <= estimate.kv_bytes


@pytest.mark.parametrize("retention", RETENTIONS)
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("codec", CODECS)
async def test_every_byte_of_retention_and_selection_is_counted(
    codec: str, selection: str, retention: str
) -> None:
    await watched(served_model(), f"{codec} + {retention} + {selection}", num_ranks=2)


@pytest.mark.parametrize("codec", [EXACT, "int4"])
@pytest.mark.parametrize("retention", BY_SCORE)
async def test_what_layers_share_is_counted_once(retention: str, codec: str) -> None:
    await watched(served_model("gemma4"), f"{codec} + {retention} + quest:tokens=48", num_ranks=3)
