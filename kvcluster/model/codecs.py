"""The codecs of a loaded model: with a calibration file, those that were fitted to it too."""

from pathlib import Path

import msgspec
import torch

from kvcluster.codec.calibration import Calibration, read_calibration
from kvcluster.codec.method import CodecModel
from kvcluster.codec.model_codecs import ModelCodecs
from kvcluster.config import CacheConfig
from kvcluster.errors import CalibrationMismatch
from kvcluster.model.loader import LoadedModel
from kvcluster.model.rotary import check_rotary, read_rotary
from kvcluster.policy_bounds import MeasuredRecipe, MeasuredTable
from kvcluster.types import ModelSpec


def load_codecs(model: LoadedModel, calibration: str) -> ModelCodecs:
    """Codecs that encode on the model's device. `calibration`: path of a file; empty: none.

    Raises: CalibrationMismatch for a file of another model; ModelUnsupported where the model's
    keys cannot be had as they were before rotation.
    """
    spec, device = model.spec, model.device
    if not calibration:
        return ModelCodecs(CodecModel(spec=spec, device=device))
    rotations = read_rotary(model.module, spec.layers)
    check_rotary(model.module, rotations)
    return ModelCodecs(
        CodecModel(
            spec=spec,
            device=device,
            calibration=calibration_for(spec, calibration),
            rotations=rotations,
        )
    )


def codec_layouts(spec: ModelSpec, calibration: Calibration | None) -> ModelCodecs:
    """The same without the model: enough to know what blocks take, not to encode."""
    return ModelCodecs(CodecModel(spec=spec, device=torch.device("cpu"), calibration=calibration))


def measured_table(calibration: Calibration) -> MeasuredTable:
    """What was measured with the calibration. Raises: CalibrationMismatch."""
    try:
        found: MeasuredTable | tuple[MeasuredRecipe, ...] = msgspec.json.decode(
            calibration.recipes_json, type=MeasuredTable | tuple[MeasuredRecipe, ...]
        )
    except msgspec.MsgspecError as error:
        raise CalibrationMismatch(
            f"the calibration file's table cannot be read: {error}"
        ) from error
    if isinstance(found, MeasuredTable):
        return found
    # Of a file from before tables said so: calibrations cut the cache as it is served by default.
    default = CacheConfig()
    return MeasuredTable(
        block_size=default.block_size,
        exact_recent_tokens=default.exact_recent_tokens,
        recipes=found,
    )


def table_mismatch(table: MeasuredTable, cache: CacheConfig) -> str:
    """Why what was measured says nothing of a cache that is cut like this; empty: it does."""
    exact_blocks = -(-table.exact_recent_tokens // table.block_size)
    if (table.block_size, exact_blocks) == (cache.block_size, cache.exact_recent_blocks):
        return ""
    return (
        f"the calibration was measured in blocks of {table.block_size} tokens with the latest "
        f"{table.exact_recent_tokens} exact, and the cache has blocks of {cache.block_size} with "
        f"{cache.exact_recent_tokens}: serve with --set cache.block_size={table.block_size} --set "
        f"cache.exact_recent_tokens={table.exact_recent_tokens}, or calibrate with --block-size "
        f"{cache.block_size} --exact-recent {cache.exact_recent_tokens}"
    )


def calibration_for(spec: ModelSpec, path: str) -> Calibration:
    """The calibration of a model. Raises: CalibrationMismatch."""
    calibration = read_calibration(Path(path), spec.weights_digest)
    widths = [
        (layer.num_kv_heads * layer.key_dim, layer.num_kv_heads * layer.value_dim)
        for layer in (spec.layers[index] for index in spec.storing_layers)
    ]
    fitted = [(len(layer.keys.mean_F), len(layer.values.mean_F)) for layer in calibration.layers]
    if fitted != widths:
        raise CalibrationMismatch(
            f"calibration file {path} is of {len(fitted)} layers with other heads than the "
            f"{len(widths)} of this model"
        )
    return calibration
