"""Runs of train.py on a pretended card, and what it felt: python -m tests.cuda.scenario JSON

JSON is a list of Scenarios. What came of each is printed as a list of Findings.
"""

import json
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field
from functools import partial, partialmethod, wraps
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.parallel.distributed as parallel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map

import train
from bench.full import Noise
from kdmini import check, checkpoint, config, distributed, engine, inputs
from kdmini.data import loader, tiles
from kdmini.detection import truth
from kdmini.detection.yolo11.model import YOLO11
from kdmini.distill.step import Distillation
from kdmini.optim import EMA
from kdmini.progress import Tally
from kdmini.segmentation.maps import VOID, Segmenter
from kdmini.segmentation.truth import Masks
from kdmini.segmentation.truth import Target as Mask
from tests.cuda.card import CARD, pretend
from tests.cuda.watch import Watch, on_card

ROOT = Path(__file__).parents[2]
HERE = "tests.cuda.scenario"
TAPS = ["model.6", "model.8", "model.13", "model.16", "model.19", "model.22"]
ATTENTION = {
    "build": "kdmini.distill.attention:AttentionTransfer",
    "weight": 0.75,
    "schedule": [[0, 2.0, 40, 0.0]],
}
WATCHED = (
    (engine, "train_one_epoch", "step"),
    (engine, "evaluate", "evaluation"),
    (engine, "attention_distances", "distances"),
    (check, "rows_of_taps", "check"),
    (loader, "render_labelled", "batch, images"),
    (truth, "pad", "batch, targets"),
    (Distillation, "teacher_view", "step, teacher"),
    (Distillation, "losses", "step, terms"),
    (YOLO11, "loss", "step, loss"),
    (Segmenter, "loss", "step, loss"),
    (Tensor, "backward", "step, backward"),
    (nn.utils, "clip_grad_norm_", "step, clip"),
    (torch.optim.SGD, "step", "step, optimiser"),
    (EMA, "update", "step, average"),
    (Tally, "read", "look"),
    (checkpoint, "save_atomic", "save"),
    (checkpoint, "restore", "restore"),
)
PARTS = ("step, ", "batch, ")


@dataclass
class Scenario:
    """A run of as many steps as fit one look at the losses."""

    amp: bool | str = True
    terms: list[str] = field(default_factory=list)  # configs of terms/; else attention
    batch: int = 2
    imgsz: int = 64
    teacher: str | None = "n"
    student: str = "n"  # scale of YOLO11, or a network of MASKED
    steps: int = 2
    taps: int = len(TAPS)  # the last ones of TAPS; 0 for those of the terms' configs
    objects: int = 3  # of an image
    storage: str = "resident"
    accumulate: int = 1
    major: int = 9  # compute capability
    check: bool = False
    resume: bool = False  # go on from what the run has saved
    ranks: int = 1
    plant: str = ""  # a fault on purpose: see PLANTS


@dataclass
class Findings:
    """Counts for each phase, those of all steps together."""

    error: str = ""
    kernels: dict[str, int] = field(default_factory=dict)
    operators: dict[str, dict[str, int]] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    waits: dict[str, dict[str, int]] = field(default_factory=dict)
    pageable: dict[str, dict[str, int]] = field(default_factory=dict)
    mixed: dict[str, dict[str, int]] = field(default_factory=dict)
    types: dict[str, dict[str, int]] = field(default_factory=dict)
    layouts: dict[str, dict[str, int]] = field(default_factory=dict)
    resting: int = 0  # bytes before the first step
    peak: int = 0
    unlike: list[str] = field(default_factory=list)  # laid out unlike their weights
    saves: int = 0
    scaled: bool = False  # whether gradients are scaled, as in fp16


class NoisyMasks(Noise):
    """The same pictures, with masks."""

    truth = Masks

    def __getitem__(self, index: int) -> tuple[np.ndarray, Any]:
        picture, _ = super().__getitem__(index)
        mask = np.full(picture.shape[:2], index % len(self.names), np.uint8)
        mask[:9] = VOID
        return picture, Mask(mask=mask, id=str(index))


