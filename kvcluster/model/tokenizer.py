"""Text to token ids while a prompt arrives, token ids to text while an answer is made.

`TextTokenizer` has the methods that `kvcluster.engine.text` asks for. Runs in any process; needs
no weights.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from kvcluster.errors import ModelUnsupported
from kvcluster.model.cuts import NO_CUTS, SafeCuts, safe_cuts
from kvcluster.model.source import LOAD_ERRORS, find_model, first_line

_INCOMPLETE: Final = "\ufffd"
"""What decoders put for bytes that are no character, or not yet one."""
_BYTE_TOKEN: Final = re.compile(r"<0x[0-9A-F]{2}>")


class TextTokenizer:
    """A model's tokenizer, immutable. Encoders and decoders of one request each come from it and
    may be used in any thread."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, digest: str) -> None:
        self.digest = digest
        self.vocab_size = len(tokenizer)
        self._tokenizer = tokenizer
        self._backend = _backend(tokenizer)
        self._framing = _framing(tokenizer)
        self._cuts = NO_CUTS
        self._skipped_ids: frozenset[int] = frozenset()
        self._byte_ids: frozenset[int] = frozenset()
        if self._backend is not None:
            added = self._backend.get_added_tokens_decoder()
            self._skipped_ids = frozenset(i for i, token in added.items() if token.special)
            vocab = self._backend.get_vocab(with_added_tokens=False)
            self._byte_ids = frozenset(i for t, i in vocab.items() if _BYTE_TOKEN.fullmatch(t))
            if self._framing is not None:
                self._cuts = safe_cuts(self._backend)

    def prompt_encoder(self) -> "PromptEncoder":
        """An encoder for one prompt: see `kvcluster.engine.text`."""
        if self._backend is None or self._framing is None:
            return WholeEncoder(self._tokenizer)
        return CuttingEncoder(self._backend, self._framing, self._cuts)

    def output_decoder(self) -> "OutputDecoder":
        """A decoder for one answer: see `kvcluster.engine.text`. Leaves out special tokens."""
        if self._backend is None or _cleans_up(self._tokenizer, self._backend):
            return WholeDecoder(self._tokenizer)
        return StreamingDecoder(self._backend, self._skipped_ids, self._byte_ids)


class CuttingEncoder:
    """Encodes up to the last safe cut, and holds the rest. Each character is encoded once."""

    def __init__(self, backend: Tokenizer, framing: "_Framing", cuts: SafeCuts) -> None:
        self._backend = backend
        self._framing = framing
        self._cuts = cuts
        self._held = ""
        self._unsent_prefix = framing.prefix

    def push(self, text: str) -> list[int]:
        """The ids that can no longer change, whatever text follows."""
        # A place needs two characters on its right, so one just before the end may be new.
        seen = max(0, len(self._held) - 2)
        self._held += text
        place = self._cuts.last(self._held, seen)
        if place is None:
            return []
        certain = self._held[:place]
        self._held = self._held[place + self._cuts.drops_space :]
        return self._encoded(certain)

    def finish(self) -> list[int]:
        """The ids of what is held. The encoder is used up."""
        rest, self._held = self._held, ""
        return [*self._encoded(rest), *self._framing.suffix]

    def _encoded(self, text: str) -> list[int]:
        prefix, self._unsent_prefix = self._unsent_prefix, ()
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return [*prefix, *ids] if prefix else ids


class WholeEncoder:
    """Holds the whole prompt: for tokenizers that cannot be understood or are plain Python."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._pieces: list[str] = []

    def push(self, text: str) -> list[int]:
        """Nothing is certain before the end."""
        self._pieces.append(text)
        return []

    def finish(self) -> list[int]:
        """The ids of the whole prompt. The encoder is used up."""
        return list(self._tokenizer("".join(self._pieces)).input_ids)


PromptEncoder = CuttingEncoder | WholeEncoder


class StreamingDecoder:
    """Gives out text as soon as no later token can change it.

    `tokenizers.DecodeStream` does not do for byte fallback: it gives out the character of a byte
    token that a following byte turns into two unreadable ones.
    """

    def __init__(
        self, backend: Tokenizer, skipped_ids: frozenset[int], byte_ids: frozenset[int]
    ) -> None:
        self._backend = backend
        self._skipped_ids = skipped_ids
        self._byte_ids = byte_ids
        self._context: list[int] = []
        """The tokens given out last: decoders treat the first token of a text differently."""
        self._context_text = ""
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that is now certain."""
        if token_id in self._skipped_ids:
            return ""
        self._held.append(token_id)
        # A run of byte tokens is text or unreadable as a whole.
        return "" if token_id in self._byte_ids else self._give_out(certain_only=True)

    def finish(self) -> str:
        """The text of what is held. The decoder is used up."""
        return self._give_out(certain_only=False)

    def _give_out(self, *, certain_only: bool) -> str:
        text: str = self._backend.decode([*self._context, *self._held], skip_special_tokens=False)
        fresh = text.removeprefix(self._context_text)
        if certain_only and (not fresh or fresh.endswith(_INCOMPLETE)):
            return ""
        self._context, self._held = self._held, []
        self._context_text = self._backend.decode(self._context, skip_special_tokens=False)
        return fresh


class WholeDecoder:
    """Holds the whole answer, for tokenizers whose decoding rewrites it in the end."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._token_ids: list[int] = []

    def push(self, token_id: int) -> str:
        """Nothing is certain before the end."""
        self._token_ids.append(token_id)
        return ""

    def finish(self) -> str:
        """The text of the whole answer. The decoder is used up."""
        return str(self._tokenizer.decode(self._token_ids, skip_special_tokens=True))


OutputDecoder = StreamingDecoder | WholeDecoder


def load_tokenizer(source: str, cache_dir: Path | None = None) -> TextTokenizer | None:
    """Load the tokenizer of a model by short name, directory or GGUF file, without its weights.

    None when the model has none: it then serves token ids only. A GGUF file is converted first,
    as `load_model` does. Raises: ModelNotFound, ModelUnsupported.
    """
    files = find_model(source, cache_dir, needs_weights=False)
    if not files.has_tokenizer:
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            files.directory, trust_remote_code=False, local_files_only=True
        )
    except LOAD_ERRORS as error:
        raise ModelUnsupported(
            f"transformers cannot load the tokenizer: {first_line(error)}"
        ) from error
    return TextTokenizer(tokenizer, files.tokenizer_digest)


@dataclass(frozen=True, slots=True)
class _Framing:
    """The special tokens around every prompt, for instance a beginning-of-sequence token."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]


def _framing(tokenizer: PreTrainedTokenizerBase) -> _Framing | None:
    """None when special tokens are added otherwise than around the text."""
    framed = tokenizer("a").input_ids
    plain = tokenizer("a", add_special_tokens=False).input_ids
    starts = [
        start
        for start in range(len(framed) - len(plain) + 1)
        if framed[start : start + len(plain)] == plain
    ]
    if len(starts) != 1:
        return None
    framing = _Framing(tuple(framed[: starts[0]]), tuple(framed[starts[0] + len(plain) :]))
    empty = tuple(tokenizer("").input_ids)
    return framing if empty == framing.prefix + framing.suffix else None


def _backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend if isinstance(backend, Tokenizer) else None


def _cleans_up(tokenizer: PreTrainedTokenizerBase, backend: Tokenizer) -> bool:
    is_bpe = type(backend.model).__name__ == "BPE"
    return bool(tokenizer.clean_up_tokenization_spaces) and not is_bpe
