"""What the engine asks of a tokenizer. Implemented structurally by the model layer.

Both directions are incremental: a prompt is encoded while it is uploaded, an answer is decoded
while it is generated.
"""

from typing import Protocol


class PromptEncoder(Protocol):
    """Encodes one prompt that arrives in pieces. Gives the ids of the whole text, however cut."""

    def push(self, text: str) -> list[int]:
        """The ids that can no longer change, whatever text follows; may be empty."""
        ...

    def finish(self) -> list[int]:
        """The ids of what is still held. The encoder is used up."""
        ...


class OutputDecoder(Protocol):
    """Decodes one answer token by token. The pieces joined are the text of all tokens."""

    def push(self, token_id: int) -> str:
        """The text that is now certain; empty while a character is incomplete."""
        ...

    def finish(self) -> str:
        """The text of what is still held. The decoder is used up."""
        ...


class Tokenizer(Protocol):
    """A model's tokenizer. Encoders and decoders of different requests are independent, and an
    encoder may be driven from another thread than the one that made it."""

    vocab_size: int
    digest: str
    """Changes whenever the ids of any text could change."""

    def prompt_encoder(self) -> PromptEncoder: ...

    def output_decoder(self) -> OutputDecoder: ...
