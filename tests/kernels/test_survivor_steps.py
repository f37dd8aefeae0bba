"""Tokens that are kept by the attention they got, which a kernel sums up."""

import pytest
import torch

from kvcluster.attention import kernel_attention, kernel_rows
from kvcluster.attention.kernel_attention import KernelAttention
from kvcluster.cache.store import KVStore
from kvcluster.retention.attention_mass import UNIT, attention_mass
from kvcluster.retention.candidates import Candidates, Queries
from kvcluster.retention.ranks import ALONE
from kvcluster.types import LayerGeometry, Policy
from tests.codec_models import Served, plain_codecs
from tests.distributed.test_survivors import MAX_TOKENS, Serving, defined, served
from tests.kernels.test_latent_steps import counted
from tests.kernels.test_steps import EXACT_ATOL, PACKED_ATOL, InterpretedAttention
from tests.scripted_model import ScriptedModel, geometry


@pytest.mark.parametrize("layer", [geometry(), geometry(softcap=2.0)])
def test_sums_are_the_mass_that_is_defined(layer: LayerGeometry, interpreted: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    num_before, epoch_start, num_rows = 37, 64, 20
    num_keys = num_before + num_rows + 5
    k_KSD = torch.randn(2, num_keys, 16, generator=generator)
    q_THD = torch.randn(num_rows, 4, 16, generator=generator)
    positions_S = torch.cat([torch.arange(num_before), epoch_start + torch.arange(num_rows + 5)])
    candidates = Candidates(positions_S.expand(2, -1), k_KSD, torch.zeros(2, num_keys).long())
    attention = KernelAttention(store(), dtypes=(torch.float32,))

    sums_KS = attention.attention_sums(q_THD, k_KSD, layer, num_before + 5)

    assert sums_KS is not None
    mass_KS = attention_mass(candidates, Queries(q_THD, epoch_start + 5, layer), ALONE)
    # A few tens of float32 exponentials, each of a score that is rounded to 2^-22.
    torch.testing.assert_close(sums_KS.double(), mass_KS.double() * UNIT, rtol=1e-5, atol=1e-6)


def test_a_window_is_left_to_the_definition() -> None:
    attention = KernelAttention(store(), dtypes=(torch.float32,))
    x_XKD = torch.zeros(2, 4, 16)

    assert attention.attention_sums(x_XKD, x_XKD, geometry(window=8), 0) is None


class ModelOfModule(ScriptedModel):
    """As steps through kernels ask for."""

    def __init__(self, *layers: LayerGeometry, max_tokens: int) -> None:
        super().__init__(*layers, max_tokens=max_tokens)
        self.module = torch.nn.Linear(1, 1)


MODEL = ModelOfModule(geometry(), geometry(window=24), geometry(softcap=5.0), max_tokens=MAX_TOKENS)
SUBJECT = Served(MODEL, plain_codecs(MODEL.spec))


def store() -> KVStore:
    return KVStore(
        MODEL.spec,
        blocks_per_group=[16] * len(MODEL.spec.windows),
        block_size=16,
        like=torch.empty(0),
        codecs=SUBJECT.codecs,
    )


@pytest.mark.parametrize(
    ("retention", "codec", "atol"),
    [
        ("heavy_hitters:budget=0.4,epoch=32", "exact", EXACT_ATOL),
        ("snap:budget=0.5,recent=0.2,epoch=64", "int8", PACKED_ATOL),
    ],
)
def test_the_tokens_that_stay_are_those_of_the_definition(
    retention: str,
    codec: str,
    atol: float,
    monkeypatch: pytest.MonkeyPatch,
    interpreted: torch.device,
) -> None:
    sums = counted(monkeypatch, kernel_attention, "column_sums")
    rows = counted(monkeypatch, kernel_rows, "decode")
    serving = Serving(1, num_prompt_tokens=134, chunk=48, num_decoded=2)
    policy = Policy(codec=codec, retention=retention)

    ours = served(policy, serving, SUBJECT, InterpretedAttention)

    assert len(sums) > 0
    assert len(rows) > 0
    for ours_THD, want_THD in zip(ours, defined(policy, 136, serving, SUBJECT), strict=True):
        torch.testing.assert_close(ours_THD, want_THD, rtol=0, atol=atol)
