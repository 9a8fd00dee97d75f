"""The evidence: which runs are made, that they go on where they were, and the arithmetic of the
table.
"""

import csv
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

import eval as eval_script
import train
from bench import evidence
from bench.evidence import ByClass, Sample, main, protocol_of, schedules, settings_of
from bench.findings import (
    BASELINE,
    BOUND,
    PEER,
    TEACHER,
    bound_of,
    deviation_of,
    gain,
    read,
    table,
    verdict,
    write,
)
from kdmini import config
from kdmini.contracts import UserError
from kdmini.detection.voc import VOC, VOC_NAMES
from kdmini.detection.yolo11.model import YOLO11
from kdmini.distill.schedule import check_segments, piecewise_linear
from tests.conftest import CONFIG, ROOT, TINY

NAMES = ["circle", "square", "triangle", "star", "ring", "cross"]


class Generous(ByClass):
    """A teacher of two epochs detects nothing, which --check would rightly refuse."""

    left = 0  # evaluations before somebody stops the program

    def compute(self) -> dict[str, float]:
        Generous.left -= 1
        if Generous.left < 0:
            raise KeyboardInterrupt
        return {name: score + 0.01 for name, score in super().compute().items()}


def test_a_sample_is_evenly_spaced(shapes: Path, tmp_path: Path) -> None:
    root = tmp_path / "shapes"
    shutil.copytree(shapes, root)
    split = root / "ImageSets/Main/few.txt"
    split.write_text(
        "".join((split.parent / "train.txt").read_text().splitlines(keepends=True)[:7])
    )
    everything = [record.id for record in VOC(str(root), ["few"], NAMES).records]
    found = Sample(str(root), ["few"], 3, NAMES)
    assert [record.id for record in found.records] == [everything[0], everything[2], everything[4]]
    assert len(found.photographs) == 3
    for count in (0, 8):
        with pytest.raises(UserError, match=f"data.train.count: {count} .* there are 7"):
            Sample(str(root), ["few"], count, NAMES)


def test_the_other_schedules_have_the_mean_of_the_notes() -> None:
    def mean(segments: list[list[float]], epochs: int) -> float:
        return float(np.mean([piecewise_linear(segments, epoch + 0.5) for epoch in range(epochs)]))

    notes = [[0, 2.0, 40, 0.0], [40, 0.3, 100, 0.0], [100, 0.05, math.inf, 0.05]]
    for name, segments in schedules(60).items():
        check_segments(segments)
        assert mean(segments, 60) == pytest.approx(mean(notes, 150), rel=0.01), name
    assert (
        piecewise_linear(schedules(60)["mosaic"], 49)
        > 0
        == piecewise_linear(schedules(60)["mosaic"], 50)
    )


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_every_row_is_a_run_that_can_be_built(name: str) -> None:
    student, teacher = (YOLO11(names=VOC_NAMES, scale=[0.5, 0.125, 1024]) for _ in range(2))
    seen = []
    for row, overrides in protocol_of(name).rows.items():
        settings = settings_of(name, overrides, row, 1, Path("runs"))
        assert (settings["seed"], settings["run"]) == (1, f"runs/{row}-1")
        built, used = settings["distill"] or {"taps": []}, teacher if settings["teacher"] else None
        config.call(
            train.make_distillation, built, "distill", student=student, teacher=used, imgsz=128
        )
        seen.append({**settings, "run": ""})
    assert all(seen.count(settings) == 1 for settings in seen)  # no two rows are the same


def test_the_row_of_the_notes_is_what_the_notes_say() -> None:
    for name in ("cpu", "gpu"):
        assert protocol_of(name).rows["notes"] == []
        notes = config.load(ROOT / "configs/voc.yaml")["distill"]
        found = config.load(ROOT / f"bench/evidence/{name}.yaml")
        (_, a, b, c), (_, d, e, f), (_, g, _, h) = notes["attention"].pop("schedule")
        first, second = (round(epoch * found["train"]["epochs"] / 150) for epoch in (b, e))
        scaled = [[0, a, first, c], [first, d, second, f], [second, g, math.inf, h]]
        assert found["distill"]["attention"].pop("schedule") == scaled
        assert found["distill"] == notes