# networks of segmentation, which learn from a SegFormer, and their taps
MASKED = {
    "fast_scnn:FastSCNN": ["fusion", "stages.1"],
    "mamba:VMamba": ["stages.1", "stages.3"],
}
SEGFORMER = {"build": "kdmini.segmentation.segformer:SegFormer", "size": "b0"}
LOGITS = {
    "build": "kdmini.terms.logits:LogitDistillation",
    "form": "softmax",
    "gamma": 0,
    "weight": 1.0,
}


class Seen:
    """A metric that only looks where predictions lie."""

    fitness = "score"

    def __init__(self, names: list[str]):
        self.names = names
        self.records: list[None] = []

    def update(self, predictions: list[Any], targets: list[Any]) -> None:
        for prediction in predictions:
            for name, value in prediction.items():
                if on_card(value):
                    raise RuntimeError(f"{name} of a prediction is still on the card")

    def compute(self) -> dict[str, float]:
        return {"score": 0.5}


def settings_of(scenario: Scenario, run: str) -> dict[str, Any]:
    """The config of a scenario."""
    pictures = {"build": "bench.full:Noise", "objects": scenario.objects}
    taps = {"taps": TAPS[-scenario.taps :]}
    terms: dict[str, Any] = {}
    if scenario.teacher and not scenario.terms:
        terms["attention"] = ATTENTION
    for name in scenario.terms:
        of_file = config.load(str(ROOT / f"configs/terms/{name}.yaml"), [])["distill"]
        terms |= {key: value for key, value in of_file.items() if isinstance(value, dict)}
        if not scenario.taps:
            taps = {key: of_file[key] for key in ("taps", "align")}
    teacher = {"build": "kdmini.detection.yolo11.model:YOLO11", "scale": scenario.teacher}
    return {
        "run": run,
        "device": "cuda",
        "compile": False,
        "allow_void": True,  # the teacher has learned nothing
        "data": {
            "imgsz": scenario.imgsz,
            "workers": 1,
            "storage": scenario.storage,
            "augment": {"close_mosaic": 0},
            "train": {**pictures, "count": scenario.batch * scenario.steps},
            "val": {**pictures, "count": scenario.batch + 1},
        },
        "student": {"build": "kdmini.detection.yolo11.model:YOLO11", "scale": scenario.student},
        "teacher": teacher if scenario.teacher else None,
        "distill": {**taps, **terms} if terms else None,
        "metric": {"build": f"{HERE}:Seen"},
        "train": {
            "epochs": 2 if scenario.resume else 1,
            "batch": scenario.batch,
            "nbs": scenario.batch * scenario.accumulate,
            "warmup_epochs": 0,
            "warmup_steps": 0,
            "amp": scenario.amp,
        },
    }


def of_masks(settings: dict[str, Any], scenario: Scenario) -> dict[str, Any]:
    """The same with a network of MASKED as the student."""
    taps = list(zip(MASKED[scenario.student], ("stages.1", "stages.3"), strict=True))
    data = {
        name: {**value, "build": f"{HERE}:NoisyMasks"} if name in ("train", "val") else value
        for name, value in settings["data"].items()
    }
    return {
        **settings,
        "data": data,
        "student": {"build": f"kdmini.segmentation.{scenario.student}"},
        "teacher": SEGFORMER,
        "distill": {
            "taps": [list(pair) for pair in taps],
            "attention": ATTENTION,
            "logits": LOGITS,
        },
    }


def phased(watch: Watch, function: Callable, phase: str) -> Callable:
    """Parts of a step that are called outside of one keep the phase that they are called in."""

    @wraps(function)
    def within(*args: Any, **kwargs: Any) -> Any:
        outer = watch.phase
        if phase.startswith(PARTS) and not outer.startswith("step"):
            return function(*args, **kwargs)
        with watch.during(phase):
            return function(*args, **kwargs)

    return within


