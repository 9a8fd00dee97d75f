"""Pictures: what stands in them is what was measured, and they are there."""

import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import train
from kdmini.data.loader import Augment, TrainLoader, ValLoader
from kdmini.data.store import Store
from kdmini.detection.average_precision import DetectionMetric
from kdmini.detection.voc import VOC
from kdmini.detection.yolo11.model import YOLO11
from tests.conftest import CONFIG, TINY

pytest.importorskip("matplotlib")
from kdmini.tools import visualize

NAMES = ["circle", "square", "triangle", "star", "ring", "cross"]
TAPS = [f"model.{layer}" for layer in (6, 8, 13, 16, 19, 22)]
IMAGES = 3


@pytest.fixture(scope="module")
def run(tmp_path_factory, shapes) -> Path:
    """A run of one epoch with a teacher, on three images of each set."""
    folder = tmp_path_factory.mktemp("visualize")
    (folder / "config.yaml").write_text(CONFIG.format(run=folder / "run", shapes=shapes, tiny=TINY))
    before = sys.argv
    sys.argv = ["train", "--config", str(folder / "config.yaml"), f"data.limit={IMAGES}"]
    sys.argv += ["train.batch=3", "train.epochs=1"]
    try:
        train.main()
    finally:
        sys.argv = before
    return folder / "run"


@pytest.fixture(scope="module")
def figures(run: Path) -> dict:
    return dict(visualize.figures_of(run, []))


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def stored(shapes: Path, split: str) -> Store:
    return Store(VOC(str(shapes), [split], NAMES), 64, limit=IMAGES)


def tapped(model: torch.nn.Module, images: torch.Tensor) -> list[np.ndarray]:
    """Attention maps in float64 by hooks of our own: at each tap (N, h, w)."""
    feats: dict[str, np.ndarray] = {}
    for tap in TAPS:
        hook = lambda module, args, output, tap=tap: feats.update({tap: output.double().numpy()})  # noqa: E731
        model.get_submodule(tap).register_forward_hook(hook)
    with torch.no_grad():
        model.eval()(images)
    energy = [(feats[tap] ** 2).sum(1) for tap in TAPS]
    return [e / (np.sqrt((e**2).sum((1, 2), keepdims=True)) + 1e-8) for e in energy]


def cells(figure) -> np.ndarray:
    """The axes of a figure of attention maps: image by image and tap, without the first column."""
    return np.array(figure.axes[: IMAGES * 7]).reshape(IMAGES, 7)[:, 1:]


def numbers(figure) -> np.ndarray:
    """What is written under each pair: (image, tap, number)."""
    texts = [[axis.get_xlabel() for axis in row] for row in cells(figure)]
    return np.array(
        [[[float(n) for n in re.findall(r"\d\.\d{3}", text)] for text in row] for row in texts]
    )


def rectangles(axis) -> list[list[float]]:
    boxes = [patch.get_bbox().extents.tolist() for patch in axis.patches]
    return sorted([round(x, 3) for x in box] for box in boxes)


# --- attention maps


def test_the_distances_under_the_maps_are_those_of_the_two_networks(
    run: Path, shapes: Path, figures: dict
) -> None:
    images = next(iter(ValLoader(stored(shapes, "val"), IMAGES)))[0]
    torch.manual_seed(3)  # of the config
    scale = yaml.safe_load(TINY)
    was, theirs = tapped(YOLO11(NAMES, scale), images), tapped(YOLO11(NAMES, scale), images)
    now = tapped(YOLO11(NAMES, scale, weights=str(run / "best.pt")), images)

    def distances(
        one: Sequence[np.ndarray], other: Sequence[np.ndarray]
    ) -> np.ndarray:  # (image, tap)
        return np.stack(
            [np.sqrt(((a - b) ** 2).sum((1, 2))) for a, b in zip(one, other, strict=True)], 1
        )

    bound = 0.0006  # three decimals
    np.testing.assert_allclose(
        numbers(figures["attention"])[..., 0], distances(theirs, now), atol=bound
    )
    moved = np.stack([distances(was, now), distances(was, theirs), distances(now, theirs)], -1)
    np.testing.assert_allclose(numbers(figures["before_after"]), moved, atol=bound)
    assert moved[..., 0].min() > bound  # there is something to see

    for row, column in [(0, 0), (2, 3)]:
        layers = cells(figures["attention"])[row, column].images
        for layer, maps in zip(layers[1::2], (theirs, now), strict=True):  # above the image in grey
            np.testing.assert_allclose(layer.get_array(), maps[column][row], atol=1e-5)
            largest = max(theirs[column][row].max(), now[column][row].max())
            np.testing.assert_allclose(layer.get_clim(), (0, largest), rtol=1e-4)


