"""Pictures of a run, or of weights by themselves.

python -m kdmini.tools.visualize RUN [IMAGES...] [--out FOLDER]           into RUN/pictures
python -m kdmini.tools.visualize WEIGHTS IMAGES... [--out FOLDER]         into ./pictures

    curves.png             metrics.jsonl: losses, lambda, average precision, attention distances, speed
    batch.png              training images as the loader renders them, with their boxes
    detections.png         what was found beside what is there; on IMAGES, else on the first of the validation set
    precision_recall.png   of each class, over the whole validation set
    attention.png          where teacher and student look at each tap, and how far apart the two maps are
    before_after.png       where the student looked before training, and after it

Of weights alone there are detections.png and attention.png, without a teacher. The student of a run
is best.pt. Its maps are those of its own features, not aligned to the teacher's: a sum over
channels needs no alignment, and a trained align module could look like the teacher in the student's
place.
Legend: N images, S image size, C channels, h, w cells of a map, D detections and G objects of an
image."""

import argparse
import io
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from kdmini import config, engine, signals
from kdmini.contracts import Detections, Target, UserError
from kdmini.data.loader import Augment, TrainLoader, ValLoader, check_size
from kdmini.data.pictures import decode
from kdmini.data.store import Store
from kdmini.detection.average_precision import (
    DetectionMetric,
    match_voc,
    overlapping_pairs,
    precision_curve,
)
from kdmini.detection.truth import Inverse
from kdmini.device import pick_device, precision
from kdmini.distill.attention import attention_map, map_distance
from kdmini.distill.taps import Taps
from kdmini.optim import Recipe
from kdmini.runlog import RunFolder, write_whole
from kdmini.tools import draw
from kdmini.tools.load import load_detector, without_objects

Figures = Iterator[tuple[str, draw.Figure]]  # name of the picture, the picture
TAPS = [
    f"model.{layer}" for layer in (6, 8, 13, 16, 19, 22)
]  # of a YOLO11, where no distillation names others
SHOWN, MOST = 6, 24  # images of a picture where none are named, and at most
BATCH, DRAWN_FROM = 12, 256  # images of batch.png; of the training set that many are decoded for it
SCORE, IOU, MAX_DET = 0.25, 0.7, 300  # of detections.png


def visualize(source: Path, files: Sequence[Path], out: Path | None = None) -> None:
    """Writes the pictures of a run folder or of a weights file, each as soon as it is made."""
    if len(files) > MOST:
        raise UserError(f"{len(files)} images are too many for one picture; name {MOST} at most")
    out = out or (source / "pictures" if source.is_dir() else Path("pictures"))
    for name, figure in figures_of(source, files):
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot make the folder {out} ({error.strerror}); name another with --out"
            ) from error
        content = io.BytesIO()
        figure.savefig(content, format="png")
        write_whole(out / f"{name}.png", content.getvalue())
        print(f"picture: {out / name}.png")


def figures_of(source: Path, files: Sequence[Path]) -> Figures:
    """Pictures that are not yet on the disk."""
    if not source.is_dir():
        return of_weights(source, files)
    path = source / "config.yaml"
    return config.call(of_run, config.load(path), str(path), folder=source, files=files)


def of_weights(path: Path, files: Sequence[Path]) -> Figures:
    place = pick_device("auto")
    detector, imgsz = load_detector(path, place)
    if not files:
        raise UserError(
            f"{path}: name images to look at beside the weights, or a run folder instead of them"
        )
    scenes = look_at(Store(Photographs(files), imgsz, place, name="images"), len(files))
    yield "detections", detections(detector, scenes, path.name, judged=False)
    yield "attention", attention(scenes, {path.name: look(detector, TAPS, scenes.images)}, TAPS)


