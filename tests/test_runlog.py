"""The run folder: one run each, its log cut off, rewound, and as a table."""

import csv
import json
import os
import subprocess
import sys

import pytest

from kdmini.contracts import UserError
from kdmini.runlog import RunFolder, write_whole


def refused(function, *words):
    with pytest.raises(UserError) as caught:
        function()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def table(folder):
    with (folder.path / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "runs" / "a")
    folder.begin("run: runs/a\n")
    return folder


def test_nothing_is_written_before_the_run_begins(tmp_path):
    folder = RunFolder(tmp_path / "runs" / "a")
    assert folder.records() == [] and os.listdir(tmp_path) == []


def test_a_new_run_has_its_config_and_nothing_else(folder):
    assert sorted(os.listdir(folder.path)) == ["config.yaml", "lock"]
    assert (folder.path / "config.yaml").read_text() == "run: runs/a\n"
    assert folder.checkpoints.parent == folder.best.parent == folder.path
    assert folder.records() == []


def test_a_run_is_never_overwritten(folder):
    folder.log({"epoch": 0, "loss": 1.0})
    before = {path.name: path.read_bytes() for path in folder.path.iterdir()}
    refused(lambda: RunFolder(folder.path), str(folder.path), "--resume", "run:")
    assert {path.name: path.read_bytes() for path in folder.path.iterdir()} == before


def test_a_resumed_run_keeps_config_and_log(folder):
    folder.log({"epoch": 0, "loss": 1.0})
    path = folder.path
    folder._held.close()  # as the end of a process does
    again = RunFolder(path, resume=True)
    assert again.records() == [{"epoch": 0, "loss": 1.0}]
    assert (path / "config.yaml").read_text() == "run: runs/a\n"


def test_a_folder_without_a_run_may_be_used(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("mine")
    RunFolder(tmp_path / "a").begin("x: 1\n")
    assert sorted(os.listdir(tmp_path / "a")) == ["config.yaml", "lock", "notes.txt"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    refused(lambda: RunFolder(tmp_path / "file" / "run").begin("x: 1\n"), "file", "run:")
    refused(lambda: RunFolder(tmp_path / "file").begin("x: 1\n"), "file", "run:")


def test_what_is_logged_is_read_back(folder):
    records = [{"epoch": -1, "distance/raw": 0.5}, {"epoch": 0, "loss": 0.1 + 0.2, "skipped": 2}]
    for record in records:
        folder.log(record)
    assert folder.records() == records
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == records


def test_the_table_has_every_column_that_ever_occurred(folder):
    folder.log({"epoch": -1, "distance/raw": 0.5})
    folder.log({"epoch": 0, "loss": 2.5})
    folder.log({"epoch": 1, "loss": 1.5, "AP": 0.25, "a, comma": 1})
    assert table(folder) == [
        {"epoch": "-1", "distance/raw": "0.5", "loss": "", "AP": "", "a, comma": ""},
        {"epoch": "0", "distance/raw": "", "loss": "2.5", "AP": "", "a, comma": ""},
        {"epoch": "1", "distance/raw": "", "loss": "1.5", "AP": "0.25", "a, comma": "1"},
    ]
    assert sorted(os.listdir(folder.path)) == [
        "config.yaml",
        "lock",
        "metrics.jsonl",
        "results.csv",
    ]


@pytest.mark.parametrize("cut", [1, 5, 15])
def test_a_line_that_was_cut_off_is_passed_over(folder, cut):
    for epoch in range(3):
        folder.log({"epoch": epoch, "loss": 0.5})
    lines = folder.path / "metrics.jsonl"
    lines.write_bytes(lines.read_bytes()[: -1 - cut])  # the end of the line and more
    assert [record["epoch"] for record in folder.records()] == [0, 1]
    folder._held.close()
    again = RunFolder(folder.path, resume=True)
    again.rewind(2)
    again.log({"epoch": 2, "loss": 0.25})
    assert [record["loss"] for record in again.records()] == [0.5, 0.5, 0.25]
    assert [row["epoch"] for row in table(again)] == ["0", "1", "2"]


def test_a_line_without_its_end_does_not_swallow_the_next(folder):
    folder.log({"epoch": 0})
    lines = folder.path / "metrics.jsonl"
    lines.write_bytes(lines.read_bytes() + b'{"epoch": 1, "lo')
    folder.log({"epoch": 2})
    assert [record["epoch"] for record in folder.records()] == [0, 2]


def test_rewinding_forgets_the_epochs_that_come_again(folder):
    for epoch in (-1, 0, 1, 2, 3):
        folder.log({"epoch": epoch, "loss": float(epoch)})
    folder.rewind(2)
    assert [record["epoch"] for record in folder.records()] == [-1, 0, 1]
    folder.log({"epoch": 2, "loss": 9.0})
    assert [row["loss"] for row in table(folder)] == ["-1.0", "0.0", "1.0", "9.0"]
    folder.rewind(0)
    assert [record["epoch"] for record in folder.records()] == [-1]
    assert [row["epoch"] for row in table(folder)] == ["-1"]


def test_rewinding_without_a_log_is_fine(folder):
    folder.rewind(3)
    assert folder.records() == []


def test_a_text_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_whole(path, "old")

    def blow(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", blow)
        refused(lambda: write_whole(path, "new"), str(path), "No space left")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
    write_whole(path, "new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]


def test_a_config_is_written_as_utf_8_whatever_the_locale(tmp_path):
    code = "import sys; from kdmini.runlog import RunFolder; RunFolder(sys.argv[1]).begin('names: [caf\\u00e9]\\n')"
    plain = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], check=True, env=plain)
    assert (tmp_path / "a" / "config.yaml").read_bytes() == "names: [café]\n".encode()
