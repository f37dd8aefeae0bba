"""A file that a calibration wrote is served: its bases by name, its recipes by bound."""

import asyncio
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import pytest
import torch

from kvcluster.config import CacheConfig, ClusterConfig, EngineConfig, RingConfig
from kvcluster.engine.api import Admitted, Finished, GenerationRequest, Output
from kvcluster.engine.service import EngineService
from kvcluster.errors import CalibrationMismatch, PolicyUnsupported
from kvcluster.model.loader import LoadedModel
from kvcluster.quality.calibration_run import CalibrationReport, CalibrationSettings, calibrate
from kvcluster.quality.held_out import CHOICE_TEXTS
from kvcluster.quality.texts import Purpose, Text
from kvcluster.types import PAGE_BLOCKS
from tests.thread_executor import hear, running_engine
from tests.unit.quality.toys import character_tokenizer, tiny_model

CACHE = CacheConfig(block_size=16, capacity_tokens=4096, exact_recent_tokens=32, prefix_cache=False)
OUTPUT_TOKENS = 12
PROSE = "Some words, one after another, and then some more of them. "
TEXTS = tuple(
    Text(name=name, purpose=Purpose.EVALUATION, content=f"{name}: {PROSE[::-1]}" * 40)
    for name in CHOICE_TEXTS
)


def with_spec(model: LoadedModel, **fields: object) -> LoadedModel:
    spec = msgspec.structs.replace(model.spec, **fields)
    return LoadedModel(spec=spec, module=model.module, device=model.device)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return with_spec(tiny_model("llama"), eos_token_ids=())


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("calibration") / "tiny.safetensors"


@pytest.fixture(scope="module")
def report(model: LoadedModel, path: Path) -> CalibrationReport:
    return calibrate(
        model,
        character_tokenizer(),
        TEXTS,
        CalibrationSettings(
            out=path,
            policies=("int8", "int4", "latent:r=0.5,bits=8", "pooled:by=learned + int8"),
            joined=(2,),
            num_documents=0,
            block_size=CACHE.block_size,
            exact_recent_tokens=CACHE.exact_recent_tokens,
        ),
        lambda _stage, _done, _total: None,
        contents=[PROSE * 40],
    )


def config(path: Path) -> ClusterConfig:
    return ClusterConfig(
        model="toy",
        cache=CACHE,
        engine=EngineConfig(prefill_chunk_tokens=64, shard_min_tokens=32),
        ring=RingConfig(num_ranks=2),
        calibration=str(path),
    )


@dataclass(frozen=True)
class Generated:
    """What was promised, given and used."""

    admitted: Admitted
    token_ids: list[int]
    kv_bytes: int


async def generate(service: EngineService, policy: str) -> Generated:
    opened = await service.open(
        GenerationRequest(model="toy", max_output_tokens=OUTPUT_TOKENS, policy=policy)
    )
    heard = await hear(service, opened, range(3, 163))
    [admitted] = [event for event in heard if isinstance(event, Admitted)]
    finished = heard[-1]
    assert isinstance(finished, Finished)
    return Generated(
        admitted,
        [id_ for event in heard if isinstance(event, Output) for id_ in event.token_ids],
        finished.usage.kv_bytes,
    )


async def test_a_bound_is_met_by_what_the_calibration_measured(
    model: LoadedModel, path: Path, report: CalibrationReport
) -> None:
    meeting = [recipe for recipe in report.recipes if recipe.ratio >= 1.5]
    best = min(meeting, key=lambda recipe: recipe.perplexity_increase)

    async with running_engine(model, config(path)) as (service, _):
        bound = await generate(service, "auto: ratio>=1.5")
        named = await generate(service, best.policy)
        with pytest.raises(PolicyUnsupported, match="no measured policy keeps to it"):
            await generate(service, "auto: ratio>=1000")

    assert bound.admitted.policy == best.policy
    assert bound.admitted.policy_bound == "auto: ratio>=1.5"
    assert len(bound.token_ids) == OUTPUT_TOKENS
    assert (bound.token_ids, bound.kv_bytes) == (named.token_ids, named.kv_bytes)


async def test_what_was_measured_does_not_count_for_a_cache_that_is_cut_otherwise(
    model: LoadedModel, path: Path, report: CalibrationReport
) -> None:
    """Ratio and perplexity are of blocks of 16 tokens with 32 exact. Bases are of no blocks."""
    cut = replace(CACHE, block_size=32, exact_recent_tokens=64)
    async with running_engine(model, replace(config(path), cache=cut)) as (service, _):
        for policy in ("auto: ratio>=1.5", "pooled:by=learned + int8"):
            with pytest.raises(PolicyUnsupported, match=r"--set cache\.block_size=16 --set"):
                await generate(service, policy)
        latent = await generate(service, "latent:r=0.5,bits=8")

    assert len(latent.token_ids) == OUTPUT_TOKENS


async def test_latents_are_served_from_the_file(
    model: LoadedModel, path: Path, report: CalibrationReport
) -> None:
    async with running_engine(model, config(path)) as (service, _):
        latent = await generate(service, "latent:r=0.5,bits=8")
        exact = await generate(service, "exact")

    assert len(latent.token_ids) == OUTPUT_TOKENS
    assert latent.kv_bytes < exact.kv_bytes


