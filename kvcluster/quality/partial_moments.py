"""Moments of the texts that a calibration has finished, kept beside its file until it is written.

`FILE.partial.safetensors`: the sums of `ModelMoments`, and one metadata entry, a JSON record with
the digests of the model and of the finished texts.
"""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Final

import msgspec
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kvcluster.errors import CalibrationMismatch
from kvcluster.quality.calibrating import ModelMoments

_METADATA_KEY: Final = "kvcluster.partial_calibration"


class _Header(msgspec.Struct, frozen=True, kw_only=True):
    weights_digest: str
    text_digests: tuple[str, ...]


class PartialMoments:
    """The file of one calibration that is not finished."""

    def __init__(self, calibration: Path, weights_digest: str) -> None:
        self.path = calibration.with_name(f"{calibration.name}.partial.safetensors")
        self._weights_digest = weights_digest

    def load_into(self, moments: ModelMoments, wanted: Collection[str]) -> None:
        """Add what is there; without a file, nothing. `wanted`: digests of the texts of this run.

        Raises: CalibrationMismatch for a file that is damaged, of another model or of other texts.
        """
        try:
            with safe_open(self.path, framework="pt") as file:
                text = (file.metadata() or {}).get(_METADATA_KEY, "")
                header = msgspec.json.decode(text, type=_Header)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            return
        except (OSError, SafetensorError, msgspec.DecodeError) as error:
            raise self._refused(f"cannot be read ({error})") from error
        if header.weights_digest != self._weights_digest:
            raise self._refused("is of another model")
        if not set(header.text_digests) <= set(wanted):
            raise self._refused("is of other texts, or of passes of another length")
        try:
            moments.load(tensors, header.text_digests)
        except ValueError as error:
            raise self._refused(f"is damaged ({error})") from error

    def save(self, moments: ModelMoments) -> None:
        """Replace the file once the new one is whole. Raises: OSError."""
        header = _Header(weights_digest=self._weights_digest, text_digests=moments.text_digests)
        unfinished = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        try:
            save_file(
                moments.tensors(), unfinished, {_METADATA_KEY: msgspec.json.encode(header).decode()}
            )
            unfinished.replace(self.path)
        finally:
            unfinished.unlink(missing_ok=True)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def _refused(self, reason: str) -> CalibrationMismatch:
        return CalibrationMismatch(
            f"{self.path}, which an earlier run left, {reason}: remove it, or give another --out"
        )