@contextmanager
def patched(watch: Watch, found: Findings) -> Iterator[dict[str, Any]]:
    """Watches the phases of a run, and keeps what a checkpoint would hold."""
    kept: dict[str, Any] = {}
    ticks = iter(range(10**6))

    def digest(tensors: Any) -> str:
        """Of no content: what learns has changed each time, what is frozen never."""
        if any(tensor.requires_grad for tensor in tensors):
            return f"{next(ticks)}"
        return "frozen"

    def save_atomic(content: Any, path: Path) -> None:
        found.saves += 1
        if "inputs" in content:
            kept["content"] = content
            kept["path"] = path

    def newest(folder: Path) -> tuple[Path, dict[str, Any]]:
        on_host = tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, kept["content"])
        on_host["rng"] = torch.zeros(1)
        return kept["path"], on_host

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(checkpoint, "save_atomic", save_atomic))
        stack.enter_context(mock.patch.object(checkpoint, "newest", newest))
        stack.enter_context(mock.patch.object(tiles, "ThreadPoolExecutor", AtOnce))
        stack.enter_context(mock.patch.object(check, "digest", digest))
        stack.enter_context(mock.patch.object(inputs, "digest", digest))
        stack.enter_context(mock.patch.object(FakeTensor, "tolist", partialmethod(listed, watch)))
        # which draws again until no number is outside, and asks for that
        stack.enter_context(mock.patch.object(nn.init, "trunc_normal_", nn.init.normal_))
        stack.enter_context(mock.patch.object(torch, "set_rng_state", lambda state: None))
        stack.enter_context(mock.patch.object(torch, "get_rng_state", lambda: torch.zeros(1)))
        for owner, name, phase in WATCHED:
            function = phased(watch, getattr(owner, name), phase)
            stack.enter_context(mock.patch.object(owner, name, function))
        inner = engine.train_one_epoch

        def measured(training: engine.Training, stop: Any) -> None:
            found.resting = watch.now
            found.scaled = training.scaler.is_enabled()
            inner(training, stop)
            found.unlike += unlike(training)

        stack.enter_context(mock.patch.object(engine, "train_one_epoch", measured))
        step = torch.optim.SGD.step

        def checked(optimizer: torch.optim.SGD, *args: Any, **kwargs: Any) -> Any:
            found.unlike += unlike_gradients(optimizer)
            return step(optimizer, *args, **kwargs)

        stack.enter_context(mock.patch.object(torch.optim.SGD, "step", checked))
        yield kept


def listed(tensor: Tensor, watch: Watch) -> list[float]:
    """One copy of all numbers to the host, where a pretended tensor asks for each by itself."""
    if on_card(tensor):
        watch.wait("copy to the host")
    return [1.0] * tensor.numel()


class Replica(parallel.DistributedDataParallel):
    """Takes its own gradients for those of all ranks: the pretended group answers nothing."""

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        self.register_comm_hook(None, self.averaged)

    @staticmethod
    def averaged(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future


@contextmanager
def as_one_of(ranks: int) -> Iterator[None]:
    """As if torchrun had started so many processes, of which the others say what this one
    does.
    """
    if ranks == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    begin = dist.init_process_group

    def init(backend: str, **settings: Any) -> None:
        assert backend == "nccl"
        assert settings["device_id"] == CARD
        begin("fake", rank=0, world_size=ranks, store=FakeStore())

    # as if each rank had a machine of its own
    variables = {"TORCHELASTIC_RUN_ID": "-", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, variables))
        stack.enter_context(mock.patch.object(dist, "init_process_group", init))
        stack.enter_context(mock.patch.object(distributed, "gather", lambda mine: [mine] * ranks))
        largest = distributed.largest

        def own(number: int, device: torch.device) -> int:
            largest(number, device)
            return number

        stack.enter_context(mock.patch.object(distributed, "largest", own))
        stack.enter_context(mock.patch.object(dist, "new_group"))
        stack.enter_context(mock.patch.object(distributed, "wait_for_all"))
        # these compare and send contents
        for name in ("_verify_param_shape_across_processes", "_sync_module_states"):
            stack.enter_context(mock.patch.object(parallel, name))
        stack.enter_context(mock.patch.object(distributed, "DistributedDataParallel", Replica))
        try:
            yield
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


class AtOnce:
    """In the place of a pool of threads: what watches operators sees those of its own thread."""

    def __init__(self, *_: Any) -> None: ...

    def __enter__(self) -> "AtOnce":
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(self, function: Callable, *args: Any) -> Future:
        future: Future = Future()
        future.set_result(function(*args))
        return future