def test_before_is_what_the_run_began_with(run: Path, figures: dict) -> None:
    """The run measured the same distance itself, before its first step."""
    began = records(run)[0]
    assert began["epoch"] == -1
    to_teacher = numbers(figures["before_after"])[..., 1]  # (image, tap)
    assert to_teacher.sum(1).mean() == pytest.approx(began["distance/raw"], abs=len(TAPS) * 0.0005)


def test_no_hook_is_left_behind(shapes: Path) -> None:
    model = YOLO11(NAMES, yaml.safe_load(TINY))
    visualize.look(model, TAPS, torch.rand(1, 3, 64, 64))
    assert not any(module._forward_hooks for module in model.modules())


# --- boxes


class Fixed:
    """A detector that finds the same boxes in every image: rows of box_xyxy in input pixels, score,
    label.
    """

    names = ("circle", "square")

    def __init__(self, rows: list[list[float]]):
        self.rows = torch.tensor(rows).reshape(-1, 6)

    def eval(self) -> "Fixed":
        return self

    def __call__(self, images: torch.Tensor) -> int:
        return len(images)

    def decode(self, preds: int, score: float, iou: float, max_det: int) -> list[dict]:
        kept = self.rows[self.rows[:, 4] > score]
        return [
            {"boxes_xyxy": kept[:, :4], "scores": kept[:, 4], "labels": kept[:, 5].long()}
        ] * preds


def target(*rows: tuple[list[float], int, bool]) -> dict:
    boxes, labels, difficult = zip(*rows, strict=True) if rows else ([], [], [])
    boxes_xyxy = np.array(boxes, np.float32).reshape(-1, 4)
    return {
        "boxes_xyxy": boxes_xyxy,
        "labels": np.array(labels, int),
        "difficult": np.array(difficult, bool),
        "id": "a",
    }


def test_hits_misses_and_false_alarms_are_told_apart() -> None:
    objects = target(
        ([0, 0, 10, 10], 0, False),
        ([20, 0, 30, 10], 0, True),
        ([40, 0, 50, 10], 1, False),
        ([60, 0, 70, 10], 1, False),
    )
    rows = [
        ([0, 0, 10, 9], 0, "hit"),
        ([0, 0, 10, 10], 0, "false alarm"),  # that object is found already
        ([20, 0, 30, 10], 0, "difficult"),
        ([21, 0, 30, 10], 0, "difficult"),  # as often as it likes
        ([40, 0, 50, 10], 0, "false alarm"),  # another class
        ([44, 0, 54, 10], 1, "false alarm"),  # IoU 0.43
        ([63, 0, 73, 10], 1, "hit"),  # 0.54
    ]
    boxes, labels, kinds = zip(*rows, strict=True)
    found = {"boxes_xyxy": torch.tensor(boxes, dtype=torch.float32), "labels": torch.tensor(labels)}
    of_found, of_objects = visualize.judge(
        {**found, "scores": torch.linspace(0.9, 0.3, len(rows))}, objects
    )
    assert of_found == list(kinds)
    assert of_objects == ["hit", "difficult", "missed", "hit"]


def test_nothing_found_and_nothing_there() -> None:
    none = Fixed([]).decode(1, 0, 0, 0)[0]
    one = Fixed([[0, 0, 9, 9, 0.9, 0]]).decode(1, 0, 0, 0)[0]
    assert visualize.judge(none, target()) == ([], [])
    assert visualize.judge(one, target()) == (["false alarm"], [])
    assert visualize.judge(none, target(([0, 0, 9, 9], 0, False))) == ([], ["missed"])


