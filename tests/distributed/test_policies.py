"""Requests with different policies are served together, each as it would be alone."""

import asyncio
from dataclasses import replace

import pytest
import torch

from kvcluster.config import CacheConfig, ClusterConfig, EngineConfig, RingConfig
from kvcluster.engine.api import Finished, GenerationRequest, Output, Usage
from kvcluster.engine.service import EngineService
from kvcluster.errors import InvalidField, KvClusterError, PolicyUnsupported
from kvcluster.policy import parse_policy
from kvcluster.quality.served import MENU
from kvcluster.types import EXACT, PAGE_BLOCKS
from tests.architectures import VOCAB_SIZE
from tests.codec_models import PLAIN
from tests.served_model import served_model
from tests.thread_executor import hear, running_engine

BLOCK_SIZE = 16
PROMPT_TOKENS = 150
OUTPUT_TOKENS = 24
BY_SCORE = (
    "heavy_hitters:budget=0.3,epoch=32",
    "int4 + snap:budget=0.4,epoch=64,queries=8,heads=shared",
    "int4:values=rotated3 + key_diversity:budget=0.25,epoch=48",
)
POLICIES = (
    EXACT,
    *PLAIN,
    "window:recent=48",
    "int4 + window:recent=64",
    *BY_SCORE,
    "pooled",
    "pooled + int4 + window:recent=64",
    "pooled + heavy_hitters:budget=0.3,epoch=32,heads=shared",
    "quest:tokens=64",
    "int4 + estimated:share=40%",
    "block_sparse:local=2,random=1 + window:recent=64",
    "int4 + heavy_hitters:budget=0.5,epoch=32 + quest:tokens=48",
    "snap:budget=0.4,epoch=64,queries=8 + estimated:share=40%",
)


def config(num_ranks: int, exact_recent_tokens: int = 20) -> ClusterConfig:
    return ClusterConfig(
        model="tiny",
        cache=CacheConfig(
            block_size=BLOCK_SIZE,
            capacity_tokens=4096,
            exact_recent_tokens=exact_recent_tokens,
            # Each request is to compute all of it.
            prefix_cache=False,
        ),
        engine=EngineConfig(
            prefill_chunk_tokens=64, shard_min_tokens=32, admit_unmeasured_pooling=True
        ),
        ring=RingConfig(num_ranks=num_ranks),
    )


async def generate(service: EngineService, policy: str, seed: int) -> tuple[list[int], Usage]:
    """The output of a prompt of its own, and what it cost."""
    opened = await service.open(
        GenerationRequest(model="tiny", max_output_tokens=OUTPUT_TOKENS, policy=policy)
    )
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(3, VOCAB_SIZE, (PROMPT_TOKENS,), generator=generator).tolist()
    heard = await hear(service, opened, prompt)
    output = [id_ for event in heard if isinstance(event, Output) for id_ in event.token_ids]
    finished = heard[-1]
    assert isinstance(finished, Finished)
    return output, finished.usage


def test_every_method_is_in_the_mixture() -> None:
    """But latents, which want a calibration: they are mixed in `test_calibration_file`."""
    chosen = [parse_policy(text, MENU) for text in POLICIES]

    assert {method.name for method in MENU.methods} - {"latent"} == {
        part.split(":")[0]
        for policy in chosen
        for part in (policy.sharing, policy.codec, policy.retention, policy.selection)
    }


@pytest.mark.parametrize("num_ranks", [1, 3])
async def test_mixed_policies_give_what_each_gives_alone(num_ranks: int) -> None:
    async with running_engine(served_model(), config(num_ranks)) as (service, _):
        alone = [await generate(service, policy, seed) for seed, policy in enumerate(POLICIES)]
        together = await asyncio.gather(
            *(generate(service, policy, seed) for seed, policy in enumerate(POLICIES))
        )
        status = await service.status()

    assert [output for output, _ in together] == [output for output, _ in alone]
    assert all(len(output) == OUTPUT_TOKENS for output, _ in together)
    assert all(rank.num_free_blocks == rank.num_blocks for rank in status.ranks)


