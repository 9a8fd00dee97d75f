"""The arithmetic of the evidence, and the page that is made of it."""

import csv
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from bench.findings import (
    BOUND,
    Results,
    bound_of,
    deviation_of,
    gains_of,
    read,
    verdict,
)
from bench.page import table, write
from bench.protocol import BASELINE, Run, protocol_of
from kdmini import config
from tests.conftest import ROOT

# row -> AP50-95, times 100, of each seed
POINTS = {
    BASELINE: [3.0, 3.3, 2.9],
    "notes": [3.1, 3.2, 3.0],
    "sample": [4.0, 4.4, 3.9],
    "logits": [1.0, 1.1, 0.9],
    "ultralytics_alone": [5.0, 5.2, 5.1],
    "ultralytics": [5.1, 5.4, 5.4],
}


def keep(folder: Path, run: str, ap: float) -> None:
    """The texts of a run: a record before training, three epochs."""
    best = {"score/AP50-95": 0.9, "score/AP50": 0.9, "score/VOC07": 0.9}  # and not to be chosen
    last = {
        "score/AP50-95": ap,
        "score/AP50": 2 * ap,
        "score/VOC07": 3 * ap,
        "score/AP cat": 4 * ap,
        "distance/raw": 2.0,
    }
    records: list[dict[str, float]] = [
        {"epoch": -1, "distance/raw": 6.0},
        {"epoch": 0, "images/s": 50, **best},
        {"epoch": 1, "images/s": 80},
        {"epoch": 2, "images/s": 60, **last},
    ]
    (folder / run).mkdir(parents=True)
    with (folder / run / "results.csv").open("w", newline="") as file:
        columns = list(dict.fromkeys(key for record in records for key in record))
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(records)


@pytest.fixture
def results(tmp_path: Path) -> Results:
    for row, points in POINTS.items():
        for seed, value in enumerate(points):
            keep(tmp_path, f"{row}-{seed}", value / 100)
    keep(tmp_path, "sample_strong-0", 0.5)  # another row, whose name begins like one
    (tmp_path / "notes-0/check.txt").write_text("ok   KD / task gradient                 3.37%\n")
    return {row: read(tmp_path, row) for row in POINTS}


def test_the_runs_of_a_row(results: Results) -> None:
    for row, points in POINTS.items():
        runs = results[row]
        assert sorted(runs) == [0, 1, 2], row
        assert [runs[seed].last["score/AP50-95"] for seed in range(3)] == [p / 100 for p in points]


def test_what_is_read_of_a_run(results: Results) -> None:
    run = results["notes"][0]
    assert run.last["epoch"] == 2
    assert run.speed == 60  # the median of 50, 80 and 60
    assert run.ratio == pytest.approx(0.0337)
    assert results["notes"][1].ratio is None


def test_gains_are_seed_by_seed(results: Results) -> None:
    assert gains_of(results, "sample") == pytest.approx([1.0, 1.1, 1.0])
    # beside its own trainer without a teacher
    assert gains_of(results, "ultralytics") == pytest.approx([0.1, 0.2, 0.3])


def test_the_noise_is_the_mean_square_within_the_rows(results: Results) -> None:
    variances = [np.var(points, ddof=1) for points in POINTS.values()]
    assert deviation_of(results) == pytest.approx(math.sqrt(np.mean(variances)))


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ([1.1, 1.1], "helps"),
        ([-1.1, -1.1], "hurts"),
        ([0.9, 0.9], "within noise"),
        ([-0.9, -0.9], "within noise"),
        ([3.0, -1.0], "within noise"),  # the mean is 1.0, on the line
        ([5.0], ""),  # one seed says nothing
        ([], ""),
    ],
)
def test_a_verdict_by_hand(gains: list[float], expected: str) -> None:
    assert bound_of(0.4, 2) == 1.0
    assert verdict(gains, 0.4) == expected


def test_no_verdict_without_a_measure_of_the_noise() -> None:
    assert verdict([5.0, 5.0], math.nan) == ""


@pytest.mark.parametrize(
    ("row", "expected"), [("notes", "within noise"), ("sample", "helps"), ("logits", "hurts")]
)
def test_the_verdict_is_of_the_means_of_two_rows(results: Results, row: str, expected: str) -> None:
    deviation = deviation_of(results)
    bound = BOUND * deviation * math.sqrt(2 / 3)
    apart = np.mean(POINTS[row]) - np.mean(POINTS[BASELINE])
    assert (abs(apart) > bound) == (expected != "within noise")
    assert verdict(gains_of(results, row), deviation) == expected