def test_detections_lie_where_they_are_in_the_file(tmp_path: Path) -> None:
    """A picture of 100 x 50 is letterboxed to 64 x 32, 16 below the top of the square."""
    Image.new("RGB", (100, 50)).save(tmp_path / "wide.png")
    scenes = visualize.look_at(Store(visualize.Photographs([tmp_path / "wide.png"]), 64), 1)
    scenes = scenes._replace(
        targets=[target(([0, 0, 50, 50], 0, False), ([60, 0, 99, 50], 0, False))]
    )
    detector = Fixed([[0, 16, 32, 48, 0.91, 0], [0, 16, 16, 32, 0.4, 1], [0, 0, 9, 9, 0.2, 0]])
    truth, found, *_ = visualize.detections(detector, scenes, "x", judged=True).axes
    assert rectangles(truth) == [[0, 0, 50, 50], [60, 0, 99, 50]]
    assert rectangles(found) == [
        [0, 0, 25, 25],
        [0, 0, 50, 50],
    ]  # the score of the third is too low
    assert {text.get_text() for text in found.texts} == {"circle 0.91", "square 0.40"}
    looks = {
        (p.get_edgecolor(), p.get_linestyle()) for axis in (truth, found) for p in axis.patches
    }
    assert (
        len(looks)
        == len({colour for colour, _ in looks})
        == len({style for _, style in looks})
        == 3
    )
    assert found.get_xlim() == (0, 100) and found.get_ylim() == (50, 0)
    assert found.images[0].get_extent() == [0, 100, 75, -25]

    alone = visualize.detections(detector, scenes, "x", judged=False).axes[0]
    assert rectangles(alone) == rectangles(found)


def test_the_batch_has_the_boxes_and_pixels_of_the_loader(shapes: Path, figures: dict) -> None:
    loader = TrainLoader(stored(shapes, "train"), IMAGES, 1, Augment(), seed=3)
    images, targets = next(loader.epoch(0))
    for n, axis in enumerate(figures["batch"].axes[:IMAGES]):
        real = targets["labels"][n] >= 0
        boxes = targets["boxes_xyxy"][n][real].tolist()
        assert rectangles(axis) == sorted([round(x, 3) for x in box] for box in boxes)
        names = [NAMES[label] for label in targets["labels"][n][real].tolist()]
        assert sorted(text.get_text() for text in axis.texts) == sorted(names)
        assert np.array_equal(axis.images[0].get_array(), images[n].permute(1, 2, 0).numpy())


# --- curves


def test_the_curves_are_the_lines_of_metrics_jsonl(run: Path, figures: dict) -> None:
    logged = records(run)
    expected = {
        name: [(r["epoch"] + 1, r[name]) for r in logged if name in r]
        for name in {name for r in logged for name in r} - {"epoch", "skipped"}
    }
    drawn = {
        a.get_title(): {line.get_label(): list(map(tuple, line.get_xydata())) for line in a.lines}
        for a in figures["curves"].axes
    }
    assert sorted(points for lines in drawn.values() for points in lines.values()) == sorted(
        expected.values()
    )
    of = {frozenset(lines): lines for lines in drawn.values()}
    assert of[frozenset({"aligned", "raw"})]["raw"] == expected["distance/raw"]
    assert of[frozenset({"box", "cls", "dfl"})]["cls"] == expected["cls"]
    by_tap = [lines for lines in drawn.values() if set(lines) == set(TAPS)]
    assert sorted(lines[TAPS[1]] for lines in by_tap) == sorted(
        expected[f"distance/{k}/model.8"] for k in ("raw", "aligned")
    )


