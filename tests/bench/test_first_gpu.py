"""bench.first_gpu, asked of a CPU; and what its table says of answers, good and bad."""

import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import first_gpu
from bench.card import OF_A_CARD, near
from bench.programs import Programs, scores_of

CPU = torch.device("cpu")
SOON = 60.0  # seconds


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KDMINI_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    return Programs(CPU, tmp_path, time.monotonic() + SOON)


def rows_of(text: str) -> dict[str, str]:
    """Question -> answer, of a table."""
    rows = [line.strip("| ").split(" | ", 1) for line in text.splitlines()[4:]]
    return {name: said for name, said in rows}


@pytest.mark.long
def test_a_cpu_answers_all_that_is_not_of_a_card_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    record = tmp_path / "record.md"
    size = ["--imgsz", "64", "--batch", "2", "--steps", "1", "--rounds", "1"]
    first_gpu.main(["--device", "cpu", *size, "--record", str(record)])
    text = capsys.readouterr().out
    assert record.read_text() == text
    rows = rows_of(text)
    assert len(rows) == 18
    assert not any(first_gpu.FAILED in said or "no time" in said for said in rows.values())
    assert [name for name, said in rows.items() if said.startswith(OF_A_CARD)] == [
        "memory",
        "out of memory",
    ]
    assert rows["deterministic, twice"].startswith("equal to the bit")
    assert rows["torchrun, one rank"].startswith("epoch 1: box ")
    assert "all classes" in rows["eval.py"] and "parameters" in rows["eval.py"]
    assert "kdmini" in rows["step"] and "the student alone" in rows["step"]


# --- the table


def test_a_question_that_fails_says_so_in_its_row_and_the_others_are_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def broken() -> str:
        raise ValueError("one\n| line\n" + 1000 * "x")

    asked = {"first": broken, "second": lambda: "fine"}
    monkeypatch.setattr(first_gpu, "questions_of", lambda *_: asked)
    record = tmp_path / "record.md"
    with pytest.raises(SystemExit, match=first_gpu.FAILED):
        first_gpu.main(["--device", "cpu", "--record", str(record)])
    rows = rows_of(record.read_text())
    assert rows["first"].startswith("FAILED, ValueError: one ")
    assert len(rows["first"]) < 400
    assert rows["second"].startswith("fine [")
    capsys.readouterr()
    first_gpu.main(["--device", "cpu", "--only", "sec"])
    assert [*rows_of(capsys.readouterr().out)] == ["second"]


def test_what_there_is_no_time_for_is_not_asked_or_is_stopped() -> None:
    def slow() -> str:
        raise subprocess.TimeoutExpired("train.py", 1)

    assert first_gpu.answer(slow, time.monotonic() - 1) == "no time was left"
    said = first_gpu.answer(slow, time.monotonic() + SOON)
    assert said.startswith("stopped, for no time was left [")


def test_only_with_photographs_are_rows_of_the_evidence_asked_for(programs: Programs) -> None:
    card = first_gpu.Card(CPU, 64, 2, 1, 1)
    without = first_gpu.questions_of(card, programs, None, Path("runs"))
    listed = first_gpu.questions_of(card, programs, Path("data"), Path("runs"))
    assert [*listed] == [*without, "evidence"]


@pytest.mark.parametrize("value", [2e-4, float("nan")])
def test_what_is_too_far_from_the_cpu_fails(value: float) -> None:
    assert near({"eager": 0.5e-4}, 1e-4) == "eager 5.0e-05"
    with pytest.raises(AssertionError, match="compiled"):
        near({"eager": 0.0, "compiled": value}, 1e-4)


# --- the programs


def test_a_program_that_ends_otherwise_than_expected_fails_with_its_last_line(
    programs: Programs,
) -> None:
    leave = "import sys; print('working'); sys.exit('error: no')"
    with pytest.raises(RuntimeError, match="exit code 1: error: no"):
        programs.command("-c", leave)
    assert programs.command("-c", leave, expected=1) == ["working", "error: no"]
    with pytest.raises(RuntimeError, match="exit code 0"):
        programs.command("-c", "print('fine')", expected=1)


