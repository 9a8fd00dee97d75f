"""Train a detector, with or without a teacher.

python train.py --config configs/voc.yaml [--check] [key.path=value ...]
python train.py --resume runs/voc [key.path=value ...]
torchrun --nproc-per-node 2 train.py --config configs/voc.yaml
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from kdmini import checkpoint, config, distributed, engine, signals
from kdmini.check import STEPS, examine, report
from kdmini.contracts import Dataset, UserError
from kdmini.data.loader import Augment, TrainLoader, ValLoader, check_batch, check_size
from kdmini.data.store import Store
from kdmini.device import choose_algorithms, pick_device, precision
from kdmini.distill.step import Distillation, Weighted, tap_shapes
from kdmini.optim import EMA, Recipe, make_sgd
from kdmini.progress import Progress
from kdmini.runlog import RunFolder

# what a resumed run may have otherwise and still come out bit for bit as if it had never stopped;
# `root` of a set too
FREE = {
    "run",
    "timeout",
    "data.workers",
    "data.storage",
    "train.save_every",
    "train.val_every",
    "train.patience",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", help="a YAML file, such as configs/voc.yaml")
    source.add_argument("--resume", metavar="RUN", help="a run folder to continue")
    parser.add_argument(
        "--check",
        action="store_true",
        help="two steps and a table that proves that distillation is on",
    )
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    args = parser.parse_intermixed_args()  # overrides may stand anywhere
    if args.check and args.resume:
        parser.error("--check goes with --config")
    signals.exit_on_signals()
    settings: dict[str, Any] = {}
    try:
        path = Path(args.resume) / "config.yaml" if args.resume else args.config
        settings = config.load(path, args.overrides) | ({"run": args.resume} if args.resume else {})
        config.call(
            train_detector,
            settings,
            str(path),
            settings=settings,
            resume=bool(args.resume),
            check=args.check,
        )
    except (UserError, RuntimeError, SystemExit) as error:
        told = in_one_line(error, settings)
        if not told:
            raise
        sys.exit(
            f"error: rank {distributed.rank()}: {told}"
            if distributed.launched()
            else f"error: {told}"
        )


def in_one_line(error: BaseException, settings: dict[str, Any]) -> str:
    """What to tell of an error; empty for one that nobody has foreseen, which is shown in full."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(
        error, SystemExit
    ):  # without a code, torchrun would take it for the end of the run
        return (
            "left before the end of the run" if distributed.world() > 1 and not error.code else ""
        )
    if isinstance(error, torch.OutOfMemoryError):
        batch, imgsz = (
            settings["train"]["batch"],
            settings["data"].get("imgsz", "640 (the default)"),
        )
        return (
            f"out of memory on the device with train.batch={batch} at data.imgsz={imgsz}: lower one of them, or set "
            "train.amp=true or data.storage=mapped; the checkpoints written so far are whole"
        )
    return distributed.lost_a_rank(error)


