"""Train a model, with or without a teacher.

python train.py --config configs/voc.yaml [--check] [key.path=value ...]
python train.py --resume runs/voc [key.path=value ...]
torchrun --nproc-per-node 2 train.py --config configs/voc.yaml
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kdmini import checkpoint, config, distributed, engine, memory, output, signals
from kdmini.assemble import Run, make_run
from kdmini.check import STEPS, examine, report
from kdmini.commands import command
from kdmini.contracts import UserError
from kdmini.data.loader import check_batch
from kdmini.defaults import defaults, filled, no_option
from kdmini.device import choose_algorithms, pick_device
from kdmini.optim import Recipe
from kdmini.outset import describe
from kdmini.progress import Progress, text_of_epoch
from kdmini.resume import check_inputs, check_resumable, run_of, with_processes
from kdmini.runlog import FolderLost, RunFolder
from kdmini.sections import Sections


def train(settings: dict[str, Any], source: str, resume: bool = False, check: bool = False) -> None:
    """One run. settings: the config. source: the file it is from, for messages."""
    sections = config.call(Sections, settings, source)
    recipe = sections.recipe()
    settings = filled(settings, defaults(settings))
    torch.manual_seed(sections.seed)
    choose_algorithms(sections.deterministic)
    device = distributed.start(pick_device(sections.device), sections.timeout)
    check_batch(recipe.batch, distributed.world())
    lead = distributed.rank() == 0
    loggers = sections.make_loggers() if lead else []
    folder = RunFolder(sections.run, resume, lead and not check, loggers)
    if check:
        run = make_run(sections, recipe, device, Progress(), limit=STEPS * recipe.batch)
        describe(run.training, run.teacher)
        return report(examine(run, sections.make_metric(run.names)))

    progress = Progress()
    saved_at: Path | None = None
    saved: dict[str, Any] = {}
    if resume:
        saved_at, saved = checkpoint.newest(folder.checkpoints)
        check_resumable(saved_at, saved, settings)
        progress.load_state_dict(saved["progress"])
        if finished(progress, recipe):
            return conclude(folder, progress)
    run = make_run(sections, recipe, device, progress)
    describe(run.training, run.teacher)
    if saved_at:
        check_inputs(saved_at, saved, run.inputs, sections.allow_changed)
        go_on_from(saved_at, saved, run, folder)
    run.training.replica = distributed.replicate(run.training.student)

    def save(to: RunFolder = folder) -> None:
        if to.lead:
            to.check()
            step = progress.epoch * len(run.training.loader) + progress.step
            parts = {**run.training.parts(), "inputs": run.inputs}
            checkpoint.save(to.checkpoints, step, parts, with_processes(settings))

    if not resume:
        folder.begin(config.dump(settings), run.drawn)
        save()  # so that a run can be resumed from its first moment
    is_begun = progress.epoch + progress.step > 0
    if run.teacher and folder.lead and not is_begun and not folder.records():
        # what training has to improve on
        folder.log({"epoch": -1, **attention_distances(run)})

    try:
        train_epochs(run, folder, sections, save)
    except FolderLost as error:
        other = folder.beside()
        other.begin(config.dump(settings), run.drawn)
        save(other)
        raise UserError(
            f"{error}; the run is saved as it stands in {other.path}; "
            f"to go on: {command('train')} --resume {other.path}"
        ) from error
    conclude(folder, progress)


def train_epochs(run: Run, folder: RunFolder, sections: Sections, save: Callable[[], None]) -> None:
    """The epochs that are left: each trained, saved, evaluated and logged."""
    recipe = run.training.recipe
    progress = run.training.progress
    while not finished(progress, recipe):
        train_epoch(run, folder, save)
        # The epoch is on the disk: an evaluation that is cut off, or not yet in a checkpoint,
        # is made again.
        record = record_of_epoch(run)
        if is_evaluated(progress, recipe):
            record |= evaluate_epoch(run, folder, sections)
        print(text_of_epoch(record, progress))
        folder.log(record)
        progress.next_epoch()
        if finished(progress, recipe):
            save()


def finished(progress: Progress, recipe: Recipe) -> bool:
    since_best = progress.epoch - 1 - progress.best_epoch
    if recipe.patience and since_best >= recipe.patience:
        return True
    return progress.epoch >= recipe.epochs


def is_evaluated(progress: Progress, recipe: Recipe) -> bool:
    done = progress.epoch + 1
    return done % recipe.val_every == 0 or done == recipe.epochs


def go_on_from(path: Path, saved: dict[str, Any], run: Run, folder: RunFolder) -> None:
    """Puts the run where the checkpoint stands."""
    training = run.training
    checkpoint.restore(saved, training.parts(), path)
    progress = training.progress
    steps = len(training.loader)
    if progress.step > steps:
        raise UserError(f"{path} is at step {progress.step} of an epoch of {steps}; delete it")
    print(
        f"resumed from {path}: {progress.epoch} of {training.recipe.epochs} epochs and "
        f"{progress.step} steps done"
    )
    folder.rewind(progress.epoch)
    if not folder.best.exists() and not math.isinf(progress.best):
        print(f"{folder.best} is not there any more: the next score counts as the best")
        progress.best = -math.inf


def train_epoch(run: Run, folder: RunFolder, save: Callable[[], None]) -> None:
    """The steps that are left of the epoch, and a checkpoint whenever one is due.

    A stop signal ends the program once the step is finished and saved.
    """
    progress = run.training.progress
    while progress.step < len(run.training.loader):
        # a signal that comes within it ends the program at its end
        with signals.delayed(repeats=distributed.launched()) as stop:
            engine.train_one_epoch(run.training, stop)
            save()
            if stop.agreed or stop.signum:
                print(
                    f"stopped after step {progress.step} of epoch {progress.epoch + 1}; "
                    f"to go on: {command('train')} --resume {folder.path}"
                )
            # all ranks leave together; one that alone knows of its signal waits for nobody
            if stop.agreed:
                distributed.finish()


def record_of_epoch(run: Run) -> dict[str, Any]:
    """What metrics.jsonl keeps of the training of an epoch."""
    training = run.training
    progress = training.progress
    steps = len(training.loader)
    last_step = (progress.epoch + 1) * steps - 1
    record: dict[str, Any] = {"epoch": progress.epoch}
    for name, value in training.distillation.lambdas(progress.epoch).items():
        record[f"lambda/{name}"] = value
    for name, value in progress.means().items():
        record[f"loss/{name}"] = value
    record["lr"] = training.recipe.at(last_step, steps).lr
    record["skipped"] = progress.skipped
    record["images/s"] = steps * training.recipe.batch / progress.seconds
    return record


def evaluate_epoch(run: Run, folder: RunFolder, sections: Sections) -> dict[str, float]:
    """Scores of the averaged student, which is kept if it is the best so far, and distances
    to the teacher -> what metrics.jsonl keeps of them.
    """
    training = run.training
    progress = training.progress
    average = training.ema.average
    # BatchNorm's statistics, for the weights are the same on all ranks
    distributed.broadcast_(average.buffers())
    metric = sections.make_metric(run.names)
    scores = engine.evaluate(average, run.val_loader, metric, training.autocast)
    record: dict[str, float] = {}
    if run.teacher and folder.lead:
        record |= attention_distances(run)
    for name, value in scores.items():
        record[f"score/{name}"] = value

    fitness = float(scores[metric.fitness])
    if fitness > progress.best:
        progress.best = fitness
        progress.best_epoch = progress.epoch
        if folder.lead:
            folder.check()
            checkpoint.save_best(folder.best, average, run.imgsz, progress.epoch, fitness)
    return record


def attention_distances(run: Run) -> dict[str, float]:
    training = run.training
    return engine.attention_distances(
        training.student, training.distillation, run.val_loader, training.autocast
    )


def conclude(folder: RunFolder, progress: Progress) -> None:
    distributed.finish()
    if math.isinf(progress.best):
        return print("finished: the metric was never a number, so there is no best.pt")
    best = f"best epoch {progress.best_epoch + 1}, {progress.best:.4f}"
    if not folder.best.exists():
        return print(f"finished: {best}, but its weights in {folder.best} were deleted")
    print(f"finished: {best}; weights in {folder.best}")
    print(f"evaluate: {command('eval')} --config {folder.config} --weights {folder.best}")
    print(f"look:     python -m kdmini.tools.visualize {folder.path}")


def in_one_line(error: BaseException, settings: dict[str, Any]) -> str:
    """The line for an error; empty for one that nobody has foreseen, which is shown in full."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, SystemExit):
        # without a code, torchrun would take it for the end of the run
        alone = distributed.world() == 1
        return "" if alone or error.code else "left before the end of the run"
    if place := memory.exhausted(error):
        remedy = memory.remedy_of(settings)
        return f"out of memory on {place}: {remedy}; the checkpoints written so far are whole"
    return distributed.lost_a_rank(error)


def main() -> None:
    output.guard()
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
    args, unknown = parser.parse_known_intermixed_args()  # overrides may stand anywhere
    if unknown:
        parser.error(no_option(unknown, sys.argv))
    if args.check and args.resume:
        parser.error("--check goes with --config")
    signals.exit_on_signals()
    settings: dict[str, Any] = {}
    try:
        folder = run_of(args.resume) if args.resume else ""
        path = str(Path(folder) / "config.yaml" if folder else args.config)
        settings = config.load(path, args.overrides)
        if args.resume:
            settings["run"] = folder
        train(settings, path, resume=bool(args.resume), check=args.check)
    except (UserError, RuntimeError, MemoryError, SystemExit) as error:
        line = in_one_line(error, settings)
        if not line:
            raise
        who = f"rank {distributed.rank()}: " if distributed.launched() else ""
        sys.exit(f"error: {who}{line}")


if __name__ == "__main__":
    main()
