"""Pictures of a run, or of weights by themselves.

python -m kdmini.tools.visualize RUN [IMAGES...] [--out FOLDER]       into RUN/pictures
python -m kdmini.tools.visualize WEIGHTS IMAGES... [--out FOLDER]     into ./pictures

    curves.png          metrics.jsonl: losses, lambda, scores, attention distances, speed
    attention.png       where teacher and student look at each tap, and how far apart the
                        two maps are
    before_after.png    where the student looked before training, and after it

and what the metric of the run draws; of a detector:

    batch.png               training images as the loader renders them, with their boxes
    detections.png          what was detected beside what is there; on IMAGES, else on the
                            first of the validation set
    precision_recall.png    of each class, over the whole validation set

Of the weights of a YOLO11 alone there are detections.png and attention.png, without a
teacher. The student of a run is best.pt. Its maps are those of its own features, not
aligned to the teacher's: a sum over channels needs no alignment, and a trained align module
could look like the teacher in the student's place.

Legend: N images, C channels, H W cells of a map.
"""

import argparse
import io
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdmini import config, engine, memory, output, signals
from kdmini.assemble import make_model, tap_pairs, with_weights
from kdmini.contracts import Metric, UserError
from kdmini.data.loader import TrainLoader, ValLoader
from kdmini.data.pictures import decode
from kdmini.data.store import Store
from kdmini.device import pick_device, precision
from kdmini.distill.attention import attention_map, map_distance, to_largest
from kdmini.files import write_whole
from kdmini.optim import Recipe
from kdmini.runlog import RunFolder
from kdmini.sections import Sections, Sets
from kdmini.tools import draw
from kdmini.tools.curves import curves
from kdmini.tools.load import FIGURES, Photographs, load_detector
from kdmini.tools.scenes import Material, Scenes, feats_at, first_scenes

Figures = Iterator[tuple[str, draw.Figure]]  # name of the picture, the picture

# of a YOLO11, where no distillation names others
TAPS = [f"model.{layer}" for layer in (6, 8, 13, 16, 19, 22)]

# images
DEFAULT_IMAGES = 6  # of a picture, where none are named
MAX_IMAGES = 24  # of a picture
BATCH = 12  # that are rendered, for a picture of training
DRAWN_FROM = 256  # of the training set that are decoded for it, at most

REMEDY = "name fewer IMAGES, or put CUDA_VISIBLE_DEVICES= before the command to draw on the CPU"


def visualize(source: Path, files: Sequence[Path], out: Path | None = None) -> None:
    """Writes the pictures of a run folder or of a weights file, each when it is made."""
    if len(files) > MAX_IMAGES:
        raise UserError(
            f"{len(files)} images are too many for one picture; name {MAX_IMAGES} at most"
        )
    if out is None:
        out = source / "pictures" if source.is_dir() else Path("pictures")
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
    return of_run(source, files) if source.is_dir() else of_weights(source, files)


def of_weights(path: Path, files: Sequence[Path]) -> Figures:
    """Of a weights file and the images named beside it."""
    device = pick_device("auto")
    detector, imgsz = load_detector(path, device)
    if not files:
        raise UserError(
            f"{path}: name images to look at beside the weights, or a run folder instead of them"
        )
    refuse_unreadable(files)
    scenes = scenes_of_files(files, imgsz, device)
    draw_task = config.locate(FIGURES, "figures")
    yield from draw_task(Material(student=detector, weights=path.name, scenes=scenes))
    sides = {path.name: feats_at(TAPS, detector, scenes.images)}
    yield "attention", attention(scenes, sides, TAPS)


def of_run(folder: Path, files: Sequence[Path]) -> Figures:
    """What needs least comes first, to be there whatever the rest meets.

    The metric's own pictures are asked for whenever there is more to draw them from.
    """
    path = folder / "config.yaml"
    sections = config.call(Sections, config.load(path), str(path))
    refuse_unreadable(files)
    records = RunFolder(folder, lead=False).records()
    if records:
        yield "curves", curves(records, f"The run {folder}")

    device = pick_device(sections.device)
    recipe = sections.recipe()
    sets = sections.sets()
    names = sets.val.names
    metric = sections.make_metric(names)
    draw_task = figures_of_task(metric)
    if draw_task:
        yield from draw_task(Material(train_loader=train_loader(sets, recipe, sections.seed)))

    best = folder / "best.pt"
    if not best.exists():
        print(f"left out: all that needs {best}, which is not there yet")
        return
    networks = make_networks(sections, names, device, best)
    val_store = sets.store("val", device)
    scenes = first_scenes(val_store, DEFAULT_IMAGES)
    if files:
        scenes = scenes_of_files(files, sets.imgsz, device)
    if draw_task:
        yield from draw_task(Material(student=networks.after, weights=str(best), scenes=scenes))
        autocast, _ = precision(recipe.amp, device)
        engine.evaluate(networks.after, ValLoader(val_store, recipe.batch), metric, autocast)
        yield from draw_task(Material(metric=metric))
    taps = sections.distill["taps"] if sections.distill else own_taps(networks.after)
    yield from of_networks(networks, scenes, tap_pairs(taps))


