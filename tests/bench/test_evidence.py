"""The runs of the evidence: they go on where they were, and what is kept of them."""

import contextlib
import io
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

import eval as eval_script
from bench import evidence, protocol
from bench.evidence import ByClass, Sample, main
from bench.protocol import protocol_of
from kdmini import config
from kdmini.contracts import UserError
from kdmini.defaults import defaults, filled
from kdmini.detection.voc import VOC, VOC_NAMES
from tests.conftest import CONFIG, ROOT, TINY

NAMES = ["circle", "square", "triangle", "star", "ring", "cross"]

ROWS = ["teacher", "alone", "notes"]
RUNS = "elsewhere"  # folder of the run folders
PHOTOGRAPHS = "set"
COMMAND = ["gpu", *ROWS, "--seeds", "0", "1", "--runs", RUNS, "--root", PHOTOGRAPHS]


class Generous(ByClass):
    """A teacher of two epochs detects nothing, which --check would rightly refuse."""

    left = 0  # evaluations before somebody stops the program

    def compute(self) -> dict[str, float]:
        Generous.left -= 1
        if Generous.left < 0:
            raise KeyboardInterrupt
        return {name: score + 0.01 for name, score in super().compute().items()}


class Made(NamedTuple):
    """The runs of COMMAND, in a folder of their own, stopped once and gone on with."""

    folder: Path
    kept_when_stopped: set[str]  # names of the runs that were done
    lines_when_stopped: int  # of the log of the run that was not
    output: str  # of going on

    @property
    def runs(self) -> Path:
        return self.folder / RUNS

    @property
    def kept(self) -> Path:
        return self.folder / "bench/evidence/gpu"


