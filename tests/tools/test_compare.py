"""The comparison of runs: numbers worked out by hand and by numpy, real runs of train.py, folders
that are damaged.
"""

import json
import re
import sys

import numpy as np
import pytest
import yaml
from PIL import Image

import train as train_script
from kdmini.contracts import UserError
from kdmini.tools.compare import curves, group, label, main, read_run, spread
from tests.test_train import run

SETTINGS = {
    "seed": 0,
    "student": {"build": "a.b:YOLO11", "scale": "n"},
    "train": {"epochs": 3, "lr0": 0.01},
}


def write(folder, scores, seed=0, settings=None, speed=(10.0, 30.0, 20.0)):
    """A run folder as train.py leaves it: AP50-95 of each epoch, None where it was not evaluated."""
    folder.mkdir(parents=True)
    config = {"run": str(folder), **SETTINGS, **(settings or {}), "seed": seed}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    records = [{"epoch": -1, "distance/raw": 5.0}]
    for epoch, (score, images) in enumerate(zip(scores, speed, strict=False)):
        records.append({"epoch": epoch, "images/s": images})
        if score is not None:
            records[-1] |= {
                "AP50-95": score,
                "VOC": score + 0.1,
                "VOC07": score + 0.2,
                "distance/raw": 4.0 - epoch,
            }
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(folder)


def rows_of(text, table=0):
    """The cells of a Markdown table, its header included; the lines have one width."""
    lines = text.split("\n\n")
    tables = [part.splitlines() for part in lines if part.startswith("| row")]
    assert len({len(line) for line in tables[table]}) == 1 and re.fullmatch(
        r"[| -]+", tables[table][1]
    )
    cells = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in tables[table]
    ]
    return [cells[0], *cells[2:]]


def compare(tmp_path, capsys, *folders):
    main([*map(str, folders), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    written = (tmp_path / "out/compare.md").read_text()
    assert printed.startswith(written)
    return written


def test_seeds_make_a_row_with_mean_and_spread_and_are_paired_with_the_first(tmp_path, capsys):
    plain, kd = [0.30, 0.32, 0.37], [0.33, 0.34, 0.38]
    first = [write(tmp_path / f"a{s}", [0.1, score, 0.2], s) for s, score in enumerate(plain)]
    faster = {"train": {"epochs": 3, "lr0": 0.02}}
    second = [
        write(tmp_path / f"b{s}", [None, 0.1, score], s, faster) for s, score in enumerate(kd)
    ]
    third = write(
        tmp_path / "c7", [0.5, None, 0.5], 7, {"train": {"epochs": 3, "lr0": 0.04}}, (1.0, 2.0, 4.0)
    )
    text = compare(
        tmp_path, capsys, first[0], second[2], first[1], second[0], first[2], third, second[1]
    )
    header, a, b, c = rows_of(text)
    assert header == [
        "row",
        "VOC07",
        "VOC",
        "AP50-95",
        "best epoch",
        "images/s",
        "distance/raw",
        "runs",
    ]
    assert [row[0] for row in (a, b, c)] == ["lr0=0.01", "lr0=0.02", "lr0=0.04"]
    for row, scores in ((a, plain), (b, kd)):
        for column, more in ((3, 0), (2, 0.1), (1, 0.2)):
            mean, sd = np.mean(scores) + more, np.std(scores, ddof=1)
            assert row[column] == f"{mean:.4f} ± {sd:.4f} (n=3)"
    assert a[4] == "2, 2, 2" and b[4] == "3, 3, 3" and c[4] == "1"  # the first of equals
    assert a[5] == "20.0 ± 0.0 (n=3)" and c[5] == "2.0 (n=1)" and c[3] == "0.5000 (n=1)"
    assert a[6] == "2.0000 ± 0.0000 (n=3)"
    assert a[7] == "a0 (seed 0), a1 (seed 1), a2 (seed 2)" and c[7] == "c7 (seed 7)"
    _, paired = rows_of(text, 1)  # no seed of the third row is one of the first's
    gains = np.subtract(kd, plain)
    assert (
        paired[0] == "lr0=0.02"
        and paired[3] == f"{gains.mean():+.4f} ± {gains.std(ddof=1):.4f} (n=3)"
    )
    assert " epochs: under way" not in text


def test_the_spread_is_that_of_numpy():
    values = np.random.default_rng(0).normal(0.4, 0.01, 5)
    assert spread(values.tolist()) == f"{values.mean():.4f} ± {values.std(ddof=1):.4f} (n=5)"
    assert spread([0.25]) == "0.2500 (n=1)" and spread([]) == "-"
    assert (
        spread([-0.01, -0.03], "+.4f") == "-0.0200 ± 0.0141 (n=2)"
        and spread([0.01], "+.4f") == "+0.0100 (n=1)"
    )


@pytest.mark.parametrize(
    ("others", "labels"),
    [
        ([{}], ["first"]),
        ([{"train": {"epochs": 3, "lr0": 0.01, "amp": True}}], ["amp unset", "amp=true"]),
        ([{"teacher": {"build": "a:Net", "weights": "x.pt"}}], ["teacher unset", "teacher=Net"]),
        (
            [{"teacher": {"build": "a:Net", "weights": "x.pt"}}, {"teacher": {"build": "a:Net", "weights": "y.pt"}}],
            ["teacher unset", "teacher=Net, weights=x.pt", "teacher=Net, weights=y.pt"],
        ),
        ([{"distill": {"taps": ["model.6"], "att": {"weight": 1}, "l2": {}}}], ["distill unset", "distill=att+l2"]),
        (
            [{"distill": {"a": {"weight": one}, "b": {"weight": one + 1}}} for one in (1, 3)],
            ["distill unset", "distill=a+b, a.weight=1, b.weight=2", "distill=a+b, a.weight=3, b.weight=4"],
        ),
        ([{"data": {"train": {"splits": ["x|y", "z"]}}}, {"data": {"train": {"splits": None}}}], None),
    ],
)  # fmt: skip
def test_a_row_is_named_by_the_keys_in_which_it_differs(tmp_path, others, labels):
    folders = [write(tmp_path / "first", [0.1])]
    folders += [
        write(tmp_path / f"run{i}", [0.1], i, settings) for i, settings in enumerate(others, 1)
    ]
    rows = group([read_run(folder) for folder in folders])
    assert label(rows) == (
        labels or ["data unset", "data=train, splits=['x|y', 'z']", "data=train, splits unset"]
    )


def test_rows_that_differ_in_too_much_for_a_name_are_named_by_their_folder(tmp_path, capsys):
    keys = {f"key{i}": i for i in range(12)}
    one = write(tmp_path / "one", [0.1])
    other = write(tmp_path / "other", [0.2], 0, {"data": {**keys, "a": 1}})
    third = write(tmp_path / "third", [0.3], 0, {"data": {key: i + 1 for key, i in keys.items()}})
    text = compare(tmp_path, capsys, other, third)
    assert [row[0] for row in rows_of(text)[1:]] == [other, third] and rows_of(text, 1)[1][
        0
    ] == third
    full = ", ".join([*(f"key{i}={i}" for i in range(12)), "a=1"])
    assert f"\n{other}: {full}\n" in text
    assert rows_of(compare(tmp_path, capsys, one, other))[1][0] == "data unset"


def test_real_runs_are_read_with_the_names_they_log(config_file, tmp_path, capsys):
    for seed in (1, 2):
        run(
            train_script,
            "--config",
            config_file,
            "train.epochs=1",
            f"run={tmp_path / str(seed)}",
            f"seed={seed}",
        )
    capsys.readouterr()
    text = compare(tmp_path, capsys, tmp_path / "1", tmp_path / "2")
    _, row = rows_of(text)
    assert row[0] == "1" and row[4] == "1, 1" and "epochs: under way" not in text
    logged = [
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])
        for name in "12"
    ]
    for cell, key in {1: "VOC07", 2: "VOC", 3: "AP50-95", 6: "distance/raw"}.items():
        assert row[cell] == spread([record[key] for record in logged])
    assert row[5] == spread([record["images/s"] for record in logged], ".1f") and row[6].endswith(
        "(n=2)"
    )