def test_a_program_is_stopped_when_time_is_up(programs: Programs) -> None:
    programs.ends = 0
    started = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        programs.command("-c", f"import time; time.sleep({SOON})")
    assert time.monotonic() - started < SOON / 2


def says(monkeypatch: pytest.MonkeyPatch, programs: Programs, text: str) -> list[Any]:
    """What is asked for from now on, of programs that print this text; the teacher is there."""
    programs.weights.parent.mkdir(exist_ok=True)
    programs.weights.touch()
    asked: list[Any] = []

    def command(*arguments: object, expected: int = 0) -> list[str]:
        asked.append([str(argument) for argument in arguments])
        return text.splitlines()

    monkeypatch.setattr(programs, "command", command)
    return asked


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("decoding\nerror: out of memory on the device: train.batch=128 ...", True),
        ("Traceback (most recent call last):\nerror: out of memory on the device: ...", False),
        ("torch.OutOfMemoryError: CUDA out of memory", False),
    ],
)
def test_memory_of_a_card_has_to_run_out_in_a_line(
    monkeypatch: pytest.MonkeyPatch, programs: Programs, text: str, good: bool
) -> None:
    programs.cuda = True
    says(monkeypatch, programs, text)
    if good:
        assert programs.out_of_memory().startswith("error: out of memory")
        return
    with pytest.raises(AssertionError):
        programs.out_of_memory()


def test_two_runs_that_differ_fail(monkeypatch: pytest.MonkeyPatch, programs: Programs) -> None:
    says(monkeypatch, programs, "")
    for run, loss, speed in (("first", 1, 70), ("second", 1, 80)):
        folder = programs.scratch / run
        folder.mkdir()
        line = f'{{"epoch": 0, "loss/box": {loss}, "images/s": {speed}}}\n'
        (folder / "metrics.jsonl").write_text(line)
    assert programs.repeats() == "equal to the bit"
    (folder / "metrics.jsonl").write_text(line.replace("1", "2"))
    with pytest.raises(AssertionError, match="not equal"):
        programs.repeats()


def test_the_rows_of_the_step_are_told_in_a_line(
    monkeypatch: pytest.MonkeyPatch, programs: Programs
) -> None:
    table = "| | ms per image | faster than A |\n|---|---|---|\n| A | 2 | 1 (1, 1) |"
    says(monkeypatch, programs, f"The step:\n\n{table}")
    assert programs.step(64, 2, 1) == "A 2 ms, 1 (1, 1); no ultralytics here"
    says(monkeypatch, programs, f"{table}\n| ultralytics 8.4 | 3 | 0.67 (0.6, 0.7) |")
    said = programs.step(64, 2, 1)
    assert said == "A 2 ms, 1 (1, 1); ultralytics 8.4 3 ms, 0.67 (0.6, 0.7)"


def test_the_evidence_is_told_by_the_scores_that_its_runs_have(
    monkeypatch: pytest.MonkeyPatch, programs: Programs, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    for name, scores in {"alone-0": ["", "0.25", "0.5"], "notes-0": [""]}.items():
        (runs / name).mkdir(parents=True)
        lines = ["epoch,score/AP50-95", *(f"{n},{score}" for n, score in enumerate(scores))]
        (runs / name / "results.csv").write_text("\n".join(lines))
    assert [*scores_of(runs)] == [("alone-0", "0.500")]
    asked = says(monkeypatch, programs, "")
    assert programs.evidence(Path("photographs"), runs) == f"alone-0 0.500; to go on: --runs {runs}"
    assert asked[0][:3] == ["-m", "bench.evidence", "gpu"]
    assert asked[0][-2:] == ["--root", "photographs"]


def test_evidence_that_was_stopped_is_told_too(
    monkeypatch: pytest.MonkeyPatch, programs: Programs, tmp_path: Path
) -> None:
    def stopped(*_: object) -> list[str]:
        raise subprocess.TimeoutExpired("bench.evidence", 1)

    monkeypatch.setattr(programs, "command", stopped)
    assert programs.evidence(tmp_path, tmp_path).startswith("no run has a score yet")
