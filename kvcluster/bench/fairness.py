"""`kvcluster bench fairness`: short prompts of a tenant while another sends the longest.

A whole cluster on this machine, with two tenants, their keys and partitions: client, keys, router,
engine and one rank on a CPU. The short ones' time to the first token is taken in rounds: on the
idle cluster, then beside the flood, and so on, because a machine of two cores is now faster and now
slower by half. Meanwhile the admin port is asked what each tenant holds.
"""

import asyncio
import random
import tempfile
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvcluster.admin_client import AdminClient
from kvcluster.bench.fairness_tenants import BLUE, RED, Secrets, make_tenants
from kvcluster.bench.report import BenchReport, Measurement, bench_report
from kvcluster.client import Client
from kvcluster.config import (
    CacheConfig,
    ClusterConfig,
    EngineConfig,
    RingConfig,
    RouterConfig,
    TenancyConfig,
)
from kvcluster.engine.api import Output
from kvcluster.errors import KvClusterError
from kvcluster.garbage import exempt_living
from kvcluster.rpc.v1 import tenant_service_pb2 as pb
from kvcluster.serve.app import RunningApp, running
from kvcluster.types import TenantId

LONGEST_TOKENS = 8192
SHORT_TOKENS = 512
NUM_ROUNDS = 4
NUM_SHORT = 50
"""Of each phase of a round: p99 is the second longest wait of all rounds."""
PAUSE = 4.0
"""Between two short ones, in times that one takes on the idle cluster: a fifth of the load."""
FIRST_TOKEN_WAIT_S = 0.06
FLOOR_TOKENS = 4 * SHORT_TOKENS
"""Guaranteed to the tenant of the short ones; the rest holds one of the longest."""
HIDDEN, LAYERS, HEADS, KV_HEADS, VOCABULARY = 256, 4, 8, 2, 512
BLOCK_SIZE = 16
TARGET = 1.5
_BYTES_PER_TOKEN = LAYERS * KV_HEADS * (HIDDEN // HEADS) * 2 * 4
_CAPACITY_TOKENS = LONGEST_TOKENS + FLOOR_TOKENS + 8 * BLOCK_SIZE


@dataclass
class Rounds:
    """Seconds to the first token of the short ones, by round. Mutable."""

    idle: list[list[float]] = field(default_factory=list)
    busy: list[list[float]] = field(default_factory=list)


@dataclass
class Flood:
    """What the tenant of the long prompts got. Mutable."""

    num_done: int = 0
    seconds: float = 0.0


@dataclass
class Held:
    """The most that tenants were seen to hold. Mutable."""

    red_bytes: list[int] = field(default_factory=list)
    num_refused: int = 0


def run() -> BenchReport:
    """Run the benchmark; takes about five minutes."""
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        _save_model(folder / "model")
        database = folder / "tenants.sqlite"
        secrets = make_tenants(database, floor_bytes=FLOOR_TOKENS * _BYTES_PER_TOKEN)
        with running(_config(folder / "model", database)) as app:
            # A client has no use for what made the model.
            exempt_living()
            return bench_report("fairness", asyncio.run(_measure(app, secrets)))


async def _measure(app: RunningApp, secrets: Secrets) -> tuple[Measurement, ...]:
    async with (
        Client(app.address, api_key=secrets.blue) as blue,
        Client(app.address, api_key=secrets.red) as red,
        AdminClient(app.admin_address, api_key=secrets.operator) as admin,
    ):
        # What the first calls pay for, later ones use; and a pace is learnt from them.
        for _ in range(8):
            await _first_token_s(blue, SHORT_TOKENS)
        rounds, flood, held = Rounds(), Flood(), Held()
        for _ in range(NUM_ROUNDS):
            idle = await _short_ones(blue, pause_s=0.0)
            rounds.idle.append(idle)
            rounds.busy.append(await _beside_flood(red, blue, admin, idle, flood, held))
    return report_of(rounds, flood, held)


async def _beside_flood(
    red: Client, blue: Client, admin: AdminClient, idle: list[float], flood: Flood, held: Held
) -> list[float]:
    flooding = asyncio.create_task(_flood(red, flood))
    watching = asyncio.create_task(_watch(admin, held))
    # The first ones find steps that were planned while the flood was alone.
    num_before = flood.num_done
    await _until(lambda: flood.num_done > num_before, flooding)
    for _ in range(3):
        await _first_token_s(blue, SHORT_TOKENS)
    waits = await _short_ones(blue, pause_s=PAUSE * _percentile(idle, 50))
    for task in (flooding, watching):
        task.cancel()
    await asyncio.gather(flooding, watching, return_exceptions=True)
    return waits


def report_of(rounds: Rounds, flood: Flood, held: Held) -> tuple[Measurement, ...]:
    """The report of seconds to the first token in all phases, and of what tenants held."""
    idle, busy = (list(chain(*phases)) for phases in (rounds.idle, rounds.busy))
    medians = [_percentile(waits, 50) for waits in rounds.idle]
    allowed_bytes = (_CAPACITY_TOKENS - FLOOR_TOKENS) * _BYTES_PER_TOKEN
    times = [
        Measurement(
            name=f"{phase}_first_token_p{percent}",
            value=1e3 * _percentile(waits, percent),
            unit="ms",
        )
        for phase, waits in (("idle", idle), ("beside_flood", busy))
        for percent in (50, 99)
    ]
    return (
        Measurement(
            name="p99_beside_flood_over_idle",
            value=_percentile(busy, 99) / _percentile(idle, 99),
            unit="x",
            at_most=TARGET,
        ),
        Measurement(
            name="p50_beside_flood_over_idle",
            value=_percentile(busy, 50) / _percentile(idle, 50),
            unit="x",
        ),
        *times,
        # What the machine alone does to a ratio of two phases.
        Measurement(
            name="idle_p50_slowest_round_over_fastest",
            value=max(medians) / min(medians),
            unit="x",
        ),
        Measurement(
            name="flood_most_held_of_what_floors_leave",
            value=max(held.red_bytes, default=0) / allowed_bytes,
            unit="share",
            at_most=1.0,
        ),
        Measurement(name="short_ones_refused", value=held.num_refused, unit="requests", at_most=0),
        Measurement(name="short_ones", value=len(busy), unit="requests"),
        Measurement(name="longest_prompts_done", value=flood.num_done, unit="requests", at_least=1),
        Measurement(
            name="flood_throughput",
            value=flood.num_done * LONGEST_TOKENS / max(flood.seconds, 1e-9),
            unit="tokens/s",
        ),
    )


async def _short_ones(client: Client, *, pause_s: float) -> list[float]:
    waits = []
    for index in range(NUM_SHORT):
        waits.append(await _first_token_s(client, SHORT_TOKENS))
        # Not in step with anything.
        await asyncio.sleep(pause_s * (0.5 + (index * 0.618) % 1))
    return waits


async def _flood(client: Client, flood: Flood) -> None:
    """Two calls at any time, so that one always waits when the other is done."""

    async def send() -> None:
        while True:
            await _first_token_s(client, LONGEST_TOKENS - 1)
            flood.num_done += 1
            flood.seconds = before_s + time.perf_counter() - start

    before_s, start = flood.seconds, time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(2):
            tasks.create_task(send())


async def _watch(admin: AdminClient, held: Held) -> None:
    while True:
        red, blue = [await _usage(admin, tenant) for tenant in (RED, BLUE)]
        held.red_bytes.append(red.gpu.used_bytes)
        held.num_refused = blue.refused_requests
        await asyncio.sleep(0.25)


async def _usage(admin: AdminClient, tenant: TenantId) -> pb.TenantUsage:
    usage = await admin.ask(pb.GetTenantUsageRequest(name=f"tenants/{tenant}/usage"))
    assert isinstance(usage, pb.TenantUsage), "the RPC says so"
    return usage


async def _first_token_s(client: Client, num_tokens: int) -> float:
    # No two begin alike: nothing is found in a cache.
    ids = array("I", (random.randrange(VOCABULARY) for _ in range(num_tokens)))
    start = time.perf_counter()
    async for event in client.generate(prompt_ids=ids, max_output_tokens=1):
        if isinstance(event.event, Output):
            return time.perf_counter() - start
    raise KvClusterError("a generation ended without a token")


async def _until(is_so: Callable[[], bool], task: "asyncio.Task[None]") -> None:
    while not is_so() and not task.done():
        await asyncio.sleep(0.05)


def _percentile(waits: list[float], percent: int) -> float:
    return sorted(waits)[min(len(waits) - 1, len(waits) * percent // 100)]


def _config(model: Path, database: Path) -> ClusterConfig:
    return ClusterConfig(
        model=str(model),
        cache=CacheConfig(block_size=BLOCK_SIZE, capacity_tokens=_CAPACITY_TOKENS),
        engine=EngineConfig(prefill_chunk_tokens=1024, first_token_wait_s=FIRST_TOKEN_WAIT_S),
        ring=RingConfig(num_ranks=1, threads_per_rank=1),
        router=RouterConfig(listen="127.0.0.1:0"),
        tenancy=TenancyConfig(database=str(database), admin_listen="127.0.0.1:0"),
    )


def _save_model(directory: Path) -> None:
    """With weights so large that computing, not calling, is what takes time."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=LONGEST_TOKENS,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
