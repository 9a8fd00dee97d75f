"""The page of what has changed: its numbers by hand, of each task, and in a real browser."""

import base64
import io
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import train as train_script
from examples.shapes import SHAPE_NAMES
from kdmini import config
from kdmini.contracts import UserError
from kdmini.detection.average_precision import DetectionMetric
from tests.commands import run as run_script
from tests.conftest import CLASSIFICATION, SEGMENTATION, write_config
from tests.tools import browser
from tests.tools.run_folders import write

pytest.importorskip("matplotlib")
from kdmini.tools import report, report_page
from kdmini.tools.report_pictures import FEW, looks, most_changed, over, worst
from kdmini.tools.report_rows import mean_of
from kdmini.tools.scenes import Scenes

SHORT = ("train.epochs=1", "data.limit=6", "train.batch=3")
ALONE = ("teacher=null", "distill=null")


class Reading(HTMLParser):
    """Texts of a page by tag: `of["h2"]`; rows of all tables; addresses of all pictures."""

    def __init__(self, page: str):
        super().__init__()
        self.of: dict[str, list[str]] = {}
        self.rows: list[list[str]] = []
        self.sources: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.rows = [[" ".join(cell.split()) for cell in row] for row in self.rows]

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.of.setdefault(tag, []).append("")
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "div" and self.rows and self.rows[-1]:
            self.rows[-1][-1] += " "
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        for tag in self.open:
            self.of[tag][-1] += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def page_of(tmp_path: Path, *runs: object) -> Reading:
    out = tmp_path / "out/report.html"
    report.main([*map(str, runs), "--out", str(out)])
    return Reading(out.read_text())


def picture(source: str) -> np.ndarray:
    """(H, W, 3) 0..255 of a source in the page."""
    content = base64.b64decode(source.partition("base64,")[2])
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), float)


def trained(folder: Path, shapes: Path, *overrides: str) -> Path:
    """A run of one epoch on six images."""
    folder.mkdir()
    run_script(train_script, "--config", write_config(folder, shapes), *SHORT, *overrides)
    return folder / "run"


