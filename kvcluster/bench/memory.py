"""`kvcluster bench memory`: the cache of a running request takes what its policy promises.

For each policy a fresh cluster serves a short prompt and then a long one. How much the memory of
the worker processes grew in between is read from the operating system and held against what the
two answers' usage says: the cache's arena is reserved whole, and memory is committed when it is
first written, with huge pages as much as a page of the cache at a time.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvcluster.bench.report import BenchReport, Measurement, bench_report
from kvcluster.bench.smaps import processes_with_arena
from kvcluster.bench.text import long_text
from kvcluster.client import Client
from kvcluster.config import CacheConfig, ClusterConfig, EngineConfig, RingConfig, RouterConfig
from kvcluster.engine.api import Finished
from kvcluster.errors import KvClusterError
from kvcluster.model.tokenizer import load_tokenizer
from kvcluster.serve.app import running
from kvcluster.types import EXACT, PAGE_BLOCKS

MODEL: Final = "smollm2-135m"
POLICIES: Final = (EXACT, "int4")
SHORT_TOKENS: Final = 1_000
LONG_TOKENS: Final = 6_000
NUM_RANKS: Final = 1
CHUNK_TOKENS: Final = 256
"""Few, so that what a chunk holds in full, in the warm-up too, is less than the short prompt."""
CAPACITY_TOKENS: Final = 65_536
"""Of a rank: makes its arena larger than anything else in a worker process, weights included."""
MEBIBYTE: Final = 1024 * 1024
_PROC: Final = Path("/proc")


@dataclass(frozen=True)
class Growth:
    """What the long prompt took more than the short one, in bytes."""

    resident: int
    """Of all worker processes, as the operating system counts."""
    reported: int
    """As the usage of the two generations says."""
    page: int
    """One page of the cache. On each rank, one that holds encoded blocks and one that holds those
    being filled may have room left."""


def run() -> BenchReport:
    """Run the benchmark; takes about a minute a policy."""
    prompt = _prompt()
    growths = {policy: _measure(policy, prompt) for policy in POLICIES}
    return bench_report("memory", measurements(growths))


def measurements(growths: Mapping[str, Growth]) -> tuple[Measurement, ...]:
    """The report of each policy's growth. `exact` is what the others are compared with."""
    found = []
    exact = growths[EXACT]
    for policy, growth in growths.items():
        found += [
            _mebibytes(
                f"resident_{policy}",
                growth.resident,
                at_most=growth.reported + 2 * NUM_RANKS * growth.page,
            ),
            _mebibytes(f"reported_{policy}", growth.reported),
            _ratio(f"resident_ratio_{policy}", exact.resident, growth.resident),
            _ratio(f"reported_ratio_{policy}", exact.reported, growth.reported),
        ]
    return tuple(found)


def _measure(policy: str, prompt: list[int]) -> Growth:
    config = ClusterConfig(
        model=MODEL,
        dtype="float32",
        cache=CacheConfig(capacity_tokens=CAPACITY_TOKENS),
        engine=EngineConfig(prefill_chunk_tokens=CHUNK_TOKENS),
        ring=RingConfig(num_ranks=NUM_RANKS),
        router=RouterConfig(listen="127.0.0.1:0", insecure_local=True),
    )
    with running(config) as app:
        return asyncio.run(_grow(app.address, policy, prompt))


async def _grow(address: str, policy: str, prompt: list[int]) -> Growth:
    async with Client(address) as client:
        (model,) = await client.models()
        arena_bytes = CAPACITY_TOKENS * model.kv_bytes_per_token
        reported, resident = [], []
        for num_tokens in (SHORT_TOKENS, LONG_TOKENS):
            reported.append(await _kv_bytes(client, policy, prompt[:num_tokens]))
            workers = processes_with_arena(_PROC, arena_bytes)
            if len(workers) != NUM_RANKS:
                raise KvClusterError(
                    f"{len(workers)} processes have a cache of {arena_bytes} bytes, not "
                    f"{NUM_RANKS}: end other clusters on this machine and try again"
                )
            resident.append(sum(workers.values()))
    page_bytes = PAGE_BLOCKS * CacheConfig().block_size * model.kv_bytes_per_token
    return Growth(resident[1] - resident[0], reported[1] - reported[0], page_bytes)


async def _kv_bytes(client: Client, policy: str, prompt: list[int]) -> int:
    async for event in client.generate(
        prompt_ids=prompt, max_output_tokens=2, policy=policy, cache_mode="bypass"
    ):
        if isinstance(event.event, Finished):
            return event.event.usage.kv_bytes
    raise KvClusterError("the generation ended without its usage")


def _prompt() -> list[int]:
    tokenizer = load_tokenizer(MODEL)
    assert tokenizer is not None, "the packaged model has a tokenizer"
    encoder = tokenizer.prompt_encoder()
    ids = encoder.push(long_text()[: 12 * LONG_TOKENS]) + encoder.finish()
    return ids[:LONG_TOKENS]


def _mebibytes(name: str, num_bytes: int, *, at_most: int | None = None) -> Measurement:
    bound = None if at_most is None else at_most / MEBIBYTE
    return Measurement(name=name, value=num_bytes / MEBIBYTE, unit="MiB", at_most=bound)


def _ratio(name: str, exact: int, growth: int) -> Measurement:
    return Measurement(name=name, value=exact / max(1, growth), unit="ratio")
