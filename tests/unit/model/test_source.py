"""A model's files are found, converted once, and told apart by their content."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kvcluster.errors import ModelNotFound, ModelUnsupported
from kvcluster.model import source
from kvcluster.model.loader import load_model
from kvcluster.model.source import digest_files, find_model
from tests.architectures import tiny_models

HIDDEN, HEADS, FEED_FORWARD = 32, 2, 48
TOKENS = ["<s>", "</s>", *(chr(code) for code in range(ord("a"), ord("z") + 1)), "ab", "cd"]


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    """A llama of one layer with a byte-level tokenizer of letters."""
    path = tmp_path / "tiny.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, *([1] * (len(TOKENS) - 2))])
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    random = np.random.default_rng(0)
    for name, shape in _tensor_shapes().items():
        writer.add_tensor(name, random.normal(0, 0.2, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tensor_shapes() -> dict[str, Sequence[int]]:
    square = (HIDDEN, HIDDEN)
    return {
        "token_embd.weight": (len(TOKENS), HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "blk.0.attn_norm.weight": (HIDDEN,),
        "blk.0.ffn_norm.weight": (HIDDEN,),
        **{f"blk.0.attn_{part}.weight": square for part in ("q", "k", "v", "output")},
        "blk.0.ffn_gate.weight": (FEED_FORWARD, HIDDEN),
        "blk.0.ffn_up.weight": (FEED_FORWARD, HIDDEN),
        "blk.0.ffn_down.weight": (HIDDEN, FEED_FORWARD),
    }


def test_a_gguf_file_becomes_a_model_directory_in_the_cache(
    gguf_file: Path, tmp_path: Path
) -> None:
    files = find_model(str(gguf_file), tmp_path / "cache")

    names = {path.name for path in files.directory.iterdir()}
    assert files.name == "tiny"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert files.has_tokenizer


def test_a_gguf_file_is_known_by_its_own_bytes(gguf_file: Path, tmp_path: Path) -> None:
    files = find_model(str(gguf_file), tmp_path / "cache")
    config = files.directory / "config.json"
    # Another transformers writes another config of the same file: calibrations fit all the same.
    config.write_text(config.read_text().replace("transformers_version", "other_version"))

    assert find_model(str(gguf_file), tmp_path / "cache").weights_digest == files.weights_digest

    gguf_file.write_bytes(gguf_file.read_bytes()[:-1] + b"!")
    other = find_model(str(gguf_file), tmp_path / "cache")
    assert other.weights_digest != files.weights_digest


def test_a_gguf_file_is_loaded_and_served(gguf_file: Path, tmp_path: Path) -> None:
    model = load_model(str(gguf_file), dtype="auto", device="cpu", cache_dir=tmp_path / "cache")

    assert model.spec.vocab_size == len(TOKENS)
    assert model.spec.layers[0].num_kv_heads == HEADS


def test_ranks_that_start_together_convert_once(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversions: list[Path] = []
    convert = source._convert

    def counted(parts: Sequence[Path], into: Path) -> None:
        conversions.append(into)
        convert(parts, into)

    monkeypatch.setattr(source, "_convert", counted)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: find_model(str(gguf_file), tmp_path / "cache"), range(4)))

    assert len({files.directory for files in found}) == 1
    assert len(conversions) == 1


def test_a_failed_conversion_leaves_nothing_behind(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF but no more")

    with pytest.raises(ModelUnsupported, match=r"broken\.gguf"):
        find_model(str(broken), tmp_path / "cache")

    left = [path for path in (tmp_path / "cache" / "models").iterdir() if path.is_dir()]
    assert left == []


def test_a_tokenizer_that_splits_its_own_words_is_refused(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers 5.17 makes it of Gemma 3."""
    letters = Tokenizer(BPE({token: number for number, token in enumerate(TOKENS)}, []))
    made = PreTrainedTokenizerFast(tokenizer_object=letters)  # type: ignore[no-untyped-call]
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: made)

    with pytest.raises(ModelUnsupported, match=r"tiny\.gguf that splits words into characters"):
        find_model(str(gguf_file), tmp_path / "cache")

    left = [path for path in (tmp_path / "cache" / "models").iterdir() if path.is_dir()]
    assert left == []


def test_the_digest_of_a_file_depends_on_every_byte_of_a_small_one(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(300_000))
    before = digest_files([path])
    path.write_bytes(bytes(150_000) + b"\x01" + bytes(149_999))

    assert digest_files([path]) != before


def test_a_large_file_is_sampled_up_to_its_last_byte(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(6_000_000))
    before = digest_files([path])
    path.write_bytes(bytes(5_999_999) + b"\x01")

    assert digest_files([path]) != before


def test_a_directory_is_named_whole_even_with_a_dot(tmp_path: Path) -> None:
    directory = tmp_path / "llama-3.1"
    tiny_models()["llama"]().save_pretrained(directory)

    assert find_model(str(directory)).name == "llama-3.1"


def test_a_directory_without_safetensors_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickled")

    with pytest.raises(ModelNotFound, match=r"no \.safetensors weights"):
        find_model(str(tmp_path))


def test_a_converted_tokenizer_encodes_as_the_gguf_files_own(
    gguf_file: Path, tmp_path: Path
) -> None:
    own = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    files = find_model(str(gguf_file), tmp_path / "cache")
    converted = AutoTokenizer.from_pretrained(files.directory)

    assert converted("<s>abcdab</s>").input_ids == own("<s>abcdab</s>").input_ids
