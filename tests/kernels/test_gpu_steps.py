"""Steps on a GPU go through kernels, and give what they give in torch."""

from collections.abc import Callable

import pytest
import torch
from kvcluster_kernels.paging import Attention, PagedRows
from transformers import LlamaConfig

from kvcluster.attention.implementation import Implementation, implementation_for
from kvcluster.attention.kernel_attention import KernelAttention
from kvcluster.bench.rank_cache import random_model
from kvcluster.cache.store import KVStore
from kvcluster.model.loader import LoadedModel
from kvcluster.types import Policy
from tests.codec_models import calibrated_codecs
from tests.kernels import encode_step_cases
from tests.kernels.test_latent_steps import rows_of
from tests.kernels.test_steps import Setting, in_torch, outputs
from tests.reference_group import ReferenceGroup

pytestmark = pytest.mark.gpu

# Weights and what leaves a layer are rounded to the dtype: by 2^-9 of numbers up to about 4 in
# bfloat16, an eighth of that in float16, a few times.
ATOL = {torch.bfloat16: 4e-2, torch.float16: 6e-3}


@pytest.mark.parametrize("dtype", list(ATOL), ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    "policies",
    [
        ("exact", "exact"),
        ("int4", "exact", "int8"),
        ("fp8", "rotated4"),
        ("int3", "int4:scale_bits=8"),
        ("int4:values=rotated3", "exact"),
        ("latent:r=0.375,bits=4,values=rotated3,ranks=adaptive", "exact"),
        ("latent:r=0.25,value_r=0.5,bits=8,scale_bits=8", "latent:r=0.5,bits=2,values=exact"),
        ("latent:r=0.5,value_r=0.75,bits=4,value_bits=2,codes=rotated", "latent:r=0.5"),
    ],
    ids="+".join,
)
def test_a_step_through_kernels_is_the_step_in_torch(
    policies: tuple[str, ...], dim: int, dtype: torch.dtype, gpu: torch.device
) -> None:
    setting = Setting(gpu, dtype, dim, block_size=64)
    check(policies, setting)


@pytest.mark.parametrize("dtype", list(ATOL), ids=str)
def test_a_step_over_latents_of_several_layers_is_the_step_in_torch(
    dtype: torch.dtype, gpu: torch.device
) -> None:
    setting = Setting(gpu, dtype, 64, block_size=64, num_alike=3, cuts_blocks=True)
    check(("latent:r=0.25,bits=4,values=rotated3,ranks=adaptive,layers=3", "exact"), setting)


@pytest.mark.parametrize(
    "codec",
    [
        "latent:r=0.5,bits=4,values=rotated3",
        "latent:r=0.5,bits=4,codes=rotated",
        "latent:r=0.5,bits=2,values=int4",
    ],
)
def test_rows_over_latents_are_read_without_waiting_for_the_gpu(
    codec: str, gpu: torch.device
) -> None:
    rows, _ = rows_of(Setting(gpu, torch.bfloat16, 64, block_size=64))
    cache = rows.packed(0, Policy(codec=codec).storage)
    assert cache is not None
    q_RTHD = torch.randn(2, 1, 4, 64, device=gpu, dtype=torch.bfloat16)
    starts_R, ends_R = torch.tensor([[3, 0], [500, 64]], dtype=torch.int32, device=gpu)
    blocks_RB = torch.zeros(2, 16, dtype=torch.int32, device=gpu)
    table = PagedRows(blocks_RB, starts_R, ends_R, blocks_RB)
    cache.decode(q_RTHD, table, Attention(scale=0.1))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()

    with torch.cuda.graph(graph):
        captured = cache.decode(q_RTHD, table, Attention(scale=0.1))

    graph.replay()
    alone = cache.decode(q_RTHD, table, Attention(scale=0.1))
    torch.testing.assert_close(captured, alone, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", list(ATOL), ids=str)
def test_a_step_of_latent_attention_is_the_step_in_torch(
    dtype: torch.dtype, gpu: torch.device
) -> None:
    check(("exact", "exact"), Setting(gpu, dtype, 576, block_size=64, latent_dim=512))


def check(policies: tuple[str, ...], setting: Setting) -> None:
    by_kernels = outputs(policies, implementation_for, setting)

    plain = outputs(policies, in_torch, setting)
    assert by_kernels.keys() == plain.keys()
    for call, out_THD in plain.items():
        torch.testing.assert_close(by_kernels[call], out_THD, rtol=0, atol=ATOL[setting.dtype])


# Random weights turn a rounding into another token sooner or later: what kernels round to float16
# sooner than float32.
@pytest.mark.parametrize(
    ("codec", "num_output"), [("exact", 70), ("int8", 6), ("int4", 6), ("latent:r=0.5,bits=8", 4)]
)
def test_a_model_gives_the_same_tokens_through_kernels(
    codec: str, num_output: int, gpu: torch.device
) -> None:
    model = tiny_llama(gpu)

    through_kernels = generated(model, Policy(codec=codec), in_kernels, num_output)

    assert through_kernels == generated(model, Policy(codec=codec), in_torch, num_output)


def in_kernels(store: KVStore) -> KernelAttention:
    return KernelAttention(store, dtypes=(torch.float32,))


def tiny_llama(device: torch.device) -> LoadedModel:
    config = LlamaConfig(
        vocab_size=211,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        initializer_range=0.08,
    )
    torch.manual_seed(0)
    return random_model(config, device, torch.float32)


def generated(
    model: LoadedModel,
    policy: Policy,
    implementation: Callable[[KVStore], Implementation],
    num_output: int,
) -> list[list[int]]:
    """Two sequences that decode together."""
    group = ReferenceGroup(
        model,
        num_ranks=1,
        block_size=64,
        exact_blocks=1,
        implementation=implementation,
        codecs=calibrated_codecs(model.spec, model.device),
    )
    group.start(0, [(7 * place + 3) % 211 for place in range(300)], policy)
    group.start(1, [(5 * place + 1) % 211 for place in range(77)], policy)
    group.run({0: 128}, owners=(0,))
    group.run({0: 172, 1: 77}, owners=(0,))
    for _ in range(num_output - 1):
        group.run({0: 1, 1: 1}, owners=(0,))
    return [group.output(sequence) for sequence in (0, 1)]


@pytest.mark.parametrize("policies", [("int4",), ("int8", "exact"), ("fp8", "int4:scale_bits=8")])
def test_blocks_that_single_rows_fill_are_encoded_as_they_are_defined(
    policies: tuple[str, ...], gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Again and again, so that what was recorded is run with other blocks."""
    setting = Setting(gpu, torch.bfloat16, 64, block_size=64)
    num_runs = encode_step_cases.check(policies, KernelAttention, setting, 140, monkeypatch)
    assert num_runs == 3 * sum(policy != "exact" for policy in policies)
