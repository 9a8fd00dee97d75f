"""Rows of any config: run, kept, compared."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from bench import rows
from bench.findings import Result, read
from kdmini import config
from kdmini.tools.compare import interval
from tests.conftest import ROOT, write_config


def test_rows_are_run_kept_and_compared(
    tmp_path: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(rows, "ROOT", tmp_path)
    path = tmp_path / "trial.yaml"
    protocol = {
        "title": "A trial",
        "about": "Which is better.",
        "config": str(write_config(tmp_path, shapes)),
        "score": "AP50",
        "seeds": [0, 1],
        "overrides": ["train.epochs=1", "teacher=null", "distill=null"],
        "rows": {"alone": {}, "faster": {"overrides": ["train.lr0=0.02"]}},
    }
    path.write_text(config.dump(protocol))
    command = [str(path), "--runs", str(tmp_path / "runs"), "--root", str(shapes)]
    rows.main(command)
    page = (tmp_path / "trial.md").read_text()
    assert page.startswith("# A trial\n\nWhich is better.")
    assert "4 of 4 runs have been made" in page
    assert "| faster | " in page
    kept = tmp_path / "trial" / "faster-1"
    settings = config.load(str(kept / "config.yaml"))
    assert (settings["seed"], settings["train"]["lr0"]) == (1, 0.02)
    assert settings["run"] == "runs/evidence/trial/faster-1"

    capsys.readouterr()
    rows.main([*command, "faster", "--seeds", "1"])  # nothing is left of it
    assert "finished: best epoch 1" in capsys.readouterr().out
    rows.main([str(path), "--table"])
    assert (tmp_path / "trial.md").read_text() == page


def test_processes_share_the_rows(
    tmp_path: Path, shapes: Path, capsys: pytest.CaptureFixture
) -> None:
    """The teacher is first, and a row that fails is named when the others are done."""
    path = tmp_path / "trial.yaml"
    alone = ["teacher=null", "distill=null"]
    protocol = {
        "title": "",
        "about": "",
        "config": str(write_config(tmp_path, shapes)),
        "score": "AP50",
        "seeds": [0],
        "overrides": ["train.epochs=1"],
        "rows": {
            "taught": {"teacher": "large"},
            "broken": {"overrides": [*alone, "train.batch=1000"]},
            "large": {"overrides": alone},
        },
    }
    path.write_text(config.dump(protocol))
    with pytest.raises(SystemExit, match=r"error: broken, seed 0: error: .*batch"):
        rows.main([str(path), "--runs", str(tmp_path / "runs"), "--jobs", "2"])
    said = capsys.readouterr().out
    assert said.index("large, seed 0: done") < said.index("taught, seed 0: done")
    assert (tmp_path / "trial/taught-0/results.csv").exists()


def new_head(name: str) -> tuple[rows.Protocol, dict[str, dict[int, Result]]]:
    """A protocol of a head that begins anew, and what its rows gave."""
    path = ROOT / f"bench/evidence/{name}.yaml"
    protocol = rows.protocol_at(path)
    return protocol, {row: read(path.with_suffix(""), row) for row in protocol.rows}


def test_voc_best_has_what_gains_most_for_sure() -> None:
    """The row with the highest lower end of its interval. Its `align` is of equal networks."""
    key = "score/AP50-95"
    protocol, results = new_head("head")
    lower = {}
    for row in protocol.rows:
        if protocol.against(row) != protocol.baseline or protocol.row(row).ultralytics:
            continue
        ends = interval(rows.gains_of(results, row, protocol.baseline, key))
        if ends:
            lower[row] = ends[0]
    winner = max(lower, key=lambda row: lower[row])
    settings = rows.settings_of(protocol, winner, 1, Path("runs"), None)
    del settings["distill"]["align"]
    best = config.load(str(ROOT / "configs/voc_best.yaml"))
    assert best["distill"] == settings["distill"]
    usual = config.load(str(ROOT / "configs/voc.yaml"))
    assert {**best, "run": usual["run"], "distill": usual["distill"]} == usual


def test_the_document_of_the_evidence_has_the_gains_of_the_records() -> None:
    """Each cell of the table of a new head: difference, interval, number of pairs."""
    text = (ROOT / "docs/evidence.md").read_text()
    marked = text.split("<!-- head -->")[1].split("<!-- /head -->")[0]
    lines = [line for line in marked.splitlines() if line.startswith("| `")]
    assert len(lines) > 10
    protocols = [new_head("head"), new_head("head_card")]
    for line in lines:
        names, _, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        for cell, (protocol, results) in zip(cells, protocols, strict=True):
            known = [name for name in names.replace("`", "").split() if results.get(name)]
            if not cell:
                assert not known, line
                continue
            other = protocol.against(known[0])
            pairs = len(rows.gains_of(results, known[0], other, "score/AP50-95"))
            gain = rows.cells_of(protocol, known[0], results)[3]
            assert cell == f"{gain}, n={pairs}", line


def test_a_row_that_needs_a_teacher_names_it(tmp_path: Path, shapes: Path) -> None:
    path = tmp_path / "trial.yaml"
    protocol = {
        "title": "",
        "about": "",
        "config": str(write_config(tmp_path, shapes)),
        "score": "AP50",
        "seeds": [0],
        "rows": {"taught": {"teacher": "large"}},
    }
    path.write_text(config.dump(protocol))
    with pytest.raises(SystemExit, match=r"row taught is taught by .*large-0: make that row"):
        rows.main([str(path), "--runs", str(tmp_path / "runs")])


def protocols() -> list[Path]:
    """Those that are kept."""
    paths = sorted((ROOT / "bench/evidence").glob("*.yaml"))
    return [path for path in paths if "\nrows:" in path.read_text()]


@pytest.mark.parametrize("path", protocols(), ids=lambda path: path.stem)
def test_the_protocols_that_are_kept_can_be_run(path: Path) -> None:
    protocol = rows.protocol_at(path)
    for name in protocol.rows:
        settings = rows.settings_of(protocol, name, 0, Path("runs"), None)
        teacher = protocol.row(name).teacher
        if teacher:
            assert settings["teacher"]["weights"] == f"runs/{teacher}-0/best.pt"
        elif name not in ("kd", "unlabelled"):  # whose teacher has public weights
            assert settings.get("teacher") is None
        assert protocol.against(name) in protocol.rows
        assert teacher is None or protocol.seeds_of(teacher)[0] == 0


@pytest.mark.parametrize("path", protocols(), ids=lambda path: path.stem)
def test_the_page_of_a_protocol_is_made_of_its_records_alone(path: Path) -> None:
    kept = path.with_suffix("")
    protocol = rows.protocol_at(path)
    page = rows.page_of(protocol, path.relative_to(ROOT), kept)
    assert page == kept.with_suffix(".md").read_text()
    runs = {f"{name}-{seed}" for name in protocol.rows for seed in protocol.seeds_of(name)}
    assert {folder.name for folder in kept.iterdir()} <= runs


@pytest.mark.parametrize("path", protocols(), ids=lambda path: path.stem)
def test_a_record_has_the_config_of_its_row(path: Path) -> None:
    """So no run was made of a row that has been changed since."""
    kept = path.with_suffix("")
    protocol = rows.protocol_at(path)
    for folder in kept.iterdir():
        name, _, seed = folder.name.rpartition("-")
        runs = Path("runs/evidence") / kept.name
        expected = rows.settings_of(protocol, name, int(seed), runs, None)
        assert config.load(str(folder / "config.yaml")) == expected, folder.name


def test_processes_go_seed_by_seed_after_those_that_teach(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[list[str]] = []

    def note(command: list[str], **_: Any) -> subprocess.CompletedProcess:
        begun.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", note)
    settings: dict[str, dict[str, Any]] = {"taught": {"teacher": "large"}, "alone": {}, "large": {}}
    protocol = rows.Protocol("", "", "", settings, "AP50", (0, 1))
    wanted = [("taught", 0), ("taught", 1), ("alone", 0), ("alone", 1), ("large", 0)]
    rows.make_together(protocol, wanted, 1, [])
    runs = [(name, seed) for name, _, seed in begun]
    assert runs == [
        ("large", "0"),
        ("alone", "0"),
        ("taught", "0"),
        ("alone", "1"),
        ("taught", "1"),
    ]


def test_rows_of_the_baseline_are_compared_with_a_rival_too() -> None:
    """Pair by pair, and not those with a baseline of their own."""
    scores = {
        "alone": {0: 0.1, 1: 0.2},
        "ours": {0: 0.2, 1: 0.33},
        "long": {0: 0.5, 1: 0.5},
        "theirs": {1: 0.3, 0: 0.15, 2: 0.9},
    }
    results: Any = {}
    for row, of_seed in scores.items():
        results[row] = {s: Result({"score/AP": score}, 1.0, None) for s, score in of_seed.items()}
    settings: dict[str, dict[str, Any]] = {row: {} for row in scores}
    settings["long"] = {"against": "long"}
    protocol = rows.Protocol("", "", "", settings, "AP", (0, 1), rival="theirs")
    shown = {row: rows.cells_of(protocol, row, results)[-1] for row in scores}
    # 5 and 3 points: 4 with a standard error of 1, times 12.706
    assert shown["ours"] == "+4.00 (-8.71 to +16.71)"
    assert shown["alone"].startswith("-7.50 ")
    assert shown["long"] == shown["theirs"] == ""
