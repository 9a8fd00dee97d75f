"""The run folder: one run each, its log cut off, rewound, and as a table."""

import csv
import json
import os
import shutil
import subprocess
import sys

import pytest

from kdmini.contracts import UserError
from kdmini.files import write_whole
from kdmini.runlog import RunFolder


def refused(function, *words):
    with pytest.raises(UserError) as caught:
        function()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def table(folder):
    with (folder.path / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def column(folder, name):
    return [row[name] for row in table(folder)]


def epochs(folder):
    return [record["epoch"] for record in folder.records()]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.path.iterdir()}


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "runs" / "a")
    folder.begin("run: runs/a\n")
    return folder


def resumed(folder):
    """The same folder in another process, once this one has ended."""
    folder._lockfile.close()
    return RunFolder(folder.path, resume=True)


# --- one run each


def test_nothing_is_written_before_the_run_begins(tmp_path):
    folder = RunFolder(tmp_path / "runs" / "a")
    assert folder.records() == []
    assert os.listdir(tmp_path) == []


def test_a_new_run_has_its_config_and_nothing_else(folder):
    assert sorted(os.listdir(folder.path)) == ["config.yaml", "lock", "log.txt"]
    assert (folder.path / "config.yaml").read_text() == "run: runs/a\n"
    assert folder.checkpoints.parent == folder.path
    assert folder.best.parent == folder.path
    assert folder.records() == []


def test_a_run_is_never_overwritten(folder):
    folder.log({"epoch": 0, "loss/box": 1.0})
    before = contents(folder)
    refused(lambda: RunFolder(folder.path), str(folder.path), "--resume", "run:")
    assert contents(folder) == before


def test_a_resumed_run_keeps_config_and_log(folder):
    folder.log({"epoch": 0, "loss/box": 1.0})
    assert resumed(folder).records() == [{"epoch": 0, "loss/box": 1.0}]
    assert (folder.path / "config.yaml").read_text() == "run: runs/a\n"


def test_a_folder_without_a_run_may_be_used(tmp_path):
    path = tmp_path / "a"
    path.mkdir()
    (path / "notes.txt").write_text("mine")
    RunFolder(path).begin("x: 1\n")
    assert sorted(os.listdir(path)) == ["config.yaml", "lock", "log.txt", "notes.txt"]


def test_a_path_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    refused(lambda: RunFolder(tmp_path / "file" / "run").begin("x: 1\n"), "file", "run:")
    refused(lambda: RunFolder(tmp_path / "file").begin("x: 1\n"), "file", "run:")


# --- the log


def test_what_is_logged_is_read_back(folder):
    records = [
        {"epoch": -1, "distance/raw": 0.5},
        {"epoch": 0, "loss/box": 0.1 + 0.2, "skipped": 2},
    ]
    for record in records:
        folder.log(record)
    assert folder.records() == records
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == records


def test_the_table_has_every_column_that_ever_occurred(folder):
    folder.log({"epoch": -1, "distance/raw": 0.5})
    folder.log({"epoch": 0, "loss/box": 2.5})
    folder.log({"epoch": 1, "loss/box": 1.5, "score/AP": 0.25, "a, comma": 1})
    columns = ("epoch", "distance/raw", "loss/box", "score/AP", "a, comma")
    rows = [
        ("-1", "0.5", "", "", ""),
        ("0", "", "2.5", "", ""),
        ("1", "", "1.5", "0.25", "1"),
    ]
    assert table(folder) == [dict(zip(columns, row, strict=True)) for row in rows]
    names = ["config.yaml", "lock", "log.txt", "metrics.jsonl", "results.csv"]
    assert sorted(os.listdir(folder.path)) == names


@pytest.mark.parametrize("cut", [1, 5, 15])
def test_a_line_that_was_cut_off_is_passed_over(folder, cut):
    for epoch in range(3):
        folder.log({"epoch": epoch, "loss/box": 0.5})
    lines = folder.path / "metrics.jsonl"
    lines.write_bytes(lines.read_bytes()[: -1 - cut])  # the end of the line and more
    assert epochs(folder) == [0, 1]

    again = resumed(folder)
    again.rewind(2)
    again.log({"epoch": 2, "loss/box": 0.25})
    assert [record["loss/box"] for record in again.records()] == [0.5, 0.5, 0.25]
    assert column(again, "epoch") == ["0", "1", "2"]


def test_a_line_without_its_end_does_not_swallow_the_next(folder):
    folder.log({"epoch": 0})
    lines = folder.path / "metrics.jsonl"
    lines.write_bytes(lines.read_bytes() + b'{"epoch": 1, "lo')
    folder.log({"epoch": 2})
    assert epochs(folder) == [0, 2]


