"""`kvcluster bench context`: the first and the second use of a stored context, through gRPC, and
the first one after a restart of the whole cluster.

First use is all that a user waits for: the upload of 8K tokens, their prefill, and the question's
first token. Second use is another question. After a restart, routers, engine and ranks are new
processes, and the context comes from disk; of several restarts the median counts. All answers have
to be those of the whole prompt without a context.
"""

import asyncio
import tempfile
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from statistics import median
from typing import NamedTuple, TypeVar

from kvcluster.bench.report import BenchReport, Measurement, bench_report
from kvcluster.bench.text import long_text
from kvcluster.client import Client
from kvcluster.config import CacheConfig, ClusterConfig, RingConfig, RouterConfig, SpillConfig
from kvcluster.engine.api import Output
from kvcluster.errors import KvClusterError
from kvcluster.model.tokenizer import load_tokenizer
from kvcluster.serve.app import running
from kvcluster.tenancy.limits import Tier

MODEL = "smollm2-135m"
CONTEXT_TOKENS = 8000
OUTPUT_TOKENS = 16
POLICIES = ("exact", "int4")
NUM_RANKS = 2
SECOND_USES = 3
RESTARTS = 3
POLL_S = 0.05
QUESTIONS = tuple(f"\n\nQuestion {number}: what is this text about? Answer:" for number in range(4))

_T = TypeVar("_T")


class Use(NamedTuple):
    """One generation."""

    first_token_s: float
    token_ids: tuple[int, ...]


def run() -> BenchReport:
    """Run the benchmark; takes some minutes."""
    config = ClusterConfig(
        model=MODEL,
        dtype="float32",
        cache=CacheConfig(capacity_tokens=12_288, commit_at_start=True),
        ring=RingConfig(num_ranks=NUM_RANKS),
        router=RouterConfig(listen="127.0.0.1:0", insecure_local=True),
    )
    ids = _ids(long_text())[:CONTEXT_TOKENS]
    questions = [_ids(question) for question in QUESTIONS]
    measured: list[Measurement] = []
    for policy in POLICIES:
        with tempfile.TemporaryDirectory(prefix="kvcluster-bench-") as folder:
            stored = replace(config, spill=SpillConfig(folder=folder))
            first = partial(_measure, policy=policy, ids=ids, questions=questions)
            before = _of_a_cluster(stored, first)
            again = partial(_use_after_restart, policy=policy, question=questions[1], before=before)
            after_s = [_of_a_cluster(stored, again) for _ in range(RESTARTS)]
        measured += [*before.measurements, *_after_restarts(policy, after_s, before)]
    return bench_report("context", tuple(measured))


def _of_a_cluster(config: ClusterConfig, measure: Callable[[str], Coroutine[None, None, _T]]) -> _T:
    """What `measure` finds at the address of a cluster of its own, started by a new process: one
    that has called gRPC cannot be relied on to start Ray again."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_served, config, measure).result()


def _served(config: ClusterConfig, measure: Callable[[str], Coroutine[None, None, _T]]) -> _T:
    with running(config) as app:
        return asyncio.run(measure(app.address))


class Before(NamedTuple):
    """What was found before the restart."""

    first_s: float
    token_ids: tuple[int, ...]
    """Of the second question."""
    measurements: list[Measurement]


async def _measure(address: str, policy: str, ids: list[int], questions: list[list[int]]) -> Before:
    """The first uses of a context, which is on disk then."""
    async with Client(address) as client:
        before = await _measure_policy(client, policy, ids, questions)
        while Tier.DISK not in (record := await client.get_context(policy)).tiers:
            if record.message:
                raise KvClusterError(f"{policy}: {record.message}")
            await asyncio.sleep(POLL_S)
    size = Measurement(name=f"disk_bytes_{policy}", value=record.disk_bytes, unit="B")
    return before._replace(measurements=[*before.measurements, size])


async def _use_after_restart(
    address: str, policy: str, question: list[int], before: Before
) -> float:
    """Seconds to the first token of the first use."""
    async with Client(address) as client:
        if (await client.get_context(policy)).tiers != (Tier.DISK,):
            raise KvClusterError(f"{policy}: the context is not only on disk after the restart")
        use = await _use(client, question, context=policy)
    if use.token_ids != before.token_ids:
        raise KvClusterError(f"{policy}: the tokens after the restart are not those of before")
    return use.first_token_s


def _after_restarts(policy: str, after_s: list[float], before: Before) -> list[Measurement]:
    return [
        Measurement(
            name=f"use_after_restart_to_first_token_{policy}", value=median(after_s), unit="s"
        ),
        Measurement(name=f"slowest_use_after_restart_{policy}", value=max(after_s), unit="s"),
        Measurement(
            name=f"first_use_to_use_after_restart_{policy}",
            value=before.first_s / median(after_s),
            unit="ratio",
            at_least=20,
        ),
    ]


async def _measure_policy(
    client: Client, policy: str, ids: list[int], questions: list[list[int]]
) -> Before:
    begun = time.perf_counter()
    record = await client.upload_context(policy, prompt_ids=ids, policy=policy)
    upload_s = time.perf_counter() - begun
    first, *others = [
        await _use(client, question, context=policy) for question in questions[: 1 + SECOND_USES]
    ]
    whole = await _use(client, [*ids, *questions[1]], policy=policy)
    if whole.token_ids != others[0].token_ids:
        raise KvClusterError(f"{policy}: the tokens on a context are not those of the whole prompt")
    first_s = upload_s + first.first_token_s
    second_s = median(use.first_token_s for use in others)

    def seconds(name: str, value: float) -> Measurement:
        return Measurement(name=f"{name}_{policy}", value=value, unit="s")

    measurements = [
        seconds("whole_prompt_to_first_token", whole.first_token_s),
        seconds("first_use_to_first_token", first_s),
        seconds("second_use_to_first_token", second_s),
        Measurement(
            name=f"first_use_to_second_{policy}",
            value=first_s / second_s,
            unit="ratio",
            at_least=20,
        ),
        Measurement(
            name=f"compression_ratio_{policy}", value=record.compression_ratio, unit="ratio"
        ),
        Measurement(
            name=f"attention_error_{policy}", value=record.attention_error, unit="relative"
        ),
    ]
    return Before(first_s, others[0].token_ids, measurements)


async def _use(client: Client, prompt: list[int], *, policy: str = "", context: str = "") -> Use:
    begun = time.perf_counter()
    first_token_s, token_ids = 0.0, list[int]()
    async for event in client.generate(
        prompt_ids=prompt,
        policy=policy,
        context=context,
        # Of earlier uses nothing is read but the context.
        cache_mode="bypass",
        max_output_tokens=OUTPUT_TOKENS,
        ignore_eos=True,
    ):
        if isinstance(event.event, Output):
            first_token_s = first_token_s or time.perf_counter() - begun
            token_ids += event.event.token_ids
    return Use(first_token_s, tuple(token_ids))


def _ids(text: str) -> list[int]:
    tokenizer = load_tokenizer(MODEL)
    assert tokenizer is not None, "the packaged model has a tokenizer"
    encoder = tokenizer.prompt_encoder()
    return encoder.push(text) + encoder.finish()
