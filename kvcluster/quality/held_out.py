"""Which evaluation texts choose a recipe, which are reported, and documents with needles for both.

Bases are fitted on texts for calibration. `auto` chooses by what `kvcluster calibrate` measured on
`CHOICE_TEXTS`, and `kvcluster bench quality` reports the other texts: no figure is reported on a
text that a choice was made on.
"""

from collections.abc import Iterable, Sequence
from typing import Final

from kvcluster.model.tokenizer import TextTokenizer
from kvcluster.quality.needles import STYLES, NeedleDocument, needle_document
from kvcluster.quality.tasks import TASKS
from kvcluster.quality.texts import Purpose, Text

CHOICE_TEXTS: Final = ("interfaces", "tensor-manual")
"""Names of the evaluation texts that recipes are chosen on."""
CHOICE_SEED: Final = 1000
"""Of the first document that recipes are chosen on; documents that are reported begin at 0."""


def choice_texts(texts: Iterable[Text]) -> list[Text]:
    return [text for text in _evaluation(texts) if text.name in CHOICE_TEXTS]


def reported_texts(texts: Iterable[Text]) -> list[Text]:
    return [text for text in _evaluation(texts) if text.name not in CHOICE_TEXTS]


def evaluation_documents(
    tokenizer: TextTokenizer,
    haystacks: Sequence[Text],
    *,
    lengths: Iterable[int],
    seeds: Sequence[int],
    num_needles: int,
) -> list[NeedleDocument]:
    """A document of each length, style and seed. Raises: ValueError as `needle_document`."""
    styles = [style for style in STYLES if style.purpose is Purpose.EVALUATION]
    return [
        needle_document(
            tokenizer,
            style,
            haystacks[(seed + place) % len(haystacks)],
            num_tokens=num_tokens,
            num_needles=min(num_needles, len(style.keys)),
            seed=seed,
        )
        for num_tokens in lengths
        for place, style in enumerate(styles)
        for seed in seeds
    ]


def task_documents(
    tokenizer: TextTokenizer, haystacks: Sequence[Text], *, num_tokens: int, seeds: Sequence[int]
) -> list[NeedleDocument]:
    """A document of each task and seed. Raises: ValueError as the tasks do."""
    return [
        make(tokenizer, haystacks[(seed + place) % len(haystacks)], num_tokens, seed)
        for place, make in enumerate(TASKS.values())
        for seed in seeds
    ]


def _evaluation(texts: Iterable[Text]) -> list[Text]:
    return [text for text in texts if text.purpose is Purpose.EVALUATION]
