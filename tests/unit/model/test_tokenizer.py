"""However a prompt is cut on its way, its ids are those of the whole text; likewise for answers."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kvcluster.model.source import ModelFiles
from kvcluster.model.tokenizer import TextTokenizer, load_tokenizer
from tests.architectures import tiny_models

CHARACTERS = "abcXYZ019 \n\t.,!?'-_<>|/\u2581\u00e9\u00a0\u00bd\u001c\u2028\ufdfa\ufffd"
RUNS = (
    *("\r\n", "\n\n", "   ", " \n ", "it's", " the", "def f(x):", "1234"),
    *("e\u0301", "\u5b57\u3002", "\u65e5\u672c\u8a9e", "\U0001f642"),
    *("<|im_start|>", "<|im_end|>", "<bos>", "<start_of_turn>", "</b>", "<0x12>"),
)
PIECES = st.lists(
    st.one_of(
        st.sampled_from([*CHARACTERS, *RUNS]),
        st.text(max_size=6).filter(lambda text: text.isprintable()),
    ),
    max_size=30,
)
FUZZ = settings(
    max_examples=200,
    deadline=None,
    # The tokenizers are immutable, so one fixture may serve all examples.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


class Loaded:
    """A tokenizer of ours beside the one of transformers."""

    def __init__(self, theirs: PreTrainedTokenizerBase) -> None:
        self.theirs = theirs
        self.ours = TextTokenizer(theirs, "digest")

    def encode(self, pieces: list[str]) -> list[int]:
        encoder = self.ours.prompt_encoder()
        ids = [token_id for piece in pieces for token_id in encoder.push(piece)]
        return ids + encoder.finish()

    def decode(self, token_ids: list[int]) -> str:
        decoder = self.ours.output_decoder()
        return "".join(decoder.push(token_id) for token_id in token_ids) + decoder.finish()


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_files: ModelFiles) -> Loaded:
    return Loaded(AutoTokenizer.from_pretrained(smollm2_files.directory))


@pytest.fixture(scope="session")
def gemma3_tokenizer(gemma3_files: ModelFiles) -> Loaded:
    return Loaded(AutoTokenizer.from_pretrained(gemma3_files.directory))


@FUZZ
@given(pieces=PIECES)
def test_smollm2_prompts_in_pieces(smollm2_tokenizer: Loaded, pieces: list[str]) -> None:
    expected = smollm2_tokenizer.theirs("".join(pieces)).input_ids

    assert smollm2_tokenizer.encode(pieces) == expected


@FUZZ
@given(pieces=PIECES)
def test_gemma3_prompts_in_pieces(gemma3_tokenizer: Loaded, pieces: list[str]) -> None:
    expected = gemma3_tokenizer.theirs("".join(pieces)).input_ids

    assert gemma3_tokenizer.encode(pieces) == expected


# Of SmolLM2 and Gemma alike: special tokens first, then bytes or single characters.
TOKEN_IDS = st.lists(
    st.one_of(st.integers(0, 49_151), st.integers(0, 20), st.integers(238, 500)), max_size=40
)


@FUZZ
@given(token_ids=TOKEN_IDS)
def test_smollm2_answers_token_by_token(smollm2_tokenizer: Loaded, token_ids: list[int]) -> None:
    expected = smollm2_tokenizer.theirs.decode(token_ids, skip_special_tokens=True)

    assert smollm2_tokenizer.decode(token_ids) == expected


@FUZZ
@given(token_ids=TOKEN_IDS)
def test_gemma3_answers_token_by_token(gemma3_tokenizer: Loaded, token_ids: list[int]) -> None:
    expected = gemma3_tokenizer.theirs.decode(token_ids, skip_special_tokens=True)

    assert gemma3_tokenizer.decode(token_ids) == expected


def test_most_of_a_long_prompt_is_encoded_before_it_ends(smollm2_tokenizer: Loaded) -> None:
    encoder = smollm2_tokenizer.ours.prompt_encoder()

    early = sum(len(encoder.push("some words and a line\n")) for _ in range(100))

    assert early > 590
    assert len(encoder.finish()) < 10


def test_text_without_any_cut_waits_for_the_end(smollm2_tokenizer: Loaded) -> None:
    encoder = smollm2_tokenizer.ours.prompt_encoder()

    assert encoder.push("1234567890" * 100) == []
    assert encoder.finish() == smollm2_tokenizer.theirs("1234567890" * 100).input_ids


def test_an_empty_prompt_is_what_transformers_makes_of_it(gemma3_tokenizer: Loaded) -> None:
    assert gemma3_tokenizer.encode([]) == gemma3_tokenizer.theirs("").input_ids == [2]


def test_a_character_of_several_tokens_comes_out_whole(smollm2_tokenizer: Loaded) -> None:
    token_ids = smollm2_tokenizer.theirs("\U0001f9ff", add_special_tokens=False).input_ids
    decoder = smollm2_tokenizer.ours.output_decoder()

    pieces = [decoder.push(token_id) for token_id in token_ids]

    assert len(token_ids) > 1
    assert pieces == [""] * (len(token_ids) - 1) + ["\U0001f9ff"]


def small(*, prefix_space: bool = False) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(alphabet)}
    vocab |= {"[B]": 256, "[E]": 257}
    tokenizer = Tokenizer(BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["[B]", "[E]"])
    tokenizer.post_processor = TemplateProcessing(
        single="[B] $A [E]", special_tokens=[("[B]", 256), ("[E]", 257)]
    )
    return tokenizer


@given(pieces=PIECES)
def test_tokens_around_a_prompt_come_once(pieces: list[str]) -> None:
    tokenizer = Loaded(PreTrainedTokenizerFast(tokenizer_object=small()))

    assert tokenizer.encode(pieces) == tokenizer.theirs("".join(pieces)).input_ids


@given(pieces=PIECES)
def test_a_tokenizer_that_adds_a_space_to_every_text_adds_it_once(pieces: list[str]) -> None:
    backend = small(prefix_space=True)
    tokenizer = Loaded(PreTrainedTokenizerFast(tokenizer_object=backend))

    assert tokenizer.encode(pieces) == tokenizer.theirs("".join(pieces)).input_ids


def test_a_directory_without_tokenizer_files_has_no_tokenizer(tmp_path: Path) -> None:
    tiny_models()["llama"]().save_pretrained(tmp_path)

    assert load_tokenizer(str(tmp_path)) is None


def test_a_directory_with_tokenizer_files_has_one(tmp_path: Path) -> None:
    tiny_models()["llama"]().save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=small()).save_pretrained(tmp_path)

    tokenizer = load_tokenizer(str(tmp_path))

    assert tokenizer is not None
    assert tokenizer.vocab_size == 258
    assert tokenizer.digest


def test_the_digest_changes_with_the_vocabulary(tmp_path: Path) -> None:
    digests = set()
    for name, extra in (("one", []), ("other", ["[X]"])):
        backend = small()
        backend.add_special_tokens(extra)
        tiny_models()["llama"]().save_pretrained(tmp_path / name)
        PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / name)
        loaded = load_tokenizer(str(tmp_path / name))
        digests.add(loaded.digest if loaded is not None else "")

    assert len(digests) == 2
