"""What a distillation step costs: student, teacher and terms, forward and backward.

python -m bench.step [--imgsz 320] [--batch 16] [--rounds 9] [--eager] [--device cuda]

Random weights, the same in every variant, and random images. The notes' form is written
out below: teacher with BatchNorm and head, alignment with bias, attention as published,
everything NCHW. Its loss is kdmini's to 1e-5, and its taps are; that is checked before
anything is timed. `--eager` leaves out what is compiled, which takes minutes on a CPU. A
batch of fewer than 16 would leave 1x1 convolutions to another, slower routine on a
single thread. With `PYTHONPATH=.oracle/newest`, where `make parity` installs it,
ultralytics' own distillation takes its turns. At the end, on a CPU: the share of
convolutions, below which no step can fall.
Legend: N images, S image size, C channels, H W cells.
"""

import argparse
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import measure
from bench.peer import PeerStep
from kdmini.bounds import Count, ImageSize
from kdmini.detection.truth import Targets
from kdmini.detection.voc import VOC_NAMES
from kdmini.detection.yolo11.model import YOLO11
from kdmini.device import pick_device
from kdmini.distill.align import Shapes
from kdmini.distill.attention import AttentionTransfer
from kdmini.distill.step import Distillation, Weighted, tap_shapes
from kdmini.distill.taps import Taps
from kdmini.typed import argument

TAPS = [f"model.{layer}" for layer in (6, 8, 13, 16, 19, 22)]
PAIRS = {tap: tap for tap in TAPS}
NOTES = "the notes' form"
OBJECTS = 8  # of an image
CONVOLUTIONS = ("aten::mkldnn_convolution", "aten::convolution_backward")
TOLERANCE = 1e-5  # relative, of losses and taps in float32


class Student:
    """The student with its detection loss, and nothing else.

    images: (N, 3, S, S).
    """

    def __init__(self, images: Tensor, targets: Targets, nchw: bool = False):
        torch.manual_seed(0)
        memory = torch.contiguous_format if nchw else torch.channels_last
        self.images = images
        self.targets = targets
        self.student = YOLO11(VOC_NAMES, "s").train()
        self.teacher = YOLO11(VOC_NAMES, "m").eval().requires_grad_(False)
        for model in (self.student, self.teacher):
            model.to(images.device, memory_format=memory)

    def loss(self) -> Any:
        """Scalar."""
        preds = self.student(self.images)
        return sum(self.student.loss(preds, self.targets).values())

    def autocast(self) -> AbstractContextManager:
        return precision(self.images)

    def step(self) -> None:
        """One forward and backward pass."""
        with self.autocast():
            loss = self.loss()
        loss.backward()
        self.student.zero_grad()

    def shapes(self) -> Shapes:
        return tap_shapes(self.student, self.teacher, PAIRS, self.images.shape[-1])