@pytest.fixture(scope="module")
def detectors(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> tuple[Path, Path]:
    """Runs with and without a teacher."""
    folder = tmp_path_factory.mktemp("detectors")
    taught = trained(folder / "taught", shapes)
    return taught, trained(folder / "alone", shapes, *ALONE)


@pytest.fixture(scope="module")
def page(detectors: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of both, as if the student alone had found 0.4 of every object, and the other all of it."""
    out = tmp_path_factory.mktemp("page") / "report.html"
    shares: dict[DetectionMetric, float] = {}
    really = DetectionMetric.update

    def update(metric: DetectionMetric, predictions: list, targets: list) -> None:
        share = shares.setdefault(metric, 1.0 if shares else 0.4)
        found = []
        for target in targets:
            boxes = torch.tensor(target["boxes_xyxy"])
            boxes[:, 2] = boxes[:, 0] + (boxes[:, 2] - boxes[:, 0]) * share
            labels = torch.tensor(target["labels"])
            found.append({"boxes_xyxy": boxes, "labels": labels, "scores": labels * 0 + 0.9})
        really(metric, found, targets)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DetectionMetric, "update", update)
        report.main([*map(str, detectors), "--out", str(out)])
    return out


# --- numbers by hand


def seeds_of(tmp_path: Path) -> list[str]:
    """Three seeds with a teacher, and the same three without."""
    taught = {"distill": {"taps": []}, "teacher": {"build": "a.b:C"}}
    folders = []
    for seed, (alone, better) in enumerate([(0.30, 0.33), (0.32, 0.34), (0.37, 0.38)]):
        folders.append(write(tmp_path / f"taught{seed}", [0.1, better, 0.2], seed, taught))
        folders.append(write(tmp_path / f"alone{seed}", [0.1, alone, 0.2], seed))
    return folders


def test_scores_and_differences_have_intervals_over_the_seeds(tmp_path: Path) -> None:
    reading = page_of(tmp_path, *seeds_of(tmp_path))
    header, alone, taught = reading.rows
    assert header == ["", "VOC07", "VOC", "AP50-95", "runs"]
    # the first, though named second
    assert alone[0] == "alone0 distill unset, teacher unset"
    assert taught[0] == "taught0 distill=given, teacher=C"
    # 4.303 * 0.0361 / sqrt(3) is 0.0896
    assert alone[3] == "0.330 0.240 to 0.420"
    # differences 0.03, 0.02, 0.01: 4.303 * 0.01 / sqrt(3) is 0.0248
    assert taught[3] == "0.350 0.284 to 0.416 +0.020 -0.005 to +0.045 cannot be told"
    assert all(f"alone{seed} (seed {seed})" in alone[4] for seed in range(3))
    assert reading.of["h2"][:2] == ["Scores", "Curves"]
    assert "it has no best.pt yet" in reading.of["body"][0]


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    reading = page_of(tmp_path, write(tmp_path / "one", [0.1, 0.3, 0.2]))
    assert reading.rows[1][3] == "0.300"
    assert reading.of["h1"] == ["The run one"]


def test_tables_are_compared_by_their_first_column() -> None:
    first = {"cat": {"AP": 0.5, "objects": 3}, "dog": {"AP": 0.25, "objects": 0}}
    second = {"cat": {"AP": 0.6, "objects": 3}, "dog": {"AP": 0.05, "objects": 1}}
    html = report_page.compared({"alone": first, "taught": second})
    assert Reading(html).rows == [
        ["", "alone", "taught"],
        ["", "AP", "objects", "AP", "objects", "difference"],
        ["cat", "0.500", "3", "0.600", "3", "+0.100"],
        ["dog", "0.250", "0", "0.050", "1", "-0.200"],
    ]
    bar = re.compile(r'class="(better|worse)" style="left:([\d.]+)%;width:([\d.]+)%"')
    # the largest change fills half of the bar, to its side of the middle
    assert bar.findall(html) == [("better", "50.0", "25.0"), ("worse", "0.0", "50.0")]
    html = report_page.compared({"alone": first, "taught": second}, less_is_better=True)
    assert bar.findall(html) == [("worse", "50.0", "25.0"), ("better", "0.0", "50.0")]


def test_what_is_not_a_number_is_a_dash_or_left_out() -> None:
    nan = float("nan")
    one = {"cat": {"AP": nan}, "dog": {"AP": nan}}
    other = {"cat": {"AP": -0.0001}, "dog": {"AP": nan}}
    rows = Reading(report_page.compared({"one": one, "other": other})).rows
    assert rows[2:] == [["cat", "-", "0.000", "-"]]


def test_means_over_seeds_leave_out_what_is_not_a_number() -> None:
    nan = float("nan")
    tables = [
        {"cat": {"AP": 0.2, "number": 3}, "dog": {"AP": nan, "number": 0}},
        {"cat": {"AP": 0.4, "number": 6}, "dog": {"AP": 0.1, "number": 1}},
    ]
    assert mean_of(tables) == {
        "cat": {"AP": pytest.approx(0.3), "number": 4},
        "dog": {"AP": pytest.approx(0.1), "number": 0},
    }


def test_the_worst_and_the_most_changed_images() -> None:
    before = {f"{n}": 0.5 for n in range(8)}
    after = {**before, "3": 0.9, "5": 0.2, "7": 0.6, "new": 0.1}
    assert worst(after)[:2] == ["new", "5"]
    assert most_changed(before, after) == ["3", "5", "7"]
    assert len(worst(after)) == FEW


def test_names_out_of_files_stay_names() -> None:
    name = '<script>alert("x")</script>'
    html = report_page.section(
        name,
        name,
        report_page.table([name], [[report_page.text(name)]]),
        report_page.small(name),
        report_page.compared({name: {name: {name: 1.0}}}),
        report_page.captioned(report_page.picture("data:,", name), name),
        report_page.slider([report_page.Look(name, name, "data:,", "data:,")], name, name),
    )
    page = report_page.page(name, [html])
    assert page.count("<script>") == 1  # its own
    assert page.count("&lt;script&gt;") > 8


# --- pictures


class Half(nn.Module):
    """Sees one half of the image alone."""

    def __init__(self, left: bool):
        super().__init__()
        self.tap = nn.Identity()
        self.left = left

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        half = torch.zeros_like(images)
        middle = images.shape[3] // 2
        where = slice(0, middle) if self.left else slice(middle, None)
        half[..., where] = images[..., where]
        return self.tap(half)


def test_the_teacher_lies_under_the_student() -> None:
    scenes = Scenes(torch.rand(2, 3, 32, 32) / 10 + 0.5, [{"id": "a"}, {"id": "b"}], [])
    shown = [*looks(Half(left=True), Half(left=False), scenes, {"tap": "tap"})]
    assert [look.group for look in shown] == ["a", "b"]
    assert {look.caption for look in shown} == {f"tap: distance {2**0.5:.3f}"}
    for look in shown:
        green = picture(look.one)[..., 1]  # viridis grows in it
        assert green[:, :70].mean() > green[:, 90:].mean() + 50
        green = picture(look.other)[..., 1]
        assert green[:, 90:].mean() > green[:, :70].mean() + 50


def test_two_maps_have_one_scale() -> None:
    grey = np.zeros((8, 8))
    weak = np.asarray(over(grey, np.full((2, 2), 0.2), largest=1.0))
    strong = np.asarray(over(grey, np.full((2, 2), 1.0), largest=1.0))
    assert strong[..., 1].mean() > weak[..., 1].mean() + 50
    assert np.asarray(over(grey, np.zeros((2, 2)), largest=0.0)).max() < 100


# --- runs


def test_a_detector_is_told_of_in_full(page: Path, detectors: tuple[Path, Path]) -> None:
    reading = Reading(page.read_text())
    assert reading.of["h2"] == [
        *("Scores", "Curves", "By class", "By size", "By IoU", "Kinds of error"),
        *("Calibration", "What is taken for what", "Where teacher and student look"),
        *("The worst images", "The most changed images"),
    ]
    taps = config.load(detectors[0] / "config.yaml")["distill"]["taps"]
    assert page.read_text().count('class="over"') == report.IMAGES * len(taps)
    # of two networks; all images have changed
    assert page.read_text().count('<figure class="">') == 2 + 2 * 2 * FEW
    rows = {row[0]: row[1:] for row in reading.rows}
    objects = rows["small"][1]  # none is larger
    assert rows["circle"] == rows["0.50"] == rows["0.95"] == ["0.000", "1.000", "+1.000"]
    assert rows["small"] == ["0.000", objects, "1.000", objects, "+1.000"]
    assert rows["place"] == ["1.000", objects, "0.000", "0", "-1.000"]
    assert rows["all from 0.1"][:4] == ["0.900", "0.900", "0.000", objects]


def test_every_picture_is_in_the_page(page: Path) -> None:
    reading = Reading(page.read_text())
    assert len(reading.sources) > 20
    assert all(source.startswith("data:") for source in reading.sources)
    for source in set(reading.sources) - {"data:,"}:
        assert picture(source).std() > 1


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Path:
    return trained(tmp_path_factory.mktemp("classes") / "taught", shapes, *CLASSIFICATION)


@pytest.fixture(scope="module")
def masker(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Path:
    return trained(tmp_path_factory.mktemp("masks") / "taught", shapes, *SEGMENTATION)


@pytest.mark.parametrize("task", ["classifier", "masker"])
def test_the_other_tasks_are_told_of_too(
    task: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    reading = page_of(tmp_path, request.getfixturevalue(task))
    assert reading.of["h2"] == [
        *("Scores", "Curves", "By class", "What is taken for what"),
        *("Where teacher and student look", "The worst images"),
    ]
    classes = [row for row in reading.rows if row[0] in SHAPE_NAMES]
    assert classes and all(re.fullmatch(r"[01]\.\d{3}", row[1]) for row in classes)


def test_runs_of_two_tasks_are_not_compared(
    detectors: tuple[Path, Path], classifier: Path, tmp_path: Path
) -> None:
    reading = page_of(tmp_path, classifier, detectors[1])
    assert "it is scored by another metric" in reading.of["body"][0]
    assert "By size" in reading.of["h2"]  # the one that is not distilled is the first


# --- mistakes


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        report.main([*map(str, arguments)])
    message = str(stopped.value)
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


def test_a_page_is_written_whole_or_not_at_all(
    detectors: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "report.html"
    out.write_text("before")
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        (folder / name).write_bytes((detectors[1] / name).read_bytes())
    (folder / "best.pt").write_bytes(b"no weights")
    assert "best.pt" in refusal(capsys, folder, "--out", out)
    assert "config.yaml" in refusal(capsys, tmp_path / "nothing", "--out", out)

    def fail(*told: object) -> str:
        raise UserError("too late")

    monkeypatch.setattr(report, "report", fail)
    assert "too late" in refusal(capsys, detectors[1], "--out", out)
    assert out.read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "run"]


def test_a_place_that_cannot_be_written_is_refused_first(
    detectors: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "folder" in refusal(capsys, detectors[1], "--out", tmp_path)
    (tmp_path / "file").write_text("")
    assert "--out" in refusal(capsys, detectors[1], "--out", tmp_path / "file/report.html")
    assert "evaluate" not in capsys.readouterr().err


# --- a browser


@pytest.fixture
def chromium(tmp_path: Path) -> Iterator[browser.Browser]:
    if browser.PROGRAM is None:
        pytest.skip(f"no browser is installed: none of {', '.join(browser.PROGRAMS)}")
    opened = browser.Browser(tmp_path)
    yield opened
    opened.close()


def test_a_browser_shows_it_without_a_connection(page: Path, chromium: browser.Browser) -> None:
    """On a telephone and on a screen."""
    for width in (400, 1200):
        chromium.open(page, width)
        assert chromium.value_of("document.documentElement.scrollWidth") <= width
        complete = "[...document.images].every(image => image.complete && image.naturalWidth > 0)"
        assert chromium.value_of(complete)
    elsewhere = [url for url in chromium.requests if not url.startswith("data:")]
    assert set(elsewhere) == {page.resolve().as_uri()}
    assert chromium.errors == []


def test_the_slider_moves_from_the_teacher_to_the_student(
    page: Path, chromium: browser.Browser
) -> None:
    chromium.open(page, 400)
    opacity = "getComputedStyle(document.querySelector('.look .over')).opacity"
    assert float(chromium.value_of(opacity)) == 0.5
    chromium.value_of("document.querySelector('.looks input').focus()")
    chromium.press("End", 35)
    assert float(chromium.value_of(opacity)) == 1
    chromium.press("Home", 36)
    assert float(chromium.value_of(opacity)) == 0
    chromium.press("ArrowRight", 39)
    assert float(chromium.value_of(opacity)) == pytest.approx(0.01)


def test_a_page_that_fetches_or_fails_would_be_seen(
    tmp_path: Path, chromium: browser.Browser
) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text('<img src="http://127.0.0.1:9/a.png"><script>nothing()</script>')
    chromium.open(bad, 400)
    assert "http://127.0.0.1:9/a.png" in chromium.requests
    assert chromium.errors
