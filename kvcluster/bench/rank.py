"""`kvcluster bench rank`: one rank's steps on a GPU, with a random model of Llama 3.2 1B's shape.

Also `python -m kvcluster.bench.rank --shape 8b --length 131072 --policy int4`, with the shape of
Llama 3.1 8B and on a GPU machine without Ray and gRPC. Steps are those that the engine asks for:
what a step costs beside them is what `bench step` measures.

Both are over a cache that is full of random numbers: a chunk of prefill at the end of it, and the
tokens behind it.
"""

import argparse
import gc
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec

from kvcluster.bench.report import BenchReport, Measurement, bench_report
from kvcluster.errors import ConfigError
from kvcluster.types import EXACT, Policy

SHAPES: Final = ("1b", "8b")
LENGTHS: Final = (4096, 32_768, 131_072)
POLICIES: Final = (EXACT, "int8", "int4")
CHUNK_TOKENS: Final = 12_672
"""Rows of a prefill chunk. With 32 query heads they are 16 rounds of tiles of 192 rows for the 132
processors of an H100 (heads of 64), and 24 rounds of tiles of 128 (heads of 128): none of them
waits for others in a last round that is not full. With 8,192 rows that is 6 % and 3 % of the time.
"""
_WARM_UP_STEPS: Final = 3
_STEPS: Final = 64
"""Tokens of a block, so that one of them leaves a block full."""


def run(
    lengths: Sequence[int] = LENGTHS,
    policies: Sequence[str] = POLICIES,
    *,
    shape: str = SHAPES[0],
    with_prefill: bool = True,
    output: Path | None = None,
) -> BenchReport:
    """Each policy at each length. `output` is rewritten after each number.

    Raises: ConfigError where there is no GPU.
    """
    # torch takes seconds, and the command line imports this module to show its help.
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("bench rank: there is no CUDA device here")
    from kvcluster.bench.kernel_timing import gpu_name

    taken: list[Measurement] = []
    asked = [*(f"--length {length}" for length in lengths), *(f"--policy {p}" for p in policies)]
    command = " ".join(["python -m kvcluster.bench.rank", f"--shape {shape}", *asked])

    def report() -> BenchReport:
        return bench_report("rank", tuple(taken), command=command, gpu=gpu_name())

    for measurement in measure(lengths, policies, shape=shape, with_prefill=with_prefill):
        taken.append(measurement)
        sys.stderr.write(f"{measurement.name} {measurement.value:,.3f} {measurement.unit}\n")
        if output is not None:
            output.write_bytes(msgspec.json.format(msgspec.json.encode(report()), indent=2) + b"\n")
    return report()


def measure(
    lengths: Sequence[int], policies: Sequence[str], *, shape: str, with_prefill: bool
) -> Iterator[Measurement]:
    """Milliseconds a decoded token, and TFLOP/s of a chunk, of one sequence."""
    import torch

    from kvcluster.bench.rank_cache import (
        LoneRank,
        attention_flops,
        llama_1b,
        llama_8b,
        matmul_flops,
        random_model,
    )

    config = {"1b": llama_1b, "8b": llama_8b}[shape](2 * max(lengths))
    model = random_model(config, torch.device("cuda"), torch.bfloat16)
    for policy in policies:
        for length in lengths:
            torch.cuda.empty_cache()
            rank = LoneRank(model, Policy(codec=policy), capacity=length + CHUNK_TOKENS)
            rank.fill()
            name = f"{shape} {policy} {length >> 10}K"
            if with_prefill:
                chunk = min(CHUNK_TOKENS, length)
                ids = [7] * chunk
                # The first one is compiled for, at the first lengths.
                repeats = 2 if length <= max(LENGTHS) else 1
                seconds = min(rank.step(length - chunk, chunk, ids=ids) for _ in range(repeats))
                flops = matmul_flops(config) * chunk
                flops += attention_flops(config, length - chunk, chunk)
                speed = flops / seconds / 1e12
                yield Measurement(name=f"{name} chunk", value=seconds * 1e3, unit="ms")
                yield Measurement(name=f"{name} chunk speed", value=speed, unit="TFLOP/s")
            rank.step(length, 1, ids=[7])
            times = [rank.step(length + 1 + step, 1) for step in range(_WARM_UP_STEPS + _STEPS)]
            times_ms = [seconds * 1e3 for seconds in times[_WARM_UP_STEPS:]]
            yield Measurement(
                name=f"{name} decoded token", value=statistics.median(times_ms), unit="ms"
            )
            yield Measurement(
                name=f"{name} decoded token, mean of a block's",
                value=statistics.fmean(times_ms),
                unit="ms",
            )
            # A block's steps, so that one of them leaves a block full.
            seconds, _ = rank.decode(_STEPS)
            yield Measurement(
                name=f"{name} decoded token, a step ahead", value=seconds * 1e3, unit="ms"
            )
            peak = torch.cuda.max_memory_allocated() / 2**30
            yield Measurement(name=f"{name} peak memory", value=peak, unit="GiB")
            torch.cuda.reset_peak_memory_stats()
            del rank
            gc.collect()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run without the command line of kvcluster, which wants more packages."""
    parser = argparse.ArgumentParser(prog="python -m kvcluster.bench.rank")
    parser.add_argument("--length", action="append", type=int, help="repeatable")
    parser.add_argument("--policy", action="append", help="repeatable")
    parser.add_argument("--shape", choices=SHAPES, default=SHAPES[0])
    parser.add_argument("--no-prefill", action="store_true", help="decode alone")
    parser.add_argument("--output", type=Path, help="write the report there as well")
    options = parser.parse_args(arguments)
    report = run(
        options.length or LENGTHS,
        options.policy or POLICIES,
        shape=options.shape,
        with_prefill=not options.no_prefill,
        output=options.output,
    )
    sys.stdout.buffer.write(msgspec.json.encode(report) + b"\n")


if __name__ == "__main__":
    main()
