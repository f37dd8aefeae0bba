"""Quality as clients get it: policies measured through a cluster that serves, over all its ranks.

Log probabilities come with the answers (`prompt_logprobs`), bytes from their usage. Whole
distributions do not travel, so there is no divergence; `kvcluster.quality.measure` has it, in one
pass without a cluster, of the same attention.
"""

import asyncio
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Final, Self

import torch
from torch import Tensor

from kvcluster.bench.quality_settings import (
    Corpus,
    Progress,
    QualitySettings,
    kept_report,
    read_corpus,
)
from kvcluster.client import Client
from kvcluster.codec.calibration import read_calibration
from kvcluster.codec.latent_method import LATENT
from kvcluster.config import CacheConfig, ClusterConfig, RingConfig, RouterConfig
from kvcluster.engine.api import Admitted, Finished, PromptScores, Usage
from kvcluster.model.loader import context_of
from kvcluster.policy import parse_policy
from kvcluster.quality.measure import perplexity_increase
from kvcluster.quality.needles import NeedleDocument
from kvcluster.quality.records import NeedleScore, RecallScore, Storage, TextScore
from kvcluster.quality.served import MENU
from kvcluster.quality.spans import mean_over_spans
from kvcluster.quality.sweep_records import (
    CalibratedOn,
    RecipeScore,
    ScoredText,
    SweepReport,
    SweepSubject,
    scored_document,
)
from kvcluster.quality.texts import Text
from kvcluster.router.records import ServedModel
from kvcluster.serve.app import running
from kvcluster.types import EXACT

