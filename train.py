"""Train a detector, with or without a teacher.

python train.py --config configs/voc.yaml [key.path=value ...]
python train.py --resume runs/voc
"""

import argparse
import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from kdmini import checkpoint, config, engine
from kdmini.contracts import Dataset, UserError
from kdmini.data.loader import Augment, TrainLoader, ValLoader, check_size
from kdmini.distill.step import Distillation, Weighted, tap_shapes
from kdmini.optim import EMA, Recipe, make_sgd
from kdmini.runlog import RunFolder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", help="a YAML file, such as configs/voc.yaml")
    source.add_argument("--resume", metavar="RUN", help="a run folder to continue")
    parser.add_argument("--debug", action="store_true", help="show where an error came from")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    args = parser.parse_args()
    try:
        if args.resume and args.overrides:
            raise UserError("--resume continues a run as it was begun; it takes no overrides")
        path = Path(args.resume) / "config.yaml" if args.resume else args.config
        settings = config.load(path, args.overrides)
        config.call(train_detector, settings, str(path), settings=settings, resume=bool(args.resume))
    except UserError as error:
        if args.debug:
            raise
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def train_detector(
    settings: dict[str, Any],
    resume: bool,
    run: str,
    data: dict[str, Any],
    student: Any,
    metric: Any,
    train: dict[str, Any],
    teacher: Any = None,
    distill: Any = None,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """One run. The parameters after `resume` are the sections of the config, each a call: see config.py."""
    recipe = config.call(Recipe, train, "train")
    torch.manual_seed(seed)
    place = engine.pick_device(device)
    autocast, scaler = engine.precision(recipe.amp, place)
    folder, text = RunFolder(run, resume), config.dump(settings)

    sets = config.call(make_sets, data, "data")
    names = sets.train.names

    # the order matters: build, load weights, copy for the EMA, attach taps (a copy would take the hooks along)
    student = config.build(student, "student", names=names).to(place, memory_format=torch.channels_last)
    ema = EMA(student, recipe.ema_decay, recipe.ema_tau)
    if not distill:
        teacher, distill = None, {"taps": []}
    if teacher:
        teacher = config.build(teacher, "teacher", names=names).to(place, memory_format=torch.channels_last)
    distillation = config.call(
        make_distillation, distill, "distill", student=student, teacher=teacher, imgsz=sets.imgsz
    )
    distillation.to(place)
    optimizer = make_sgd([student, distillation], recipe)  # align modules and terms learn too, the teacher does not

    loader = TrainLoader(sets.train, sets.imgsz, recipe.batch, recipe.epochs, sets.augment, seed, place, **sets.store)
    val_loader = ValLoader(sets.val, sets.imgsz, recipe.batch, place, **sets.store)

    progress = engine.Progress()
    parts = {
        "student": student,
        "ema": ema,
        "distillation": distillation,
        "optimizer": optimizer,
        "scaler": scaler,
        "progress": progress,
    }
    describe(student, teacher, distillation, loader, recipe, place)
    if resume:
        path = checkpoint.resume(folder.checkpoints, parts, text)
        print(f"resumed from {path}: {progress.epoch} of {recipe.epochs} epochs done")
        folder.rewind(progress.epoch)
    else:
        folder.begin(text)
        if teacher:  # what training has to improve on
            folder.log({"epoch": -1, **engine.attention_distances(student, distillation, val_loader, autocast)})

    while progress.epoch < recipe.epochs and progress.epoch - 1 - progress.best_epoch < recipe.patience:
        epoch = progress.epoch
        lambdas = {f"lambda/{name}": value for name, value in distillation.lambdas(epoch).items()}
        record = engine.train_one_epoch(
            student, distillation, loader, optimizer, scaler, ema, recipe, progress, autocast
        )
        if (epoch + 1) % recipe.val_every == 0 or epoch + 1 == recipe.epochs:
            score = config.build(metric, "metric", names=names)
            scores = engine.evaluate(ema.average, val_loader, score, autocast)
            record |= scores
            record |= engine.attention_distances(student, distillation, val_loader, autocast) if teacher else {}
            shown = " ".join(f"{name} {value:.3f}" for name, value in scores.items())
            print(f"epoch {epoch + 1}: {shown}" + (" best" if record[score.fitness] > progress.best else ""))
            if record[score.fitness] > progress.best:
                progress.best, progress.best_epoch = record[score.fitness], epoch
                save_best(folder.best, ema.average, names, sets.imgsz, epoch, progress.best)
        folder.log({"epoch": epoch, **lambdas, **record})
        progress.epoch += 1
        checkpoint.save(folder.checkpoints, progress.epoch * len(loader), parts, text)
    print(f"best: epoch {progress.best_epoch + 1}, {progress.best:.4f}; weights in {folder.best}")
    print(f"evaluate: python eval.py --config {folder.path / 'config.yaml'} --weights {folder.best}")


class Sets(NamedTuple):
    train: Dataset
    val: Dataset
    imgsz: int
    augment: Augment
    store: dict[str, Any]  # settings of data/store.py


def make_sets(
    train: dict[str, Any],
    val: dict[str, Any],
    root: str | None = None,
    imgsz: int = 640,
    augment: dict[str, Any] | None = None,
    workers: int = 8,
    storage: Literal["auto", "resident", "mapped"] = "auto",
    limit: int | None = None,
) -> Sets:
    """The `data` section. root: folder of both sets, where they do not name their own. limit: use a fixed random
    subset of that many images of each set."""
    check_size(imgsz)
    strengths = config.call(Augment, augment or {}, "data.augment")
    place = {"root": root} if root else {}
    train_set, val_set = config.build(train, "data.train", **place), config.build(val, "data.val", **place)
    if train_set.names != val_set.names:
        raise UserError("data: train and val name different classes, or the same in another order")
    return Sets(train_set, val_set, imgsz, strengths, {"workers": workers, "storage": storage, "limit": limit})


def make_distillation(
    student: nn.Module,
    teacher: nn.Module | None,
    imgsz: int,
    taps: list[str | tuple[str, str]],
    align: Literal["all", "unequal", "none", "frozen"] = "all",
    kd_scale: float | Literal["batch"] = 1.0,
    **terms: Any,
) -> Distillation:
    """The `distill` section. A tap is a submodule's name, or [student's name, teacher's name]; other keys are terms."""
    pairs = dict((tap, tap) if isinstance(tap, str) else tap for tap in taps)
    shapes = tap_shapes(student, teacher, pairs, imgsz) if teacher else {}
    weighted = {}
    for name, entry in terms.items():
        if not isinstance(entry, dict) or "build" not in entry:
            raise UserError(f"distill.{name}: neither taps, align, kd_scale nor a term; a term has a `build:` key")
        rest = {key: value for key, value in entry.items() if key not in ("weight", "schedule")}
        term = config.build(rest, f"distill.{name}", shapes=shapes)
        if teacher is None and getattr(term, "needs_teacher", True):
            raise UserError(f"distill.{name}: needs a teacher; add the section `teacher`, or set distill=null")
        place = {key: entry[key] for key in ("weight", "schedule") if key in entry}
        weighted[name] = config.call(Weighted, place, f"distill.{name}", term=term)
    return Distillation(student, teacher, weighted, pairs, shapes, align, kd_scale)


def describe(
    student: Any,
    teacher: nn.Module | None,
    distillation: Distillation,
    loader: TrainLoader,
    recipe: Recipe,
    device: torch.device,
) -> None:
    """Prints what is about to happen, and warns where a setting may surprise."""
    millions = sum(p.numel() for p in student.parameters()) / 1e6
    print(f"student: {type(student).__name__}, {millions:.2f} M parameters, {len(student.names)} classes, on {device}")
    if teacher:
        millions = sum(p.numel() for p in teacher.parameters()) / 1e6
        print(f"teacher: {type(teacher).__name__}, {millions:.2f} M parameters, frozen")
        print(f"terms: {', '.join(distillation.terms) or 'none'}; taps: {', '.join(distillation.taps)}")
    print(f"data: {len(loader.store)} images, {len(loader)} steps an epoch, {recipe.epochs} epochs")
    if recipe.accumulate > 1 and any(getattr(term, "reduction", "") == "notes" for term in distillation.terms.values()):
        print(
            f"warning: reduction `notes` falls with the batch: N is {recipe.batch} here, not train.nbs={recipe.nbs}; "
            "`reduction: sample` does not depend on it"
        )


def save_best(path: Path, model: nn.Module, names: list[str], imgsz: int, epoch: int, fitness: float) -> None:
    """The student alone: averaged weights in float32 under public keys, and what is needed to load them."""
    tensors = {key: value.float() if value.is_floating_point() else value for key, value in model.state_dict().items()}
    card = dict(getattr(model, "card", {}))
    about = {"names": names, "nc": len(names), "imgsz": imgsz, "epoch": epoch + 1, "fitness": fitness}
    checkpoint.save_atomic({"format": "kdmini", "model": tensors, "card": card, **about}, path)


if __name__ == "__main__":
    main()
