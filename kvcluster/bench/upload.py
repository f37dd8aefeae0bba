"""`kvcluster bench upload`: one million tokens through the front door, and what the router keeps.

A tiny sliding-window model does the least possible work, so that the way in is what is measured:
client, chunks, router, back-pressure, engine, prefill of every token.
"""

import asyncio
import tempfile
import time
from array import array
from pathlib import Path

import torch
from transformers import MistralConfig, MistralForCausalLM

from kvcluster.bench.report import BenchReport, Measurement, bench_report
from kvcluster.client import Client
from kvcluster.config import CacheConfig, ClusterConfig, EngineConfig, RingConfig, RouterConfig
from kvcluster.engine.api import Output, Progress
from kvcluster.errors import KvClusterError
from kvcluster.serve.app import RunningApp, running

NUM_TOKENS = 1_000_000
VOCAB_SIZE = 256
WINDOW = 128
MEBIBYTE = 1024 * 1024


def run() -> BenchReport:
    """Run the benchmark; takes about a minute."""
    with tempfile.TemporaryDirectory() as directory:
        _save_tiny_model(Path(directory))
        config = ClusterConfig(
            model=directory,
            cache=CacheConfig(block_size=64, capacity_tokens=65_536),
            engine=EngineConfig(prefill_chunk_tokens=8192),
            ring=RingConfig(num_ranks=1),
            router=RouterConfig(listen="127.0.0.1:0", insecure_local=True),
        )
        with running(config) as app:
            return bench_report("upload", asyncio.run(_measure(app)))


async def _measure(app: RunningApp) -> tuple[Measurement, ...]:
    ids = array("I", (index % VOCAB_SIZE for index in range(NUM_TOKENS)))
    async with Client(app.address) as client:
        # The first call pays for imports and buffers that every later one uses.
        await _upload(client, ids[:50_000])
        before = await app.ingress.memory.remote()
        seconds, num_progress = await _upload(client, ids)
        after = await app.ingress.memory.remote()
    return (
        Measurement(
            name="router_memory_growth",
            value=(after.peak_bytes - before.peak_bytes) / MEBIBYTE,
            unit="MiB",
            at_most=64,
        ),
        Measurement(name="upload_and_prefill", value=NUM_TOKENS / seconds, unit="tokens/s"),
        Measurement(name="tokens", value=NUM_TOKENS, unit="tokens"),
        Measurement(name="progress_events", value=num_progress, unit="events"),
    )


async def _upload(client: Client, ids: "array[int]") -> tuple[float, int]:
    start = time.perf_counter()
    num_progress = 0
    async for event in client.generate(prompt_ids=ids, max_output_tokens=1, cache_mode="bypass"):
        num_progress += isinstance(event.event, Progress)
        if isinstance(event.event, Output):
            return time.perf_counter() - start, num_progress
    raise KvClusterError("the upload ended without a token")


def _save_tiny_model(directory: Path) -> None:
    config = MistralConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2 * NUM_TOKENS,
        sliding_window=WINDOW,
    )
    torch.manual_seed(0)
    MistralForCausalLM(config).save_pretrained(directory)