def of_run(
    folder: Path,
    files: Sequence[Path],
    data: dict[str, Any],
    student: dict[str, Any],
    train: dict[str, Any],
    teacher: dict[str, Any] | None = None,
    distill: dict[str, Any] | None = None,
    seed: int = 0,
    device: str = "auto",
    **others: Any,  # sections that only training reads
) -> Figures:
    """What needs least comes first, to be there whatever the rest meets. The parameters after
    `files` are sections of the config.
    """
    photographs = Photographs(files)
    if records := RunFolder(folder, lead=False).records():
        yield (
            "curves",
            draw.curves(panels(records), "epoch (0: before training)", f"The run {folder}"),
        )

    place, recipe = pick_device(device), config.call(Recipe, train, "train")
    offered = {"root": data["root"]} if data.get("root") else {}
    train_set, val_set = (
        config.build(data[part], f"data.{part}", **offered) for part in ("train", "val")
    )
    keys = ("imgsz", "workers", "storage", "limit", "on_bad")
    storing = {"imgsz": 640} | {key: data[key] for key in keys if key in data}
    check_size(storing["imgsz"])
    few = storing | {"limit": min(storing.get("limit") or DRAWN_FROM, DRAWN_FROM)}
    store = config.call(Store, few, "data", dataset=train_set, name="train")
    augment = config.call(Augment, data.get("augment") or {}, "data.augment")
    loader = TrainLoader(store, min(BATCH, len(store)), recipe.epochs, augment, seed)
    yield "batch", batch(loader)

    torch.manual_seed(
        seed
    )  # as train.py does, so that `before` has the weights that training began with
    before = config.build(student, "student", names=val_set.names).to(place)
    guide = (
        config.build(teacher, "teacher", names=val_set.names).to(place)
        if teacher and distill
        else None
    )
    best = folder / "best.pt"
    if not best.exists():
        return print(f"left out: all that needs {best}, which is not there yet")
    given = student.get("weights")
    weights = {**given, "path": str(best)} if isinstance(given, Mapping) else str(best)
    after = config.build({**student, "weights": weights}, "student", names=val_set.names).to(place)

    val_store = config.call(Store, storing, "data", dataset=val_set, device=place, name="val")
    scenes = look_at(val_store, SHOWN)
    if files:
        scenes = look_at(Store(photographs, storing["imgsz"], place, name="images"), len(files))
    yield "detections", detections(after, scenes, str(best), judged=not files)
    metric = DetectionMetric(val_set.names)
    engine.evaluate(
        after, ValLoader(val_store, recipe.batch), metric, precision(recipe.amp, place)[0]
    )
    yield "precision_recall", precision_recall(metric)

    pairs = dict(
        (tap, tap) if isinstance(tap, str) else tap for tap in (distill or {"taps": TAPS})["taps"]
    )
    taps = list(pairs)
    if not taps:
        return print("left out: the attention maps, as the run has no taps")
    was, now = look(before, taps, scenes.images), look(after, taps, scenes.images)
    theirs = look(guide, list(pairs.values()), scenes.images) if guide else None
    if theirs:
        yield "attention", attention(scenes, {"teacher": theirs, "student": now}, taps)
    else:
        print(
            "left out: attention.png, as the run has no teacher; before_after.png has the student's maps"
        )
    yield "before_after", attention(scenes, {"before": was, "after": now}, taps, theirs)


class Photographs:
    """Image files without annotations, as a `kdmini.contracts.Dataset`. Raises UserError for one
    that is no image.
    """

    def __init__(self, paths: Sequence[Path]):
        self.names: list[str] = []
        self.paths, self.decoded = paths, [decode(path) for path in paths]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, Target]:
        return self.decoded[index], without_objects(self.paths[index].stem)


class Scenes(NamedTuple):
    """Images that are looked at."""

    images: Tensor  # (N, 3, S, S) RGB 0..1
    targets: list[Target]  # N, in pixels of the files
    inverse: Inverse  # to those pixels

    @property
    def pictures(self) -> np.ndarray:
        return self.images.permute(0, 2, 3, 1).cpu().numpy()  # (N, S, S, 3)


def look_at(store: Store, most: int) -> Scenes:
    return Scenes(*next(iter(ValLoader(store, most))))


@torch.no_grad()
def look(model: nn.Module, taps: Sequence[str], images: Tensor) -> list[Tensor]:
    """-> the output of each tap, (N, C, h, w). Leaves no hook behind."""
    hooks = Taps(model, taps)
    model.eval()(images)
    feats = hooks.take()
    hooks.remove()
    return [feats[tap] for tap in taps]