class Notes(Student):
    """Distillation as the research notes spell it out."""

    def __init__(self, images: Tensor, targets: Targets):
        super().__init__(images, targets, nchw=True)
        shapes = self.shapes()
        torch.manual_seed(1)
        layers = []
        for student_channels, channels, _, _ in shapes.values():
            conv = nn.Conv2d(student_channels, channels, 1, bias=False)
            layers.append(nn.Sequential(conv, nn.BatchNorm2d(channels, affine=False)))
        self.align = nn.ModuleList(layers).to(images.device)
        for layer in layers:
            conv = layer[0]
            conv.bias = nn.Parameter(torch.zeros(conv.out_channels, device=images.device))
        self.student_taps = Taps(self.student, TAPS)
        self.teacher_taps = Taps(self.teacher, TAPS)

    @staticmethod
    def attention(feat: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, H, W)"""
        energy = torch.pow(torch.abs(feat), 2).sum(dim=1)
        return energy / (torch.norm(energy, p=2, dim=(1, 2), keepdim=True) + 1e-8)

    @torch.no_grad()
    def run_teacher(self) -> None:
        with precision(self.images):
            self.teacher(self.images)
        self.teacher_feats = self.teacher_taps.take()

    def loss(self) -> Any:
        loss = super().loss()
        self.run_teacher()
        ours = self.student_taps.take().values()
        theirs = self.teacher_feats.values()
        for layer, our_feat, their_feat in zip(self.align, ours, theirs, strict=True):
            difference = self.attention(layer(our_feat)) - self.attention(their_feat)
            loss = loss + torch.norm(difference, p=2) / len(self.images)
        return loss


class Ours(Student):
    """Distillation as train.py runs it. half: the type of autocast, where it is run in one."""

    def __init__(
        self,
        images: Tensor,
        targets: Targets,
        compiled: bool = False,
        half: torch.dtype | None = None,
    ):
        super().__init__(images, targets)
        shapes = self.shapes()
        torch.manual_seed(1)
        terms = {"attention": Weighted(AttentionTransfer(), 1.0)}
        self.distillation = Distillation(self.student, self.teacher, terms, PAIRS, shapes)
        self.distillation.to(images.device)
        self.half = half
        if half:
            self.teacher.hold_in(half)
        if compiled:
            student: Any = self.student
            student.compile(dynamic=False)
            student.loss = torch.compile(student.loss, dynamic=False)
            self.distillation.compile(dynamic=False)

    def autocast(self) -> AbstractContextManager:
        if not self.half:
            return super().autocast()
        return torch.autocast(self.images.device.type, self.half)

    def run_teacher(self) -> None:
        with self.autocast():
            view: Any = self.distillation.teacher_view(self.images)
        self.teacher_feats = view.feats

    def loss(self) -> Any:
        preds = self.student(self.images)
        kd = self.distillation(self.images, preds, self.targets, 0)
        task = self.student.loss(preds, self.targets)
        return sum(task.values()) + sum(kd.values())


def noise(batch: int, imgsz: int, device: torch.device | str) -> tuple[Tensor, Targets]:
    """Random images and OBJECTS random boxes in each."""
    images = torch.rand(batch, 3, imgsz, imgsz, device=device)
    corners = torch.rand(batch, OBJECTS, 2, 2, device=device).sort(2).values
    targets: Targets = {
        "boxes_xyxy": corners.flatten(2) * imgsz,
        "labels": torch.randint(0, len(VOC_NAMES), (batch, OBJECTS), device=device),
        "ids": [""] * batch,
    }
    return images, targets


def precision(images: Tensor) -> AbstractContextManager:
    """On a GPU every variant runs in bfloat16 where autocast puts it."""
    return torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda)


def check_equal(notes: Notes, ours: Ours) -> None:
    """Raises AssertionError unless loss and taps agree to TOLERANCE."""
    theirs = notes.loss().item()
    mine = ours.loss().item()
    apart = abs(theirs - mine)
    assert apart < TOLERANCE * theirs, f"the notes' loss is {theirs}, kdmini's {mine}"
    ours.run_teacher()
    for tap, feat in notes.teacher_feats.items():
        difference = (feat - ours.teacher_feats[tap]).abs().max() / feat.abs().max()
        assert difference < TOLERANCE, f"{tap} differs by {difference}"


def share_of_convolutions(work: Callable[[], object]) -> float:
    """0..1, of the time of one call, on a CPU."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds) as trace:
        work()
    own = {event.key: event.self_cpu_time_total for event in trace.key_averages()}
    return sum(own.get(name, 0) for name in CONVOLUTIONS) / sum(own.values())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--imgsz", type=argument(ImageSize), default=320)
    parser.add_argument("--batch", type=argument(Count), default=16)
    parser.add_argument("--rounds", type=argument(Count), default=9)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = pick_device(args.device)

    torch.manual_seed(2)
    images, targets = noise(args.batch, args.imgsz, device)
    print(
        f"{measure.machine(device.type)}, imgsz {args.imgsz}, batch {args.batch}, "
        f"{args.rounds} rounds\n"
    )
    notes = Notes(images, targets)
    half = torch.bfloat16 if images.is_cuda else None
    variants = {"kdmini": Ours(images, targets, half=half)}
    if not args.eager:
        variants["kdmini, compiled"] = Ours(images, targets, compiled=True, half=half)

    # the teacher first: training leaves the process a heap so large that nothing has to
    # ask for memory again
    teachers: dict[str, Callable[[], object]] = {NOTES: notes.run_teacher}
    for name, variant in variants.items():
        teachers[name] = variant.run_teacher
    seconds = measure.take_turns(teachers, args.rounds, device.type)
    print("The teacher alone; the notes' form has BatchNorm and head:\n")
    print(measure.table(seconds, NOTES, args.batch, "image"))

    steps: dict[str, Callable[[], object]] = {
        NOTES: notes.step,
        "the student alone": Student(images, targets).step,
    }
    for name, variant in variants.items():
        steps[name] = variant.step
        if device.type == "cpu":
            check_equal(notes, variant)
    opponents = [NOTES]
    with tempfile.TemporaryDirectory() as scratch:
        try:
            peer = PeerStep(images, targets, Path(scratch))
        except ImportError as error:
            print("\n" + measure.no_peer(error))
        else:
            steps[peer.name] = peer.step
            opponents.append(peer.name)
        seconds = measure.take_turns(steps, args.rounds, device.type)
        for opponent in opponents:
            print("\nThe step:\n\n" + measure.table(seconds, opponent, args.batch, "image"))
        if device.type == "cpu":
            print("\nConvolutions, share of the time:\n")
            works = {f"teacher, {name}": work for name, work in teachers.items()} | steps
            for name, work in works.items():
                print(f"- {name}: {share_of_convolutions(work):.0%}")


if __name__ == "__main__":
    main()
