"""Pictures: what stands in them is what was measured, and they are there."""

import json
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import train
from examples.shapes import write_set
from kdmini import config
from kdmini.contracts import UserError
from kdmini.data.loader import Augment, TrainLoader, ValLoader
from kdmini.data.store import Store
from kdmini.detection.voc import VOC
from kdmini.detection.yolo11.model import YOLO11
from kdmini.sections import Sections
from tests.commands import run as run_script
from tests.conftest import CLASSIFIER, CONFIG, SEGMENTED, TINY

pytest.importorskip("matplotlib")
from kdmini.tools import visualize
from kdmini.tools.draw import Figure
from kdmini.tools.scenes import Material, feats_at

NAMES = ["circle", "square", "triangle", "star", "ring", "cross"]
TAPS = [f"model.{layer}" for layer in (6, 8, 13, 16, 19, 22)]
IMAGES = 3
SEED = 3  # of the config
HALF_A_DIGIT = 0.0006  # of the three decimals under the maps


@pytest.fixture(scope="module")
def run(tmp_path_factory, shapes) -> Path:
    """A run of one epoch with a teacher, on three images of each set."""
    folder = tmp_path_factory.mktemp("visualize")
    config = folder / "config.yaml"
    config.write_text(CONFIG.format(run=folder / "run", shapes=shapes, tiny=TINY))
    settings = [f"data.limit={IMAGES}", "train.batch=3", "train.epochs=1"]
    before = sys.argv
    sys.argv = ["train", "--config", str(config), *settings]
    try:
        train.main()
    finally:
        sys.argv = before
    return folder / "run"


@pytest.fixture(scope="module")
def figures(run: Path) -> dict[str, Figure]:
    return dict(visualize.figures_of(run, []))