def attention(
    scenes: Scenes,
    sides: Mapping[str, list[Tensor]],
    taps: Sequence[str],
    goal: list[Tensor] | None = None,
) -> draw.Figure:
    """sides: name -> the features of one network or moment at each tap; of two, the distance stands
    under each pair, and that of either to `goal`, the teacher's.
    """
    captions: dict[str, list[str]] = {tap: [""] * len(scenes.targets) for tap in taps}
    title = f"Where {next(iter(sides))} looks: sum of squares over the channels"
    if len(sides) == 2:
        title = f"Where the network looks, {' and '.join(sides)}: sum of squares over the channels, not aligned"
        for number, tap in enumerate(taps):
            one, other = (feats[number] for feats in sides.values())
            captions[tap] = [f"distance {d:.3f}" for d in map_distance(one, other).tolist()]
            if goal:
                first, last = (map_distance(side, goal[number]).tolist() for side in (one, other))
                captions[tap] = [
                    f"{text}\nto teacher {a:.3f} → {b:.3f}"
                    for text, a, b in zip(captions[tap], first, last, strict=True)
                ]
    maps = {
        tap: [attention_map(feats[number]).cpu().numpy() for feats in sides.values()]
        for number, tap in enumerate(taps)
    }
    if any(
        np.linalg.norm(side, axis=(1, 2)).min() < 0.5 for both in maps.values() for side in both
    ):
        title += "\nA map that is all dark is of features so small that eps outweighs them, as before any training"
    ids = [target["id"] for target in scenes.targets]
    return draw.attention(scenes.pictures, ids, maps, list(sides), captions, title)


@torch.no_grad()
def detections(detector: Any, scenes: Scenes, title: str, judged: bool) -> draw.Figure:
    """judged: hits and misses beside the ground truth; else the detections alone."""
    found = scenes.inverse(
        detector.decode(detector.eval()(scenes.images), score=SCORE, iou=IOU, max_det=MAX_DET)
    )
    frames = []
    for n, (picture, target, mine) in enumerate(
        zip(scenes.pictures, scenes.targets, found, strict=True)
    ):
        mine = Detections(**{key: value.cpu() for key, value in mine.items()})  # type: ignore[typeddict-item, attr-defined]
        left, top = -scenes.inverse.corner[n] * scenes.inverse.scale[n]
        right, bottom = (len(picture) - scenes.inverse.corner[n]) * scenes.inverse.scale[n]
        place = picture, (left, right, bottom, top), tuple(scenes.inverse.native[n])
        of_found, of_objects = (
            judge(mine, target) if judged else (["detection"] * len(mine["scores"]), [])
        )
        if judged:
            texts = [detector.names[label] for label in target["labels"]]
            truth = list(map(draw.Box, target["boxes_xyxy"].tolist(), texts, of_objects))
            frames.append(draw.Frame(*place, truth, f"{target['id']}: ground truth"))
        rows = zip(
            mine["boxes_xyxy"].tolist(), mine["labels"], mine["scores"], of_found, strict=True
        )
        boxes = [
            draw.Box(box, f"{detector.names[label]} {score:.2f}", kind)
            for box, label, score, kind in rows
        ]
        frames.append(draw.Frame(*place, boxes, f"{target['id']}: detections"))
    return draw.boxes(frames, 4, f"Detections of {title} with a score over {SCORE}")


def judge(found: Detections, target: Target, iou: float = 0.5) -> tuple[list[str], list[str]]:
    """-> kinds of the detections (D), best score first, and of the objects (G): hit, difficult,
    false alarm or missed.

    As VOC counts: a detection stands for the object of its class that it overlaps most, and each is
    found once."""
    of_found = ["false alarm"] * len(found["scores"])
    of_objects = ["difficult" if difficult else "missed" for difficult in target["difficult"]]
    overlap = box_iou(
        found["boxes_xyxy"], torch.from_numpy(target["boxes_xyxy"]).to(found["boxes_xyxy"])
    )  # (D, G)
    overlap[found["labels"][:, None] != torch.from_numpy(target["labels"])] = 0
    for d in range(len(of_found) if of_objects else 0):
        g = int(overlap[d].argmax())
        if overlap[d, g] >= iou and of_objects[g] != "hit":
            of_found[d] = of_objects[g] = "difficult" if of_objects[g] == "difficult" else "hit"
    return of_found, of_objects


