"""`make demo`: a question about a long text, answered by three ranks on two simulated nodes.

No rank's cache could hold the prompt alone. The tokens are compared with those that transformers
generates from the same prompt in one process; the exit code is 1 if any differs.
"""

import asyncio
import logging
import sys
import time
from pydoc_data.topics import topics
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from kvcluster import log
from kvcluster.cli.exits import ExitCode
from kvcluster.cli.prefill_bar import PrefillBar
from kvcluster.cli.transcript import GenerateReport, Transcript
from kvcluster.client import Client
from kvcluster.cluster.simulated_nodes import simulated_nodes
from kvcluster.config import CacheConfig, ClusterConfig, RingConfig, RouterConfig
from kvcluster.engine.api import Output, ShardSize
from kvcluster.model.loader import load_model
from kvcluster.model.source import find_model
from kvcluster.serve import app
from kvcluster.serve.remote import RemoteBackend

NUM_NODES = 2
NUM_RANKS = 3
MAX_OUTPUT_TOKENS = 32
MIN_PROMPT_TOKENS = 6_000
MAX_PROMPT_TOKENS = 7_500
TOPICS = ("string-methods", "formatstrings", "typesseq")
"""Python's own documentation, which every Python brings; its length differs by version."""
QUESTION = "Question: which method makes a string lowercase?"

CONFIG = ClusterConfig(
    model="smollm2-135m",
    cache=CacheConfig(block_size=64, capacity_tokens=4_096),
    ring=RingConfig(num_ranks=NUM_RANKS, placement="SPREAD"),
    router=RouterConfig(listen="127.0.0.1:0", insecure_local=True),
)


def main() -> ExitCode:
    console = Console(highlight=False)
    log.configure(level="warning", as_json=False)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    console.print(
        f"Starting {NUM_RANKS} ranks on {NUM_NODES} simulated nodes: {CONFIG.model}, "
        f"each with cache for {CONFIG.cache.capacity_tokens:,} tokens ..."
    )
    started_s = time.monotonic()
    with (
        simulated_nodes(NUM_NODES, cpus_per_node=NUM_RANKS - 1),
        app.running(CONFIG) as running,
    ):
        console.print(f"Ready on {running.address} after {time.monotonic() - started_s:.0f} s.")
        backend = RemoteBackend(running.engine)
        prompt, report, shards = asyncio.run(_ask(running.address, backend, console))
    _print_shards(shards, console)
    _print_report(report, console)
    return _compared(prompt, report, console)


async def _ask(
    address: str, backend: RemoteBackend, console: Console
) -> tuple[str, GenerateReport, tuple[ShardSize, ...]]:
    """The prompt, what came back, and the shards while the last token was made."""
    shards: tuple[ShardSize, ...] = ()
    async with Client(address) as client:
        prompt = await _prompt(client)
        num_tokens = await client.count_tokens(prompt=prompt)
        console.print(f"\nPrompt: {num_tokens:,} tokens of Python's documentation, then:")
        console.print(f"[bold]{QUESTION}[/bold]\n")
        transcript = Transcript(time.monotonic)
        with PrefillBar(console, is_transient=False) as bar:
            async for received in client.generate(
                prompt=prompt, max_output_tokens=MAX_OUTPUT_TOKENS
            ):
                transcript.add(received)
                bar.show(received.event)
                if isinstance(received.event, Output):
                    console.print(escape(received.event.text), end="", style="green")
                    shards = shards or (await backend.status()).ranks
    console.print("\n")
    return prompt, transcript.report(), shards


async def _prompt(client: Client) -> str:
    text = ""
    for topic in TOPICS:
        text += topics[topic]
        num_tokens = await client.count_tokens(prompt=text)
        if num_tokens >= MIN_PROMPT_TOKENS:
            break
    if num_tokens > MAX_PROMPT_TOKENS:
        text = text[: len(text) * MAX_PROMPT_TOKENS // num_tokens]
    # The model's own marks of a conversation (ChatML), which its tokenizer knows.
    return f"<|im_start|>user\n{text}\n\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"


def _print_shards(shards: tuple[ShardSize, ...], console: Console) -> None:
    node_names = {
        node: f"node {index}"
        for index, node in enumerate(dict.fromkeys(shard.node for shard in shards))
    }
    console.print("The prompt's cache, while the answer was generated:")
    for shard in shards:
        num_used = shard.num_blocks - shard.num_free_blocks
        console.print(
            f"  rank {shard.rank} on {node_names[shard.node]}: {num_used} blocks, "
            f"up to {num_used * CONFIG.cache.block_size:,} tokens"
        )


def _print_report(report: GenerateReport, console: Console) -> None:
    usage, timings = report.usage, report.timings
    console.print(
        f"\n{usage.input_tokens:,} prompt tokens, {usage.output_tokens} output tokens, "
        f"{usage.kv_bytes / 1024**2:.0f} MiB of cache ({report.policy})"
    )
    if timings.time_to_first_token_s is not None and timings.output_tokens_per_s is not None:
        prefill_speed = usage.input_tokens / timings.time_to_first_token_s
        console.print(
            f"time to first token {timings.time_to_first_token_s:.1f} s "
            f"({prefill_speed:,.0f} tokens/s), then {timings.output_tokens_per_s:.1f} tokens/s"
        )


def _compared(prompt: str, report: GenerateReport, console: Console) -> ExitCode:
    """Whether transformers, alone in this process, gives the same tokens."""
    console.print("\nGenerating the same with transformers in one process ...")
    expected = _reference_token_ids(prompt, len(report.token_ids))
    if list(report.token_ids) == expected:
        console.print(f"[bold green]All {len(expected)} tokens are the same.[/bold green]")
        return ExitCode.OK
    same = (ours == theirs for ours, theirs in zip(report.token_ids, expected, strict=False))
    first = next((index for index, is_same in enumerate(same) if not is_same), len(expected))
    console.print(
        f"[bold red]The tokens differ from number {first} on:[/bold red]\n"
        f"  kvcluster    {report.token_ids[first:]}\n  transformers {expected[first:]}"
    )
    return ExitCode.BUG


def _reference_token_ids(prompt: str, num_tokens: int) -> list[int]:
    # torch types every attribute of a module as Tensor or Module, generate included.
    model: Any = load_model(CONFIG.model, dtype=CONFIG.dtype, device="cpu").module
    model.set_attn_implementation("sdpa")
    tokenizer = AutoTokenizer.from_pretrained(find_model(CONFIG.model).directory)
    token_ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.inference_mode():
        generated = model.generate(
            token_ids,
            attention_mask=torch.ones_like(token_ids),
            max_new_tokens=num_tokens,
            do_sample=False,
        )
    return [int(token_id) for token_id in generated[0, token_ids.shape[1] :]]


if __name__ == "__main__":
    sys.exit(main())
