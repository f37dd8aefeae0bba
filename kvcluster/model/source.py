"""Where a model's files are. A GGUF file is converted once into a directory in the cache, which
all ranks of a machine then map into memory."""

import fcntl
import hashlib
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedTokenizerBase,
)

from kvcluster.errors import ModelNotFound, ModelUnsupported
from kvcluster.model.packages import PACKAGED_MODELS, gguf_parts

DEFAULT_CACHE_DIR: Final = Path("~/.cache/kvcluster")

LOAD_ERRORS: Final = (
    ValueError,
    OSError,
    ImportError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    struct.error,
    SafetensorError,
    StrictDataclassError,
)
"""What transformers raises when a model's files are not as it expects."""

_CONVERSION: Final = 2
"""Version of what `_convert` writes. Another number is another directory."""
_SAMPLE_BYTES: Final = 64 * 1024
_SAMPLES_PER_FILE: Final = 64
_SAMPLED_TOKENS: Final = 4096
_LEAST_WHOLE: Final = 0.1
"""Share of a vocabulary's words that come back as one token; of good tokenizers over a half do."""
_TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFiles:
    """A model on this machine, as config, safetensors and perhaps a tokenizer."""

    name: str
    directory: Path
    weights_digest: str
    tokenizer_digest: str
    """Empty: there is no tokenizer."""

    @property
    def has_tokenizer(self) -> bool:
        return bool(self.tokenizer_digest)


def find_model(
    source: str, cache_dir: Path | None = None, *, needs_weights: bool = True
) -> ModelFiles:
    """Find a model by short name, directory or GGUF file; convert it where that is needed.

    Conversion happens once: it takes seconds to minutes and 4 bytes of `cache_dir` a weight, and
    other processes that want the same model wait for it. `needs_weights`: a directory without any
    is no model. Raises: ModelNotFound, ModelUnsupported.
    """
    path = Path(source).expanduser()
    parts: tuple[Path, ...] = ()
    if source in PACKAGED_MODELS:
        parts = gguf_parts(source)
        directory = _converted(source, parts, cache_dir or DEFAULT_CACHE_DIR)
    elif path.suffix == ".gguf" and path.is_file():
        parts = (path,)
        directory = _converted(path.stem, parts, cache_dir or DEFAULT_CACHE_DIR)
    elif (path / "config.json").is_file():
        directory = path
    else:
        raise ModelNotFound(
            f"no model {source!r}: give a directory with config.json, a .gguf file, or one of "
            f"{', '.join(sorted(PACKAGED_MODELS))}"
        )
    weights = sorted(directory.glob("*.safetensors"))
    if needs_weights and not weights:
        raise ModelNotFound(f"{directory} has no .safetensors weights")
    return ModelFiles(
        name=source if source in PACKAGED_MODELS else _display_name(path),
        directory=directory,
        # What a GGUF file becomes says which transformers made it of the same weights.
        weights_digest=digest_files(parts or [*weights, directory / "config.json"]),
        tokenizer_digest=_tokenizer_digest(directory),
    )


def _display_name(path: Path) -> str:
    whole = path.resolve()
    return whole.name if whole.is_dir() else whole.stem


def first_line(error: BaseException) -> str:
    """The first line of an error's message: those of transformers go on for pages."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def digest_files(paths: Sequence[Path]) -> str:
    """Tells files apart by name, size and 64 samples of 64 KiB spread over each, ends included.

    Files up to 4 MiB are read whole. So two models that differ everywhere, as trained ones do,
    have different digests, and the cost does not grow with the model; it is no protection against
    somebody who forges a model.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size};".encode())
        last = max(0, size - _SAMPLE_BYTES)
        whole = range(0, max(size, 1), _SAMPLE_BYTES)
        spread = [last * index // (_SAMPLES_PER_FILE - 1) for index in range(_SAMPLES_PER_FILE)]
        with path.open("rb") as file:
            for offset in whole if len(whole) <= _SAMPLES_PER_FILE else spread:
                file.seek(offset)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _tokenizer_digest(directory: Path) -> str:
    names = [name for name in _TOKENIZER_FILES if (directory / name).is_file()]
    if not {"tokenizer.json", "tokenizer.model", "vocab.json"} & set(names):
        return ""
    return digest_files([directory / name for name in names])


def _converted(name: str, parts: Sequence[Path], cache_dir: Path) -> Path:
    models = cache_dir.expanduser() / "models"
    models.mkdir(parents=True, exist_ok=True)
    final = models / f"{name}-{digest_files(parts)}-f{_CONVERSION}"
    if final.is_dir():
        return final
    with _exclusive(final.with_name(final.name + ".lock")):
        # Another process may have converted it while this one waited.
        if not final.is_dir():
            unfinished = Path(tempfile.mkdtemp(dir=models, prefix=f".{name}-"))
            try:
                _convert(parts, unfinished)
                unfinished.rename(final)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return final


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Hold a lock that the operating system drops when this process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _convert(parts: Sequence[Path], into: Path) -> None:
    """Write a GGUF file as float32 safetensors, config and tokenizer.

    float32 because it holds every dequantised weight exactly, and because a CPU rank, which
    computes in float32, can then use the mapped file as it is.
    """
    with tempfile.TemporaryDirectory(dir=into) as folder:
        whole = parts[0]
        if len(parts) > 1:
            whole = Path(folder) / "model.gguf"
            with whole.open("wb") as target:
                for part in parts:
                    with part.open("rb") as piece:
                        shutil.copyfileobj(piece, target, 1 << 20)
        where = os.fspath(whole.parent)
        try:
            model = AutoModelForCausalLM.from_pretrained(
                where,
                gguf_file=whole.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
            )
            tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=whole.name)
        except LOAD_ERRORS as error:
            raise ModelUnsupported(
                f"transformers cannot read {whole.name}: {first_line(error)}"
            ) from error
        _check_joined(tokenizer, whole.name)
        # save_pretrained refuses a model that still says it is quantised.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(into)
        tokenizer.save_pretrained(into)


def _check_joined(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raises: ModelUnsupported for a tokenizer that splits its own words into characters, which is
    what some versions of transformers (5.17) make of some files (Gemma 3), without a word."""
    step = max(1, len(tokenizer) // _SAMPLED_TOKENS)
    are_whole = []
    for number in range(0, len(tokenizer), step):
        text = str(tokenizer.decode([number]))
        if len(text) > 1 and text.isascii() and text.strip().isalpha():
            are_whole.append(tokenizer.encode(text, add_special_tokens=False) == [number])
    if sum(are_whole) < _LEAST_WHOLE * len(are_whole):
        raise ModelUnsupported(
            f"transformers {transformers.__version__} makes a tokenizer of {name} that splits "
            "words into characters: install another version (5.23 reads Gemma 3), or give a "
            "directory"
        )
