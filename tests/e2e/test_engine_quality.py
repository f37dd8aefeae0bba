"""Quality through a cluster is what one pass of the definition measures."""

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from kvcluster.bench.engine_quality import measure_at
from kvcluster.bench.quality import measure_quality
from kvcluster.bench.quality_settings import QualitySettings, read_corpus
from kvcluster.config import CacheConfig, ClusterConfig, EngineConfig, RingConfig
from kvcluster.errors import PolicyUnsupported
from kvcluster.model.loader import context_of, load_model
from kvcluster.quality.sweep_records import SweepReport, read_report
from kvcluster.quality.texts import Purpose, Text
from tests.model_directory import write_tiny_model
from tests.thread_executor import running_engine
from tests.unit.router.serving import serving

PROSE = "Some words, one after another, and then some. "
TEXTS = (
    Text(name="judged", purpose=Purpose.EVALUATION, content=PROSE[::-1] * 40),
    Text(name="other", purpose=Purpose.EVALUATION, content=PROSE.upper() * 40),
)


@pytest.fixture
def settings(tmp_path: Path) -> QualitySettings:
    directory = tmp_path / "tiny"
    write_tiny_model(directory)
    texts = tmp_path / "texts.json"
    texts.write_bytes(msgspec.json.encode(TEXTS))
    return QualitySettings(
        model=str(directory),
        policies=("int2", "rotated4 + window:recent=64"),
        num_tokens=200,
        texts_file=texts,
        lengths=(500,),
        num_seeds=1,
        num_needles=1,
        first_scored=100,
        block_size=16,
        exact_recent_tokens=32,
        num_ranks=3,
    )


def ignore(_line: str) -> None: ...


async def served(settings: QualitySettings) -> SweepReport:
    model = load_model(settings.model, dtype="float32", device="cpu")
    config = ClusterConfig(
        model=settings.model,
        cache=CacheConfig(
            block_size=settings.block_size,
            capacity_tokens=1024,
            exact_recent_tokens=settings.exact_recent_tokens,
        ),
        engine=EngineConfig(prefill_chunk_tokens=96, shard_min_tokens=32),
        ring=RingConfig(num_ranks=settings.num_ranks),
    )
    async with running_engine(model, config) as (service, _), serving(service) as server:
        corpus = read_corpus(settings, context_of(settings.model))
        return await measure_at(server.address, settings, corpus, ignore)


async def test_a_cluster_measures_what_one_pass_does(
    settings: QualitySettings, tmp_path: Path
) -> None:
    output = tmp_path / "report.json"

    through_cluster = await served(replace(settings, output=output))

    in_one_pass = measure_quality(replace(settings, num_ranks=0), ignore)
    assert read_report(output) == through_cluster
    for score, expected in zip(through_cluster.scores, in_one_pass.scores, strict=True):
        assert score.policy == expected.policy
        assert score.kl is None
        assert score.storage.ratio > 1
        for text, expected_text in zip(score.texts, expected.texts, strict=True):
            # Rounding of float32 alone: quantised blocks are the same bytes.
            assert text.nll_increase.value == pytest.approx(
                expected_text.nll_increase.value, abs=2e-4
            )
            assert text.exact_nll == pytest.approx(expected_text.exact_nll, abs=1e-4)
            assert text.top1_agreement.value == pytest.approx(
                expected_text.top1_agreement.value, abs=0.02
            )
        assert [document.needles for document in score.recall] == [
            document.needles for document in expected.recall
        ]


async def test_a_policy_that_the_cluster_refuses_ends_the_measurement(
    settings: QualitySettings,
) -> None:
    with pytest.raises(PolicyUnsupported, match="calibration"):
        await served(replace(settings, policies=("latent",)))
