"""`kvcluster bench serve`: a served cluster with a random model on a GPU, through the real client.

Everything that `kvcluster serve` starts is started, on Ray; prompts are random token ids, uploaded
through gRPC. Also `python -m kvcluster.bench.serve --shape 1b --length 1048576 --policy exact`.

A run of one policy begins with a prompt of two chunks and some of a third, which compiles what
there is to compile. Every other prompt is computed as a whole: nothing is taken from earlier ones.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from kvcluster.bench.gpu_memory import MemoryPeak, query_gpu
from kvcluster.bench.rank import CHUNK_TOKENS, SHAPES
from kvcluster.bench.report import BenchReport, Measurement, bench_report
from kvcluster.client import Client
from kvcluster.config import CacheConfig, ClusterConfig, EngineConfig, RingConfig, RouterConfig
from kvcluster.engine.api import Output
from kvcluster.errors import ConfigError
from kvcluster.types import EXACT

if TYPE_CHECKING:
    from transformers import LlamaConfig

LENGTHS: Final = (4096, 32_768, 131_072)
OUTPUT_TOKENS: Final = 512
_WARM_UP_ROWS: Final = 2048
"""Of the warm-up's last chunk."""
_WARM_UP_TOKENS: Final = 24
"""Tokens whose times are left out: the first ones fill tables, and the client gets them in turn
with the prompt's last progress."""
_SPARE_TOKENS: Final = 1024
_STRIDE: Final = 7919
"""A prime, so that a prompt goes through all of a vocabulary."""


@dataclass(frozen=True)
class Target:
    """What vLLM 0.24 took on the same card (H100, bfloat16, one request), and what we want."""

    first_token_s: float | None = None
    token_ms: float | None = None
    tflops: float | None = None


# First token no later than 1.05 of vLLM's 0.118, 1.173, 10.17 and 2.67, 146.6 seconds.
TARGETS: Final = {
    ("8b", EXACT, 4096): Target(first_token_s=0.118 * 1.05, token_ms=6.43),
    ("8b", EXACT, 32_768): Target(first_token_s=1.173 * 1.05, token_ms=8.09),
    ("8b", EXACT, 131_072): Target(first_token_s=10.17 * 1.05, token_ms=12.91),
    ("8b", "int4", 131_072): Target(token_ms=8.0),
    ("1b", EXACT, 131_072): Target(first_token_s=2.67 * 1.05, token_ms=3.26),
    ("1b", EXACT, 1 << 20): Target(token_ms=14.9, tflops=500.0),
    ("1b", "int8", 1 << 20): Target(token_ms=8.5),
    ("1b", "int4", 1 << 20): Target(token_ms=5.5),
}
"""By shape, policy and prompt length."""


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """What is measured."""

    shape: str = SHAPES[0]
    lengths: Sequence[int] = LENGTHS
    policies: Sequence[str] = (EXACT,)
    chunk_tokens: int = CHUNK_TOKENS
    num_ranks: int = 1
    output_tokens: int = OUTPUT_TOKENS
    config: "LlamaConfig | None" = None
    """Of the model, instead of the shape's."""

    @property
    def command(self) -> str:
        """What repeats the run."""
        parts = ["python -m kvcluster.bench.serve", f"--shape {self.shape}"]
        parts += [f"--length {length}" for length in self.lengths]
        parts += [f"--policy {policy}" for policy in self.policies]
        parts += [f"--ranks {self.num_ranks}"] if self.num_ranks > 1 else []
        return " ".join([*parts, f"--chunk {self.chunk_tokens} --tokens {self.output_tokens}"])


@dataclass
class Served:
    """One generation as the client saw it."""

    token_times_s: list[float] = field(default_factory=list)
    """When each token came, from the call on, so that the upload counts; those of one message came
    together."""

    @property
    def first_token_s(self) -> float:
        return self.token_times_s[0]

    @property
    def token_ms(self) -> float:
        """Mean time of a token, without the first ones."""
        times = self.token_times_s[_WARM_UP_TOKENS:]
        return (times[-1] - times[0]) / (len(times) - 1) * 1e3

    @property
    def median_token_ms(self) -> float:
        """Median time between a token and the one before, without the first ones."""
        times = self.token_times_s[_WARM_UP_TOKENS:]
        return statistics.median(after - before for before, after in pairwise(times)) * 1e3


def run(settings: ServeSettings | None = None, *, output: Path | None = None) -> BenchReport:
    """Each policy at each length. `output` is rewritten after each number.

    Raises: ConfigError where there is no GPU.
    """
    settings = settings or ServeSettings()
    gpu = query_gpu("name")
    if gpu is None and settings.config is None:
        raise ConfigError("bench serve: there is no CUDA device here")
    taken: list[Measurement] = []

    def report() -> BenchReport:
        return bench_report("serve", tuple(taken), command=settings.command, gpu=gpu or "")

    for measurement in measure(settings):
        taken.append(measurement)
        sys.stderr.write(f"{measurement.name} {measurement.value:,.3f} {measurement.unit}\n")
        if output is not None:
            output.write_bytes(msgspec.json.format(msgspec.json.encode(report()), indent=2) + b"\n")
    return report()


