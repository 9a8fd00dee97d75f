"""ultralytics' own distillation and tuning (AGPL-3.0), run by its own trainer.

`distil` makes two rows of the evidence, where all but the distillation should be kdmini's;
`tune` those of public weights, where its user's defaults are asked about.

Of `distil`: photographs, reduction to the image size, labels, teacher, first weights, optimiser,
learning rates, momentum, weight decay, clipping, average, strengths of augmentation and
the epoch in which the mosaic ends are those of a run of kdmini. What is not, in 8.4.190:

- The distillation, which is what is compared: score-weighted L2 at layers 16, 19 and 22
  behind a projector, weight 6 throughout, times the batch size.
- The assigner of its detection loss lets a box with a side under 16 pixels choose among
  the cells of one of 16. Trained by it without a teacher (`teacher: null`), the student
  shows what that alone is worth.
- Precision on a CPU: float32, for its trainer refuses bf16 there.
- Augmentation: hue is shifted, not multiplied; pixels are rounded after each stage; other
  random numbers.
- An epoch ends with the incomplete batch, which kdmini leaves out, and an update may reach
  into the next epoch. Neither occurs where the batch divides the images and nbs is the
  batch.
- Its trainer compiles nothing while it distils.
"""

import io
import math
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.peer import version, write_yolo
from kdmini import config
from kdmini.contracts import UserError
from kdmini.device import pick_device
from kdmini.optim import Recipe
from kdmini.sections import Sections, Sets

SPPF = 9  # the layer whose activation some releases lack
VAL_IMAGES = 1  # it validates after the last epoch, whatever it is told

# of Recipe: its trainer has these as numbers in the code, the defaults of Recipe
FIXED = ("clip", "ema_decay", "ema_tau", "loss_scale")
# of Recipe: its settings have the same names and meanings
SAME = (
    "epochs",
    "batch",
    "nbs",
    "lr0",
    "lrf",
    "momentum",
    "weight_decay",
    "warmup_momentum",
    "warmup_bias_lr",
)
# augmentation of its own that kdmini does not have
OFF = (
    "degrees",
    "shear",
    "perspective",
    "flipud",
    "bgr",
    "mixup",
    "cutmix",
    "copy_paste",
    "multi_scale",
)


class Trained(NamedTuple):
    """What a run of its trainer leaves."""

    # the averaged student after the last epoch: on the CPU, float32, public keys; it
    # fits kdmini's YOLO11 of that scale
    state: dict[str, Tensor]
    speed: float  # images/s, median over the epochs of the training alone


def distil(settings: dict[str, Any], scratch: Path) -> Trained:
    """One run of its distillation; without a teacher, of its plain training.

    `distill_model` with its own `dis`, on the data, teacher, schedule, seed and device of
    a config of kdmini, whose section `distill` is not read.
    scratch: an empty folder for all that it writes. A run that is interrupted begins anew,
    in another one. Raises UserError for a recipe that its trainer cannot follow.
    """
    sections = config.call(Sections, settings, "settings")
    recipe = sections.recipe()
    device = pick_device(sections.device)
    refuse_what_it_lacks(recipe, device)
    scratch = scratch.resolve()
    version(scratch)  # before anything else of it

    sets = sections.sets()
    names = sets.train.names
    torch.manual_seed(sections.seed)
    # first of all, as in train.py: so it draws the same weights
    ours = config.build(sections.student, "student", names=names)
    student = counterpart(ours)
    teacher: Path | None = None
    if sections.teacher:
        teacher = scratch / "teacher.pt"
        model = counterpart(config.build(sections.teacher, "teacher", names=names))
        torch.save({"model": model}, teacher)
    data = write_data(sets, scratch)

    images = len(list((scratch / "train" / "images").iterdir()))
    arguments = {
        **of_recipe(recipe, images, device),
        "freeze": frozen_layers(recipe),
        **of_sets(sets),
        **ours.gains,
        "model": f"yolo11{ours.scale}.yaml",
        "distill_model": teacher and str(teacher),
        "data": str(data),
        "project": str(scratch),
        "name": "run",
        "device": str(device),
        "seed": sections.seed,
        "deterministic": sections.deterministic,
        "val": False,
        "plots": False,
        "verbose": False,
    }
    return train(student, arguments, images, device)


