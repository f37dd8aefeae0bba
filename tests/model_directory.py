"""A tiny model on disk, with a tokenizer of one token for each printable ASCII character."""

from pathlib import Path

from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.architectures import tiny_models


def write_tiny_model(directory: Path, name: str = "llama") -> None:
    tiny_models()[name]().save_pretrained(directory)
    alphabet = [chr(code) for code in range(33, 127)] + ["\u0120", "\u010a"]
    backend = Tokenizer(
        BPE(vocab={"<s>": 0} | {char: 3 + place for place, char in enumerate(alphabet)}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>").save_pretrained(directory)