def copy_of(run: Path, folder: Path, **sections: Any) -> Path:
    """The run with other sections in its config."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("ckpt", "pictures"))
    settings = yaml.safe_load((run / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**settings, **sections}))
    return folder


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def stored(shapes: Path, split: str) -> Store:
    return Store(VOC(str(shapes), [split], NAMES), 64, limit=IMAGES)


def detector(**settings: Any) -> YOLO11:
    return YOLO11(NAMES, yaml.safe_load(TINY), **settings)


def tapped(model: torch.nn.Module, images: torch.Tensor) -> list[np.ndarray]:
    """Attention maps in float64 by hooks of our own: at each tap (N, H, W)."""
    feats: dict[str, np.ndarray] = {}

    def keep(tap: str, output: torch.Tensor) -> None:
        feats[tap] = output.double().numpy()

    for tap in TAPS:
        module = model.get_submodule(tap)
        module.register_forward_hook(lambda module, args, output, tap=tap: keep(tap, output))
    with torch.no_grad():
        model.eval()(images)
    maps = []
    for tap in TAPS:
        energy = (feats[tap] ** 2).sum(1)
        norm = np.sqrt((energy**2).sum((1, 2), keepdims=True))
        maps.append(energy / norm)
    return maps


def distances(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> np.ndarray:
    """Maps at each tap, (N, H, W) -> (image, tap)."""
    of_taps = [np.sqrt(((a - b) ** 2).sum((1, 2))) for a, b in zip(one, other, strict=True)]
    return np.stack(of_taps, 1)


def cells(figure: Figure) -> np.ndarray:
    """The axes of attention maps: by image and tap, without the first column."""
    columns = 1 + len(TAPS)
    return np.array(figure.axes[: IMAGES * columns]).reshape(IMAGES, columns)[:, 1:]


def numbers(figure: Figure) -> np.ndarray:
    """What is written under each pair: (image, tap, number)."""
    rows = []
    for row in cells(figure):
        texts = [axis.get_xlabel() for axis in row]
        rows.append([[float(n) for n in re.findall(r"\d\.\d{3}", text)] for text in texts])
    return np.array(rows)


def rectangles(axis) -> list[list[float]]:
    boxes = [patch.get_bbox().extents.tolist() for patch in axis.patches]
    return sorted([round(side, 3) for side in box] for box in boxes)


# --- attention maps


def test_the_distances_under_the_maps_are_those_of_the_two_networks(
    run: Path, shapes: Path, figures: dict[str, Figure]
) -> None:
    images, _, _ = next(iter(ValLoader(stored(shapes, "val"), IMAGES)))
    torch.manual_seed(SEED)
    before = tapped(detector(), images)
    teacher = tapped(detector(), images)
    after = tapped(detector(weights=str(run / "best.pt")), images)

    apart = numbers(figures["attention"])[..., 0]
    np.testing.assert_allclose(apart, distances(teacher, after), atol=HALF_A_DIGIT)
    moved = [distances(before, after), distances(before, teacher), distances(after, teacher)]
    expected = np.stack(moved, -1)
    np.testing.assert_allclose(numbers(figures["before_after"]), expected, atol=HALF_A_DIGIT)
    assert moved[0].min() > HALF_A_DIGIT  # there is something to see

    for row, column in [(0, 0), (2, 3)]:
        layers = cells(figures["attention"])[row, column].images
        of_teacher = teacher[column][row]
        of_student = after[column][row]
        largest = max(of_teacher.max(), of_student.max())
        # every second layer is the image in grey
        for layer, values in zip(layers[1::2], (of_teacher, of_student), strict=True):
            np.testing.assert_allclose(layer.get_array(), values, atol=1e-5)
            np.testing.assert_allclose(layer.get_clim(), (0, largest), rtol=1e-4)


def test_before_is_what_the_run_began_with(run: Path, figures: dict[str, Figure]) -> None:
    """The run measured the same distance itself, before its first step."""
    began = records(run)[0]
    assert began["epoch"] == -1
    to_teacher = numbers(figures["before_after"])[..., 1]  # (image, tap)
    rounding = len(TAPS) * 0.0005
    assert to_teacher.sum(1).mean() == pytest.approx(began["distance/raw"], abs=rounding)


def test_no_hook_is_left_behind() -> None:
    model = detector()
    feats_at(TAPS, model, torch.rand(1, 3, 64, 64))
    assert not any(module._forward_hooks for module in model.modules())


# --- what the run's own pieces show


def test_the_batch_has_the_boxes_and_pixels_of_the_loader(
    shapes: Path, figures: dict[str, Figure]
) -> None:
    loader = TrainLoader(stored(shapes, "train"), IMAGES, 1, Augment(), seed=SEED)
    images, targets = next(loader.epoch(0))
    for n, axis in enumerate(figures["batch"].axes[:IMAGES]):
        real = targets["labels"][n] >= 0
        boxes = targets["boxes_xyxy"][n][real].tolist()
        assert rectangles(axis) == sorted([round(side, 3) for side in box] for box in boxes)
        names = [NAMES[label] for label in targets["labels"][n][real].tolist()]
        assert sorted(text.get_text() for text in axis.texts) == sorted(names)
        drawn = axis.images[0].get_array()
        assert np.array_equal(drawn, images[n].permute(1, 2, 0).numpy())


def test_the_curves_are_the_lines_of_metrics_jsonl(run: Path, figures: dict[str, Figure]) -> None:
    logged = records(run)
    expected: dict[str, list[tuple]] = {}
    for record in logged:
        for key in record.keys() - {"epoch", "skipped"}:
            expected.setdefault(key, []).append((record["epoch"] + 1, record[key]))
    panels = []
    for axis in figures["curves"].axes:
        panels.append(
            {line.get_label(): list(map(tuple, line.get_xydata())) for line in axis.lines}
        )
    drawn = [points for panel in panels for points in panel.values()]
    assert sorted(drawn) == sorted(expected.values())

    by_labels = {frozenset(panel): panel for panel in panels}
    assert (
        by_labels[frozenset({"aligned", "raw", "rolled", "constant"})]["raw"]
        == expected["distance/raw"]
    )
    assert by_labels[frozenset({"box", "cls", "dfl"})]["cls"] == expected["loss/cls"]
    assert by_labels[frozenset({"attention"})]["attention"]
    by_tap = [panel for panel in panels if set(panel) == set(TAPS)]
    of_second = [expected[f"distance/{kind}/{TAPS[1]}"] for kind in ("raw", "aligned")]
    assert sorted(panel[TAPS[1]] for panel in by_tap) == sorted(of_second)


# --- the metric names what draws the task


class Undrawn:
    """A metric without `figures`."""

    fitness = "count"

    def __init__(self) -> None:
        self.records: list[int] = []

    def update(self, predictions: list, targets: list) -> None:
        self.records.append(len(targets))

    def compute(self) -> dict[str, float]:
        return {"count": sum(self.records)}


class Drawn(Undrawn):
    figures = "tests.tools.test_visualize:figures_of_count"


class Misnamed(Undrawn):
    figures = "tests.tools.test_visualize:nothing"


def figures_of_count(material: Material) -> Iterator[tuple[str, Figure]]:
    if material.metric is not None:
        yield f"count_{sum(material.metric.records)}", Figure()


def test_a_metric_without_figures_gets_the_curves_and_the_maps_alone(
    run: Path, tmp_path: Path
) -> None:
    metric = {"build": "tests.tools.test_visualize:Undrawn"}
    other = copy_of(run, tmp_path / "other", metric=metric)
    assert list(dict(visualize.figures_of(other, []))) == ["curves", "attention", "before_after"]


def test_the_figures_of_a_metric_are_drawn_after_the_whole_validation_set(
    run: Path, tmp_path: Path
) -> None:
    metric = {"build": "tests.tools.test_visualize:Drawn"}
    other = copy_of(run, tmp_path / "other", metric=metric)
    names = list(dict(visualize.figures_of(other, [])))
    assert names == ["curves", f"count_{IMAGES}", "attention", "before_after"]


def test_figures_that_do_not_exist_are_a_mistake_that_is_named(run: Path, tmp_path: Path) -> None:
    metric = {"build": "tests.tools.test_visualize:Misnamed"}
    other = copy_of(run, tmp_path / "other", metric=metric)
    with pytest.raises(UserError, match=r"figures.*nothing"):
        dict(visualize.figures_of(other, []))


# --- the command


def pictures(folder: Path) -> dict[str, tuple[int, int]]:
    """The size of each, all decoded."""
    sizes = {}
    for path in folder.iterdir():
        with Image.open(path) as image:
            image.load()
            sizes[path.name] = image.size
    return sizes


def test_a_run_leaves_its_pictures(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    visualize.main([str(run)])
    sizes = pictures(run / "pictures")
    of_task = ["batch", "detections", "precision_recall", "confusion"]
    names = ["curves", *of_task, "attention", "before_after"]
    assert set(sizes) == {f"{name}.png" for name in names}
    for width, height in sizes.values():
        assert 600 < width <= 2000
        assert height > 300
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("picture: ")]
    assert [Path(line).stem for line in lines] == names


def test_a_run_without_a_teacher_has_no_pair_of_networks(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = copy_of(run, tmp_path / "alone", teacher=None, distill=None)
    figures = dict(visualize.figures_of(alone, []))
    assert "attention" not in figures
    assert "no teacher" in capsys.readouterr().out
    assert numbers(figures["before_after"]).shape == (IMAGES, len(TAPS), 1)

    (alone / "best.pt").unlink()  # of a run that has only begun
    assert set(dict(visualize.figures_of(alone, []))) == {"curves", "batch"}
    assert "best.pt" in capsys.readouterr().out


def test_a_student_of_which_no_taps_are_known_is_said_to_have_none(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**yaml.safe_load((run / "config.yaml").read_text()), "distill": None}
    sections = config.call(Sections, settings, "config.yaml")
    assert visualize.taps_of(sections, YOLO11(["a"], [0.5, 0.0625, 1024])) == TAPS
    assert capsys.readouterr().out == ""
    assert visualize.taps_of(sections, torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3))) == []
    (line,) = capsys.readouterr().out.splitlines()
    other = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3))
    assert visualize.taps_of(sections, YOLO11(["a"], [0.5, 0.0625, 1024]), other) == []
    assert "none are known of Sequential" in line
    assert "`distill` with `taps`" in line


def test_weights_alone_have_detections_and_their_own_maps(
    run: Path, shapes: Path, tmp_path: Path
) -> None:
    image = next((shapes / "JPEGImages").iterdir())
    out = tmp_path / "a" / "b"
    visualize.main([str(run / "best.pt"), str(image), "--out", str(out)])
    assert set(pictures(out)) == {"detections.png", "attention.png"}


def test_a_run_is_looked_at_on_images_that_are_named(run: Path, shapes: Path) -> None:
    image = next((shapes / "JPEGImages").iterdir())
    figures = dict(visualize.figures_of(run, [image]))
    titles = [axis.get_title() for axis in figures["detections"].axes]
    assert titles == [f"{image.stem}: detections"]  # nobody knows what is there


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["{run}/best.pt"], "name images"),
        (["{run}/nothing.pt", "x.jpg"], "nothing.pt"),
        (["{run}/ckpt"], "config.yaml"),
        (
            ["{run}/best.pt", "{run}/config.yaml", "--out", "{tmp}"],
            "config.yaml: not a usable image",
        ),
        (["{run}", "{run}/config.yaml", "--out", "{tmp}"], "config.yaml: not a usable image"),
        (["{run}", "--out", "{run}/config.yaml"], "config.yaml"),
        (["{run}", *["x.jpg"] * 25], "25 images"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], named: str, run: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        visualize.main([text.format(run=run, tmp=tmp_path) for text in arguments])
    message = str(stopped.value.code)
    assert message.startswith("error: ")
    assert named in message
    assert "\n" not in message
    assert not list(tmp_path.iterdir())


# --- masks


@pytest.fixture(scope="module")
def masked_run(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Path:
    """Of Fast-SCNN under SegFormer, on three images of each set."""
    folder = tmp_path_factory.mktemp("masks")
    settings = [
        f"run={folder / 'run'}",
        f"data.root={shapes}",
        "data.imgsz=64",
        f"data.limit={IMAGES}",
        f"data.train.names={SEGMENTED}",
        f"data.val.names={SEGMENTED}",
        "distill.frequency.radius=1",  # the deepest map is 2x2
        "teacher.weights=null",
        "allow_void=true",
        "device=cpu",
        "train.batch=3",
        "train.epochs=1",
    ]
    run_script(train, "--config", "configs/segmentation/demo.yaml", *settings)
    return folder / "run"


def test_a_run_of_masks_leaves_its_pictures(masked_run: Path) -> None:
    figures = dict(visualize.figures_of(masked_run, []))
    assert list(figures) == [
        *("curves", "batch", "masks", "confusion", "attention", "before_after"),
        *("stages_teacher", "stages_student", "spectra_frequency"),
    ]
    titles = [axis.get_title() for axis in figures["masks"].axes[:5]]
    assert titles == ["photograph", "truth", "teacher", "student", "where wrong"]
    assert "decoder → fusion" in " ".join(axis.get_title() for axis in figures["attention"].axes)


def test_weights_of_masks_alone_have_masks_and_maps(
    masked_run: Path, shapes: Path, tmp_path: Path
) -> None:
    image = next((shapes / "JPEGImages").iterdir())
    visualize.main([str(masked_run / "best.pt"), str(image), "--out", str(tmp_path)])
    assert set(pictures(tmp_path)) == {"masks.png", "attention.png"}


# --- classes


@pytest.fixture(scope="module")
def labelled_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a classifier that teaches itself, on a few images."""
    folder = tmp_path_factory.mktemp("classes")
    write_set(folder / "set", train=12, val=6, size=32, folders=True)
    settings = [
        f"run={folder / 'run'}",
        f"data.root={folder / 'set'}",
        "data.imgsz=32",
        f"student={CLASSIFIER}",
        "distill.taps=[group1, group2, group3]",
        "device=cpu",
        "train.batch=6",
        "train.nbs=6",
        "train.epochs=1",
    ]
    run_script(train, "--config", "configs/classification/demo.yaml", *settings)
    return folder / "run"


def test_a_run_of_classes_leaves_its_pictures(labelled_run: Path) -> None:
    assert list(dict(visualize.figures_of(labelled_run, []))) == [
        *("curves", "batch", "answers", "confusion", "mistakes"),
        *("before_after", "self_teacher"),
    ]


def test_weights_of_classes_alone_have_answers_and_maps(labelled_run: Path, tmp_path: Path) -> None:
    image = next((labelled_run.parent / "set").rglob("*.jpg"))
    visualize.main([str(labelled_run / "best.pt"), str(image), "--out", str(tmp_path)])
    assert set(pictures(tmp_path)) == {"answers.png", "attention.png"}