def refuse_what_it_lacks(recipe: Recipe, device: torch.device) -> None:
    """Raises UserError."""
    frozen_layers(recipe)
    if recipe.freeze_statistics:
        raise UserError("train.freeze_statistics: ultralytics has no setting for it")
    if (recipe.optimizer, recipe.schedule) != ("sgd", "cosine"):
        raise UserError("train: ultralytics follows `optimizer: sgd` and `schedule: cosine` here")
    for name in FIXED:
        fixed = getattr(Recipe, name)
        if getattr(recipe, name) != fixed:
            raise UserError(f"train.{name}: ultralytics has {fixed}, and no setting for it")
    if device.type == "cuda" and recipe.amp == "fp16":
        raise UserError(
            "train.amp: before fp16, ultralytics downloads a model to try it with; use bf16 or "
            "false"
        )


def frozen_layers(recipe: Recipe) -> int:
    """How many of the first layers are frozen. Raises UserError where others are."""
    count = len(recipe.freeze)
    if set(recipe.freeze) != {f"model.{number}" for number in range(count)}:
        raise UserError("train.freeze: ultralytics freezes the first layers, whole; name those")
    return count


def counterpart(ours: Any) -> nn.Module:
    """Its model, with the weights of kdmini's."""
    from ultralytics.nn.tasks import DetectionModel

    classes = len(ours.names)
    branch = ours.model[-1].cv3[0][-1].in_channels
    theirs = DetectionModel(f"yolo11{ours.scale}.yaml", nc=classes, verbose=False)
    if theirs.model[-1].cv3[0][-1].in_channels != branch:
        # of weights cut from more classes; its branch is as wide as their number asks for
        theirs = DetectionModel(f"yolo11{ours.scale}.yaml", nc=branch, verbose=False)
        head = theirs.model[-1]
        head.nc = classes
        head.no = classes + 4 * head.reg_max
        for level in head.cv3:
            level[-1] = nn.Conv2d(branch, classes, 1)
        theirs.names = dict(enumerate(ours.names))
    theirs.model[SPPF].cv1.act = nn.SiLU() if ours.sppf_act else nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    return theirs


def write_data(sets: Sets, scratch: Path, val_images: int | None = VAL_IMAGES) -> Path:
    """The images and labels as it reads them -> the file that names them.

    val_images: of the data set to evaluate on; None for all.
    """
    from ultralytics.utils import USER_CONFIG_DIR

    write_yolo(sets.train, sets.storing["limit"], scratch / "train", sets.imgsz)
    write_yolo(sets.val, val_images, scratch / "val")
    data = {
        "path": str(scratch),
        "train": "train/images",
        "val": "val/images",
        "names": dict(enumerate(sets.train.names)),
    }
    path = scratch / "data.yaml"
    path.write_text(config.dump(data))
    # for plots, which are off: else it asks the network for the font
    USER_CONFIG_DIR.mkdir(parents=True, exist_ok=True)
    (USER_CONFIG_DIR / "Arial.ttf").touch()
    return path


def of_recipe(recipe: Recipe, images: int, device: torch.device) -> dict[str, Any]:
    """Its arguments for the recipe. Raises UserError where the warm-up is too long."""
    steps = math.ceil(images / recipe.batch)
    warmup = recipe.warmup(steps)
    if warmup > (recipe.epochs - 1) * steps:
        raise UserError(
            "train.warmup_epochs: ultralytics ends the warm-up before the last epoch; make it "
            "shorter"
        )
    half = device.type == "cuda" and recipe.amp
    return {
        **{name: getattr(recipe, name) for name in SAME},
        "warmup_epochs": warmup / steps,
        "optimizer": "SGD",
        "cos_lr": True,
        "patience": 0,
        "amp": "bf16" if half else False,
    }


