"""Safetensors files that know when they were cut short or changed.

A file has one metadata entry of ours, a JSON record with a format version and a SHA-256 over that
record and all tensors, names, dtypes and shapes included.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvcluster.errors import ConfigError


class SealedHeader(Protocol):
    """What every such record has: a frozen `msgspec.Struct`."""

    @property
    def format_version(self) -> int: ...

    @property
    def digest(self) -> str:
        """SHA-256 over the record with an empty digest and over the tensors, in hex."""
        ...


HeaderT = TypeVar("HeaderT", bound=SealedHeader)


class _Version(msgspec.Struct, frozen=True):
    """The part of a record that every version has."""

    format_version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class FileKind(Generic[HeaderT]):
    """One kind of sealed file."""

    name: str
    """As messages call it: `calibration file`."""
    metadata_key: str
    format_version: int
    """Of what is written, and the only one that is read."""
    header: type[HeaderT]
    error: type[ConfigError]
    """Raised for a file that is not what it should be."""

    def write(self, path: Path, header: HeaderT, tensors: Mapping[str, Tensor]) -> None:
        """Write the file, replacing an older one only once it is whole. The header's digest is
        set here. Raises: OSError."""
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        sealed = msgspec.to_builtins(header) | {"digest": _seal(header, stored)}
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            save_file(stored, partial, {self.metadata_key: msgspec.json.encode(sealed).decode()})
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def read(self, path: Path) -> tuple[HeaderT, dict[str, Tensor]]:
        """The record and the tensors, every byte checked. Raises: `error` when the file is missing,
        truncated, edited, or of an unknown version."""
        try:
            header, tensors = self._read(path)
        except OSError as error:
            raise self.error(f"{self.name} {path} cannot be read: {error}") from error
        except (SafetensorError, msgspec.DecodeError) as error:
            raise self.error(
                f"{self.name} {path} is truncated or no {self.name} ({error})"
            ) from error
        if header.digest != _seal(header, tensors):
            raise self.error(f"{self.name} {path} was changed after it was written")
        return header, tensors

    def _read(self, path: Path) -> tuple[HeaderT, dict[str, Tensor]]:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(self.metadata_key, "")
            version = msgspec.json.decode(text, type=_Version).format_version
            if version != self.format_version:
                raise self.error(
                    f"{self.name} {path} has format version {version}, "
                    f"this kvcluster reads version {self.format_version}"
                )
            header = msgspec.json.decode(text, type=self.header)
            return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, in hex, over names, dtypes, shapes and bytes."""
    return _digest(b"", tensors)


def _seal(header: SealedHeader, tensors: Mapping[str, Tensor]) -> str:
    record = msgspec.to_builtins(header) | {"digest": ""}
    return _digest(msgspec.json.encode(record), tensors)


def _digest(start: bytes, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(start)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        # numpy has no bfloat16 and no 8-bit floats.
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
