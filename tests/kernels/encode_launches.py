"""Calls of the encoding kernels whose code is looked at on machines without a GPU (`launches`)."""

from collections.abc import Callable
from functools import partial

import torch

from kvcluster.bench.encode_calls import FORMATS, EncodeShape, encode_calls

_SHAPE = EncodeShape(2, 8, 128)


def _encode(name: str) -> None:
    encode_calls(name, _SHAPE, torch.device("cpu")).kernel()


LAUNCHES: dict[str, Callable[[], object]] = {name: partial(_encode, name) for name in FORMATS}