@pytest.fixture(scope="module")
def made(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("evidence")
    write_protocol(folder)
    write_photographs(folder / PHOTOGRAPHS, shapes)
    with inside(folder):
        Generous.left = 3
        with pytest.raises(KeyboardInterrupt):
            main(COMMAND)
        kept = {path.parent.name for path in Path("bench/evidence/gpu").glob("*/results.csv")}
        log = Path(RUNS, "alone-1/metrics.jsonl").read_text()

        Generous.left = 100
        with contextlib.redirect_stdout(io.StringIO()) as output:
            main(COMMAND)
    return Made(folder, kept, log.count("\n"), output.getvalue())


def write_protocol(folder: Path) -> None:
    """Two epochs of tiny detectors on 16 photographs of a folder that is not there."""
    settings = yaml.safe_load(CONFIG.format(run="unused", shapes="usual", tiny=TINY))
    settings["data"]["train"] = {
        "build": "bench.evidence:Sample",
        "splits": ["train"],
        "count": 16,
    }
    settings["data"]["val"] = {"build": "kdmini.detection.voc:VOC", "splits": ["val"]}
    settings["metric"] = {"build": "tests.bench.test_evidence:Generous"}
    settings["train"]["epochs"] = 2
    path = folder / "bench/evidence/gpu.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(config.dump(settings))
    (folder / "configs").symlink_to(ROOT / "configs")


def write_photographs(root: Path, shapes: Path) -> None:
    """The shapes under names of VOC."""
    shutil.copytree(shapes, root)
    for path in (root / "Annotations").iterdir():
        text = path.read_text()
        for shape, name in zip(NAMES, VOC_NAMES, strict=False):
            text = text.replace(f"<name>{shape}</name>", f"<name>{name}</name>")
        path.write_text(text)


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """The folder in the place of the repository."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol, "ROOT", folder)
        patch.setattr(evidence, "LEAST_OBJECTS", 3)
        patch.chdir(folder)
        yield


def test_a_run_that_was_stopped_goes_on(made: Made) -> None:
    assert made.kept_when_stopped == {"teacher-0", "alone-0"}
    assert made.lines_when_stopped == 2  # before training, and one epoch
    assert f"resumed from {RUNS}/alone-1" in made.output


def test_what_is_kept_of_each_run(made: Made) -> None:
    kept = {path.name: {file.name for file in path.iterdir()} for path in made.kept.iterdir()}
    texts = {"config.yaml", "results.csv", "made.txt"}
    assert kept == {
        "teacher-0": texts,
        "alone-0": texts,
        "alone-1": texts,
        "notes-0": {*texts, "check.txt"},
        "notes-1": texts,
    }


@pytest.mark.parametrize("name", ["alone-1", "notes-0"])
def test_the_curve_is_kept_as_it_was_logged(made: Made, name: str) -> None:
    kept = (made.kept / name / "results.csv").read_text()
    assert kept == (made.runs / name / "results.csv").read_text()


@pytest.mark.parametrize("name", ["alone-1", "notes-0"])
def test_the_config_is_kept_with_the_usual_folders(made: Made, name: str) -> None:
    text = (made.runs / name / "config.yaml").read_text()
    assert f"run: {RUNS}/{name}\n" in text
    assert f"weights: {RUNS}/teacher-0/best.pt\n" in text
    usual = text.replace(RUNS, "runs/evidence/gpu").replace("root: set\n", "root: usual\n")
    kept = config.load(made.kept / name / "config.yaml")
    # the run's states what the protocol leaves to the defaults
    assert filled(kept, defaults(kept)) == yaml.safe_load(usual)


def test_the_check_is_of_the_student_that_was_trained_alone(made: Made) -> None:
    text = (made.kept / "notes-0/check.txt").read_text()
    assert "KD / task gradient" in text
    assert f"{RUNS}/alone-0/best.pt" in text


def test_the_page_of_these_runs(made: Made) -> None:
    with inside(made.folder):
        rows = len(protocol_of("gpu").rows)
    page = (made.folder / "bench/evidence/gpu.md").read_text()
    assert f"{3 * rows - 4} of {3 * rows} runs are yet to be made" in page
    assert "| notes " in page
    assert "aeroplane" in page
    assert "not trained yet" not in page
    assert (made.folder / "bench/evidence/gpu.png").stat().st_size > 10_000


def test_a_score_of_one_class_has_no_place_in_the_rows_of_all(
    made: Made, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = str(made.runs / "alone-0/config.yaml")
    weights = str(made.runs / "alone-0/best.pt")
    monkeypatch.setattr(sys, "argv", ["eval.py", "--config", settings, "--weights", weights])
    with inside(made.folder):
        eval_script.main()
    lines = capsys.readouterr().out.splitlines()
    assert not any("AP aeroplane" in line for line in lines)
    assert any(line.startswith("aeroplane ") for line in lines)


def test_nothing_is_trained_twice(made: Made) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.runs.rglob("*.pt")}
    with inside(made.folder):
        main(COMMAND)
    after = {path: path.stat().st_mtime_ns for path in made.runs.rglob("*.pt")}
    assert before
    assert after == before


@pytest.fixture
def few(shapes: Path, tmp_path: Path) -> Path:
    """The shapes with a split `few` of seven."""
    root = tmp_path / "shapes"
    shutil.copytree(shapes, root)
    splits = root / "ImageSets/Main"
    lines = (splits / "train.txt").read_text().splitlines(keepends=True)
    (splits / "few.txt").write_text("".join(lines[:7]))
    return root


def test_a_sample_is_evenly_spaced(few: Path) -> None:
    everything = [record.id for record in VOC(str(few), ["few"], NAMES).records]
    sample = Sample(str(few), ["few"], 3, NAMES)
    assert [record.id for record in sample.records] == [everything[i] for i in (0, 2, 4)]
    assert len(sample.photographs) == 3


@pytest.mark.parametrize("count", [0, 8])
def test_a_sample_of_nothing_or_of_too_many(few: Path, count: int) -> None:
    with pytest.raises(UserError, match=f"data.train.count: {count} .* there are 7"):
        Sample(str(few), ["few"], count, NAMES)


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
    command = f"python -m bench.evidence cpu {needed} --seeds 0"
    assert f"notes needs {tmp_path}/{needed}-0: `{command}` first" in str(left.value)
