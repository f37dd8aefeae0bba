"""No text serves two purposes."""

from kvcluster.quality.held_out import (
    CHOICE_SEED,
    CHOICE_TEXTS,
    choice_texts,
    evaluation_documents,
    reported_texts,
)
from kvcluster.quality.texts import TEXT_NAMES, Purpose, Text
from tests.unit.quality.toys import character_tokenizer

TEXTS = [
    Text(name="learned", purpose=Purpose.CALIBRATION, content="learned"),
    *(
        Text(name=name, purpose=Purpose.EVALUATION, content=f"{name} is read here.\n\n" * 200)
        for name in (*CHOICE_TEXTS, "another")
    ),
]


def test_recipes_are_chosen_on_texts_that_exist_and_are_not_reported() -> None:
    assert set(CHOICE_TEXTS) < set(TEXT_NAMES)
    assert [text.name for text in choice_texts(TEXTS)] == [*CHOICE_TEXTS]
    assert [text.name for text in reported_texts(TEXTS)] == ["another"]


def test_there_is_a_document_of_each_length_style_and_seed() -> None:
    chosen = choice_texts(TEXTS)
    documents = evaluation_documents(
        character_tokenizer(),
        chosen,
        lengths=[600, 900],
        seeds=[CHOICE_SEED, CHOICE_SEED + 1],
        num_needles=1,
    )

    assert len({document.name for document in documents}) == len(documents) == 12
    assert {len(document.token_ids) for document in documents} == {600, 900}
    assert all(f"/{text.name}/" in "".join(d.name for d in documents) for text in chosen)
