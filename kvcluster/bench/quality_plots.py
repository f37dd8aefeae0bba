"""Pictures and the table of a sweep of recipes: what they cost against what they save.

    python -m kvcluster.bench.quality_plots REPORT.json --pareto OUT.png --needles OUT.png --table

Needs matplotlib (`pip install kvcluster[plots]`), which is imported when a picture is asked for.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from kvcluster.bench.quality_settings import found_of_exact
from kvcluster.errors import ConfigError, KvClusterError
from kvcluster.quality.spans import Mean
from kvcluster.quality.sweep_records import RecipeScore, SweepReport, read_report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DEPTHS: Final = 8
"""Rows of a heat map."""
_PANELS_PER_ROW: Final = 4
_LINEAR_PERCENT: Final = 1.0
"""Perplexity is drawn linearly up to here and by its logarithm beyond."""
_PERCENT_TICKS: Final = (0, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 50, 100, 1000)


def write_pareto(path: Path, report: SweepReport) -> None:
    """Write a PNG: ratio to the right, rise of perplexity upwards, recall as colour; low and right
    is good. Recipes are numbered, and listed beside the plot.

    Raises: ConfigError when matplotlib is missing or no recipe was measured on texts.
    """
    scores = sorted(
        (score for score in report.scores if score.texts), key=lambda score: score.storage.ratio
    )
    if not scores:
        raise ConfigError("plots: no recipe of the report was measured on texts")
    figure = _figure(15, max(7.0, 1.5 + 0.23 * len(scores)))
    grid = figure.add_gridspec(1, 2, width_ratios=(4, 3))
    axes, listing = figure.add_subplot(grid[0]), figure.add_subplot(grid[1])
    points = axes.scatter(
        [score.storage.ratio for score in scores],
        [_mean(score).value for score in scores],
        c=[_share_found(score) for score in scores],
        cmap="RdYlGn",
        vmin=0,
        vmax=1,
        s=60,
        edgecolors="black",
        linewidths=0.6,
        zorder=3,
    )
    for number, score in enumerate(scores, start=1):
        mean = _mean(score)
        axes.errorbar(
            score.storage.ratio, mean.value, yerr=mean.standard_error, color="grey", capsize=2
        )
        axes.annotate(
            str(number),
            (score.storage.ratio, mean.value),
            xytext=(6, 5),
            textcoords="offset points",
            fontsize=8,
        )
    _dress_pareto(axes, [score.storage.ratio for score in scores], report)
    figure.colorbar(
        points,
        ax=axes,
        location="bottom",
        shrink=0.6,
        aspect=40,
        label="needles found, of those that the exact cache finds",
    )
    _list(listing, scores)
    figure.savefig(path, dpi=120)


def write_needles(path: Path, report: SweepReport, recipes: Sequence[str] = ()) -> None:
    """Write a PNG with a panel for each recipe (empty: all), and one for the exact cache: share of
    the needles found, by length of the document and depth of the needle.

    Raises: ConfigError when matplotlib is missing, a recipe is not in the report, or it has no
    needles.
    """
    chosen = _chosen(report, recipes)
    lengths = sorted({document.num_tokens for score in chosen for document in score.needles})
    if not lengths:
        raise ConfigError("plots: the report has no needles")
    panels = [("exact cache", found_share(chosen[0], lengths, is_exact=True))]
    panels += [(score.policy, found_share(score, lengths)) for score in chosen]
    num_columns = min(len(panels), _PANELS_PER_ROW)
    num_rows = -(-len(panels) // num_columns)
    figure = _figure(1.0 + 3.4 * num_columns, 0.8 + 2.9 * num_rows)
    drawn: list[Axes] = []
    image = None
    for place, (name, share_DL) in enumerate(panels, start=1):
        axes = figure.add_subplot(num_rows, num_columns, place)
        image = axes.imshow(share_DL, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
        _dress_panel(axes, name, lengths, is_first=(place - 1) % num_columns == 0)
        drawn.append(axes)
    assert image is not None
    figure.colorbar(image, ax=drawn, label="share of needles found", shrink=0.8)
    figure.suptitle(f"{report.subject.model}: needles found, by length and depth")
    figure.savefig(path, dpi=120)


def found_share(
    score: RecipeScore, lengths: Sequence[int], *, is_exact: bool = False
) -> NDArray[np.float64]:
    """Share of needles found, [depth, length], NaN where there is none."""
    found = np.zeros((DEPTHS, len(lengths)))
    asked = np.zeros((DEPTHS, len(lengths)))
    for document in score.needles:
        column = lengths.index(document.num_tokens)
        for needle in document.needles:
            row = min(int(needle.depth * DEPTHS), DEPTHS - 1)
            asked[row, column] += 1
            found[row, column] += needle.is_found_by_exact if is_exact else needle.is_found
    return np.divide(found, asked, out=np.full_like(found, np.nan), where=asked > 0)


def markdown_table(report: SweepReport) -> str:
    """A row for each recipe, in the order of ratios."""
    rows = [
        "| policy | bytes/token | ratio | keys read | perplexity increase, mean ± s.e. "
        "| worst text | KL | top-1 | needles found of exact's |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for score in sorted(report.scores, key=lambda score: score.storage.ratio):
        worst = score.worst_text
        rows.append(
            f"| `{score.policy}` "
            f"| {score.storage.bytes_per_token:,.0f} | {score.storage.ratio:.2f} "
            f"| {score.read_share:.0%} "
            f"| {_percent(score.perplexity_increase_percent)} "
            f"| {'-' if worst is None else _percent(worst.perplexity_increase_percent)} "
            f"| {'-' if score.kl is None else f'{score.kl.value:.4f}'} "
            f"| {'-' if score.top1_agreement is None else f'{score.top1_agreement.value:.1%}'} "
            f"| {score.num_found_of_exact} of {score.num_found_by_exact} |"
        )
    return "\n".join(rows)


def task_table(report: SweepReport) -> str:
    """A row for each recipe, a column for each task: answers found, of those that exact finds."""
    kinds = list(dict.fromkeys(task.kind for score in report.scores for task in score.tasks))
    rows = [f"| policy | {' | '.join(kinds)} |", "|---|" + "---:|" * len(kinds)]
    for score in sorted(report.scores, key=lambda score: score.storage.ratio):
        cells = (
            found_of_exact([task for task in score.tasks if task.kind == kind]) for kind in kinds
        )
        rows.append(f"| `{score.policy}` | {' | '.join(cells)} |")
    return "\n".join(rows)


def _dress_pareto(axes: "Axes", ratios: Sequence[float], report: SweepReport) -> None:
    axes.set_xscale("log", base=2)
    ticks = [
        tick for tick in (1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32) if tick < 2 * max(ratios)
    ]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.set_xlim(min(ratios) / 1.1, max(ratios) * 1.15)
    axes.set_yscale("symlog", linthresh=_LINEAR_PERCENT)
    limits = axes.get_ylim()
    axes.set_yticks(_PERCENT_TICKS, [f"{tick:g}" for tick in _PERCENT_TICKS])
    axes.set_ylim(*limits)
    axes.axhline(_LINEAR_PERCENT, color="grey", linewidth=0.8, linestyle=":")
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.grid(alpha=0.3)
    subject = report.subject
    axes.set_xlabel("size of a bfloat16 cache over this one")
    axes.set_ylabel("perplexity increase, %")
    axes.set_title(f"{subject.model}, {len(subject.texts)} texts of {subject.num_tokens:,} tokens")


def _list(axes: "Axes", scores: Sequence[RecipeScore]) -> None:
    axes.set_axis_off()
    lines = [f"{'':>3} {'ratio':>6} {'ppl %':>7}  policy"]
    lines += [
        f"{number:>3} {score.storage.ratio:>5.2f}x {_mean(score).value:>+7.2f}  "
        f"{_short(score.policy, 66)}"
        for number, score in enumerate(scores, start=1)
    ]
    axes.text(
        0, 1, "\n".join(lines), family="monospace", fontsize=7.5, va="top", linespacing=1.45,
        transform=axes.transAxes,
    )  # fmt: skip


def _dress_panel(axes: "Axes", name: str, lengths: Sequence[int], *, is_first: bool) -> None:
    # Policies have no blanks inside a method: they are broken after commas.
    lines = wrap(name.replace(",", ", "), 42)
    axes.set_title("\n".join(lines).replace(", ", ","), fontsize=8)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=7)
    marks = (-0.5, DEPTHS / 2 - 0.5, DEPTHS - 0.5)
    axes.set_yticks(marks, ["start", "middle", "end"] if is_first else [""] * 3, fontsize=7)


def _short(name: str, num_characters: int) -> str:
    return name if len(name) <= num_characters else f"{name[: num_characters - 3]}..."


def _chosen(report: SweepReport, recipes: Sequence[str]) -> list[RecipeScore]:
    scores = {score.policy: score for score in report.scores}
    for recipe in recipes:
        if recipe not in scores:
            raise ConfigError(f"plots: the report has no policy {recipe!r}")
    chosen = [scores[recipe] for recipe in recipes or scores if scores[recipe].needles]
    if not chosen:
        raise ConfigError("plots: the report has no needles")
    return chosen


def _mean(score: RecipeScore) -> Mean:
    mean = score.perplexity_increase_percent
    assert mean is not None
    return mean


def _share_found(score: RecipeScore) -> float:
    """NaN, which has no colour, where the exact cache finds none."""
    return float("nan") if score.recall_share is None else score.recall_share


def _percent(mean: Mean | None) -> str:
    if mean is None:
        return "-"
    error = "" if mean.standard_error is None else f" ± {mean.standard_error:.2f}"
    return f"{mean.value:+.2f}{error} %"


def _figure(width: float, height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure  # an extra: not everybody has it
    except ImportError as error:
        raise ConfigError(
            "plots: matplotlib is not installed: run pip install 'kvcluster[plots]'"
        ) from error
    options: dict[str, Any] = {"figsize": (width, height), "layout": "constrained"}
    return Figure(**options)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Exits with 2 and one line for a wrong setting."""
    parser = argparse.ArgumentParser(prog="python -m kvcluster.bench.quality_plots")
    parser.add_argument("report", type=Path)
    parser.add_argument("--pareto", type=Path, help="PNG to write")
    parser.add_argument("--needles", type=Path, help="PNG to write")
    parser.add_argument("--policy", action="append", default=[], help="a panel of --needles")
    parser.add_argument("--table", action="store_true", help="Markdown on stdout")
    given = parser.parse_args(arguments)
    try:
        report = read_report(given.report)
        if given.pareto is not None:
            write_pareto(given.pareto, report)
        if given.needles is not None:
            write_needles(given.needles, report, given.policy)
    except KvClusterError as error:
        sys.stderr.write(f"quality_plots: {error.message}\n")
        raise SystemExit(2) from error
    if given.table:
        sys.stdout.write(markdown_table(report) + "\n")
        if any(score.tasks for score in report.scores):
            sys.stdout.write("\n" + task_table(report) + "\n")


if __name__ == "__main__":
    main()
