"""`kvcluster bench retrieval`: needles at all depths of a long prompt, through a served cluster.

The model is `quality.retrieval_model`, whose answers are right by construction: what comes out
wrong was lost on the way. Each policy computes the prompt once; further questions find it in the
prefix cache. Also `python -m kvcluster.bench.retrieval --length 1048000 --policy int4`.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

import msgspec

from kvcluster.bench.gpu_memory import query_gpu
from kvcluster.bench.rank import CHUNK_TOKENS
from kvcluster.bench.report import BenchReport, Measurement, bench_report
from kvcluster.client import Client
from kvcluster.config import CacheConfig, ClusterConfig, EngineConfig, RingConfig, RouterConfig
from kvcluster.engine.api import Output
from kvcluster.types import EXACT

POLICIES: Final = (EXACT, "int8", "int4")
VOCAB_SIZE: Final = 1024
_SPARE_TOKENS: Final = 8192


@dataclass(frozen=True, kw_only=True)
class RetrievalSettings:
    """What is asked."""

    num_tokens: int = (1 << 20) - 64
    """Of a prompt."""
    num_needles: int = 16
    policies: Sequence[str] = POLICIES
    chunk_tokens: int = CHUNK_TOKENS
    dtype: str = "bfloat16"

    @property
    def command(self) -> str:
        """What repeats the run."""
        policies = " ".join(f"--policy {policy}" for policy in self.policies)
        length = f"--length {self.num_tokens} --needles {self.num_needles}"
        return f"python -m kvcluster.bench.retrieval {length} {policies}"


def run(settings: RetrievalSettings | None = None, *, output: Path | None = None) -> BenchReport:
    """The share of right answers under each policy. `output` is rewritten after each."""
    settings = settings or RetrievalSettings()
    taken: list[Measurement] = []

    def report() -> BenchReport:
        gpu = query_gpu("name") or ""
        return bench_report("retrieval", tuple(taken), command=settings.command, gpu=gpu)

    for measurement in measure(settings):
        taken.append(measurement)
        sys.stderr.write(f"{measurement.name} {measurement.value:,.3f} {measurement.unit}\n")
        if output is not None:
            output.write_bytes(msgspec.json.format(msgspec.json.encode(report()), indent=2) + b"\n")
    return report()


def measure(settings: RetrievalSettings) -> Iterator[Measurement]:
    """Right answers of all questions, by policy; one at a time, the deepest needle first."""
    # They take seconds, and the command line imports this module to show its help.
    from kvcluster.quality.retrieval_model import (
        retrieval_document,
        retrieval_model,
        save_retrieval_model,
    )
    from kvcluster.serve.app import running

    document = retrieval_document(
        VOCAB_SIZE, num_tokens=settings.num_tokens, num_needles=settings.num_needles, seed=0
    )
    # The questions are asked after the hay, each by itself.
    hay = document.token_ids[: -2 * settings.num_needles]
    questions = sorted(document.questions, key=lambda question: question.depth)
    with tempfile.TemporaryDirectory() as directory:
        save_retrieval_model(retrieval_model(VOCAB_SIZE), Path(directory))
        with running(_cluster(settings, directory)) as app, asyncio.Runner() as loop:
            for policy in settings.policies:
                right, times = 0, [time.perf_counter()]
                for question in questions:
                    prompt = array("I", [*hay, int(question.key)])
                    answer = loop.run(_next_token(app.address, prompt, policy))
                    right += answer == int(question.value)
                    times.append(time.perf_counter())
                name = f"{policy} {settings.num_tokens} tokens"
                first_s, *others_s = (after - before for before, after in pairwise(times))
                yield Measurement(
                    name=name,
                    value=right / len(questions),
                    unit=f"of {len(questions)} needles",
                    at_least=1.0,
                )
                yield Measurement(name=f"{name}, first answer", value=first_s, unit="s")
                for median_s in [statistics.median(others_s)] if others_s else []:
                    yield Measurement(name=f"{name}, others", value=median_s, unit="s")


async def _next_token(address: str, prompt: "array[int]", policy: str) -> int | None:
    async with Client(address) as client:
        async for event in client.generate(
            prompt_ids=prompt, policy=policy, max_output_tokens=1, temperature=0.0, ignore_eos=True
        ):
            if isinstance(event.event, Output):
                return next(iter(event.event.token_ids), None)
    return None


def _cluster(settings: RetrievalSettings, directory: str) -> ClusterConfig:
    capacity = len(settings.policies) * (settings.num_tokens + settings.chunk_tokens)
    return ClusterConfig(
        model=directory,
        dtype=settings.dtype,
        cache=CacheConfig(capacity_tokens=capacity + _SPARE_TOKENS),
        engine=EngineConfig(prefill_chunk_tokens=settings.chunk_tokens),
        ring=RingConfig(num_ranks=1),
        router=RouterConfig(listen="127.0.0.1:0", insecure_local=True),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run without the command line of kvcluster, with other lengths and policies."""
    parser = argparse.ArgumentParser(prog="python -m kvcluster.bench.retrieval")
    defaults = RetrievalSettings()
    parser.add_argument("--length", type=int, default=defaults.num_tokens)
    parser.add_argument("--needles", type=int, default=defaults.num_needles)
    parser.add_argument("--policy", action="append", help="repeatable")
    parser.add_argument("--dtype", default=defaults.dtype)
    parser.add_argument("--output", type=Path, help="write the report there as well")
    options = parser.parse_args(arguments)
    settings = RetrievalSettings(
        num_tokens=options.length,
        num_needles=options.needles,
        policies=options.policy or POLICIES,
        dtype=options.dtype,
    )
    report = run(settings, output=options.output)
    sys.stdout.buffer.write(msgspec.json.encode(report) + b"\n")


if __name__ == "__main__":
    main()