@pytest.mark.parametrize("num_ranks", [1, 2])
async def test_latents_of_several_layers_are_served_from_the_file_in_a_mixed_batch(
    model: LoadedModel, path: Path, report: CalibrationReport, num_ranks: int
) -> None:
    policies = (
        "latent:r=0.5,bits=8,layers=2",
        "latent:r=0.5,values=int4,layers=2 + window:recent=64",
        "int4",
        "latent:r=0.5,bits=8",
        "exact",
    )
    cluster = replace(config(path), ring=RingConfig(num_ranks=num_ranks))
    async with running_engine(model, cluster) as (service, _):
        alone = [await generate(service, policy) for policy in policies]
        together = await asyncio.gather(*(generate(service, policy) for policy in policies))
        status = await service.status()

    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    assert all(len(one.token_ids) == OUTPUT_TOKENS for one in alone)
    assert alone[0].kv_bytes < alone[-1].kv_bytes
    assert all(rank.num_free_blocks == rank.num_blocks for rank in status.ranks)


async def test_usage_is_the_bytes_of_the_tensors_that_hold_a_latent_of_several_layers(
    model: LoadedModel, path: Path, report: CalibrationReport
) -> None:
    """171 tokens that are read, with 2 recent blocks exact and 2 encoded at a time: when the most
    is held, blocks 0, 8, 9 and 10 are exact, and all but the first have room to be encoded."""
    policy = "latent:r=0.5,bits=8,layers=2"
    cluster = replace(config(path), ring=RingConfig(num_ranks=1))
    async with running_engine(model, cluster) as (service, executor):
        used = (await generate(service, policy)).kv_bytes
        estimate = await service.estimate(
            GenerationRequest(
                model="toy",
                max_output_tokens=OUTPUT_TOKENS,
                input_tokens=160,
                policy=policy,
            )
        )
        store = executor.runners[0]._store
        ids_B, num_layers = torch.zeros(1, dtype=torch.int64), len(model.spec.layers)
        held = [
            sum(plane.nbytes for plane in store.read_held(layer, policy, ids_B))
            for layer in range(num_layers)
        ]
        exact_bytes = sum(
            plane.nbytes
            for layer in range(num_layers)
            for plane in store.gather(layer, [slice(0, CACHE.block_size)]).planes
        )
        page_bytes = PAGE_BLOCKS * exact_bytes
        encoded_bytes = page_bytes / store.blocks_per_page(0, policy)

    assert store.joined_layers(0, policy) == (0, 1)
    assert held[0] > 0
    assert held[1] == 0
    # A page is not filled to its last byte.
    assert sum(held) <= encoded_bytes < 1.1 * sum(held)
    assert used == round(4 * exact_bytes + 10 * encoded_bytes)
    assert used <= estimate.kv_bytes


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ("latent:layers=2 + heavy_hitters:epoch=32,heads=shared", "other tokens in each layer"),
        ("latent:layers=2 + quest:tokens=64", "not offered together with a selection"),
        ("latent:layers=3", "kvcluster calibrate --layers 3"),
    ],
)
async def test_what_several_layers_cannot_share_is_refused(
    model: LoadedModel, path: Path, report: CalibrationReport, policy: str, reason: str
) -> None:
    async with running_engine(model, config(path)) as (service, _):
        with pytest.raises(PolicyUnsupported, match=reason):
            await generate(service, policy)


async def test_learned_groups_are_served_from_the_file_within_the_operator_s_bound(
    model: LoadedModel, path: Path, report: CalibrationReport
) -> None:
    any_loss = replace(config(path), engine=replace(config(path).engine, max_pooling_loss=1e6))
    async with running_engine(model, any_loss) as (service, _):
        pooled = await generate(service, "pooled:by=learned + int8")
        plain = await generate(service, "int8")

    assert [recipe.policy for recipe in report.recipes][-1] == "pooled:by=learned + int8"
    assert pooled.kv_bytes < plain.kv_bytes


async def test_latents_keep_tokens_by_score_where_heads_share_them(
    model: LoadedModel, path: Path, report: CalibrationReport
) -> None:
    by_score = "latent:r=0.5,bits=8 + heavy_hitters:budget=0.3,epoch=32"
    async with running_engine(model, config(path)) as (service, _):
        with pytest.raises(PolicyUnsupported, match="ask for heads=shared"):
            await generate(service, by_score)
        shared = await generate(service, f"{by_score},heads=shared")
        all_kept = await generate(service, "latent:r=0.5,bits=8")

    assert len(shared.token_ids) == OUTPUT_TOKENS
    assert shared.kv_bytes < all_kept.kv_bytes


async def test_a_file_of_another_model_is_refused(
    model: LoadedModel, path: Path, report: CalibrationReport
) -> None:
    other = with_spec(model, weights_digest="1")

    with pytest.raises(CalibrationMismatch, match="another model"):
        async with running_engine(other, config(path)):
            pass