def test_runs_go_on_and_are_made_once(
    shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(shapes, tmp_path / "set")
    for path in (tmp_path / "set/Annotations").iterdir():  # shapes under names of VOC
        text = path.read_text()
        for shape, name in zip(NAMES, VOC_NAMES, strict=False):
            text = text.replace(f"<name>{shape}</name>", f"<name>{name}</name>")
        path.write_text(text)
    base = yaml.safe_load(CONFIG.format(run="unused", shapes="usual", tiny=TINY))
    base["data"]["train"] = {"build": "bench.evidence:Sample", "splits": ["train"], "count": 16}
    base["data"]["val"] = {"build": "kdmini.detection.voc:VOC", "splits": ["val"]}
    base |= {
        "metric": {"build": "tests.test_evidence:Generous"},
        "train": {**base["train"], "epochs": 2},
    }
    (tmp_path / "bench/evidence").mkdir(parents=True)
    (tmp_path / "bench/evidence/gpu.yaml").write_text(config.dump(base))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.setattr(evidence, "ROOT", tmp_path)
    monkeypatch.setattr(evidence, "LEAST_OBJECTS", 3)
    monkeypatch.chdir(tmp_path)
    runs, kept = tmp_path / "elsewhere", tmp_path / "bench/evidence/gpu"
    asked = [
        "gpu",
        "teacher",
        "alone",
        "notes",
        "--seeds",
        "0",
        "1",
        "--runs",
        "elsewhere",
        "--root",
        "set",
    ]

    Generous.left = 3
    with pytest.raises(KeyboardInterrupt):
        main(asked)
    Generous.left = 100
    assert {path.parent.name for path in kept.glob("*/results.csv")} == {"teacher-0", "alone-0"}
    assert (runs / "alone-1/metrics.jsonl").read_text().count("\n") == 2

    capsys.readouterr()
    main(asked)
    assert "resumed from elsewhere/alone-1" in capsys.readouterr().out
    made = {path.name: {file.name for file in path.iterdir()} for path in kept.iterdir()}
    texts = {"config.yaml", "results.csv", "made.txt"}
    assert made == {
        **dict.fromkeys(("teacher-0", "alone-0", "alone-1", "notes-1"), texts), "notes-0": {*texts, "check.txt"}
    }  # fmt: skip
    for name in ("alone-1", "notes-0"):
        assert (kept / name / "results.csv").read_text() == (
            runs / name / "results.csv"
        ).read_text()
        text = (runs / name / "config.yaml").read_text()
        assert (
            f"run: elsewhere/{name}\n" in text and "weights: elsewhere/teacher-0/best.pt\n" in text
        )
        assert (kept / name / "config.yaml").read_text() == text.replace(
            "elsewhere", "runs/evidence/gpu"
        ).replace("root: set\n", "root: usual\n")
    check = (kept / "notes-0/check.txt").read_text()
    assert (
        "KD / task gradient" in check and "elsewhere/alone-0/best.pt" in check
    )  # the student trained alone
    page = (tmp_path / "bench/evidence/gpu.md").read_text()
    assert (
        f"{3 * len(protocol_of('gpu').rows) - 4} of {3 * len(protocol_of('gpu').rows)} runs are yet to be made"
        in page
    )
    assert "| notes " in page and "aeroplane" in page and "not trained yet" not in page
    assert (tmp_path / "bench/evidence/gpu.png").stat().st_size > 10_000

    its_config, best = str(runs / "alone-0/config.yaml"), str(runs / "alone-0/best.pt")
    monkeypatch.setattr(sys, "argv", ["eval.py", "--config", its_config, "--weights", best])
    eval_script.main()
    told = capsys.readouterr().out.splitlines()
    assert not any(
        "AP aeroplane" in line for line in told
    )  # a score of its own has no place in the row of a class
    assert any(line.startswith("aeroplane ") for line in told)

    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*.pt")}
    main(asked)
    assert {
        path: path.stat().st_mtime_ns for path in runs.rglob("*.pt")
    } == before  # nothing was trained again


@pytest.mark.parametrize("argument", ["nots", "teachers"])
def test_a_row_that_is_none(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["cpu", argument])
    assert f"no row `{argument}`: there are teacher, alone, notes" in capsys.readouterr().err


@pytest.mark.parametrize(("there", "needed"), [([], "teacher"), (["teacher-0"], "alone")])
def test_a_row_names_the_row_that_it_needs(tmp_path: Path, there: list[str], needed: str) -> None:
    for name in there:
        (tmp_path / name).mkdir()
        (tmp_path / name / "best.pt").touch()
    with pytest.raises(SystemExit) as left:
        main(["cpu", "notes", "--seeds", "0", "--runs", str(tmp_path)])
    assert (
        f"notes needs {tmp_path}/{needed}-0: `python -m bench.evidence cpu {needed} --seeds 0` first"
        in str(left.value)
    )


def keep(folder: Path, run: str, ap: float) -> None:
    """The texts of a run: a record before training, three epochs."""
    (folder / run).mkdir(parents=True)
    best = {"AP50-95": 0.9, "AP50": 0.9, "VOC07": 0.9}  # and not to be chosen
    last = {"AP50-95": ap, "AP50": 2 * ap, "VOC07": 3 * ap, "AP cat": 4 * ap, "distance/raw": 2.0}
    lines = [{"epoch": -1, "distance/raw": 6.0}, {"epoch": 0, "images/s": 50, **best}]
    lines += [{"epoch": 1, "images/s": 80}, {"epoch": 2, "images/s": 60, **last}]
    with (folder / run / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for line in lines for key in line)))
        writer.writeheader()
        writer.writerows(lines)