def unlike(training: engine.Training) -> list[str]:
    """Momentum and averages that are laid out unlike their weights."""
    names = []
    state = training.optimizer.state
    for parameter, values in state.items():
        if values["momentum_buffer"].stride() != parameter.stride():
            names.append(f"momentum {list(parameter.shape)}")
    pairs = zip(training.student.named_parameters(), training.ema.average.parameters(), strict=True)
    for (name, parameter), average in pairs:
        if parameter.stride() != average.stride():
            names.append(f"average of {name}")
    return names


def unlike_gradients(optimizer: torch.optim.SGD) -> list[str]:
    """Gradients of another type, place or layout than their weights."""
    names = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            grad = parameter.grad
            if grad is None:
                continue
            strides = zip(grad.stride(), parameter.stride(), parameter.shape, strict=True)
            same = all(ours == theirs for ours, theirs, length in strides if length > 1)
            if not same or (grad.dtype, grad.device) != (parameter.dtype, parameter.device):
                names.append(f"gradient {list(parameter.shape)} {grad.dtype}")
    return names


def forgotten() -> Tensor:
    """A constant that somebody left on the CPU; of one dimension, for a number may lie there."""
    return torch.ones(1)


def with_tensor(box: Tensor) -> Tensor:
    return box * forgotten()


def with_item(box: Tensor) -> Tensor:
    box.item()
    return box


def with_pageable(box: Tensor) -> Tensor:
    return box * forgotten().to(box.device, non_blocking=True).sum()


def with_float32(box: Tensor) -> Tensor:
    with torch.autocast(box.device.type, enabled=False):
        return box * torch.bmm(box.expand(1, 1, 1), box.expand(1, 1, 1)).sum()


PLANTS: dict[str, Callable[[Tensor], Tensor]] = {
    "tensor on the CPU": with_tensor,
    "item": with_item,
    "pageable": with_pageable,
    "float32": with_float32,
}


def planted(plant: str) -> Callable:
    """The detection loss, with a fault on purpose."""
    loss = YOLO11.loss

    def faulty(student: Any, preds: Any, targets: Any) -> Any:
        losses = loss(student, preds, targets)
        return {**losses, "box": PLANTS[plant](losses["box"])}

    return faulty


def play(scenario: Scenario) -> Findings:
    mode = pretend(scenario.major)
    found = Findings()
    watch = Watch()
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        if scenario.plant:
            faulty = planted(scenario.plant)
            stack.enter_context(mock.patch.object(YOLO11, "loss", faulty))
        stack.enter_context(as_one_of(scenario.ranks))
        stack.enter_context(patched(watch, found))
        settings = settings_of(scenario, f"{scratch}/run")
        if scenario.student in MASKED:
            settings = of_masks(settings, scenario)
        stack.enter_context(mode)
        stack.enter_context(watch)
        work = partial(train.train, settings, "the scenario")
        try:
            if scenario.check:
                work(check=True)
            elif scenario.resume:
                stop_after_an_epoch(work)
                work(resume=True)
            else:
                work()
        except BaseException as error:
            found.error = f"{type(error).__name__}: {error}"
            traceback.print_exc()
    found.kernels = dict(watch.kernels)
    found.bytes = dict(watch.bytes)
    found.operators = {phase: dict(counts) for phase, counts in watch.by_operator.items()}
    for name in ("waits", "pageable", "mixed", "types", "layouts"):
        of_phases = getattr(watch, name)
        setattr(found, name, {phase: dict(counts) for phase, counts in of_phases.items()})
    found.peak = watch.peak
    return found


def stop_after_an_epoch(work: Callable) -> None:
    """A run that ends as if it had been killed once its first epoch was evaluated."""
    with mock.patch.object(train, "text_of_epoch", side_effect=KeyboardInterrupt):
        try:
            work()
        except KeyboardInterrupt:
            return


def main() -> None:
    warnings.simplefilter("ignore")
    results = []
    with redirect_stdout(sys.stderr):
        for numbers in json.loads(sys.argv[1]):
            results.append(asdict(play(Scenario(**numbers))))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