def of_sets(sets: Sets) -> dict[str, Any]:
    """Its arguments for images and augmentation."""
    strengths = asdict(sets.augment)
    # boxes do not follow an image in another one, so there is none
    for name in ("cutmix_alpha", "mixup_alpha"):
        del strengths[name]
    return {
        **strengths,
        **dict.fromkeys(OFF, 0.0),
        "augmentations": [],
        "imgsz": sets.imgsz,
        "cache": "ram",
        "workers": sets.storing["workers"],
    }


class Tuned(NamedTuple):
    """What its user gets who tunes public weights."""

    weights: Path  # of the last epoch, its own kind of file
    scores: dict[str, float]  # of the last epoch, by its own evaluation
    speed: float  # images/s, median over the epochs of the training alone


def tune(settings: dict[str, Any], arguments: dict[str, Any], scratch: Path) -> Tuned:
    """One run of its trainer from the weights of a config's student, as they are.

    Images, epochs, batch, image size, seed and device are those of a config of kdmini; all
    else is its own defaults, or `arguments`. scratch: an empty folder for all that it writes.
    """
    sections = config.call(Sections, settings, "settings")
    recipe = sections.recipe()
    device = pick_device(sections.device)
    scratch = scratch.resolve()
    version(scratch)
    from ultralytics.models.yolo.detect import DetectionTrainer

    sets = sections.sets()
    data = write_data(sets, scratch, val_images=sets.storing["limit"])
    images = len(list((scratch / "train" / "images").iterdir()))
    weights = sections.student["weights"]
    whole = {
        "model": str(Path(weights["path"]).resolve()),
        "data": str(data),
        "epochs": recipe.epochs,
        "batch": recipe.batch,
        "imgsz": sets.imgsz,
        "seed": sections.seed,
        "device": str(device),
        "amp": False,
        "cache": "ram",
        "workers": 0,
        "project": str(scratch),
        "name": "run",
        "val": False,  # before the last epoch
        "plots": False,
        "verbose": False,
        **arguments,
    }
    trainer, speeds = run(lambda: DetectionTrainer(overrides=whole), images, device)
    scores = {}
    for name, key in (("AP50-95", "mAP50-95(B)"), ("AP50", "mAP50(B)")):
        scores[f"{name} by ultralytics"] = float(trainer.metrics[f"metrics/{key}"])
    return Tuned(Path(trainer.last), scores, median(speeds))


def train(
    student: nn.Module, arguments: dict[str, Any], images: int, device: torch.device
) -> Trained:
    """Runs its trainer. images: of an epoch."""
    from ultralytics.models.yolo.detect import DetectionTrainer

    state: dict[str, Tensor] = {}

    def keep(trainer: Any) -> None:
        # with a teacher, the average is of a model that holds the student
        average = getattr(trainer.ema.ema, "student_model", trainer.ema.ema)
        for key, value in average.state_dict().items():
            state[key] = value.cpu().clone()

    def make() -> Any:
        trainer = DetectionTrainer(overrides=arguments)
        trainer.model = student
        trainer.add_callback("on_train_epoch_end", keep)
        return trainer

    _, speeds = run(make, images, device)
    return Trained(state, median(speeds))


def run(make: Callable[[], Any], images: int, device: torch.device) -> tuple[Any, list[float]]:
    """Makes a trainer and lets it train, with a line an epoch -> it, and the images/s of each
    epoch. images: of an epoch.
    """
    began = 0.0
    speeds: list[float] = []
    terminal = sys.stdout

    def begin(_: Any) -> None:
        nonlocal began
        began = time.perf_counter()

    def end(trainer: Any) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        speeds.append(images / (time.perf_counter() - began))
        losses = [f"{name} {float(value):.3f}" for name, value in trainer.tloss.items()]
        line = f"epoch {trainer.epoch + 1}: {' '.join(losses)}, {speeds[-1]:.1f} images/s"
        print(line, file=terminal, flush=True)

    threads = torch.get_num_threads()
    hidden = io.StringIO()  # its progress bars
    with redirect_stdout(hidden), redirect_stderr(hidden):
        trainer = make()
        torch.set_num_threads(threads)  # it takes another number
        trainer.add_callback("on_train_epoch_start", begin)
        trainer.add_callback("on_train_epoch_end", end)
        trainer.train()
    torch.set_num_threads(threads)
    return trainer, speeds