def train_detector(
    settings: dict[str, Any],
    resume: bool,
    check: bool,
    run: str,
    data: dict[str, Any],
    student: Any,
    metric: Any,
    train: dict[str, Any],
    teacher: Any = None,
    distill: Any = None,
    seed: int = 0,
    device: str = "auto",
    compile: bool | Literal["auto"] = "auto",
    deterministic: bool = False,
    timeout: float = 10.0,
) -> None:
    """One run. The parameters after `check` are the sections of the config, each a call: see
    config.py.

    compile: rendering, student, teacher and terms by torch.compile; it takes minutes on a CPU, so
    `auto` is CUDA only.
    deterministic: the same run gives the same bits on CUDA too, more slowly.
    timeout: minutes that one of several processes waits for another before it gives up.
    """
    recipe = config.call(Recipe, train, "train")
    torch.manual_seed(seed)
    choose_algorithms(deterministic)
    place = distributed.start(pick_device(device), timeout)
    compiled = place.type == "cuda" if compile == "auto" else compile
    autocast, scaler = precision(recipe.amp, place)
    rank, world = distributed.rank(), distributed.world()
    check_batch(recipe.batch, world)
    folder, progress = RunFolder(run, resume, lead=rank == 0 and not check), Progress()
    saved: dict[str, Any] = {}
    if resume:
        saved_at, saved = checkpoint.newest(folder.checkpoints)
        check_resumable(saved_at, saved, settings)
        progress.load_state_dict(saved["progress"])
        if finished(progress, recipe):
            return conclude(folder, progress)

    sets = config.call(make_sets, data, "data")
    names = sets.train.names
    storing = {**sets.store, "compiled": compiled} | (
        {"limit": STEPS * recipe.batch} if check else {}
    )

    # the order matters: build, load weights, copy for the EMA, attach taps (a copy would take the
    # hooks along), compile
    student = config.build(student, "student", names=names).to(
        place, memory_format=torch.channels_last
    )
    ema = EMA(student, recipe.ema_decay, recipe.ema_tau)
    if not distill:
        teacher, distill = None, {"taps": []}
    if teacher:
        teacher = config.build(teacher, "teacher", names=names).to(
            place, memory_format=torch.channels_last
        )
    distillation = config.call(
        make_distillation, distill, "distill", student=student, teacher=teacher, imgsz=sets.imgsz
    )
    distillation.to(place)
    if compiled:
        student.compile(dynamic=False)
        distillation.compile(dynamic=False)
    optimizer = make_sgd(
        [student, distillation], recipe
    )  # align modules and terms learn too, the teacher does not

    store = Store(sets.train, sets.imgsz, place, name="train", **storing)
    loader = TrainLoader(store, recipe.batch, recipe.epochs, sets.augment, seed, rank, world)
    val_loader = ValLoader(
        Store(sets.val, sets.imgsz, place, name="val", **storing), recipe.batch, rank, world
    )

    parts: dict[str, Any] = {"student": student, "ema": ema, "distillation": distillation}
    parts |= {"optimizer": optimizer, "scaler": scaler, "progress": progress}
    describe(student, teacher, distillation, loader, recipe)
    if resume:
        checkpoint.restore(saved, parts, saved_at)
        print(
            f"resumed from {saved_at}: {progress.epoch} of {recipe.epochs} epochs and {progress.step} steps done"
        )
        folder.rewind(progress.epoch)
    if check:
        score = config.build(metric, "metric", names=names)
        loop = (loader, optimizer, scaler, ema, recipe, Progress(), autocast, signals.Stop())
        return report(examine(student, teacher, distillation, loop, val_loader, score))
    replica = distributed.replicate(student)

    def save() -> None:
        if folder.lead:
            step = progress.epoch * len(loader) + progress.step
            checkpoint.save(folder.checkpoints, step, parts, {**settings, "processes": world})

    if not resume:
        folder.begin(config.dump(settings))
        save()  # so that a run can be resumed from its first moment
    if teacher and folder.lead and not folder.records():  # what training has to improve on
        folder.log(
            {"epoch": -1, **engine.attention_distances(student, distillation, val_loader, autocast)}
        )

    while not finished(progress, recipe):
        epoch = progress.epoch
        while progress.step < len(loader):
            with signals.delayed(
                repeats=distributed.launched()
            ) as stop:  # leaves the program at its end
                engine.train_one_epoch(
                    student,
                    replica,
                    distillation,
                    loader,
                    optimizer,
                    scaler,
                    ema,
                    recipe,
                    progress,
                    autocast,
                    stop,
                )
                save()
                if stop.agreed or stop.signum:
                    print(
                        f"stopped after step {progress.step} of epoch {epoch + 1}; to go on: train.py --resume {run}"
                    )
                if (
                    stop.agreed
                ):  # a rank that alone knows of its signal does not wait for the others
                    distributed.finish()

        # the epoch is on the disk: an evaluation that is cut off, or not yet in a checkpoint, is
        # made again
        record = {f"lambda/{name}": value for name, value in distillation.lambdas(epoch).items()}
        record |= {
            **progress.means(),
            "lr": recipe.at((epoch + 1) * len(loader) - 1, len(loader)).lr,
        }
        record |= {
            "skipped": progress.left_out,
            "images/s": len(loader) * recipe.batch / progress.seconds,
        }
        scores: dict[str, float] = {}
        if (epoch + 1) % recipe.val_every == 0 or epoch + 1 == recipe.epochs:
            distributed.broadcast_(
                ema.average.buffers()
            )  # BatchNorm's, for the weights are the same on all ranks
            score = config.build(metric, "metric", names=names)
            scores = engine.evaluate(ema.average, val_loader, score, autocast)
            if teacher and folder.lead:
                record |= engine.attention_distances(student, distillation, val_loader, autocast)
            fitness = float(scores[score.fitness])
            if fitness > progress.best:
                progress.best, progress.best_epoch = fitness, epoch
                if folder.lead:
                    save_best(folder.best, ema.average, names, sets.imgsz, epoch, fitness)
        shown = {
            **progress.means(),
            **scores,
            **{key: record[key] for key in record if key.startswith("distance/raw")},
        }
        told = " ".join(f"{name} {value:.3f}" for name, value in shown.items())
        told += f" skipped {progress.left_out}" if progress.left_out else ""
        print(
            f"epoch {epoch + 1}: {told}"
            + (
                " best"
                if scores and (progress.best, progress.best_epoch) == (fitness, epoch)
                else ""
            )
        )
        folder.log({"epoch": epoch, **record, **scores})
        progress.next_epoch()
        if finished(progress, recipe):
            save()
    conclude(folder, progress)


