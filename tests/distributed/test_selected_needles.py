"""Through the sharded path, a model that retrieves by construction finds what its queries pick."""

import pytest

from kvcluster.model.loader import LoadedModel, load_model
from kvcluster.quality.needles import NeedleDocument, Question
from kvcluster.quality.retrieval_model import (
    retrieval_document,
    retrieval_model,
    save_retrieval_model,
)
from kvcluster.types import Policy
from tests.reference_group import ReferenceGroup

VOCAB_SIZE = 997
BLOCK_SIZE = 8
NUM_NEEDLES = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    directory = tmp_path_factory.mktemp("retrieval")
    save_retrieval_model(retrieval_model(VOCAB_SIZE, head_dim=64, seed=1), directory)
    return load_model(str(directory), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def document() -> NeedleDocument:
    return retrieval_document(VOCAB_SIZE, num_tokens=640, num_needles=NUM_NEEDLES, seed=2)


def answer(
    model: LoadedModel, document: NeedleDocument, question: Question, policy: Policy, num_ranks: int
) -> int:
    """What follows the key where it stands for the second time, as a token of the output."""
    *prompt, key = document.token_ids[: question.answer_from]
    group = ReferenceGroup(model, num_ranks=num_ranks, block_size=BLOCK_SIZE, num_blocks=1024)
    group.start(1, prompt, policy, output=[key])
    whole = len(prompt) // BLOCK_SIZE * BLOCK_SIZE
    for size in (whole, len(prompt) + 1 - whole):
        group.run({1: size}, owners=range(num_ranks))
    return group.output(1)[-1]


def num_found(
    model: LoadedModel, document: NeedleDocument, policy: Policy, num_ranks: int = 3
) -> int:
    return sum(
        answer(model, document, question, policy, num_ranks) == int(question.value)
        for question in document.questions
    )


@pytest.mark.parametrize("codec", ["exact", "int4"])
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_quest_finds_every_needle_in_an_eighth_of_the_blocks(
    model: LoadedModel, document: NeedleDocument, num_ranks: int, codec: str
) -> None:
    policy = Policy(codec=codec, selection=f"quest:tokens={10 * BLOCK_SIZE}")

    assert num_found(model, document, policy, num_ranks) == NUM_NEEDLES


def test_without_the_best_blocks_no_needle_is_found(
    model: LoadedModel, document: NeedleDocument
) -> None:
    """The blocks that are always read hold none of them."""
    policy = Policy(selection=f"quest:tokens={3 * BLOCK_SIZE}")

    assert num_found(model, document, policy) == 0
