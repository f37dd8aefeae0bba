"""The benchmarks by name. A module is imported when its benchmark is asked for, not before."""

from collections.abc import Callable
from importlib import import_module
from typing import cast

from kvcluster.bench.report import BenchReport
from kvcluster.errors import ConfigError

BENCHMARKS = {
    "e2e": "whole generations beside transformers.generate, with 1 and 3 ranks",
    "context": "uses of a stored context of 8K tokens: first, second, after a restart",
    "upload": "one million tokens through StreamGenerate, and the router's memory",
    "memory": "what the worker processes hold of a cache, under policies",
    "step": "the control path's time a step, without model work",
    "rank": "a rank's prefill and decode on a GPU, a model of Llama 3.2 1B's shape",
    "serve": "first token and tokens of long prompts through gRPC and Ray, on a GPU",
    "retrieval": "needles at all depths of a million tokens through gRPC and Ray",
    "fairness": "short prompts of one tenant while another sends the longest ones",
    "kernels": "attention kernels on a GPU beside the best there are",
}
"""Name, which is a module of this package with a function `run() -> BenchReport`, and what it
measures."""


def benchmark(name: str) -> Callable[[], BenchReport]:
    """The benchmark of that name. Raises: ConfigError when there is none."""
    if name not in BENCHMARKS:
        raise ConfigError(f"bench: no benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
    module = import_module(f"kvcluster.bench.{name}")
    return cast(Callable[[], BenchReport], module.run)