SERVED: Final = "served"
"""What a report calls the device: the client does not know it."""
_LATENT: Final = LATENT.method.name
_SPARE_TOKENS: Final = 1024
"""Of a rank's cache, beyond the longest prompt."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Reading:
    """What a cluster makes of a prompt of T tokens under a policy."""

    policy: str
    """Canonical."""
    nll_P: Tensor
    """P = T - 1: negative log-likelihood of each token but the first, in nats."""
    best_P: Tensor
    """The token that was found most likely in its place."""
    usage: Usage

    @property
    def storage(self) -> Storage:
        return Storage(
            bytes_per_token=self.usage.kv_bytes / self.usage.input_tokens,
            ratio=self.usage.kv_bytes_uncompressed / self.usage.kv_bytes,
        )


async def read(client: Client, token_ids: Sequence[int], policy: str) -> Reading:
    """Let the cluster read a prompt. Raises: KvClusterError, of admission or of the generation."""
    logprobs: list[float] = []
    best: list[int] = []
    async for received in client.generate(
        prompt_ids=list(token_ids), policy=policy, prompt_logprobs=1, max_output_tokens=1
    ):
        match received.event:
            case Admitted() as admitted:
                canonical = admitted.policy
            case PromptScores() as scores:
                logprobs += scores.logprobs
                best += scores.top_token_ids
            case Finished() as finished:
                usage = finished.usage
            case _:
                pass
    return Reading(
        policy=canonical, nll_P=-torch.tensor(logprobs), best_P=torch.tensor(best), usage=usage
    )


def measure_served(settings: QualitySettings, progress: Progress) -> SweepReport:
    """Start a cluster on this machine, and measure the policies of the settings through it.

    Takes minutes to hours on a CPU; blocks. Raises: KvClusterError.
    """
    # One token less than the model can read: a request asks for at least one more.
    corpus = read_corpus(settings, context_of(settings.model) - 1)
    config = ClusterConfig(
        model=settings.model,
        dtype=settings.dtype,
        calibration=str(settings.calibration or ""),
        cache=CacheConfig(
            block_size=settings.block_size,
            exact_recent_tokens=settings.exact_recent_tokens,
            capacity_tokens=corpus.longest + _SPARE_TOKENS,
        ),
        ring=RingConfig(num_ranks=settings.num_ranks),
        router=RouterConfig(listen="127.0.0.1:0", insecure_local=True),
    )
    # Ray prints what its processes say to stdout, which is the report's alone.
    with redirect_stdout(sys.stderr), running(config) as app:
        return asyncio.run(measure_at(app.address, settings, corpus, progress))


async def measure_at(
    address: str, settings: QualitySettings, corpus: Corpus, progress: Progress
) -> SweepReport:
    """Measure the policies through the server at an address. Raises: KvClusterError."""
    async with Client(address) as client:
        [model] = await client.models()
        calibration = None
        if settings.calibration is not None:
            calibration = read_calibration(settings.calibration, model.weights_digest)
        subject = _subject(settings, corpus, model)
        report, keep = kept_report(settings, subject, progress)
        started = time.monotonic()
        sweep = await ServedSweep.beside_exact(client, corpus, settings.first_scored)
        progress(f"exact cache: {time.monotonic() - started:.1f} s")
        for policy in dict.fromkeys(str(parse_policy(text, MENU)) for text in settings.policies):
            if not report.has(policy):
                made_with = calibration if _LATENT in policy else None
                score = await sweep.score(policy, CalibratedOn.of(made_with))
                report = report.with_score(score)
                keep(report)
        return report


def _subject(settings: QualitySettings, corpus: Corpus, model: ServedModel) -> SweepSubject:
    return SweepSubject(
        model=model.name,
        weights_digest=model.weights_digest,
        tokenizer_digest=model.tokenizer_digest,
        dtype=settings.dtype,
        block_size=settings.block_size,
        exact_recent_tokens=settings.exact_recent_tokens,
        num_tokens=max((len(ids_T) for _, ids_T in corpus.texts), default=0),
        first_scored=settings.first_scored,
        texts=tuple(ScoredText(name=text.name, digest=text.digest) for text, _ in corpus.texts),
        documents=tuple(scored_document(document) for document in corpus.documents),
        num_ranks=settings.num_ranks,
    )


class ServedSweep:
    """Scores policies one after another, beside the exact cache of the same cluster."""

    def __init__(
        self,
        client: Client,
        corpus: Corpus,
        first_scored: int,
        exact_texts: Sequence[Reading],
        exact_documents: Sequence[Reading],
    ) -> None:
        self._client = client
        self._corpus = corpus
        self._first_scored = first_scored
        self._exact_texts = exact_texts
        self._exact_documents = exact_documents

    @classmethod
    async def beside_exact(cls, client: Client, corpus: Corpus, first_scored: int) -> Self:
        """Read everything with the exact cache. Raises: KvClusterError."""
        texts = [await read(client, ids_T.tolist(), EXACT) for _, ids_T in corpus.texts]
        documents = [await read(client, doc.token_ids, EXACT) for doc in corpus.documents]
        return cls(client, corpus, first_scored, texts, documents)

    async def score(self, policy: str, calibrated_on: CalibratedOn | None = None) -> RecipeScore:
        """Read everything with a policy. Raises: KvClusterError."""
        started = time.monotonic()
        texts = [
            self._text_score(text, exact, await read(self._client, ids_T.tolist(), policy))
            for (text, ids_T), exact in zip(self._corpus.texts, self._exact_texts, strict=True)
        ]
        recall = [
            recall_score(document, exact, await read(self._client, document.token_ids, policy))
            for document, exact in zip(self._corpus.documents, self._exact_documents, strict=True)
        ]
        return RecipeScore(
            policy=policy,
            device=SERVED,
            seconds=time.monotonic() - started,
            texts=tuple(texts),
            recall=tuple(recall),
            calibrated_on=calibrated_on,
        )

    def _text_score(self, text: Text, exact: Reading, reading: Reading) -> TextScore:
        first = self._first_scored
        exact_R, nll_R = exact.nll_P[first - 1 :], reading.nll_P[first - 1 :]
        increase = mean_over_spans(nll_R - exact_R)
        is_same_R = exact.best_P[first - 1 :] == reading.best_P[first - 1 :]
        return TextScore(
            policy=reading.policy,
            text=text.name,
            text_digest=text.digest,
            num_tokens=reading.usage.input_tokens,
            first_scored=first,
            exact_nll=float(exact_R.double().mean()),
            nll_increase=increase,
            perplexity_increase_percent=perplexity_increase(increase),
            kl=None,
            top1_agreement=mean_over_spans(is_same_R.float()),
            storage=reading.storage,
        )


def recall_score(document: NeedleDocument, exact: Reading, reading: Reading) -> RecallScore:
    """Which of the document's answers each reading finds."""
    needles = tuple(
        NeedleScore(
            key=question.key,
            depth=question.depth,
            is_found=is_found,
            is_found_by_exact=is_found_by_exact,
        )
        for question, is_found, is_found_by_exact in zip(
            document.questions, _found(document, reading), _found(document, exact), strict=True
        )
    )
    return RecallScore(
        policy=reading.policy,
        document=document.name,
        num_tokens=len(document.token_ids),
        needles=needles,
        num_found=sum(needle.is_found for needle in needles),
        num_found_by_exact=sum(needle.is_found_by_exact for needle in needles),
        num_found_of_exact=sum(n.is_found and n.is_found_by_exact for n in needles),
        storage=reading.storage,
    )


def _found(document: NeedleDocument, reading: Reading) -> list[bool]:
    """Whether each token of an answer is the likeliest in its place, as greedy decoding has it."""
    best = reading.best_P.tolist()
    return [
        all(
            best[position - 1] == document.token_ids[position]
            for position in range(question.answer_from, question.answer_to)
        )
        for question in document.questions
    ]
