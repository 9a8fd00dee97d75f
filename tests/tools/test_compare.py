"""The comparison of runs: numbers worked out by hand and by numpy, and runs of train.py."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train as train_script
from kdmini.checkpoint import save_best
from kdmini.detection.yolo11.model import YOLO11
from kdmini.tools.compare import OKABE_ITO, T_975, curves, interval, main, spread, verdict
from kdmini.tools.rows import group, read_run
from tests.commands import run
from tests.tools.run_folders import rows_of, write


class Bare:
    """A metric without a `summary`."""

    fitness = "AP50-95"


class Own:
    """A metric whose fitness depends on its settings, and which needs the classes."""

    def __init__(self, names: list[str], of: str):
        self.fitness = f"{of} of {len(names)}"


class Nameless:
    """No metric: it has no `fitness`."""


def compare(tmp_path, capsys, *folders):
    """-> the text that is written, and printed before anything else."""
    main([*map(str, folders), "--out", str(tmp_path / "out")])
    written = (tmp_path / "out/compare.md").read_text()
    assert capsys.readouterr().out.startswith(written)
    return written


# --- intervals


@pytest.mark.parametrize("freedom", range(1, len(T_975) + 1))
def test_students_t_is_that_of_its_density(freedom: int) -> None:
    """By trapezoids from 0 to the value: 47.5 %."""
    x = np.linspace(0, T_975[freedom - 1], 200_001)
    density = (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    factor = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2)
    share = factor / math.sqrt(math.pi * freedom) * np.trapezoid(density, x)
    assert share == pytest.approx(0.475, abs=2e-5)


def test_an_interval_by_hand() -> None:
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 2.484, 2 + 2.484), abs=1e-3)
    assert interval([1.0]) is None
    assert [verdict(ends) for ends in ((0.1, 2), (-2, -0.1), (-1, 1), None)] == [
        "helps",
        "hurts",
        "cannot be told",
        "",
    ]


# --- the table

PLAIN = [0.30, 0.32, 0.37]  # AP50-95 of the best epoch, by seed
BETTER = [0.33, 0.34, 0.38]


@pytest.fixture
def three_rows(tmp_path, capsys):
    """The text on two rows of three seeds, and a third row of another seed."""
    faster = {"train": {"epochs": 3, "lr0": 0.02}}
    fastest = {"train": {"epochs": 3, "lr0": 0.04}}
    a = [write(tmp_path / f"a{s}", [0.1, best, 0.2], s) for s, best in enumerate(PLAIN)]
    b = [write(tmp_path / f"b{s}", [None, 0.1, best], s, faster) for s, best in enumerate(BETTER)]
    c = write(tmp_path / "c7", [0.5, None, 0.5], 7, fastest, speed=(1.0, 2.0, 4.0))
    return compare(tmp_path, capsys, a[0], b[2], a[1], b[0], a[2], c, b[1])


def test_runs_that_differ_in_the_seed_alone_are_one_row(three_rows):
    header, a, b, c = rows_of(three_rows)
    columns = ["row", "VOC07", "VOC", "AP50-95", "best epoch", "images/s", "distance/raw", "runs"]
    assert header == columns
    assert [row[0] for row in (a, b, c)] == ["lr0=0.01", "lr0=0.02", "lr0=0.04"]
    assert a[7] == "a0 (seed 0), a1 (seed 1), a2 (seed 2)"
    assert c[7] == "c7 (seed 7)"
    assert " epochs: under way" not in three_rows


def test_scores_are_those_of_the_best_epoch_with_mean_and_spread(three_rows):
    _, a, b, c = rows_of(three_rows)
    for row, scores in ((a, PLAIN), (b, BETTER)):
        deviation = np.std(scores, ddof=1)
        for column, more in ((3, 0), (2, 0.1), (1, 0.2)):
            assert row[column] == f"{np.mean(scores) + more:.4f} ± {deviation:.4f} (n=3)"
    assert c[3] == "0.5000 (n=1)"


def test_the_best_epoch_is_the_first_of_equals_as_in_training(three_rows):
    _, a, b, c = rows_of(three_rows)
    assert a[4] == "2, 2, 2"
    assert b[4] == "3, 3, 3"
    assert c[4] == "1"


def test_speed_is_a_median_and_the_distance_the_last(three_rows):
    _, a, _, c = rows_of(three_rows)
    assert a[5] == "20.0 ± 0.0 (n=3)"
    assert c[5] == "2.0 (n=1)"
    assert a[6] == "2.0000 ± 0.0000 (n=3)"


def test_rows_are_paired_with_the_first_seed_by_seed(three_rows):
    _, *paired = rows_of(three_rows, 1)  # no seed of the third row is one of the first's
    gains = np.subtract(BETTER, PLAIN)
    assert [row[0] for row in paired] == ["lr0=0.02"]
    assert paired[0][3] == f"{gains.mean():+.4f} ± {gains.std(ddof=1):.4f} (n=3)"


def test_the_spread_is_that_of_numpy():
    values = np.random.default_rng(0).normal(0.4, 0.01, 5)
    assert spread(values.tolist()) == f"{values.mean():.4f} ± {values.std(ddof=1):.4f} (n=5)"


@pytest.mark.parametrize(
    "values, form, text",
    [
        ([0.25], ".4f", "0.2500 (n=1)"),
        ([], ".4f", "-"),
        ([-0.01, -0.03], "+.4f", "-0.0200 ± 0.0141 (n=2)"),
        ([0.01], "+.4f", "+0.0100 (n=1)"),
    ],
)
def test_the_spread_of_few_values_is_worked_out_by_hand(values, form, text):
    assert spread(values, form) == text


# --- the metric


def test_a_metric_without_a_summary_has_all_its_scores_shown(tmp_path, capsys):
    bare = {"metric": {"build": f"{__name__}:Bare"}}
    text = compare(tmp_path, capsys, write(tmp_path / "a", [0.1, 0.3], settings=bare))
    header, row = rows_of(text)
    assert header[1:4] == ["AP50-95", "VOC", "VOC07"]  # in the order in which they were logged
    assert row[1:4] == ["0.3000 (n=1)", "0.4000 (n=1)", "0.5000 (n=1)"]
    assert "the best epoch by AP50-95" in text


def test_a_row_has_the_scores_of_its_own_metric(tmp_path, capsys):
    first = write(tmp_path / "first", [0.1])
    own = {"metric": {"build": f"{__name__}:Own", "of": "recall"}}
    other = write(tmp_path / "other", [None, None], settings=own)
    save_best(tmp_path / "other" / "best.pt", YOLO11(["a", "b"], [0.5, 0.0625, 1024]), 64, 0, 0.5)
    before, first_epoch, second_epoch = Path(other, "metrics.jsonl").read_text().splitlines()
    lines = [before]
    for line, score in ((first_epoch, 0.6), (second_epoch, 0.4)):
        scored = {"score/recall of 2": score, "score/strays": True}
        lines.append(json.dumps(json.loads(line) | scored))
    Path(other, "metrics.jsonl").write_text("\n".join(lines))

    text = compare(tmp_path, capsys, first, other)
    header, row, own_row = rows_of(text)
    scores = ["VOC07", "VOC", "AP50-95", "recall of 2", "strays"]
    assert header[1:7] == [*scores, "best epoch"]
    assert row[4:7] == ["-", "-", "1"]
    assert own_row[1:7] == ["-", "-", "-", "0.6000 (n=1)", "-", "1"]
    assert "best epoch by recall of 2" in text


def test_rows_of_another_metric_are_said_to_be(tmp_path, capsys):
    first = write(tmp_path / "first", [0.1])
    other = write(tmp_path / "other", [0.2], settings={"metric": {"build": "a.b:Other"}})
    text = compare(tmp_path, capsys, first, other)
    assert "build=a.b:Other: scored by a.b:Other, best epoch by AP50-95" in text.splitlines()
    assert text.count("scored by") == 1


@pytest.mark.parametrize(
    "metric, message",
    [
        ({"build": "missing.module:Name"}, "cannot import `missing.module`"),
        ({"build": f"{__name__}:Nothing"}, "has no class or function `Nothing`"),
        ({"build": f"{__name__}:Nameless"}, "Nameless has no `fitness`"),
        ({}, "expected package.module:Name"),
        (None, "expected package.module:Name"),
    ],
)
def test_a_metric_that_cannot_be_had_is_one_line(tmp_path, metric, message):
    folder = write(tmp_path / "a", [0.1], settings={"metric": metric})
    with pytest.raises(SystemExit) as left:
        main([folder, "--out", str(tmp_path / "out")])
    line = left.value.code
    assert line.startswith(f"error: {folder}/config.yaml: metric.build: ")
    assert message in line
    assert "\n" not in line


def test_of_rows_named_by_their_folder_the_settings_stand_below(tmp_path, capsys):
    low = {f"key{i}": i for i in range(12)}
    high = {f"key{i}": i + 1 for i in range(12)}
    one = write(tmp_path / "one", [0.1], settings={"data": low})
    other = write(tmp_path / "other", [0.2], settings={"data": high})
    text = compare(tmp_path, capsys, one, other)
    assert [row[0] for row in rows_of(text)[1:]] == [one, other]
    assert [row[0] for row in rows_of(text, 1)[1:]] == [other]
    settings = ", ".join(f"key{i}={i}" for i in range(12))
    assert f"\n{one}: {settings}\n" in text


# --- runs as they are found


def test_real_runs_are_read_with_the_names_they_log(config_file, tmp_path, capsys):
    folders = [tmp_path / "1", tmp_path / "2"]
    for folder in folders:
        run_and_seed = [f"run={folder}", f"seed={folder.name}"]
        run(train_script, "--config", config_file, "train.epochs=1", *run_and_seed)
    capsys.readouterr()
    text = compare(tmp_path, capsys, *folders)
    _, row = rows_of(text)
    assert row[0] == "1"
    assert row[4] == "1, 1"
    assert "epochs: under way" not in text

    lines = [(folder / "metrics.jsonl").read_text().splitlines()[-1] for folder in folders]
    logged = [json.loads(line) for line in lines]
    columns = {1: "score/VOC07", 2: "score/VOC", 3: "score/AP50-95", 6: "distance/raw"}
    for column, key in columns.items():
        assert row[column] == spread([record[key] for record in logged])
    assert row[5] == spread([record["images/s"] for record in logged], ".1f")
    assert row[6].endswith("(n=2)")


@pytest.fixture
def damaged(tmp_path):
    """Folders by name: a whole run, and some that have not come to their end."""
    cpu = {"device": "cpu"}
    folders = {
        "whole": write(tmp_path / "whole", [0.1, 0.2, 0.3]),
        "cut": write(tmp_path / "cut", [0.1, 0.2, 0.3], 1),
        "begun": write(tmp_path / "begun", [], 0, cpu),
        "odd": write(tmp_path / "odd", [0.2], 1, cpu),
        "fresh": write(tmp_path / "fresh", [], 2, cpu),
    }
    path = tmp_path / "cut/metrics.jsonl"
    text = path.read_text()
    path.write_text(text[: text.index('"epoch": 2') + 30])
    (tmp_path / "fresh/metrics.jsonl").unlink()
    lines = [
        '{"epoch": 1, "score/AP50-95": NaN}',
        '{"epoch": 2, "score/AP50-95": Infinity, "images/s": "fast"}',
        '{"epoch": 3, "score/AP50-95": 1' + "0" * 400 + "}",
    ]
    with (tmp_path / "odd/metrics.jsonl").open("a") as file:
        file.write("\n".join(lines))
    return folders


def test_runs_under_way_and_cut_off_lines_are_read_as_far_as_they_go(tmp_path, capsys, damaged):
    text = compare(tmp_path, capsys, *damaged.values())
    _, first, second = rows_of(text)
    assert first[3:5] == ["0.2500 ± 0.0707 (n=2)", "3, 2"]
    assert second[3:5] == ["0.2000 (n=1)", "-, 1, -"]
    # what the run that has begun has is the distance before training, which is of no epoch
    assert second[6] == "4.0000 (n=1)"


def test_runs_that_are_not_at_their_end_are_said_to_be(tmp_path, capsys, damaged):
    text = compare(tmp_path, capsys, *damaged.values())
    for name, done in {"cut": 2, "begun": 0, "odd": 1, "fresh": 0}.items():
        assert f"{damaged[name]}: {done} of 3 epochs: under way" in text
    assert f"{damaged['whole']}: " not in text


def test_curves_go_as_far_as_all_runs_of_a_row_have_come(damaged):
    rows = group([read_run(damaged[name]) for name in ("whole", "cut", "begun")])
    assert curves(rows, "score/AP50-95") == {"device unset": {1: [0.1, 0.1], 2: [0.2, 0.2]}}


def test_folders_that_are_no_runs_are_named_and_the_others_compared(tmp_path, capsys):
    good = write(tmp_path / "good", [0.1])
    names = ("missing", "empty", "yaml", "text", "binary", "deep", "list", "folder")
    bad = {name: tmp_path / name for name in names}
    bad["empty"].mkdir()
    for name in ("yaml", "text", "binary", "deep", "list", "folder"):
        write(bad[name], [0.1])
    (bad["yaml"] / "config.yaml").write_text("seed: 1\nseed: 2\n")
    (bad["text"] / "config.yaml").write_text("text")
    (bad["binary"] / "metrics.jsonl").write_bytes(b"\xff\xfe\x00")
    (bad["deep"] / "metrics.jsonl").write_text("[" * 200_000)
    (bad["list"] / "metrics.jsonl").write_text("[1, 2]")
    (bad["folder"] / "metrics.jsonl").unlink()
    (bad["folder"] / "metrics.jsonl").mkdir()
    missing, *others = map(str, bad.values())

    with pytest.raises(SystemExit) as left:
        main([missing, good, *others, "--out", str(tmp_path / "out")])

    printed = capsys.readouterr()
    assert left.value.code == 1
    assert "| good (seed 0)" in printed.out
    for line, path in zip(printed.err.splitlines(), bad.values(), strict=True):
        assert line.startswith("error: ")
        assert str(path) in line


def test_without_any_run_nothing_is_written(tmp_path):
    with pytest.raises(SystemExit) as left:
        main([str(tmp_path / "missing"), "--out", str(tmp_path / "out")])
    assert left.value.code == 1
    assert not (tmp_path / "out").exists()


# --- what is written


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    good = write(tmp_path / "good", [0.1])
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"^error: .*file: cannot be made"):
        main([good, "--out", str(tmp_path / "file")])


def test_a_picture_that_cannot_be_written_is_named(tmp_path):
    pytest.importorskip("matplotlib")
    good = write(tmp_path / "good", [0.1])
    (tmp_path / "out/compare.png").mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"^error: cannot write .*compare\.png"):
        main([good, "--out", str(tmp_path / "out")])
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_without_matplotlib_the_table_is_there_and_a_line_says_what_to_install(
    tmp_path, capsys, monkeypatch
):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    main([write(tmp_path / "a", [0.1]), "--out", str(tmp_path / "out")])
    line = "no picture: it takes matplotlib, `pip install -e '.[plots]'` in the checkout\n"
    assert capsys.readouterr().out.endswith(line)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["compare.md"]


def test_nothing_evaluated_is_no_picture(tmp_path, capsys):
    main([write(tmp_path / "a", [None]), "--out", str(tmp_path / "out")])
    assert capsys.readouterr().out.endswith("no picture: no epoch with AP50-95 yet\n")


def rgb(colour):
    """ "#rrggbb" -> (3,) 0..255."""
    return np.array(list(bytes.fromhex(colour.removeprefix("#"))))


def test_the_picture_has_a_line_a_row_and_a_band_between_the_seeds(tmp_path):
    """Two flat curves. The band is measured by the pixels below and above the mean of one."""
    pytest.importorskip("matplotlib")
    low = write(tmp_path / "$a_0", [0.2] * 3, 0)
    high = write(tmp_path / "$a_1", [0.6] * 3, 1)
    other = write(tmp_path / "_b", [0.8] * 3, 0, {"note": "$x^$ 90%"})
    out = tmp_path / "deep/out"
    main([low, high, other, "--out", str(out)])
    assert sorted(path.name for path in out.iterdir()) == ["compare.md", "compare.png"]

    pixels = np.asarray(Image.open(out / "compare.png").convert("RGB")).astype(int)
    assert min(pixels.shape[:2]) > 500
    column = pixels[:, pixels.shape[1] // 3]  # away from the legend's text and the markers
    blue, orange = map(rgb, OKABE_ITO[:2])
    mean_row = np.nonzero(np.abs(column - blue).max(1) < 12)[0].mean()
    other_row = np.nonzero(np.abs(column - orange).max(1) < 12)[0].mean()
    tint = 0.8 * 255 + 0.2 * blue
    band = np.nonzero(np.abs(column - tint).max(1) < 4)[0]
    unit = (mean_row - other_row) / (0.8 - 0.4)  # pixels of a whole AP: rows count downwards
    assert unit > 0
    assert mean_row - band.min() == pytest.approx(0.2 * unit, abs=4)
    assert band.max() - mean_row == pytest.approx(0.2 * unit, abs=4)
