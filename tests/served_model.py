"""Tiny random models as an engine serves them, under the name `tiny`."""

from functools import cache

import torch

from kvcluster.model.loader import LoadedModel
from kvcluster.model.probe import probe
from kvcluster.types import ModelSpec
from tests.architectures import VOCAB_SIZE, tiny_models


@cache
def served_model(architecture: str = "gemma2") -> LoadedModel:
    """One of `tiny_models`, without a tokenizer and without an end of sequence."""
    module = tiny_models()[architecture]()
    spec = ModelSpec(
        name="tiny",
        layers=probe(module),
        vocab_size=VOCAB_SIZE,
        max_context_tokens=512,
        eos_token_ids=(),
        dtype="float32",
        bytes_per_element=4,
        weights_digest="test",
        tokenizer_digest="",
    )
    return LoadedModel(spec=spec, module=module, device=torch.device("cpu"))