@pytest.mark.parametrize("n", [2, 3])
def test_equal_rows_seldom_lie_beyond_the_noise(n: int) -> None:
    draws = np.random.default_rng(0).normal(7.0, 0.4, (50_000, 2, n)).mean(2)
    beyond = np.abs(draws[:, 0] - draws[:, 1]) > bound_of(0.4, n)
    # a normal deviate is beyond 2.5 of its standard deviations in 1.24 %
    assert 0.011 < beyond.mean() < 0.014


def cells_of(text: str) -> list[list[str]]:
    """The lines of its tables."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def rows_of(text: str) -> dict[str, list[str]]:
    """The first cell of each line -> the others."""
    return {name: cells for name, *cells in cells_of(text)}


def test_a_line_of_the_table(results: Results) -> None:
    rows = rows_of(table(results, "python -m bench.evidence cpu", (0, 1, 2)))
    assert rows["notes"] == [
        "3.10 ± 0.10 (n=3)",
        "6.20 ± 0.20 (n=3)",
        "9.30 ± 0.30 (n=3)",
        "+0.03 ± 0.12 (n=3)",
        "within noise",
        "3.4%",
        "2.00",
        "",
        "60",
        "`python -m bench.evidence cpu notes`",
    ]


def test_a_seed_that_was_not_planned_is_named(results: Results) -> None:
    planned = rows_of(table(results, "make", (0, 1, 2)))["notes"]
    added = rows_of(table(results, "make", (0, 1)))["notes"]
    assert planned[-1] == "`make notes`"
    assert added == [*planned[:-1], "`make notes --seeds 0 1 2`"]


def test_a_table_of_nothing_says_so(tmp_path: Path) -> None:
    write(tmp_path / "gpu", ["alone", "notes"], (0, 1, 2))
    text = (tmp_path / "gpu.md").read_text()
    assert "6 of 6 runs are yet to be made" in text
    assert "nan" not in text
    assert "not trained yet" in text
    assert not (tmp_path / "gpu.png").exists()


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_the_page_is_what_the_kept_texts_say(name: str, tmp_path: Path) -> None:
    protocol = protocol_of(name)
    kept = ROOT / "bench/evidence" / name
    if kept.exists():
        shutil.copytree(kept, tmp_path / name)
    write(tmp_path / name, list(protocol.rows), protocol.seeds)
    assert (tmp_path / f"{name}.md").read_text() == kept.with_suffix(".md").read_text()


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_the_kept_configs_are_those_of_the_protocol(name: str) -> None:
    protocol = protocol_of(name)
    overrides = {"teacher": protocol.teacher, **protocol.rows}
    for path in (ROOT / "bench/evidence" / name).glob("*/config.yaml"):
        row, _, seed = path.parent.name.rpartition("-")
        run = Run(name, row, overrides[row], int(seed))
        assert config.load(path) == run.settings(Path(f"runs/evidence/{name}")), path


@pytest.fixture
def page() -> dict[str, list[str]]:
    """Row -> cells, of the table of all classes."""
    text = (ROOT / "bench/evidence/cpu.md").read_text()
    return rows_of(text.partition("\nBy class")[0])


def test_the_table_of_the_document_is_that_of_the_page(page: dict[str, list[str]]) -> None:
    text = (ROOT / "docs/evidence.md").read_text()
    marked = text.split("<!-- evidence -->")[1].split("<!-- /evidence -->")[0]
    lines = cells_of(marked)
    assert len(lines) == len(page)
    # beyond the title and the line of dashes; the second column says what the row is
    for (name, _, *cells), row in zip(lines[2:], list(page)[2:], strict=True):
        assert name == f"`{row}`"
        assert cells == page[row][:6]


def test_the_results_of_the_terms_are_those_of_the_page(page: dict[str, list[str]]) -> None:
    results = (ROOT / "docs/terms.md").read_text().split("\n## Results")[1]
    for _, _, name, result in cells_of(results)[2:]:
        cells = page.get(name.strip("`"))
        if cells is None or cells[3] == "-":
            assert result == "", name
        else:
            gain, said = cells[3:5]
            assert result == f"{gain}, {said}", name