def test_runs_under_way_and_cut_off_lines_are_read_as_far_as_they_go(tmp_path, capsys):
    whole = write(tmp_path / "whole", [0.1, 0.2, 0.3])
    cut = write(tmp_path / "cut", [0.1, 0.2, 0.3], 1)
    path = tmp_path / "cut/metrics.jsonl"
    text = path.read_text()
    path.write_text(text[: text.index('"epoch": 2') + 30])
    begun = write(tmp_path / "begun", [], 0, {"device": "cpu"})
    fresh = write(tmp_path / "fresh", [], 2, {"device": "cpu"})
    (tmp_path / "fresh/metrics.jsonl").unlink()
    odd = write(tmp_path / "odd", [0.2], 1, {"device": "cpu"})
    with (tmp_path / "odd/metrics.jsonl").open("a") as file:
        lines = [
            "[1, 2]",
            "7",
            '{"epoch": "2", "AP50-95": 0.9}',
            '{"AP50-95": 0.9}',
            '{"epoch": 1, "AP50-95": NaN}',
        ]
        lines += [
            '{"epoch": 2, "AP50-95": Infinity, "images/s": "fast"}',
            '{"epoch": 3, "AP50-95": 1' + "0" * 400 + "}",
        ]
        file.write("\n".join(lines))
    text = compare(tmp_path, capsys, whole, cut, begun, odd, fresh)
    _, first, second = rows_of(text)
    assert first[3:5] == ["0.2500 ± 0.0707 (n=2)", "3, 2"] and second[3:5] == [
        "0.2000 (n=1)",
        "-, 1, -",
    ]
    assert (
        second[6] == "4.0000 (n=1)"
    )  # of the run that has begun, the distance is that before training
    for name, done in {"cut": 2, "begun": 0, "odd": 1, "fresh": 0}.items():
        assert f"{tmp_path / name}: {done} of 3 epochs: under way" in text
    assert f"{whole}: " not in text
    rows = group([read_run(folder) for folder in (whole, cut, begun)])
    assert curves(rows) == {
        "device unset": {1: [0.1, 0.1], 2: [0.2, 0.2]}
    }  # as far as both have come


