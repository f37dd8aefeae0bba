"""K and V that layers of a model share (Gemma 3n, Gemma 4) are found, and stored once."""

import asyncio
from dataclasses import replace
from functools import cache

import msgspec
import pytest
import torch

from kvcluster.cache.capacity import block_bytes_per_group, blocks_per_group
from kvcluster.cache.encoded_pages import blocks_per_page
from kvcluster.cache.store import KVStore
from kvcluster.codec.calibration import Calibration
from kvcluster.config import CacheConfig, EngineConfig
from kvcluster.engine.api import GenerationRequest
from kvcluster.errors import ConfigError
from kvcluster.model.loader import LoadedModel
from kvcluster.quality.calibrating import (
    CalibrationText,
    ModelMoments,
    add_text,
    checked_rotaries,
    fitted,
)
from kvcluster.quality.passes import final_states
from kvcluster.quality.retained import RetainedAttention
from kvcluster.quality.served import codecs_of, served_policies
from kvcluster.quality.strict import ExactTokens, LayerCodecs, StrictAttention
from kvcluster.retention.heavy_hitters import HeavyHitters
from kvcluster.types import LayerGeometry, ModelSpec, Route
from tests.architectures import VOCAB_SIZE, WINDOW
from tests.codec_models import calibrated_codecs, plain_codecs
from tests.distributed.test_policies import config, generate
from tests.distributed.test_sharded_model import check_sharded
from tests.served_model import served_model
from tests.thread_executor import running_engine
from tests.unit.quality.toys import tiny_model

SHARING = ("gemma3n", "gemma4")
BLOCK_SIZE = 16


@cache
def model_of(architecture: str) -> LoadedModel:
    return tiny_model(architecture)


def unshared(spec: ModelSpec) -> ModelSpec:
    """The same layers, each with K and V of its own."""
    layers = tuple(msgspec.structs.replace(layer, kv_layer=None) for layer in spec.layers)
    return msgspec.structs.replace(spec, layers=layers)


def own_bytes(spec: ModelSpec) -> int:
    """Of a token in the first three layers of the five, which are those with K and V."""
    return spec.bytes_per_element * sum(
        layer.num_kv_heads * (layer.key_dim + layer.value_dim) for layer in spec.layers[:3]
    )


@pytest.mark.parametrize("architecture", SHARING)
def test_the_probe_finds_which_layer_each_layer_reads(architecture: str) -> None:
    layers = model_of(architecture).spec.layers

    assert [layer.kv_layer for layer in layers] == [None, None, None, 2, 1]
    assert [layer.window for layer in layers] == [WINDOW, None, WINDOW, WINDOW, None]


@pytest.mark.parametrize("architecture", ["gemma3", "llama"])
def test_layers_with_keys_of_their_own_share_nothing(architecture: str) -> None:
    assert all(layer.kv_layer is None for layer in model_of(architecture).spec.layers)


@pytest.mark.parametrize("route", list(Route))
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("architecture", SHARING)
def test_shared_layers_give_the_models_own_logits(
    architecture: str, num_ranks: int, route: Route
) -> None:
    check_sharded(architecture, num_ranks=num_ranks, chunk_tokens=40, route=route)


@pytest.mark.parametrize("architecture", SHARING)
def test_a_token_takes_the_bytes_of_the_layers_that_are_not_shared(architecture: str) -> None:
    spec = model_of(architecture).spec

    assert spec.kv_bytes_per_token == own_bytes(spec)
    assert sum(block_bytes_per_group(spec, BLOCK_SIZE)) == BLOCK_SIZE * own_bytes(spec)
    assert own_bytes(spec) < unshared(spec).kv_bytes_per_token


@pytest.mark.parametrize("architecture", SHARING)
def test_the_store_allocates_shared_layers_once(architecture: str) -> None:
    spec = model_of(architecture).spec
    cache_config = CacheConfig(block_size=BLOCK_SIZE, capacity_tokens=1024)
    counts = blocks_per_group(spec, cache_config, EngineConfig())

    store = KVStore(
        spec,
        blocks_per_group=counts,
        block_size=BLOCK_SIZE,
        like=torch.empty(0),
        codecs=plain_codecs(spec),
    )

    block_bytes = block_bytes_per_group(spec, BLOCK_SIZE)
    assert store.num_bytes == sum(n * b for n, b in zip(counts, block_bytes, strict=True))
    for layer, source in enumerate((0, 1, 2, 2, 1)):
        assert store.planes(layer).k_PKSD.data_ptr() == store.planes(source).k_PKSD.data_ptr()


async def test_an_estimate_counts_shared_layers_once() -> None:
    shared = model_of("gemma4")
    request = GenerationRequest(model="tiny", max_output_tokens=1, input_tokens=400)
    found = {}
    for name, spec in (("shared", shared.spec), ("unshared", unshared(shared.spec))):
        model = replace(shared, spec=msgspec.structs.replace(spec, name="tiny"))
        async with running_engine(model, config(num_ranks=1)) as (service, _):
            found[name] = (await service.estimate(request)).kv_bytes

    # Layers with a window hold a part of the tokens, and the same part whether shared or not.
    assert found["shared"] < 0.65 * found["unshared"]