def test_rewinding_forgets_the_epochs_that_come_again(folder):
    for epoch in (-1, 0, 1, 2, 3):
        folder.log({"epoch": epoch, "loss/box": float(epoch)})
    folder.rewind(2)
    assert epochs(folder) == [-1, 0, 1]
    folder.log({"epoch": 2, "loss/box": 9.0})
    assert column(folder, "loss/box") == ["-1.0", "0.0", "1.0", "9.0"]
    folder.rewind(0)
    assert epochs(folder) == [-1]
    assert column(folder, "epoch") == ["-1"]


def test_rewinding_without_a_log_is_fine(folder):
    folder.rewind(3)
    assert folder.records() == []


# --- loggers


def failing(record):
    if record["epoch"] > 0:
        raise RuntimeError(f"no room\nfor {record['epoch']}")
    record.clear()  # its own


def test_loggers_get_every_record_and_one_that_fails_stops_nothing(tmp_path, capsys):
    kept = []
    folder = RunFolder(tmp_path / "a", loggers=[failing, kept.append])
    folder.begin("run: a\n")
    records = [{"epoch": epoch, "loss/box": 0.5} for epoch in range(-1, 4)]
    for record in records:
        folder.log(record)
    assert kept == folder.records() == records
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: log: function failed, and the run goes on without: Runtime")
    assert "no room\\nfor 1" in line


def test_of_several_processes_one_logs(tmp_path):
    kept = []
    RunFolder(tmp_path / "a", lead=False, loggers=[kept.append]).log({"epoch": 0})
    assert kept == []


# --- a folder that goes away


def deleted(folder):
    shutil.rmtree(folder.path)


def deleted_and_made_anew(folder):
    deleted(folder)
    RunFolder(folder.path).begin("another: run\n")


def renamed(folder):
    folder.path.rename(folder.path.with_name("b"))


def emptied(folder):
    for path in folder.path.iterdir():
        path.unlink()


@pytest.mark.parametrize("lose", [deleted, deleted_and_made_anew, renamed, emptied])
def test_nothing_is_written_where_the_folder_was(folder, lose):
    folder.log({"epoch": 0})
    lose(folder)
    runs = folder.path.parent
    before = {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()}
    refused(lambda: folder.log({"epoch": 1}), str(folder.path), "deleted, renamed or emptied")
    refused(folder.check, "deleted, renamed or emptied")
    assert {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()} == before


def test_a_run_that_lost_its_folder_gets_one_beside_it(folder):
    shutil.rmtree(folder.path)
    for name in ("a_rescued", "a_rescued1"):
        other = folder.beside()
        other.begin("x: 1\n")
        assert other.path == folder.path.with_name(name)
        other.check()


def test_a_lock_that_was_deleted_loses_nothing(folder):
    (folder.path / "lock").unlink()
    folder.log({"epoch": 0})
    assert epochs(folder) == [0]


# --- files


def test_a_text_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_whole(path, "old")

    def blow(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", blow)
        refused(lambda: write_whole(path, "new"), str(path), "No space left")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]

    write_whole(path, "new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


BEGIN = """
import sys
from kdmini.runlog import RunFolder
RunFolder(sys.argv[1]).begin("names: [caf\\u00e9]\\n")
"""


def test_a_config_is_written_as_utf_8_whatever_the_locale(tmp_path):
    plain = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    subprocess.run([sys.executable, "-c", BEGIN, str(tmp_path / "a")], check=True, env=plain)
    assert (tmp_path / "a" / "config.yaml").read_bytes() == "names: [café]\n".encode()


@pytest.mark.parametrize(
    "line",
    [
        "[1, 2]",
        "7",
        "null",
        "NaN",
        '{"loss/box": 1}',
        '{"epoch": "2"}',
        '{"epoch": true}',
        "[" * 200_000,
        '{"epoch": 1' + "0" * 5000 + "}",
    ],
    ids=lambda line: line[:15],
)
def test_a_line_that_is_json_and_no_record_is_named(folder, line):
    folder.log({"epoch": 0})
    lines = folder.path / "metrics.jsonl"
    lines.write_text(lines.read_text() + line + "\n" + '{"epoch": 1}\n')
    for look in (folder.records, lambda: resumed(folder)):
        with pytest.raises(UserError, match=r"metrics\.jsonl:2: .* delete that line$") as caught:
            look()
        assert len(str(caught.value)) < 300