async def test_usage_and_estimate_fall_with_the_bits() -> None:
    cluster = config(num_ranks=1, exact_recent_tokens=0)
    async with running_engine(served_model(), cluster) as (service, _):
        used = {
            policy: (await generate(service, policy, seed=0))[1].kv_bytes
            for policy in (EXACT, "int8", "int4", "int2", "pooled", "pooled + int8")
        }
        estimated = {
            policy: (
                await service.estimate(
                    GenerationRequest(
                        model="tiny", max_output_tokens=1, input_tokens=450, policy=policy
                    )
                )
            ).kv_bytes
            for policy in used
        }

    assert used[EXACT] > used["int8"] > used["int4"] > used["int2"]
    assert used[EXACT] > used["pooled"] > used["int8"] > used["pooled + int8"]
    # In whole pages, of which two codecs may need as many.
    assert estimated[EXACT] > estimated["int8"] > estimated["int4"] >= estimated["int2"]


@pytest.mark.parametrize("num_ranks", [1, 3])
async def test_the_attention_error_falls_with_the_bits(num_ranks: int) -> None:
    async with running_engine(served_model(), config(num_ranks, exact_recent_tokens=0)) as (
        service,
        _,
    ):
        errors = {
            policy: (await generate(service, policy, seed=0))[1].attention_error
            for policy in (EXACT, "int8", "int4", "int2")
        }

    assert errors[EXACT] == 0
    # A step of a code of 8 bits is a 17th of one of 4 bits, and that a fifth of one of 2 bits.
    assert 0 < 8 * errors["int8"] < errors["int4"] < errors["int2"] / 2 < 0.5


async def test_a_window_bounds_what_a_sequence_holds() -> None:
    async with running_engine(served_model(), config(num_ranks=3)) as (service, _):
        estimated = [
            await service.estimate(
                GenerationRequest(
                    model="tiny",
                    max_output_tokens=1,
                    input_tokens=input_tokens,
                    policy="window:recent=48",
                )
            )
            for input_tokens in (200, 500)
        ]
        _, used = await generate(service, "window:recent=48", seed=0)
        _, used_in_full = await generate(service, "exact", seed=0)

    assert estimated[0].kv_bytes == estimated[1].kv_bytes
    assert used.kv_bytes <= estimated[0].kv_bytes
    assert used.kv_bytes < used_in_full.kv_bytes


async def test_a_window_that_is_no_whole_blocks_is_refused() -> None:
    async with running_engine(served_model(), config(num_ranks=1)) as (service, _):
        with pytest.raises(PolicyUnsupported, match="give 16 or a multiple of it, not 40"):
            await generate(service, "window:recent=40", seed=0)


async def test_pooled_heads_are_refused_until_they_are_measured() -> None:
    cluster = config(num_ranks=1)
    careful = replace(cluster, engine=replace(cluster.engine, admit_unmeasured_pooling=False))

    async with running_engine(served_model(), careful) as (service, _):
        with pytest.raises(PolicyUnsupported, match="has not been measured"):
            await generate(service, "pooled + int4", seed=0)


@pytest.mark.parametrize("tokens", [40, 32])
async def test_a_selection_that_is_no_whole_blocks_or_too_few_is_refused(tokens: int) -> None:
    async with running_engine(served_model(), config(num_ranks=1)) as (service, _):
        with pytest.raises(PolicyUnsupported, match=f"give 48 or more, not {tokens}"):
            await generate(service, f"quest:tokens={tokens}", seed=0)


async def test_usage_and_estimate_fall_with_the_budget() -> None:
    async with running_engine(served_model(), config(num_ranks=3)) as (service, _):
        used, estimated = [], []
        for budget in (1, 0.5, 0.2):
            policy = f"heavy_hitters:budget={budget},epoch=32"
            used.append((await generate(service, policy, seed=0))[1].kv_bytes)
            asked = GenerationRequest(
                model="tiny",
                max_output_tokens=OUTPUT_TOKENS,
                input_tokens=PROMPT_TOKENS,
                policy=policy,
            )
            estimated.append((await service.estimate(asked)).kv_bytes)

    assert used[0] > used[1] > used[2]
    assert all(one <= most for one, most in zip(used, estimated, strict=True))
    assert estimated[0] > estimated[1] > estimated[2]


