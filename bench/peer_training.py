"""ultralytics' own distillation (AGPL-3.0), as its trainer runs it: the competitor's row among
kdmini's runs.

Photographs, reduction to the image size, labels, teacher, first weights, optimiser, learning rates,
momentum, weight decay, clipping, average, strengths of augmentation and the epoch in which the
mosaic ends are those of a run of kdmini. What is not, in 8.4.190:

- The distillation, which is what is compared: score-weighted L2 at layers 16, 19 and 22 behind a
projector, weight 6
  throughout, times the batch size.
- The assigner of its detection loss lets a box with a side under 16 pixels choose among the cells
of one of 16. Trained
  by it without a teacher (`teacher: null`), the student shows what that alone is worth.
- Precision on a CPU: float32, for its trainer refuses bf16 there.
- Augmentation: hue is shifted, not multiplied; pixels are rounded after each stage; other random
numbers. - An epoch ends with the incomplete batch, which kdmini leaves out, and an update may reach
into the next epoch.
  Neither occurs where the batch divides the images and nbs is the batch.
- Its trainer compiles nothing while it distils.
"""

import io
import math
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from bench.peer import version, write_yolo
from kdmini import config
from kdmini.contracts import UserError
from kdmini.device import pick_device
from kdmini.optim import Recipe
from train import make_sets

FIXED = (
    "clip",
    "ema_decay",
    "ema_tau",
    "loss_scale",
)  # its trainer has them as numbers in the code: Recipe's defaults
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


def distil(settings: dict[str, Any], scratch: Path) -> tuple[dict[str, Tensor], float]:
    """One run of its distillation, `distill_model` with its own `dis`, on the data, teacher,
    schedule, seed and device of a config of kdmini, whose section `distill` is not read; without a
    teacher, of its plain training.

    -> the averaged student after the last epoch (on the CPU, float32, public keys; it fits kdmini's
    YOLO11 of that scale), and images/s, the median over the epochs of the training alone.

    scratch: an empty folder for all that it writes. A run that is interrupted begins anew, in
    another one. Raises UserError for a recipe that its trainer cannot follow.
    """
    recipe = config.call(Recipe, settings["train"], "train")
    if unlike := [name for name in FIXED if getattr(recipe, name) != getattr(Recipe, name)]:
        raise UserError(
            f"train.{unlike[0]}: ultralytics has {getattr(Recipe, unlike[0])}, and no setting for it"
        )
    device, seed = pick_device(settings.get("device", "auto")), settings.get("seed", 0)
    if device.type == "cuda" and recipe.amp == "fp16":
        raise UserError(
            "train.amp: before fp16, ultralytics downloads a model to try it with; use bf16 or false"
        )
    scratch = scratch.resolve()
    version(scratch)
    from ultralytics.models.yolo.detect import DetectionTrainer
    from ultralytics.nn.tasks import DetectionModel
    from ultralytics.utils import USER_CONFIG_DIR

    sets = config.call(make_sets, settings["data"], "data")
    names = sets.train.names

    def counterpart(section: str) -> tuple[Any, Any]:
        ours = config.build(settings[section], section, names=names)
        theirs = DetectionModel(f"yolo11{ours.scale}.yaml", nc=len(names), verbose=False)
        theirs.model[9].cv1.act = (
            nn.SiLU() if ours.sppf_act else nn.Identity()
        )  # some releases have none
        theirs.load_state_dict(ours.state_dict())
        return ours, theirs

    torch.manual_seed(seed)
    ours, student = counterpart(
        "student"
    )  # first of all, as in train.py: so it draws the same weights
    teacher = scratch / "teacher.pt" if settings.get("teacher") else None
    if teacher:
        torch.save({"model": counterpart("teacher")[1]}, teacher)
    write_yolo(sets.train, sets.store["limit"], scratch / "train", sets.imgsz)
    write_yolo(
        sets.val, 1, scratch / "val"
    )  # it validates after the last epoch, whatever it is told: on one image
    data = {
        "path": str(scratch),
        "train": "train/images",
        "val": "val/images",
        "names": dict(enumerate(names)),
    }
    (scratch / "data.yaml").write_text(config.dump(data))
    USER_CONFIG_DIR.mkdir(parents=True, exist_ok=True)
    (
        USER_CONFIG_DIR / "Arial.ttf"
    ).touch()  # for plots, which are off: else it asks the network for it

    count = len(list((scratch / "train" / "images").iterdir()))
    steps = math.ceil(count / recipe.batch)
    if recipe.warmup(steps) > (recipe.epochs - 1) * steps:
        raise UserError(
            "train.warmup_epochs: ultralytics ends the warm-up before the last epoch; make it shorter"
        )
    arguments = (
        {name: getattr(recipe, name) for name in SAME}
        | asdict(sets.augment)
        | dict.fromkeys(OFF, 0.0)
    )
    arguments |= {"warmup_epochs": recipe.warmup(steps) / steps}
    arguments |= {
        "optimizer": "SGD",
        "cos_lr": True,
        "patience": 0,
        "augmentations": [],
        **ours.gains,
    }
    arguments |= {
        "imgsz": sets.imgsz,
        "cache": "ram",
        "workers": sets.store["workers"],
        "seed": seed,
    }
    arguments |= {
        "amp": "bf16" if device.type == "cuda" and recipe.amp else False,
        "device": str(device),
    }
    arguments |= {
        "deterministic": settings.get("deterministic", False),
        "val": False,
        "plots": False,
        "verbose": False,
    }
    arguments |= {"data": str(scratch / "data.yaml"), "distill_model": teacher and str(teacher)}
    arguments |= {"model": f"yolo11{ours.scale}.yaml", "project": str(scratch), "name": "run"}

    began, rates, average = 0.0, [], {}
    shown = sys.stdout

    def begin(_: Any) -> None:
        nonlocal began
        began = time.perf_counter()

    def end(trainer: Any) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        rates.append(count / (time.perf_counter() - began))
        averaged = getattr(trainer.ema.ema, "student_model", trainer.ema.ema)
        average.update({key: value.cpu().clone() for key, value in averaged.state_dict().items()})
        told = " ".join(f"{name} {float(value):.3f}" for name, value in trainer.tloss.items())
        print(
            f"epoch {trainer.epoch + 1}: {told}, {rates[-1]:.1f} images/s", file=shown, flush=True
        )

    threads = torch.get_num_threads()
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # its progress bars
        trainer = DetectionTrainer(overrides=arguments)
        torch.set_num_threads(threads)  # it takes another number
        trainer.model = student
        trainer.add_callback("on_train_epoch_start", begin)
        trainer.add_callback("on_train_epoch_end", end)
        trainer.train()
    torch.set_num_threads(threads)
    return average, median(rates)