def test_encoded_pages_hold_as_many_blocks_as_without_the_sharing_layers() -> None:
    spec = model_of("gemma4").spec
    alone = msgspec.structs.replace(spec, layers=spec.layers[:3])

    found = blocks_per_page(spec, plain_codecs(spec).layers("int4"), BLOCK_SIZE)

    assert found == blocks_per_page(alone, plain_codecs(alone).layers("int4"), BLOCK_SIZE)


@pytest.mark.parametrize("codec", ["int4", "latent:r=0.5,ranks=adaptive"])
def test_a_sharing_layer_has_the_codec_of_the_layer_that_it_reads(codec: str) -> None:
    own = LayerGeometry(num_query_heads=4, num_kv_heads=2, key_dim=16, value_dim=16, scale=0.25)
    spec = msgspec.structs.replace(
        model_of("gemma4").spec,
        layers=(own, own, msgspec.structs.replace(own, kv_layer=0)),
    )

    first, second, sharing = calibrated_codecs(spec).layers(codec)

    assert sharing is first
    assert codec == "int4" or sharing is not second


def text() -> CalibrationText:
    generator = torch.Generator().manual_seed(0)
    ids_T = torch.randint(3, VOCAB_SIZE, (300,), generator=generator)
    return CalibrationText("noise", tuple(ids_T.tolist()))


def moments_of(model: LoadedModel) -> ModelMoments:
    moments = ModelMoments(model.spec)
    add_text(model, checked_rotaries(model), moments, text())
    return moments


def calibrated(model: LoadedModel) -> Calibration:
    return fitted(model, checked_rotaries(model), moments_of(model))


@pytest.mark.parametrize("architecture", SHARING)
def test_calibration_has_bases_for_the_layers_that_store(architecture: str) -> None:
    model = model_of(architecture)

    calibration = calibrated(model)

    widths = [len(layer.keys.mean_F) for layer in calibration.layers]
    assert widths == [layer.num_kv_heads * layer.key_dim for layer in model.spec.layers[:3]]


def test_keys_are_weighed_by_the_queries_of_all_layers_that_read_them() -> None:
    model = model_of("gemma4")
    alone = replace(model, spec=unshared(model.spec))

    [shared] = moments_of(model).of_kinds()
    [apart] = moments_of(alone).of_kinds()

    for place, readers in enumerate(([0], [1, 4], [2, 3])):
        expected_KDD = torch.stack([apart[reader].query_KDD for reader in readers]).sum(0)
        torch.testing.assert_close(shared[place].query_KDD, expected_KDD)
        assert torch.equal(shared[place].keys.covariance_FF, apart[readers[0]].keys.covariance_FF)


def test_values_are_weighed_by_the_outputs_of_all_layers_that_read_them() -> None:
    model = model_of("gemma4")
    alone = replace(model, spec=unshared(model.spec))

    shared, apart = calibrated(model), calibrated(alone)

    sums = [layer.values.spectrum_F.sum() for layer in apart.layers]
    # The total of a spectrum is the covariance weighed by the outputs, and so adds up.
    for place, readers in enumerate(([0], [1, 4], [2, 3])):
        expected = sum(sums[reader] for reader in readers)
        torch.testing.assert_close(shared.layers[place].values.spectrum_F.sum(), expected)


def test_a_measurement_counts_shared_layers_once() -> None:
    model = model_of("gemma4")
    codecs = plain_codecs(model.spec).layers("int8")
    attention = StrictAttention(
        model.spec, lambda layer: LayerCodecs(*codecs[layer]), ExactTokens(block_size=BLOCK_SIZE)
    )

    final_states(model, torch.tensor(text().token_ids), attention)

    stored = attention.stored()
    full, windowed = model.spec.layers[1], model.spec.layers[0]
    in_window = 300 - (300 - WINDOW) // BLOCK_SIZE * BLOCK_SIZE
    assert stored.exact_elements + stored.encoded_elements == (
        300 * full.kv_elements_per_token + 2 * in_window * windowed.kv_elements_per_token
    )


def test_one_pass_cannot_tell_what_shared_layers_keep_by_score() -> None:
    model = model_of("gemma4")
    attention = RetainedAttention(
        model.spec,
        HeavyHitters(budget=0.4, block_size=8, epoch_tokens=32),
        exact=ExactTokens(block_size=8),
    )

    with pytest.raises(ValueError, match="layer 1 shares its keys and values"):
        final_states(model, torch.tensor(text().token_ids), attention)
    exact = ExactTokens(block_size=8)
    with pytest.raises(ConfigError, match="measure it as it is served"):
        served_policies(["key_diversity:epoch=32"], codecs_of(model, None), model.spec, exact)


BY_SCORE = (
    "heavy_hitters:budget=0.4,epoch=32",
    "int4 + snap:budget=0.4,epoch=32,queries=9",
    "int4 + key_diversity:budget=0.5,epoch=32 + quest:tokens=48",
)


@pytest.mark.parametrize("architecture", SHARING)
async def test_tokens_of_shared_layers_are_kept_by_score_on_any_number_of_ranks(
    architecture: str,
) -> None:
    """A model's own weights: tokens follow from each other, so one other survivor shows."""
    outputs = []
    for num_ranks in (1, 3):
        async with running_engine(served_model(architecture), config(num_ranks)) as (service, _):
            found = await asyncio.gather(
                *(generate(service, policy, seed) for seed, policy in enumerate(BY_SCORE))
            )
        outputs.append([output for output, _ in found])

    assert outputs[0] == outputs[1]
    assert all(outputs[0])
