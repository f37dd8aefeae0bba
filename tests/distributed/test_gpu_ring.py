"""On GPUs the same ring group gives the same tokens: NCCL between ranks, one GPU each."""

import asyncio
from pathlib import Path

import pytest
import torch

from kvcluster.client import Client
from kvcluster.config import (
    CacheConfig,
    ClusterConfig,
    EngineConfig,
    RingConfig,
    RouterConfig,
)
from kvcluster.engine.api import Output
from kvcluster.model.loader import load_model
from kvcluster.serve.app import running
from tests.architectures import VOCAB_SIZE, tiny_models

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

OUTPUT_TOKENS = 16


@pytest.mark.parametrize("route", ["pass_kv", "pass_q", "gather"])
def test_ranks_on_gpus_go_on_as_transformers_does(route: str, tmp_path: Path) -> None:
    tiny_models()["gemma2"]().save_pretrained(tmp_path)
    prompt = [(7 * index + 3) % VOCAB_SIZE for index in range(300)]
    config = ClusterConfig(
        model=str(tmp_path),
        dtype="float32",
        cache=CacheConfig(block_size=16, capacity_tokens=1024),
        engine=EngineConfig(prefill_chunk_tokens=128, shard_min_tokens=16, history_route=route),
        ring=RingConfig(num_ranks=torch.cuda.device_count()),
        router=RouterConfig(listen="127.0.0.1:0", insecure_local=True),
    )

    with running(config) as app:
        tokens = asyncio.run(_answer(app.address, prompt))

    assert tokens == _generated(tmp_path, prompt)


async def _answer(address: str, prompt: list[int]) -> list[int]:
    async with Client(address) as client:
        return [
            token_id
            async for event in client.generate(
                prompt_ids=prompt, max_output_tokens=OUTPUT_TOKENS, ignore_eos=True
            )
            if isinstance(event.event, Output)
            for token_id in event.event.token_ids
        ]


def _generated(directory: Path, prompt: list[int]) -> list[int]:
    module = load_model(str(directory), dtype="float32", device="cuda").module
    module.set_attn_implementation("eager")
    ids = torch.tensor([prompt], device="cuda")
    with torch.inference_mode():
        for _ in range(OUTPUT_TOKENS):
            ids = torch.cat([ids, module(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(prompt) :].tolist()
