"""Pictures of a run, or of weights by themselves.

python -m kdmini.tools.visualize RUN [IMAGES...] [--out FOLDER]
python -m kdmini.tools.visualize WEIGHTS IMAGES... [--out FOLDER]

They go into RUN/pictures, those of weights into ./pictures.

    curves.png        metrics.jsonl: losses, lambda, scores, attention
                      distances, speed
    attention.png     where teacher and student look at each tap, and how far
                      apart the two maps are
    before_after.png  where the student looked before training, and after it
    stages_teacher.png, stages_student.png
                      the maps of the stages of each that no tap shows
    spectra_TERM.png  of a term that filters, the spectra before and after it
    self_teacher.png  named after the term: where the student and its
                      self-teacher look, both as in the newest checkpoint, on
                      twelve images of the validation set that are drawn at
                      random

and what the metric of the run draws; of a detector:

    batch.png             training images as the loader renders them, with their
                          boxes
    detections.png        what was detected beside what is there; on IMAGES,
                          else on some of the validation set
    precision_recall.png  of each class, over the whole validation set
    confusion.png         what the objects of each class were taken for,
                          likewise

of a network for segmentation:

    batch.png      likewise, with their masks
    masks.png      the photograph, its true mask, those of teacher and student,
                   and where the networks are wrong
    confusion.png  what the pixels of each class were taken for, over the whole
                   validation set

of a classifier:

    batch.png      likewise, with their classes and the shares of mixed ones
    answers.png    the class of each image, and what teacher and student say
    confusion.png  what the images of each class were taken for, over the whole
                   validation set
    mistakes.png   of that set, the images whose wrong answer was the surest

Of weights alone there are detections.png, masks.png or answers.png, and
attention.png, without a teacher. The student of a run is best.pt.
"""

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdmini import config, engine, memory, output, signals
from kdmini.assemble import make_model, tap_pairs, with_weights
from kdmini.classification.truth import Labels
from kdmini.contracts import Metric, Truth, UserError
from kdmini.data.loader import TrainLoader, ValLoader
from kdmini.data.store import Store
from kdmini.detection.truth import Boxes
from kdmini.device import pick_device, precision
from kdmini.files import write_whole
from kdmini.optim import Recipe
from kdmini.runlog import RunFolder
from kdmini.sections import Sections, Sets
from kdmini.segmentation.truth import Masks
from kdmini.tools import classifications, detections, segmentations
from kdmini.tools.curves import curves
from kdmini.tools.load import load_network
from kdmini.tools.maps import Figures, Networks, attention, maps_at, of_networks, own_taps
from kdmini.tools.photographs import Photographs, read_upright
from kdmini.tools.scenes import Material, Scenes, scenes_at, spread_scenes
from kdmini.tools.terms import of_terms

# what draws the pictures of weights alone; of a run its metric says so
DRAWN_BY: dict[type[Truth], Callable[[Material], Figures]] = {
    Boxes: detections.figures,
    Masks: segmentations.figures,
    Labels: classifications.figures,
}

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
    network, imgsz, truth = load_network(path, device)
    if not files:
        raise UserError(
            f"{path}: name images to look at beside the weights, or a run folder instead of them"
        )
    refuse_unreadable(files)
    scenes = scenes_of_files(files, imgsz, device, truth)
    yield from DRAWN_BY[truth](Material(student=network, weights=path.name, scenes=scenes))
    taps = own_taps(network)
    sides = {path.name: maps_at(taps, network, scenes.images)}
    yield "attention", attention(scenes, sides, taps)


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
    scenes = spread_scenes(val_store, DEFAULT_IMAGES)
    if files:
        scenes = scenes_of_files(files, sets.imgsz, device, sets.val.truth)
    if draw_task:
        material = Material(
            student=networks.after, weights=str(best), teacher=networks.teacher, scenes=scenes
        )
        yield from draw_task(material)
        autocast, _ = precision(recipe.amp, device)
        engine.evaluate(networks.after, ValLoader(val_store, recipe.batch), metric, autocast)
        yield from draw_task(Material(metric=metric, store=val_store))
    pairs = tap_pairs(taps_of(sections, networks.after, networks.teacher))
    yield from of_networks(networks, scenes, pairs)
    if sections.distill is not None:
        yield from of_terms(folder, sections.distill, networks, scenes, val_store)


def taps_of(sections: Sections, student: Any, teacher: Any = None) -> list[Any]:
    """Those of the config; of one that names none those that are known of the student, if they
    are those of its teacher too.
    """
    named = list(sections.distill["taps"]) if sections.distill else []
    if named:
        return named
    own = own_taps(student)
    if not own:
        print(
            f"its config names no taps, and none are known of {type(student).__name__}; "
            "to see maps, name layers of it: a section `distill` with `taps`"
        )
    are_shared = teacher is None or own_taps(teacher) == own
    return list(own) if are_shared else []


def refuse_unreadable(files: Sequence[Path]) -> None:
    """Raises UserError for the first that is no image, before anything is drawn."""
    for path in files:
        read_upright(path)


def scenes_of_files(
    files: Sequence[Path], imgsz: int, device: torch.device, truth: type[Truth]
) -> Scenes:
    """The images as they are letterboxed, named by their files."""
    photographs = Photographs(files, [path.stem for path in files], truth)
    store = Store(photographs, imgsz, device, name="images")
    return scenes_at(store, np.arange(len(store)), annotated=False)


def figures_of_task(metric: Metric) -> Callable[[Material], Figures] | None:
    """What draws the pictures of the run's task, if its metric names anything."""
    figures = getattr(metric, "figures", None)
    return config.locate(figures, "metric: figures") if figures else None


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
