"""A single row on a GPU: products at the sizes of models, and steps that are recorded."""

import math
from collections.abc import Callable

import pytest
import torch
from kvcluster_kernels import row_products_plain as plain
from kvcluster_kernels.row_products import Norm, gated_product, products
from transformers import LlamaConfig

from kvcluster.attention.implementation import Implementation
from kvcluster.bench.rank_cache import LoneRank, random_model
from kvcluster.cache.store import KVStore
from kvcluster.codec.method import CodecModel
from kvcluster.codec.model_codecs import ModelCodecs
from kvcluster.model.loader import LoadedModel
from kvcluster.model.row_layers import row_layers
from kvcluster.types import Policy
from tests.kernels.test_gpu_steps import in_kernels, tiny_llama
from tests.kernels.test_steps import in_torch
from tests.reference_group import ReferenceGroup

pytestmark = pytest.mark.gpu

# The result is rounded once, to 2^-9 of itself; sums of thousands of float32 products add less.
RTOL = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 1e-4}


@pytest.mark.parametrize("dtype", list(RTOL), ids=str)
@pytest.mark.parametrize(
    ("dim", "num_rows"),
    [(4096, (4096, 1024, 1024)), (2048, (2048, 512, 512)), (14_336, (4096,)), (896, (1001,))],
)
def test_products_are_those_of_the_definition(
    dim: int, num_rows: tuple[int, ...], dtype: torch.dtype, gpu: torch.device
) -> None:
    torch.manual_seed(0)
    x_E = torch.randn(dim, device=gpu, dtype=dtype)
    weights = [torch.randn(n, dim, device=gpu, dtype=dtype) / math.sqrt(dim) for n in num_rows]
    norm = Norm(torch.rand(dim, device=gpu, dtype=dtype) + 0.5, 1e-5)
    wide_norm = Norm(norm.weight_E.double(), norm.epsilon)
    wide_weights = [weight.double() for weight in weights]
    residual_N = torch.randn(num_rows[0], device=gpu, dtype=dtype)

    normed = products(x_E, weights, norm=norm)
    added = products(x_E, weights[:1], residual_N=residual_N)
    gated = gated_product(x_E, weights[0], weights[0].flip(0).contiguous(), norm=norm)

    for found, right in (
        (normed, plain.products(x_E.double(), wide_weights, norm=wide_norm)),
        (
            added,
            plain.products(x_E.double(), wide_weights[:1], residual_N=residual_N.double()),
        ),
        (
            gated,
            plain.gated_product(
                x_E.double(), wide_weights[0], wide_weights[0].flip(0), norm=wide_norm
            ),
        ),
    ):
        torch.testing.assert_close(found.double(), right, rtol=RTOL[dtype], atol=RTOL[dtype])


@pytest.mark.parametrize("dtype", list(RTOL), ids=str)
def test_a_model_like_llama_is_served_in_every_dtype(dtype: torch.dtype, gpu: torch.device) -> None:
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)

    assert row_layers(random_model(config, gpu, dtype)) is not None


@pytest.mark.parametrize(("codec", "num_output"), [("exact", 70), ("int8", 6), ("int4", 6)])
def test_one_sequence_gives_the_same_tokens_through_kernels(
    codec: str, num_output: int, gpu: torch.device
) -> None:
    model = tiny_llama(gpu)
    assert row_layers(model) is not None

    found = generated(model, codec, in_kernels, num_output)

    assert found == generated(model, codec, in_torch, num_output)


@pytest.mark.parametrize("codec", ["exact", "int8"])
def test_steps_begin_before_the_tokens_of_the_one_before_are_known(
    codec: str, gpu: torch.device
) -> None:
    """From a row's second to last token of a block on, so that blocks become encoded too."""
    model = tiny_llama(gpu)
    found, right = (
        LoneRank(model, Policy(codec=codec), capacity=1024, implementation=implementation)
        for implementation in (in_kernels, in_torch)
    )
    for lone in (found, right):
        lone.step(0, 510, ids=[(7 * place + 3) % 211 for place in range(510)])

    _, token_ids = found.decode(6)

    assert token_ids == right.decode(6)[1]


def generated(
    model: LoadedModel,
    codec: str,
    implementation: Callable[[KVStore], Implementation],
    num_output: int,
) -> list[int]:
    group = ReferenceGroup(
        model,
        num_ranks=1,
        block_size=64,
        exact_blocks=1,
        implementation=implementation,
        codecs=ModelCodecs(CodecModel(spec=model.spec, device=model.device)),
    )
    group.start(0, [(7 * place + 3) % 211 for place in range(300)], Policy(codec=codec))
    group.run({0: 128}, owners=(0,))
    group.run({0: 172}, owners=(0,))
    for _ in range(num_output - 1):
        group.run({0: 1}, owners=(0,))
    return group.output(0)
