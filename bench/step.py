"""What a distillation step costs: forward and backward of the student, the teacher, the terms.

python -m bench.step [--imgsz 320] [--batch 16] [--rounds 9] [--eager] [--device cuda]

Random weights, the same in every variant, and random images. The notes' form is written out below:
teacher with BatchNorm and head, alignment with bias, attention as published, everything NCHW. Its
loss is kdmini's to 1e-5, and its taps are; that is checked before anything is timed. `--eager`
leaves out what is compiled, which takes minutes on a CPU. A batch of fewer than 16 would leave 1x1
convolutions to another, slower routine on a single thread. With `PYTHONPATH=.oracle/newest`, where
`make parity` installs it, ultralytics' own distillation takes its turns."""

import argparse
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn

from bench import measure
from bench.peer import PeerStep
from kdmini.contracts import Targets
from kdmini.detection.voc import VOC_NAMES
from kdmini.detection.yolo11.model import YOLO11
from kdmini.distill.attention import AttentionTransfer
from kdmini.distill.step import Distillation, Weighted, tap_shapes
from kdmini.distill.taps import Taps

TAPS = [f"model.{layer}" for layer in (6, 8, 13, 16, 19, 22)]


class Student:
    """The student with its detection loss, and nothing else; `step` is one forward and backward
    pass.
    """

    def __init__(self, images: Tensor, targets: Targets, nchw: bool = False):
        torch.manual_seed(0)
        memory = torch.contiguous_format if nchw else torch.channels_last
        self.images, self.targets = images, targets
        self.student = YOLO11(VOC_NAMES, "s").to(images.device, memory_format=memory).train()
        self.teacher = (
            YOLO11(VOC_NAMES, "m")
            .to(images.device, memory_format=memory)
            .eval()
            .requires_grad_(False)
        )

    def loss(self) -> Tensor:
        return sum(self.student.loss(self.student(self.images), self.targets).values())  # type: ignore[return-value]

    def step(self) -> None:
        with precision(self.images):
            loss = self.loss()
        loss.backward()
        self.student.zero_grad()


class Notes(Student):
    """Distillation as the research notes spell it out."""

    def __init__(self, images: Tensor, targets: Targets):
        super().__init__(images, targets, nchw=True)
        shapes = tap_shapes(
            self.student, self.teacher, dict(zip(TAPS, TAPS, strict=True)), images.shape[-1]
        )
        torch.manual_seed(1)
        self.align = nn.ModuleList(
            nn.Sequential(nn.Conv2d(cs, ct, 1, bias=False), nn.BatchNorm2d(ct, affine=False))
            for cs, ct, _, _ in shapes.values()
        ).to(images.device)
        for layer in self.align:
            layer[0].bias = nn.Parameter(torch.zeros(layer[0].out_channels, device=images.device))
        self.student_taps, self.teacher_taps = Taps(self.student, TAPS), Taps(self.teacher, TAPS)

    @staticmethod
    def attention(feat: Tensor) -> Tensor:
        energy = torch.pow(torch.abs(feat), 2).sum(dim=1)
        return energy / (torch.norm(energy, p=2, dim=(1, 2), keepdim=True) + 1e-8)

    @torch.no_grad()
    def look(self) -> None:
        with precision(self.images):
            self.teacher(self.images)
        self.seen = self.teacher_taps.take()

    def loss(self) -> Tensor:
        loss = super().loss()
        self.look()
        pairs = zip(self.align, self.student_taps.take().values(), self.seen.values(), strict=True)
        for layer, ours, theirs in pairs:
            difference = self.attention(layer(ours)) - self.attention(theirs)
            loss = loss + torch.norm(difference, p=2) / len(self.images)
        return loss


class Ours(Student):
    """Distillation as train.py runs it."""

    def __init__(self, images: Tensor, targets: Targets, compiled: bool = False):
        super().__init__(images, targets)
        pairs = dict(zip(TAPS, TAPS, strict=True))
        shapes = tap_shapes(self.student, self.teacher, pairs, images.shape[-1])
        torch.manual_seed(1)
        terms = {"attention": Weighted(AttentionTransfer(), 1.0)}
        self.distillation = Distillation(self.student, self.teacher, terms, pairs, shapes).to(
            images.device
        )
        if compiled:
            self.student.compile(dynamic=False)
            self.distillation.compile(dynamic=False)

    def look(self) -> None:
        with precision(self.images):
            self.seen = self.distillation.look(self.images).feats  # type: ignore[union-attr]

    def loss(self) -> Tensor:
        preds = self.student(self.images)
        kd = self.distillation(self.images, preds, self.targets, 0)
        return sum({**self.student.loss(preds, self.targets), **kd}.values())  # type: ignore[return-value]


def noise(batch: int, imgsz: int, device: str) -> tuple[Tensor, Targets]:
    """Random images and eight random boxes in each."""
    images = torch.rand(batch, 3, imgsz, imgsz, device=device)
    corners = torch.rand(batch, 8, 2, 2, device=device).sort(2).values.flatten(2) * imgsz
    labels = torch.randint(0, 20, (batch, 8), device=device)
    return images, {"boxes_xyxy": corners, "labels": labels, "ids": [""] * batch}


def precision(images: Tensor) -> AbstractContextManager:
    """On a GPU every variant runs in bfloat16 where autocast puts it."""
    return torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda)


def check_equal(notes: Notes, ours: Ours) -> None:
    """Raises AssertionError unless loss and taps agree to 1e-5, in float32."""
    theirs, mine = notes.loss().item(), ours.loss().item()
    assert abs(theirs - mine) < 1e-5 * theirs, f"the notes' loss is {theirs}, kdmini's {mine}"
    ours.look()
    for tap, feat in notes.seen.items():
        apart = (feat - ours.seen[tap]).abs().max() / feat.abs().max()
        assert apart < 1e-5, f"{tap} differs by {apart}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    torch.manual_seed(2)
    images, targets = noise(args.batch, args.imgsz, args.device)
    print(
        f"{measure.machine(args.device)}, imgsz {args.imgsz}, batch {args.batch}, {args.rounds} rounds\n"
    )

    notes, ours = Notes(images, targets), Ours(images, targets)
    variants = {"kdmini": ours}
    if not args.eager:
        variants["kdmini, compiled"] = Ours(images, targets, compiled=True)

    # the teacher first: training leaves the process a heap so large that nothing has to ask for
    # memory again
    looks: dict[str, Callable] = {"the notes' form": notes.look}
    looks |= {name: variant.look for name, variant in variants.items()}
    print("The teacher alone; the notes' form has BatchNorm and head:\n")
    seen = measure.take_turns(looks, args.rounds, args.device)
    print(measure.table(seen, "the notes' form", args.batch, "image"))

    steps: dict[str, Callable] = {
        "the notes' form": notes.step,
        "the student alone": Student(images, targets).step,
    }
    for name, variant in variants.items():
        steps[name] = variant.step
        if args.device == "cpu":
            check_equal(notes, variant)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            peer = PeerStep(images, targets, Path(scratch))
            steps[peer.name] = peer.step
        except ImportError as error:
            print(
                f"\nultralytics takes no part ({error}): PYTHONPATH=.oracle/newest, after `make parity`"
            )
        seconds = measure.take_turns(steps, args.rounds, args.device)
    for against in ("the notes' form", *(name for name in steps if name.startswith("ultralytics"))):
        print("\nThe step:\n\n" + measure.table(seconds, against, args.batch, "image"))


if __name__ == "__main__":
    main()
