"""`kvcluster bench step`: what a step costs besides the model.

Four ranks run every plan with a model that computes nothing, so what is left is the engine, the
actor call, the hand-over between ranks and the way back. Steps overlap as in serving.
"""

import asyncio
import itertools
import statistics
import time
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcluster.bench.report import BenchReport, Measurement, bench_report
from kvcluster.cluster.ring_group import RingGroup
from kvcluster.cluster.worker import Worker
from kvcluster.config import CacheConfig, ClusterConfig, EngineConfig, RingConfig
from kvcluster.engine.api import GenerationRequest, Output, TokenChunk
from kvcluster.model.attention_hook import LayerAttention
from kvcluster.model.codecs import codec_layouts
from kvcluster.model.loader import LoadedModel
from kvcluster.serve.app import start_local_ray, stop_ray
from kvcluster.serve.assembly import engine_service
from kvcluster.types import DEFAULT_TENANT, LayerGeometry, ModelSpec

NUM_RANKS = 4
NUM_STEPS = 2000
WARM_UP_STEPS = 200
WINDOW_STEPS = 50
TARGET_MS = 1.5
VOCAB_SIZE = 1000


class IdleModel(LoadedModel):
    """Samples token 0 at once and never asks for attention."""

    def forward(
        self,
        token_ids_T: Tensor,  # noqa: ARG002
        positions_T: Tensor,  # noqa: ARG002
        logit_rows_R: Tensor,
        attention: LayerAttention,  # noqa: ARG002
    ) -> Tensor:
        return torch.zeros(len(logit_rows_R), VOCAB_SIZE)


def _weightless() -> PreTrainedModel:
    """Something with a parameter, whose dtype and device the store takes."""
    return cast(PreTrainedModel, torch.nn.Linear(1, 1))


class IdleWorker(Worker):
    """A rank with the whole step protocol and no model work."""

    def load(self) -> ModelSpec:
        layer = LayerGeometry(num_query_heads=1, num_kv_heads=1, key_dim=8, value_dim=8, scale=1.0)
        spec = ModelSpec(
            name="idle",
            layers=(layer,),
            vocab_size=VOCAB_SIZE,
            max_context_tokens=1 << 20,
            eos_token_ids=(),
            dtype="float32",
            bytes_per_element=4,
            weights_digest="",
            tokenizer_digest="",
        )
        self._codecs = codec_layouts(spec, calibration=None)
        self._model = IdleModel(spec=spec, module=_weightless(), device=torch.device("cpu"))
        return spec


def run() -> BenchReport:
    """Run the benchmark on a Ray cluster of its own."""
    start_local_ray(NUM_RANKS)
    try:
        times_ms = asyncio.run(_step_times())
    finally:
        stop_ray()
    return bench_report(
        "step",
        (
            Measurement(
                name="step_overhead_median",
                value=statistics.median(times_ms),
                unit="ms",
                at_most=TARGET_MS,
            ),
            Measurement(
                name="step_overhead_p90", value=statistics.quantiles(times_ms, n=10)[-1], unit="ms"
            ),
            Measurement(name="ranks", value=NUM_RANKS, unit="ranks"),
        ),
    )


async def _step_times() -> list[float]:
    """Milliseconds a step, over a decode that all ranks share, in windows of 50 steps."""
    config = ClusterConfig(
        model="idle",
        ring=RingConfig(num_ranks=NUM_RANKS),
        cache=CacheConfig(block_size=16, capacity_tokens=4096),
        engine=EngineConfig(shard_min_tokens=1),
    )
    ring = RingGroup(config, IdleWorker)
    try:
        spec = await ring.start()
        service = engine_service(
            config, spec, ring, nodes=ring.nodes, epoch=ring.epoch, tokenizer=None
        )
        service.start()
        opened = await service.open(
            GenerationRequest(model=spec.name, max_output_tokens=WARM_UP_STEPS + NUM_STEPS)
        )
        await service.append_prompt(opened.generation, opened.upload, TokenChunk(0, bytes(4 * 256)))
        await service.finish_prompt(opened.generation, opened.upload)
        times = [
            time.perf_counter()
            async for events in service.watch(DEFAULT_TENANT, opened.generation, 0)
            for event in events
            if isinstance(event.event, Output)
        ]
        await service.stop()
    finally:
        await ring.stop()
    marks = times[WARM_UP_STEPS::WINDOW_STEPS]
    return [(after - before) / WINDOW_STEPS * 1000 for before, after in itertools.pairwise(marks)]