def batch(loader: TrainLoader) -> draw.Figure:
    """The first batch of the first epoch."""
    images, targets = next(loader.epoch(0))
    size = float(images.shape[2])
    frames = []
    for n, picture in enumerate(images.permute(0, 2, 3, 1).numpy()):
        labels = targets["labels"][n].tolist()
        rows = zip(targets["boxes_xyxy"][n].tolist(), labels, strict=True)
        boxes = [
            draw.Box(box, loader.store.names[label], "object") for box, label in rows if label >= 0
        ]
        frames.append(
            draw.Frame(picture, (0, size, size, 0), (size, size), boxes, targets["ids"][n])
        )
    return draw.boxes(frames, 4, "Training images as rendered in the first epoch, with their boxes")


def precision_recall(metric: DetectionMetric) -> draw.Figure:
    curves, values = {}, []
    for name, found, objects in metric.by_class():
        count = int((~objects["difficult"]).sum())
        matches = match_voc(*overlapping_pairs(found, objects), objects["difficult"], len(found))
        curves[name] = precision_curve(*matches, count)
        values += [curves[name].mean()] if count else []
    mean = f"mean AP {np.mean(values):.3f}" if values else "no objects"
    return draw.precision_recall(
        curves, f"Precision and recall at IoU 0.5 over the validation set, as in VOC: {mean}"
    )


PLACES = {  # a name in metrics.jsonl -> title and unit of the panel it is drawn in; the group is its label
    r"lambda/(.+)": ("Lambda: how strongly a term counts", "lambda"),
    r"distance/(aligned|raw)": (
        "Attention distance to the teacher, held-out images",
        "sum over the taps",
    ),
    r"distance/raw/(.+)": ("Distance at each tap, student as it is (raw)", "distance"),
    r"distance/aligned/(.+)": ("Distance at each tap, after the align modules", "distance"),
    r"(AP.*|VOC.*)": ("Average precision on the validation set", "average precision"),
    r"(lr)": ("Learning rate", ""),
    r"(images/s)": ("Speed of training", ""),
}
LOSSES = "Losses of the detector, with their gains", "mean over the epoch"
TERMS = "Losses of distillation, with weight and lambda", "mean over the epoch"
UNDRAWN = {"epoch", "skipped"}


def panels(records: Sequence[Mapping[str, Any]]) -> list[draw.Panel]:
    """Lines of metrics.jsonl -> what to draw: every number in them, each in its panel."""
    names = dict.fromkeys(name for record in records for name in record)
    lines: dict[tuple[str, str], dict[str, draw.Line]] = {
        place: {} for place in (LOSSES, TERMS, *PLACES.values())
    }
    for name in (name for name in names if name not in UNDRAWN):
        points = [
            (r["epoch"] + 1, r[name]) for r in records if isinstance(r.get(name), int | float)
        ]
        place, label = LOSSES if f"lambda/{name}" not in names else TERMS, name
        for pattern, known in PLACES.items():
            if match := re.fullmatch(pattern, name):
                place, label = known, match[1]
        if points:
            lines[place][label] = points
    return [draw.Panel(*place, lines[place]) for place in lines if lines[place]]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m kdmini.tools.visualize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source",
        metavar="RUN|WEIGHTS",
        type=Path,
        help="a run folder, or best.pt, or a YOLO11 file",
    )
    parser.add_argument(
        "images", metavar="IMAGES", type=Path, nargs="*", help=f"files to look at, {MOST} at most"
    )
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="where the pictures go")
    args = parser.parse_args(argv)
    signals.exit_on_signals()
    try:
        visualize(args.source, args.images, args.out)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