def cells_of(text: str) -> list[list[str]]:
    """The lines of its tables."""
    return [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line.startswith("|")
    ]


def test_the_arithmetic_of_the_table(tmp_path: Path) -> None:
    points = {
        BASELINE: [3.0, 3.3, 2.9],
        "notes": [3.1, 3.2, 3.0],
        "sample": [4.0, 4.4, 3.9],
        "logits": [1.0, 1.1, 0.9],
    }
    points |= {"ultralytics_alone": [5.0, 5.2, 5.1], "ultralytics": [5.1, 5.4, 5.4]}
    for row, values in points.items():
        for seed, value in enumerate(values):
            keep(tmp_path, f"{row}-{seed}", value / 100)
    keep(tmp_path, "sample_strong-0", 0.5)  # another row, whose name begins like one
    (tmp_path / "notes-0/check.txt").write_text("ok   KD / task gradient                 3.37%\n")
    results = {row: read(tmp_path, row) for row in points}
    assert {row: sorted(runs) for row, runs in results.items()} == {
        row: [0, 1, 2] for row in points
    }

    # one-way analysis of variance: the mean square within the rows
    pooled = math.sqrt(np.mean([np.var(values, ddof=1) for values in points.values()]))
    assert deviation_of(results) == pytest.approx(pooled)
    assert gain(results, "sample") == pytest.approx([1.0, 1.1, 1.0])
    assert gain(results, "ultralytics") == pytest.approx(
        [0.1, 0.2, 0.3]
    )  # its own trainer without a teacher
    bound = BOUND * pooled * math.sqrt(2 / 3)
    for row, expected in (("notes", "within noise"), ("sample", "helps"), ("logits", "hurts")):
        apart = np.mean(points[row]) - np.mean(points[BASELINE])
        assert (abs(apart) > bound) == (expected != "within noise")
        assert verdict(gain(results, row), pooled) == expected
    assert verdict([5.0], pooled) == ""  # one seed says nothing

    rows = {
        name: cells
        for name, *cells in cells_of(table(results, "python -m bench.evidence cpu", (0, 1, 2)))
    }
    assert rows["notes"] == [
        "3.10 ± 0.10 (n=3)", "6.20 ± 0.20 (n=3)", "9.30 ± 0.30 (n=3)", "+0.03 ± 0.12 (n=3)", "within noise", "3.4%",
        "6.00", "2.00", "", "60", "`python -m bench.evidence cpu notes`",
    ]  # fmt: skip
    added = {
        name: cells for name, *cells in cells_of(table(results, "make", (0, 1)))
    }  # the third seed was not planned
    assert added["notes"] == [*rows["notes"][:-1], "`make notes --seeds 0 1 2`"]


