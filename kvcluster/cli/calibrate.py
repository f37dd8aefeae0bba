"""`kvcluster calibrate`: fits a model's latent bases, measures recipes, writes the file of both."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvcluster.cli.exits import exiting, print_json
from kvcluster.config import CacheConfig
from kvcluster.errors import ConfigError

if TYPE_CHECKING:
    from kvcluster.quality.calibration_run import CalibrationReport, CalibrationSettings

_CACHE = CacheConfig()


def calibrate(
    *,
    model: Annotated[str, typer.Option(help="Short name, directory or GGUF file.")],
    out: Annotated[
        Path, typer.Option(help="File to write, for `kvcluster serve --set calibration=FILE`.")
    ],
    data: Annotated[
        list[Path] | None,
        typer.Option(help="UTF-8 text to fit to; repeatable. Default: texts of Python packages."),
    ] = None,
    policy: Annotated[
        list[str] | None, typer.Option(help="To measure; repeatable. Default: a dozen.")
    ] = None,
    fisher: Annotated[
        int,
        typer.Option(
            min=0,
            help="Texts on which directions are ordered by what losing them costs the predictions "
            "(Fisher information), 64 or so; 0: by what it costs each layer. Wants a GPU.",
        ),
    ] = 0,
    refine: Annotated[
        list[str] | None,
        typer.Option(
            help="A policy with latents whose bases are trained by distillation, and measured; "
            "repeatable. Wants a GPU: minutes there, hours on a CPU."
        ),
    ] = None,
    refine_steps: Annotated[
        int, typer.Option(min=1, help="Of training, for each --refine: a text each.")
    ] = 300,
    tokens: Annotated[
        int | None, typer.Option(help="Of each pass. Default: the model's context, at most 4096.")
    ] = None,
    documents: Annotated[int, typer.Option(min=0, help="With needles, of each style.")] = 2,
    layers: Annotated[
        list[int] | None,
        typer.Option(help="Neighbouring layers that may share latents; repeatable. Default: none."),
    ] = None,
    block_size: Annotated[int, typer.Option(help="As it is served.")] = _CACHE.block_size,
    exact_recent: Annotated[
        int, typer.Option(help="Latest tokens that are read exact, as it is served.")
    ] = _CACHE.exact_recent_tokens,
    device: Annotated[str, typer.Option(help="cpu, cuda ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="One object on stdout.")] = False,
) -> None:
    """Calibrate a model, once. A run that was broken off goes on when it is started again."""
    with exiting(as_json=as_json):
        if not out.parent.is_dir():
            raise ConfigError(f"--out: no folder {out.parent}")
        if out.is_dir():
            raise ConfigError(f"--out: {out} is a folder, want a file")
        contents = [_content(path) for path in data or ()]
        # Only here, so that --help and usage errors come without waiting for torch.
        from kvcluster.quality.calibration_run import CalibrationSettings
        from kvcluster.quality.distillation import DistillationSettings

        settings = CalibrationSettings(
            out=out,
            policies=tuple(policy or ()),
            num_fisher=fisher,
            refine=tuple(refine or ()),
            distillation=DistillationSettings(num_steps=refine_steps),
            num_tokens=tokens,
            num_documents=documents,
            joined=tuple(layers or ()),
            block_size=block_size,
            exact_recent_tokens=exact_recent,
        )
        report = _run(model, contents, settings, device=device, dtype=dtype)
        if as_json:
            print_json(report)
        else:
            _print(report, out)


def _run(
    source: str,
    contents: Sequence[str],
    settings: "CalibrationSettings",
    *,
    device: str,
    dtype: str,
) -> "CalibrationReport":
    from rich.console import Console

    from kvcluster.cli.calibration_bar import CalibrationBar
    from kvcluster.model.loader import load_model
    from kvcluster.model.tokenizer import load_tokenizer
    from kvcluster.quality.calibration_run import calibrate as run
    from kvcluster.quality.texts import load_texts

    model = load_model(source, dtype=dtype, device=device)
    tokenizer = load_tokenizer(source)
    if tokenizer is None:
        raise ConfigError(f"model {source} has no tokenizer to read texts with")
    texts = load_texts()
    asked = {"directions": settings.num_fisher > 0, "refinement": bool(settings.refine)}
    stages = ("texts", *(stage for stage, is_asked in asked.items() if is_asked), "recipes")
    with CalibrationBar(Console(stderr=True), stages) as bar:
        try:
            return run(model, tokenizer, texts, settings, bar.show, contents=contents)
        except OSError as error:
            raise ConfigError(f"--out: {settings.out} cannot be written: {error}") from error


def _content(path: Path) -> str:
    try:
        content = path.read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"--data: {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--data: {path}: want UTF-8, byte {error.start} is not") from error
    if not content.strip():
        raise ConfigError(f"--data: {path} is empty")
    return content


def _print(report: "CalibrationReport", out: Path) -> None:
    from kvcluster.quality.recipe_table import dominated

    typer.echo(
        f"{report.model}: fitted to {report.num_calibration_tokens:,} tokens; recipes measured on "
        f"{', '.join(report.measured_on)} ({report.num_tokens:,} tokens each) and "
        f"{report.num_needles} needles"
    )
    for refined in report.refinements:
        typer.echo(
            f"refined {refined.codec}: divergence {refined.divergence_before:.5f} -> "
            f"{refined.divergence_after:.5f} on held-out texts"
            f"{'' if refined.is_kept else ', so the fitted bases stay'}"
        )
    rows = zip(report.recipes, dominated(report.recipes), strict=True)
    typer.echo(f"{'ratio':>7} {'perplexity':>18} {'recall':>7}  policy")
    for recipe, is_dominated in sorted(rows, key=lambda row: row[0].ratio):
        increase = f"{recipe.perplexity_increase:+.2%} ± {recipe.perplexity_error:.2%}"
        mark = "  (dominated)" if is_dominated else ""
        recall = f"{recipe.recall:.1%}" if report.num_needles else "-"
        typer.echo(f"{recipe.ratio:>6.2f}x {increase:>18} {recall:>7}  {recipe.policy}{mark}")
    typer.echo(f"written to {out}: kvcluster serve --set calibration={out}")
