"""Array codecs small enough to be checked by eye, and a model to run them in."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from kvcluster.codec.array import BlockShape, Plane
from kvcluster.model.loader import LoadedModel
from kvcluster.model.probe import probe
from kvcluster.model.tokenizer import TextTokenizer
from kvcluster.types import LayerGeometry, ModelSpec
from tests.architectures import VOCAB_SIZE, tiny_models


@dataclass(frozen=True)
class Same:
    """Loses nothing."""

    def planes(self, shape: BlockShape) -> tuple[Plane, ...]:
        return (Plane("x", tuple(shape), torch.float32),)

    def encode(self, x_BKSD: Tensor, positions_BS: Tensor) -> tuple[Tensor, ...]:
        return (x_BKSD.float().contiguous(),)

    def decode(self, planes: Sequence[Tensor], positions_BS: Tensor) -> Tensor:
        return planes[0].clone()


@dataclass(frozen=True)
class Coarse:
    """Whole numbers, shifted by each token's place so that a wrong place shows."""

    def planes(self, shape: BlockShape) -> tuple[Plane, ...]:
        return (Plane("x", tuple(shape), torch.int8),)

    def encode(self, x_BKSD: Tensor, positions_BS: Tensor) -> tuple[Tensor, ...]:
        return ((x_BKSD.float() + _shift(positions_BS)).round().to(torch.int8),)

    def decode(self, planes: Sequence[Tensor], positions_BS: Tensor) -> Tensor:
        return planes[0].float() - _shift(positions_BS)


@dataclass(frozen=True)
class Undeclared(Coarse):
    """Writes other planes than it says."""

    def planes(self, shape: BlockShape) -> tuple[Plane, ...]:
        return (Plane("x", (shape.num_heads, 1), torch.int8),)


def spec_of(*layers: LayerGeometry) -> ModelSpec:
    return ModelSpec(
        name="toy",
        layers=layers,
        vocab_size=VOCAB_SIZE,
        max_context_tokens=512,
        eos_token_ids=(2,),
        dtype="float32",
        bytes_per_element=4,
        weights_digest="0",
        tokenizer_digest="0",
    )


def tiny_model(name: str) -> LoadedModel:
    module = tiny_models()[name]()
    return LoadedModel(spec=spec_of(*probe(module)), module=module, device=torch.device("cpu"))


def character_tokenizer() -> TextTokenizer:
    """One token for each ASCII character, after a token that begins every prompt. Its ids are
    those of a tiny model."""
    alphabet = sorted(
        char
        for char in pre_tokenizers.ByteLevel.alphabet()
        if char <= "~" or "\u0100" <= char <= "\u0120"
    )
    vocab = {"<bos>": 0} | {char: place for place, char in enumerate(alphabet, start=1)}
    backend = Tokenizer(BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return TextTokenizer(
        PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>"), "digest"
    )


def _shift(positions_BS: Tensor) -> Tensor:
    return 0.01 * positions_BS[:, None, :, None].float()