def measure(settings: ServeSettings) -> Iterator[Measurement]:
    """Seconds to the first token, the whole model's speed until then, milliseconds a token and the
    GPU's memory, of one request at a time."""
    # They take seconds, and the command line imports this module to show its help.
    from kvcluster.serve.app import running

    model = settings.config or _config(settings.shape, 2 * max(settings.lengths))
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        begin = time.perf_counter()
        with running(_cluster(settings, directory)) as app, asyncio.Runner() as loop:
            seconds = time.perf_counter() - begin
            yield _seconds(f"{settings.shape} until it serves", seconds)
            for policy in settings.policies:
                served = partial(_generated, loop, app.address, policy, settings.output_tokens)
                yield from _measure_policy(settings, model, policy, served)


def _generated(
    loop: asyncio.Runner, address: str, policy: str, output_tokens: int, prompt: "array[int]"
) -> Served:
    return loop.run(generate(address, prompt, policy, output_tokens))


def _measure_policy(
    settings: ServeSettings,
    model: "LlamaConfig",
    policy: str,
    serve: Callable[["array[int]"], Served],
) -> Iterator[Measurement]:
    begin = time.perf_counter()
    warm_up = min(2 * settings.chunk_tokens + _WARM_UP_ROWS, max(settings.lengths))
    for place, length in enumerate((warm_up, *settings.lengths)):
        prompt = array("I", (index * _STRIDE % model.vocab_size for index in range(length)))
        with MemoryPeak() as memory:
            served = serve(prompt)
        if place == 0:
            name = f"{settings.shape} {policy} warm-up"
            yield _seconds(name, time.perf_counter() - begin)
            continue
        yield from _measurements(settings, model, policy, length, served)
        if memory.peak_mib is not None:
            name = f"{_name(settings, policy, length)} peak memory"
            yield Measurement(name=name, value=memory.peak_mib / 1024, unit="GiB")


async def generate(address: str, prompt: "array[int]", policy: str, output_tokens: int) -> Served:
    """One prompt, and `output_tokens` tokens after it."""
    served = Served()
    begin = time.perf_counter()
    async with Client(address) as client:
        async for event in client.generate(
            prompt_ids=prompt,
            policy=policy,
            max_output_tokens=output_tokens,
            temperature=0.0,
            ignore_eos=True,
            cache_mode="bypass",
        ):
            if isinstance(event.event, Output):
                now = time.perf_counter()
                served.token_times_s += [now - begin] * len(event.event.token_ids)
    return served


def _measurements(
    settings: ServeSettings, model: "LlamaConfig", policy: str, length: int, served: Served
) -> list[Measurement]:
    from kvcluster.bench.rank_cache import attention_flops, matmul_flops

    name = _name(settings, policy, length)
    target = Target()
    if settings.config is None and settings.num_ranks == 1:
        target = TARGETS.get((settings.shape, policy, length), target)
    flops = matmul_flops(model) * length + attention_flops(model, 0, length)
    return [
        _seconds(f"{name} first token", served.first_token_s, at_most=target.first_token_s),
        Measurement(
            name=f"{name} speed until then",
            value=flops / served.first_token_s / 1e12,
            unit="TFLOP/s",
            at_least=target.tflops,
        ),
        Measurement(
            name=f"{name} token", value=served.token_ms, unit="ms", at_most=target.token_ms
        ),
        Measurement(name=f"{name} token p50", value=served.median_token_ms, unit="ms"),
    ]


def _name(settings: ServeSettings, policy: str, length: int) -> str:
    kibi = f"{length >> 10}K" if length >= 1024 else str(length)
    return f"{settings.shape} {policy} {kibi}"


def _seconds(name: str, value: float, *, at_most: float | None = None) -> Measurement:
    return Measurement(name=name, value=value, unit="s", at_most=at_most)


def _config(shape: str, max_tokens: int) -> "LlamaConfig":
    from kvcluster.bench.rank_cache import llama_1b, llama_8b

    return {"1b": llama_1b, "8b": llama_8b}[shape](max_tokens)


def _cluster(settings: ServeSettings, directory: str) -> ClusterConfig:
    longest = max(*settings.lengths, settings.chunk_tokens) + _SPARE_TOKENS
    per_rank = -(-longest // settings.num_ranks) + _SPARE_TOKENS
    return ClusterConfig(
        model=directory,
        weights="random",
        dtype="bfloat16" if settings.config is None else "auto",
        cache=CacheConfig(capacity_tokens=per_rank, prefix_cache=False),
        engine=EngineConfig(prefill_chunk_tokens=settings.chunk_tokens),
        ring=RingConfig(num_ranks=settings.num_ranks),
        router=RouterConfig(listen="127.0.0.1:0", insecure_local=True),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run without the command line of kvcluster, with other lengths, policies and shapes."""
    parser = argparse.ArgumentParser(prog="python -m kvcluster.bench.serve")
    parser.add_argument("--length", action="append", type=int, help="repeatable")
    parser.add_argument("--policy", action="append", help="repeatable")
    parser.add_argument("--shape", choices=SHAPES, default=SHAPES[0])
    parser.add_argument("--chunk", type=int, default=CHUNK_TOKENS, help="rows of a prefill chunk")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=OUTPUT_TOKENS, help="after each prompt")
    parser.add_argument("--output", type=Path, help="write the report there as well")
    options = parser.parse_args(arguments)
    settings = ServeSettings(
        shape=options.shape,
        lengths=options.length or LENGTHS,
        policies=options.policy or (EXACT,),
        chunk_tokens=options.chunk,
        num_ranks=options.ranks,
        output_tokens=options.tokens,
    )
    report = run(settings, output=options.output)
    sys.stdout.buffer.write(msgspec.json.encode(report) + b"\n")


if __name__ == "__main__":
    main()