@pytest.mark.parametrize("codec", [EXACT, "int4"])
async def test_usage_is_the_bytes_of_the_tensors_that_hold_survivors_and_epoch(codec: str) -> None:
    """150 tokens: of the first 128, 70 survive, in 5 blocks; 22 are in the open epoch, in 2. Each
    head has the survivors' positions, and a sum of attention for all 92."""
    llama, policy = served_model("llama"), f"{codec} + heavy_hitters:budget=0.54,epoch=32"
    async with running_engine(llama, config(num_ranks=1)) as (service, executor):
        opened = await service.open(
            GenerationRequest(model="tiny", max_output_tokens=1, policy=policy)
        )
        heard = await hear(service, opened, [5] * PROMPT_TOKENS)
        store = executor.runners[0]._store
        exact_bytes = encoded_bytes = 0.0
        for layer in range(len(llama.spec.layers)):
            slots = store.gather(layer, [slice(0, BLOCK_SIZE)])
            exact_bytes += sum(plane.nbytes for plane in slots.planes)
        if codec != EXACT:
            page_bytes = exact_bytes * PAGE_BLOCKS
            encoded_bytes = page_bytes / store.blocks_per_page(0, codec)

    num_exact, num_encoded = (7, 0) if codec == EXACT else (4, 4)
    finished = heard[-1]
    assert isinstance(finished, Finished)
    marks = sum(layer.num_kv_heads for layer in llama.spec.layers) * (70 * 4 + 92 * 8)
    held = num_exact * exact_bytes + num_encoded * encoded_bytes + marks
    assert finished.usage.kv_bytes == round(held)


@pytest.mark.parametrize(
    ("policy", "error", "reason"),
    [
        ("heavy_hitters:budget=0", InvalidField, "must be over 0 and at most 1"),
        ("heavy_hitters:budget=1.5", InvalidField, "must be over 0 and at most 1"),
        ("snap:recent=-0.1", InvalidField, "must be at least 0 and at most 1"),
        ("heavy_hitters:epoch=40", PolicyUnsupported, "give 16 or a multiple of it, not 40"),
        ("snap:epoch=32,queries=33", PolicyUnsupported, "queries must be 1 to 32"),
        ("key_diversity:heads=some", InvalidField, "must be one of own, shared"),
        ("int4 + snap:budget=0.2,budget=0.3", InvalidField, "budget"),
    ],
)
async def test_what_cannot_be_kept_by_score_is_refused(
    policy: str, error: type[KvClusterError], reason: str
) -> None:
    async with running_engine(served_model(), config(num_ranks=1)) as (service, _):
        with pytest.raises(error, match=reason):
            await generate(service, policy, seed=0)


async def test_a_codec_that_cannot_encode_the_blocks_is_refused() -> None:
    tiny_blocks = replace(
        config(num_ranks=1), cache=CacheConfig(block_size=1, capacity_tokens=1024)
    )

    async with running_engine(served_model(), tiny_blocks) as (service, _):
        with pytest.raises(PolicyUnsupported, match="more than 2 KV heads"):
            await generate(service, "pooled:heads=2", seed=0)
        with pytest.raises(PolicyUnsupported, match="must be a multiple of 2, not 1"):
            await generate(service, "int4", seed=0)


LATENT_POLICIES = (EXACT, "int8", "int4", "fp8", "rotated4", "int4 + window:recent=64")


@pytest.mark.parametrize("num_ranks", [1, 3])
async def test_a_model_with_latent_attention_is_served_under_its_policies(num_ranks: int) -> None:
    latent = served_model("deepseek_v2")
    async with running_engine(latent, config(num_ranks)) as (service, _):
        alone = [
            await generate(service, policy, seed) for seed, policy in enumerate(LATENT_POLICIES)
        ]
        together = await asyncio.gather(
            *(generate(service, policy, seed) for seed, policy in enumerate(LATENT_POLICIES))
        )

    assert [output for output, _ in together] == [output for output, _ in alone]
    # The last token is never read: it takes no place.
    num_tokens = PROMPT_TOKENS + OUTPUT_TOKENS - 1
    # Of each token three layers keep a latent of 24 and a rotary key of 8 numbers of 4 bytes.
    bytes_per_token = 3 * (24 + 8) * 4
    assert {usage.kv_bytes_uncompressed for _, usage in alone} == {num_tokens * bytes_per_token}
    used = dict(zip(LATENT_POLICIES, (usage.kv_bytes for _, usage in alone), strict=True))
    num_blocks = -(-num_tokens // BLOCK_SIZE)
    assert used[EXACT] == num_blocks * BLOCK_SIZE * bytes_per_token
    assert used[EXACT] > used["int8"] > used["int4"]


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ("latent:r=0.5", "the model's own latent already"),
        ("int4:values=rotated3", "its values are part of its keys"),
    ],
)
async def test_a_policy_that_latent_attention_cannot_have_is_refused(
    policy: str, reason: str
) -> None:
    async with running_engine(served_model("deepseek_v2"), config(num_ranks=1)) as (service, _):
        with pytest.raises(PolicyUnsupported, match=reason):
            await generate(service, policy, seed=0)
