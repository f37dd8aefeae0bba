"""Pictures are PNGs of all recipes, and the table says what the report says."""

import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from kvcluster.bench.quality_plots import (
    DEPTHS,
    found_share,
    main,
    markdown_table,
    task_table,
    write_needles,
    write_pareto,
)
from kvcluster.errors import ConfigError
from kvcluster.quality.records import NeedleScore, RecallScore, Storage, TextScore
from kvcluster.quality.spans import Mean
from kvcluster.quality.stored import StoredBytes
from kvcluster.quality.sweep_records import RecipeScore, SweepReport, SweepSubject, write_report

PNG = b"\x89PNG\r\n"
SUBJECT = SweepSubject(
    model="toy",
    weights_digest="0",
    tokenizer_digest="0",
    dtype="float32",
    block_size=64,
    exact_recent_tokens=256,
    num_tokens=1000,
    first_scored=100,
    texts=(),
    documents=(),
)


def mean(value: float) -> Mean:
    return Mean(value=value, standard_error=0.25)


def score(recipe: str, encoded_bytes: int, increases: tuple[float, ...]) -> RecipeScore:
    stored = StoredBytes(num_tokens=1000, encoded_elements=8000, encoded_bytes=encoded_bytes)
    storage = Storage.of(stored)
    texts = tuple(
        TextScore(
            policy=recipe,
            text=f"text{place}",
            text_digest="0",
            num_tokens=1000,
            first_scored=100,
            exact_nll=2.0,
            nll_increase=mean(increase / 100),
            perplexity_increase_percent=mean(increase),
            kl=mean(0.0125),
            top1_agreement=mean(0.875),
            storage=storage,
            read_share=0.25 + 0.5 * (place % 2),
        )
        for place, increase in enumerate(increases)
    )
    recall = tuple(
        RecallScore(
            policy=recipe,
            document=f"document{num_tokens}",
            num_tokens=num_tokens,
            needles=tuple(
                NeedleScore(
                    key=str(place),
                    depth=place / 16,
                    is_found=place % 4 == 0,
                    is_found_by_exact=place % 2 == 0,
                )
                for place in range(16)
            ),
            num_found=4,
            num_found_by_exact=8,
            num_found_of_exact=4,
            storage=storage,
        )
        for num_tokens in (500, 1000)
    )
    return RecipeScore(policy=recipe, device="cpu", seconds=1.0, texts=texts, recall=recall)


REPORT = SweepReport(
    subject=SUBJECT,
    scores=(score("int4:windowed=exact", 4000, (1.0, 3.0)), score("int8", 8000, (-0.5, 0.25))),
)


def test_the_table_has_a_row_for_each_recipe_in_the_order_of_ratios() -> None:
    _, _, *rows = markdown_table(REPORT).splitlines()

    assert rows == [
        "| `int8` | 8 | 2.00 | 50% | -0.12 ± 0.18 % | +0.25 ± 0.25 % | 0.0125 | 87.5% | 8 of 16 |",
        "| `int4:windowed=exact` | 4 | 4.00 | 50% | +2.00 ± 0.18 % | +3.00 ± 0.25 % | 0.0125 "
        "| 87.5% | 8 of 16 |",
    ]


def test_the_table_of_a_sweep_without_texts_leaves_those_columns_out() -> None:
    report = SweepReport(subject=SUBJECT, scores=(score("int4", 4000, ()),))

    assert markdown_table(report).endswith("| - | - | - | - | 8 of 16 |")


def task(kind: str, num_found: int) -> RecallScore:
    whole = REPORT.scores[0].recall[0]
    document = f"{kind}/text/1000/0"
    return msgspec.structs.replace(whole, document=document, num_found_of_exact=num_found)


def test_tasks_have_a_table_of_their_own_and_do_not_count_as_needles() -> None:
    plain = score("int4", 4000, (1.0,))
    tasks = (task("multi-key", 3), task("multi-key", 4), task("frequent-words", 0))
    scored = msgspec.structs.replace(plain, recall=(*plain.recall, *tasks))
    report = SweepReport(subject=SUBJECT, scores=(scored,))

    assert task_table(report).splitlines() == [
        "| policy | multi-key | frequent-words |",
        "|---|---:|---:|",
        "| `int4` | 7/16 | 0/8 |",
    ]
    assert (scored.num_found_of_exact, scored.num_found_by_exact) == (8, 16)
    assert found_share(scored, [500, 1000])[:, 1].tolist() == [0.5, 0.0] * 4


def test_needles_are_counted_by_length_and_depth() -> None:
    share_DL = found_share(REPORT.scores[0], [500, 1000, 2000])

    assert share_DL.shape == (DEPTHS, 3)
    # Two needles in each row, of which the first is found in every second row.
    assert share_DL[:, 0].tolist() == [0.5, 0.0] * 4
    assert np.isnan(share_DL[:, 2]).all()
    assert found_share(REPORT.scores[0], [500, 1000], is_exact=True)[:, 1].tolist() == [0.5] * 8


def test_pictures_are_written_as_png(tmp_path: Path) -> None:
    write_pareto(tmp_path / "pareto.png", REPORT)
    write_needles(tmp_path / "needles.png", REPORT)
    write_needles(tmp_path / "one.png", REPORT, ["int8"])

    for name in ("pareto.png", "needles.png", "one.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)


def test_what_the_report_does_not_have_is_refused(tmp_path: Path) -> None:
    empty = SweepReport(subject=SUBJECT)

    with pytest.raises(ConfigError, match="no needles"):
        write_needles(tmp_path / "a.png", empty)
    with pytest.raises(ConfigError, match="measured on texts"):
        write_pareto(tmp_path / "a.png", empty)
    with pytest.raises(ConfigError, match="no policy 'int3'"):
        write_needles(tmp_path / "a.png", REPORT, ["int3"])


def test_without_matplotlib_the_command_that_installs_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)

    with pytest.raises(ConfigError, match=r"kvcluster\[plots\]"):
        write_pareto(tmp_path / "a.png", REPORT)


def test_the_command_prints_the_table_and_writes_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_report(tmp_path / "report.json", REPORT)

    main([str(tmp_path / "report.json"), "--pareto", str(tmp_path / "p.png"), "--table"])

    assert capsys.readouterr().out == markdown_table(REPORT) + "\n"
    assert (tmp_path / "p.png").exists()


def test_a_wrong_report_ends_the_command_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / "none.json")])

    assert ended.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