def own_taps(student: Any) -> list[Any]:
    """Of a run that names none: those of a YOLO11, if the student is one."""
    modules = dict(student.named_modules())
    if all(tap in modules for tap in TAPS):
        return TAPS
    print(
        f"its config names no taps, and {type(student).__name__} has none of a YOLO11; "
        "to see maps, name layers of it: a section `distill` with `taps`"
    )
    return []


def refuse_unreadable(files: Sequence[Path]) -> None:
    """Raises UserError for the first that is no image, before anything is drawn."""
    for path in files:
        decode(path)


def scenes_of_files(files: Sequence[Path], imgsz: int, device: torch.device) -> Scenes:
    """The images as they are letterboxed, named by their files."""
    photographs = Photographs(files, ids=[path.stem for path in files])
    store = Store(photographs, imgsz, device, name="images")
    return first_scenes(store, len(files), annotated=False)


def figures_of_task(metric: Metric) -> Callable[[Material], Figures] | None:
    """What draws the pictures of the run's task, if its metric names anything."""
    figures = getattr(metric, "figures", None)
    return config.locate(figures, "metric: figures") if figures else None


class Networks(NamedTuple):
    """The networks of a run."""

    before: Any  # the student as training began with it
    after: Any  # as it is in best.pt
    teacher: Any  # None where the run has none


def make_networks(
    sections: Sections, names: list[str], device: torch.device, best: Path
) -> Networks:
    # as train.py does, so that `before` has the weights that training began with
    torch.manual_seed(sections.seed)
    before = make_model(sections.student, "student", names, device)
    teacher = None
    if sections.teacher and sections.distill:
        teacher = make_model(sections.teacher, "teacher", names, device)
    trained = with_weights(sections.student, str(best))
    after = make_model(trained, "student", names, device)
    return Networks(before, after, teacher)


def train_loader(sets: Sets, recipe: Recipe, seed: int) -> TrainLoader:
    """Of a part of the training set: its first batch is all that is drawn."""
    limit = min(sets.storing["limit"] or DRAWN_FROM, DRAWN_FROM)
    store = sets.store("train", torch.device("cpu"), limit=limit)
    return TrainLoader(store, min(BATCH, len(store)), recipe.epochs, sets.augment, seed)


# --- where networks look


def of_networks(networks: Networks, scenes: Scenes, pairs: Mapping[str, str]) -> Figures:
    """pairs: {student's tap: teacher's tap}."""
    taps = list(pairs)
    if not taps:
        print("left out: the attention maps, as the run has no taps")
        return
    before = feats_at(taps, networks.before, scenes.images)
    after = feats_at(taps, networks.after, scenes.images)
    teacher = None
    if networks.teacher is not None:
        teacher = feats_at(list(pairs.values()), networks.teacher, scenes.images)
        yield "attention", attention(scenes, {"teacher": teacher, "student": after}, taps)
    else:
        print(
            "left out: attention.png, as the run has no teacher; "
            "before_after.png has the student's maps"
        )
    sides = {"before": before, "after": after}
    yield "before_after", attention(scenes, sides, taps, goal=teacher)


def attention(
    scenes: Scenes,
    sides: Mapping[str, Sequence[Tensor]],
    taps: Sequence[str],
    goal: Sequence[Tensor] | None = None,
) -> draw.Figure:
    """The maps of one network, or of two networks or moments with their distances.

    sides: name -> the features at each tap, (N, C, H, W).
    goal: those of the teacher, from which the distance of either side is given too.
    """
    columns = {}
    for number, tap in enumerate(taps):
        feats = [of_side[number] for of_side in sides.values()]
        maps = [attention_map(to_largest(feat)).cpu().numpy() for feat in feats]
        captions = [""] * len(scenes.targets)
        if len(feats) == 2:
            one, other = feats
            captions = distances(one, other, goal[number] if goal else None)
        columns[tap] = draw.Column(maps, captions)

    names = list(sides)
    title = f"Where {names[0]} looks: sum of squares over the channels"
    if len(names) == 2:
        title = (
            f"Where the network looks, {' and '.join(names)}: "
            "sum of squares over the channels, not aligned"
        )
    return draw.attention(scenes.pictures, scenes.ids, names, columns, title)


def distances(one: Tensor, other: Tensor, goal: Tensor | None) -> list[str]:
    """What stands under the maps of each image: how far apart they are.

    And how far each is from the goal's, if there is one. All features are (N, C, H, W), and
    compared by maps of unit norm, however weak they are.
    """
    one = to_largest(one)
    other = to_largest(other)
    captions = [f"distance {apart:.3f}" for apart in map_distance(one, other).tolist()]
    if goal is None:
        return captions
    goal = to_largest(goal)
    first = map_distance(one, goal).tolist()
    last = map_distance(other, goal).tolist()
    return [
        f"{caption}\nto teacher {then:.3f} → {now:.3f}"
        for caption, then, now in zip(captions, first, last, strict=True)
    ]


def main(argv: list[str] | None = None) -> None:
    output.guard(needed=True)
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
        "images",
        metavar="IMAGES",
        type=Path,
        nargs="*",
        help=f"files to look at, {MAX_IMAGES} at most",
    )
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="where the pictures go")
    args = parser.parse_args(argv)
    signals.exit_on_signals()
    try:
        with memory.bounded(REMEDY):
            visualize(args.source, args.images, args.out)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