def test_the_area_under_a_curve_is_the_average_precision() -> None:
    rng = np.random.default_rng(0)
    metric = DetectionMetric([*NAMES[:3], "nothing"])
    for n in range(20):
        corners = rng.uniform(0, 50, (6, 2))
        boxes = np.hstack([corners, corners + rng.uniform(10, 30, (6, 2))]).astype(np.float32)
        labels = rng.integers(0, 3, 6)
        truth = {
            "boxes_xyxy": boxes,
            "labels": labels,
            "difficult": rng.uniform(size=6) < 0.2,
            "id": str(n),
        }
        moved = torch.from_numpy(boxes + rng.normal(0, 2.5, (6, 4)).astype(np.float32))
        scores = torch.from_numpy(rng.uniform(size=6)).sort(descending=True).values
        metric.update(
            [{"boxes_xyxy": moved, "scores": scores, "labels": torch.from_numpy(labels)}], [truth]
        )
    figure = visualize.precision_recall(metric)
    assert f"{metric.compute()['VOC']:.3f}" in figure.get_suptitle()
    for axis, (name, scores) in zip(figure.axes, metric.per_class().items(), strict=False):
        if name == "nothing":
            assert axis.get_title() == "nothing: no objects" and not axis.lines
            continue
        x, y = axis.lines[0].get_data()
        assert (np.diff(x) * y[1:]).sum() == pytest.approx(scores["VOC"]) and 0.2 < scores[
            "VOC"
        ] < 0.95
        assert axis.get_title() == f"{name}: AP {scores['VOC']:.2f}, {scores['objects']} objects"


# --- the command


def pictures(folder: Path) -> dict[str, tuple[int, int]]:
    """The size of each, all decoded."""
    sizes = {}
    for path in folder.iterdir():
        with Image.open(path) as image:
            image.load()
            sizes[path.name] = image.size
    return sizes


def test_a_run_leaves_its_pictures(run: Path, capsys) -> None:
    visualize.main([str(run)])
    left = pictures(run / "pictures")
    names = {"curves", "batch", "detections", "precision_recall", "attention", "before_after"}
    assert set(left) == {f"{name}.png" for name in names}
    assert all(600 < width <= 2000 and height > 300 for width, height in left.values())
    assert capsys.readouterr().out.count("picture: ") == 6


def test_a_run_without_a_teacher_has_no_pair_of_networks(run: Path, tmp_path: Path, capsys) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(run, alone, ignore=shutil.ignore_patterns("ckpt", "pictures"))
    settings = yaml.safe_load((run / "config.yaml").read_text())
    (alone / "config.yaml").write_text(
        yaml.safe_dump({**settings, "teacher": None, "distill": None})
    )
    figures = dict(visualize.figures_of(alone, []))
    assert "attention" not in figures and "no teacher" in capsys.readouterr().out
    assert numbers(figures["before_after"]).shape == (IMAGES, len(TAPS), 1)

    (alone / "best.pt").unlink()  # of a run that has only begun
    assert set(dict(visualize.figures_of(alone, []))) == {"curves", "batch"}
    assert "best.pt" in capsys.readouterr().out


def test_weights_alone_have_detections_and_their_own_maps(
    run: Path, shapes: Path, tmp_path: Path
) -> None:
    image = next((shapes / "JPEGImages").iterdir())
    visualize.main([str(run / "best.pt"), str(image), "--out", str(tmp_path / "a" / "b")])
    assert set(pictures(tmp_path / "a" / "b")) == {"detections.png", "attention.png"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["{run}/best.pt"], "name images"),
        (["{run}/nothing.pt", "x.jpg"], "nothing.pt"),
        (["{run}/ckpt"], "config.yaml"),
        (
            ["{run}/best.pt", "{run}/config.yaml", "--out", "{tmp}"],
            "config.yaml: not a usable image",
        ),
        (["{run}", "--out", "{run}/config.yaml"], "config.yaml"),
        (["{run}", *["x.jpg"] * 25], "25 images"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], told: str, run: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as left:
        visualize.main([text.format(run=run, tmp=tmp_path) for text in arguments])
    message = str(left.value.code)
    assert message.startswith("error: ") and told in message and "\n" not in message
    assert not list(tmp_path.iterdir())