def test_a_folder_that_is_no_run_is_named_and_the_others_are_compared(tmp_path, capsys):
    good = write(tmp_path / "good", [0.1])
    bad = {
        name: tmp_path / name
        for name in ("missing", "empty", "yaml", "text", "binary", "deep", "folder")
    }
    for name in list(bad)[2:]:
        write(bad[name], [0.1])
    bad["empty"].mkdir()
    (bad["yaml"] / "config.yaml").write_text("seed: 1\nseed: 2\n")
    (bad["text"] / "config.yaml").write_text("text")
    (bad["binary"] / "metrics.jsonl").write_bytes(b"\xff\xfe\x00")
    (bad["deep"] / "metrics.jsonl").write_text("[" * 200_000)
    (bad["folder"] / "metrics.jsonl").unlink()
    (bad["folder"] / "metrics.jsonl").mkdir()
    with pytest.raises(SystemExit) as stop:
        main(
            [
                str(bad["missing"]),
                good,
                *map(str, list(bad.values())[1:]),
                "--out",
                str(tmp_path / "out"),
            ]
        )
    out, err = capsys.readouterr()
    assert stop.value.code == 1 and "| good (seed 0)" in out
    assert len(err.splitlines()) == len(bad)
    for line, path in zip(err.splitlines(), bad.values(), strict=True):
        assert line.startswith("error: ") and str(path) in line
    with pytest.raises(SystemExit) as stop:
        main([str(bad["missing"]), "--out", str(tmp_path / "none")])
    assert stop.value.code == 1 and not (tmp_path / "none").exists()


def test_the_same_config_and_seed_twice_is_no_spread(tmp_path):
    one, other = write(tmp_path / "one", [0.1]), write(tmp_path / "other", [0.2])
    for pair in ((one, other), (one, one)):
        with pytest.raises(
            SystemExit, match=rf"^error: {pair[1]}: same config and seed as {one}; name one"
        ):
            main([*pair, "--out", str(tmp_path / "out")])
    with pytest.raises(UserError):
        group([read_run(one), read_run(other)])


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    good = write(tmp_path / "good", [0.1])
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"^error: .*file"):
        main([good, "--out", str(tmp_path / "file")])
    (tmp_path / "out/compare.png").mkdir(parents=True)
    pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit, match=r"^error: cannot write .*compare\.png"):
        main([good, "--out", str(tmp_path / "out")])
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_without_matplotlib_the_table_is_there_and_a_line_tells_what_to_install(
    tmp_path, capsys, monkeypatch
):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    main([write(tmp_path / "a", [0.1]), "--out", str(tmp_path / "out")])
    assert capsys.readouterr().out.endswith(
        "no picture: it takes matplotlib, `pip install 'kdmini[plots]'`\n"
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["compare.md"]


def test_nothing_evaluated_is_no_picture(tmp_path, capsys):
    main([write(tmp_path / "a", [None]), "--out", str(tmp_path / "out")])
    assert capsys.readouterr().out.endswith("no picture: no epoch with AP50-95 yet\n")


def test_the_picture_has_a_line_a_row_and_a_band_between_the_seeds(tmp_path):
    """Where the band is, and where it is not, by the pixels below and above the mean of two flat
    curves.
    """
    pytest.importorskip("matplotlib")
    folders = [write(tmp_path / f"$a_{s}", [score] * 3, s) for s, score in enumerate((0.2, 0.6))]
    folders.append(write(tmp_path / "_b", [0.8] * 3, 0, {"note": "$x^$ 90%"}))
    main([*folders, "--out", str(tmp_path / "deep/out")])
    assert sorted(path.name for path in (tmp_path / "deep/out").iterdir()) == [
        "compare.md",
        "compare.png",
    ]
    pixels = np.asarray(Image.open(tmp_path / "deep/out/compare.png").convert("RGB")).astype(int)
    assert min(pixels.shape[:2]) > 500
    column = pixels[:, pixels.shape[1] // 3]  # away from the legend's text and the markers
    blue, orange = (0, 0x72, 0xB2), (0xE6, 0x9F, 0)
    lines = [np.nonzero(np.abs(column - colour).max(1) < 12)[0].mean() for colour in (blue, orange)]
    tint = np.nonzero(np.abs(column - (0.8 * 255 + 0.2 * np.array(blue))).max(1) < 4)[0]
    unit = (lines[0] - lines[1]) / (0.8 - 0.4)  # pixels of a whole AP: rows count downwards
    assert unit > 0
    assert lines[0] - tint.min() == pytest.approx(0.2 * unit, abs=4)
    assert tint.max() - lines[0] == pytest.approx(0.2 * unit, abs=4)
