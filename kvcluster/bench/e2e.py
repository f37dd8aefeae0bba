"""`kvcluster bench e2e`: whole generations through gRPC beside `transformers.generate`.

Same model, dtype, cores and prompt; the two take turns in one run, so that a noisy machine hits
both. What counts is the ratio of medians.
"""

import asyncio
import os
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from kvcluster.bench.report import BenchReport, Measurement, bench_report
from kvcluster.bench.text import long_text
from kvcluster.client import Client
from kvcluster.config import ClusterConfig, RingConfig, RouterConfig
from kvcluster.engine.api import Output
from kvcluster.errors import KvClusterError
from kvcluster.model.loader import load_model
from kvcluster.model.tokenizer import load_tokenizer
from kvcluster.serve.app import running

MODEL = "smollm2-135m"
PROMPT_TOKENS = 4096
OUTPUT_TOKENS = 64
ROUNDS = 3
RANK_COUNTS = (1, 3)


@dataclass(frozen=True)
class Speeds:
    """One generation."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    token_ids: tuple[int, ...]


def run() -> BenchReport:
    """Run the benchmark; takes some minutes."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    module = load_model(MODEL, dtype="float32", device="cpu").module
    module.set_attn_implementation("sdpa")
    prompt = _prompt()
    medians: dict[tuple[int, str], float] = {}
    measurements: list[Measurement] = []
    for num_ranks in RANK_COUNTS:
        config = ClusterConfig(
            model=MODEL,
            dtype="float32",
            ring=RingConfig(num_ranks=num_ranks),
            router=RouterConfig(listen="127.0.0.1:0", insecure_local=True),
        )
        with running(config) as app:
            theirs, ours = asyncio.run(_take_turns(module, app.address, prompt))
        if any(speeds.token_ids != theirs[0].token_ids for speeds in ours):
            raise KvClusterError(f"with {num_ranks} ranks the tokens are not those of transformers")
        for phase in ("prefill", "decode"):
            field = f"{phase}_tokens_per_s"
            their_median = statistics.median(getattr(speeds, field) for speeds in theirs)
            our_median = statistics.median(getattr(speeds, field) for speeds in ours)
            medians[num_ranks, phase] = our_median / their_median
            measurements += [
                _speed(f"{phase}_transformers_beside_{num_ranks}_ranks", their_median),
                _speed(f"{phase}_{num_ranks}_ranks", our_median),
            ]
    return bench_report("e2e", tuple(measurements) + _ratios(medians))


def _ratios(medians: dict[tuple[int, str], float]) -> tuple[Measurement, ...]:
    """Each side was measured beside the same peer, so the peer's noise cancels."""
    return (
        _ratio("prefill_1_rank_to_transformers", medians[1, "prefill"], at_least=0.95),
        _ratio("decode_1_rank_to_transformers", medians[1, "decode"], at_least=0.9),
        _ratio("prefill_3_ranks_to_1", medians[3, "prefill"] / medians[1, "prefill"], at_least=0.8),
        _ratio("decode_3_ranks_to_1", medians[3, "decode"] / medians[1, "decode"], at_least=0.8),
    )


def _prompt() -> list[int]:
    tokenizer = load_tokenizer(MODEL)
    assert tokenizer is not None, "the packaged model has a tokenizer"
    encoder = tokenizer.prompt_encoder()
    ids = encoder.push(long_text()) + encoder.finish()
    return ids[:PROMPT_TOKENS]


async def _take_turns(
    module: PreTrainedModel, address: str, prompt: list[int]
) -> tuple[list[Speeds], list[Speeds]]:
    theirs, ours = [], []
    async with Client(address) as client:
        await _generate(client, prompt)
        for _ in range(ROUNDS):
            theirs.append(_transformers(module, prompt))
            ours.append(await _generate(client, prompt))
    return theirs, ours


async def _generate(client: Client, prompt: list[int]) -> Speeds:
    start = time.perf_counter()
    times: list[float] = []
    token_ids: list[int] = []
    async for event in client.generate(
        prompt_ids=prompt, max_output_tokens=OUTPUT_TOKENS, ignore_eos=True, cache_mode="bypass"
    ):
        if isinstance(event.event, Output):
            times.append(time.perf_counter())
            token_ids += event.event.token_ids
    return Speeds(
        prefill_tokens_per_s=len(prompt) / (times[0] - start),
        decode_tokens_per_s=(len(token_ids) - 1) / (times[-1] - times[0]),
        token_ids=tuple(token_ids),
    )


def _transformers(module: PreTrainedModel, prompt: list[int]) -> Speeds:
    ids = torch.tensor([prompt])
    first_s, _ = _timed_generate(module, ids, 1)
    all_s, token_ids = _timed_generate(module, ids, OUTPUT_TOKENS)
    return Speeds(
        prefill_tokens_per_s=len(prompt) / first_s,
        decode_tokens_per_s=(OUTPUT_TOKENS - 1) / (all_s - first_s),
        token_ids=tuple(token_ids),
    )


def _timed_generate(
    module: PreTrainedModel, ids: torch.Tensor, num_tokens: int
) -> tuple[float, list[int]]:
    start = time.perf_counter()
    generate: Any = module.generate
    output = generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return time.perf_counter() - start, output[0, ids.shape[1] :].tolist()


def _speed(name: str, value: float) -> Measurement:
    return Measurement(name=name, value=value, unit="tokens/s")


def _ratio(name: str, value: float, *, at_least: float) -> Measurement:
    return Measurement(name=name, value=value, unit="ratio", at_least=at_least)