@pytest.mark.parametrize("n", [2, 3])
def test_equal_rows_seldom_lie_beyond_the_noise(n: int) -> None:
    draws = np.random.default_rng(0).normal(7.0, 0.4, (50_000, 2, n)).mean(2)
    beyond = np.abs(draws[:, 0] - draws[:, 1]) > bound_of(0.4, n)
    assert (
        0.011 < beyond.mean() < 0.014
    )  # a normal deviate is beyond 2.5 of its standard deviations in 1.24 %


def test_a_table_of_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "gpu", ["alone", "notes"], (0, 1, 2))
    text = (tmp_path / "gpu.md").read_text()
    assert (
        "6 of 6 runs are yet to be made" in text and "nan" not in text and "not trained yet" in text
    )
    assert not (tmp_path / "gpu.png").exists()


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_the_page_is_what_the_kept_texts_say(name: str, tmp_path: Path) -> None:
    protocol, kept = protocol_of(name), ROOT / "bench/evidence" / name
    if kept.exists():
        shutil.copytree(kept, tmp_path / name)
    write(tmp_path / name, list(protocol.rows), protocol.seeds)
    assert (tmp_path / f"{name}.md").read_text() == kept.with_suffix(".md").read_text()
    for path in kept.glob("*/config.yaml"):
        row, _, seed = path.parent.name.rpartition("-")
        overrides = {TEACHER: protocol.teacher, **protocol.rows}[row]
        assert config.load(path) == settings_of(
            name, overrides, row, int(seed), Path(f"runs/evidence/{name}")
        )


def test_voc_best_is_what_the_evidence_prefers() -> None:
    rows = {row: made for row, made in protocol_of("cpu").rows.items() if not row.startswith(PEER)}
    results = {row: read(ROOT / "bench/evidence/cpu", row) for row in rows}
    gains = {
        row: np.mean(gained) for row in rows if row != BASELINE and (gained := gain(results, row))
    }
    settings = config.load(ROOT / "configs/voc.yaml", rows[max(gains, key=lambda row: gains[row])])
    assert config.load(ROOT / "configs/voc_best.yaml") == {**settings, "run": "runs/voc_best"}


def test_the_tables_of_the_documents_are_that_of_the_page() -> None:
    shown = cells_of(
        (ROOT / "README.md")
        .read_text()
        .split("<!-- evidence -->")[1]
        .split("<!-- /evidence -->")[0]
    )
    page = {
        name: cells
        for name, *cells in cells_of(
            (ROOT / "bench/evidence/cpu.md").read_text().split("\nBy class")[0]
        )
    }
    assert len(shown) == len(page)  # a title and a line of dashes each
    for (name, _, *cells), title in zip(shown[2:], list(page)[2:], strict=True):
        assert (name, cells) == (f"`{title}`", page[title][:6])
    for _, _, name, found, _ in cells_of(
        (ROOT / "docs/terms.md").read_text().split("\n## Results")[1]
    )[2:]:
        gained, told = page.get(name.strip("`"), ["-"] * 5)[3:5]
        assert found == (f"{gained}, {told}" if gained != "-" else "")