def finished(progress: Progress, recipe: Recipe) -> bool:
    return (
        progress.epoch >= recipe.epochs
        or progress.epoch - 1 - progress.best_epoch >= recipe.patience
    )


def conclude(folder: RunFolder, progress: Progress) -> None:
    distributed.finish()
    if math.isinf(progress.best):
        return print("finished: the metric was never a number, so there is no best.pt")
    print(
        f"finished: best epoch {progress.best_epoch + 1}, {progress.best:.4f}; weights in {folder.best}"
    )
    evaluate = f"python eval.py --config {folder.config} --weights {folder.best}"
    print(f"evaluate: {evaluate}\nlook:     python -m kdmini.tools.visualize {folder.path}")


def check_resumable(path: Path, saved: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raises UserError where the config has changed since in a way that changes what is computed;
    else warns.
    """
    about = {key: saved[key] for key in ("config", "progress") if key in saved}
    if fault := checkpoint.misfit({"config": {}, "progress": Progress().state_dict()}, about):
        raise UserError(f"{path} is no checkpoint of a run: {fault}; delete it")
    told = config.changed(saved["config"], {**settings, "processes": distributed.world()})
    exact = {key for key in told if key in FREE or key.split(".")[-1] == "root"}
    if refused := [
        told[key]
        for key in told
        if key not in exact | {"device", "compile", "deterministic", "processes"}
    ]:
        raise UserError(f"{path}: {'; '.join(refused[:5])}: set it back, or begin another run")
    for key in told.keys() - {"run"}:
        print(
            f"warning: {told[key]}"
            + ("" if key in exact else "; not bit for bit what the run would have been")
        )


class Sets(NamedTuple):
    train: Dataset
    val: Dataset
    imgsz: int
    augment: Augment
    store: dict[str, Any]  # further settings of data/store.py


def make_sets(
    train: dict[str, Any],
    val: dict[str, Any],
    root: str | None = None,
    imgsz: int = 640,
    augment: dict[str, Any] | None = None,
    workers: int = 8,
    storage: Literal["auto", "resident", "mapped"] = "auto",
    limit: int | None = None,
    on_bad: Literal["stop", "skip"] = "stop",
    allow_overlap: bool = False,
) -> Sets:
    """The `data` section. root: folder of both sets, where they do not name their own. limit: use a
    fixed random
    subset of that many images of each set. on_bad: what to do about files that cannot be used."""
    check_size(imgsz)
    strengths = config.call(Augment, augment or {}, "data.augment")
    offered = {"root": root} if root else {}
    train_set, val_set = (
        config.build(train, "data.train", **offered),
        config.build(val, "data.val", **offered),
    )
    overlap: set[Any] = getattr(train_set, "photographs", set()) & getattr(
        val_set, "photographs", set()
    )
    if overlap and not allow_overlap:
        raise UserError(
            f"data: {len(overlap):,} images are in train and val both, such as {'/'.join(min(overlap))}: `exclude` "
            "one split from the other, or set data.allow_overlap=true"
        )
    if train_set.names != val_set.names:
        raise UserError("data: train and val name different classes, or the same in another order")
    store = {"workers": workers, "storage": storage, "limit": limit, "on_bad": on_bad}
    return Sets(train_set, val_set, imgsz, strengths, store)


def make_distillation(
    student: nn.Module,
    teacher: nn.Module | None,
    imgsz: int,
    taps: list[str | tuple[str, str]],
    align: Literal["all", "unequal", "none", "frozen"] = "all",
    kd_scale: float | Literal["batch"] = 1.0,
    **terms: Any,
) -> Distillation:
    """The `distill` section. A tap is a submodule's name, or [student's name, teacher's name];
    other keys are terms.
    """
    pairs = dict((tap, tap) if isinstance(tap, str) else tap for tap in taps)
    shapes = tap_shapes(student, teacher or student, pairs, imgsz) if pairs else {}
    weighted = {}
    for name, entry in terms.items():
        if not isinstance(entry, dict) or "build" not in entry:
            raise UserError(
                f"distill.{name}: neither taps, align, kd_scale nor a term; a term has a `build:` key"
            )
        rest = {key: value for key, value in entry.items() if key not in ("weight", "schedule")}
        term = config.build(rest, f"distill.{name}", shapes=shapes, names=student.names)
        if teacher is None and getattr(term, "needs_teacher", True):
            raise UserError(
                f"distill.{name}: needs a teacher; add the section `teacher`, or set distill=null"
            )
        place = {key: entry[key] for key in ("weight", "schedule") if key in entry}
        weighted[name] = config.call(Weighted, place, f"distill.{name}", term=term)
    return Distillation(
        student, teacher, weighted, pairs, shapes if teacher else {}, align, kd_scale
    )


def describe(
    student: Any, teacher: Any, distillation: Distillation, loader: TrainLoader, recipe: Recipe
) -> None:
    """Prints what is about to happen, and warns where a setting may surprise."""
    millions = sum(p.numel() for p in student.parameters()) / 1e6
    classes = f"{len(student.names)} classes, on {loader.device}"
    print(f"student: {type(student).__name__}, {millions:.2f} M parameters, {classes}")
    if loader.device.type == "cpu" and not torch.cuda.is_available():
        print("device: torch finds no CUDA device, so this runs on the CPU")
    if teacher:
        millions = sum(p.numel() for p in teacher.parameters()) / 1e6
        print(f"teacher: {type(teacher).__name__}, {millions:.2f} M parameters, frozen")
        print(
            f"terms: {', '.join(distillation.terms) or 'none'}; taps: {', '.join(distillation.taps)}"
        )
    ranks = f", {distributed.world()} processes" if distributed.world() > 1 else ""
    print(
        f"data: {len(loader.store)} images, {len(loader)} steps an epoch, {recipe.epochs} epochs{ranks}"
    )
    if recipe.accumulate > 1 and any(
        getattr(term, "reduction", "") == "notes" for term in distillation.terms.values()
    ):
        print(
            f"warning: reduction `notes` falls with the batch: N is {recipe.batch} here, not train.nbs={recipe.nbs}; "
            "`reduction: sample` does not depend on it"
        )


def save_best(
    path: Path, model: nn.Module, names: list[str], imgsz: int, epoch: int, fitness: float
) -> None:
    """The student alone: averaged weights in float32 under public keys, and what is needed to load
    them.
    """
    tensors = {
        key: value.float() if value.is_floating_point() else value
        for key, value in model.state_dict().items()
    }
    card = dict(getattr(model, "card", {}))
    about = {
        "names": names,
        "nc": len(names),
        "imgsz": imgsz,
        "epoch": epoch + 1,
        "fitness": fitness,
    }
    checkpoint.save_atomic({"format": "kdmini", "model": tensors, "card": card, **about}, path)


if __name__ == "__main__":
    main()
