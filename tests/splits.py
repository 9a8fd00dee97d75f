"""One update on 16 images, split into micro-batches in every way, among ranks or not.

Everything is in float64, statistics are frozen, and the task is a mean over images, so that
nothing but a wrong scale can tell one split from another.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdmini import config, distributed, engine
from kdmini.assemble import make_distillation
from kdmini.classification.classifier import Classifier
from kdmini.device import precision
from kdmini.engine import Training
from kdmini.optim import EMA, Recipe, make_optimizer
from kdmini.progress import Progress
from kdmini.segmentation.fast_scnn import conv_bn
from kdmini.segmentation.maps import VOID, Segmenter
from kdmini.signals import Stop
from tests.conftest import ROOT

CPU = torch.device("cpu")
IMAGES = 16
IMGSZ = 128
CHANNELS = [8, 12, 16]  # of the maps, at strides 8, 16 and 32
TAPS = ["steps.0", "steps.1", "steps.2"]
# inside a step, which goes on after them
PLACES = {"cross_head": ["steps.0.1", "steps.1.1", "steps.2.1"]}
REG_MAX = 16
NAMES = ["cat", "dog"]
KD_SCALES: list[Any] = [1.0, 0.5, "batch"]
# terms with `reduction: batch`
OVER_BATCH = ("cross_head", "localisation", "logits", "pearson", "score_weighted", "self_teacher")
# terms that have no other form
ONLY_OVER_BATCH = ("centred", "standardised")


class Stepped(nn.Module):
    """Three maps, each with preds in YOLO's layout, whose loss is a mean over images."""

    def __init__(self, channels: list[int], sharpness: float = 1.0):
        super().__init__()
        self.names = NAMES
        self.sharpness = sharpness  # factor of the preds
        self.gain = 1.0  # of the loss
        strides = [8, 2, 2]
        inputs = [3, *channels]
        layers = zip(inputs, channels, strides, strict=False)
        self.steps = nn.ModuleList(step(*layer) for layer in layers)
        self.head = self.make_head(channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        feats = []
        x = images
        for layer in self.steps:
            x = layer(x)
            feats.append(x)
        return [self.sharpness * pred for pred in self.head(feats)]

    def make_head(self, channels: list[int]) -> nn.Module:
        return Head(channels)

    def class_maps(self, preds: list[Tensor]) -> list[Tensor]:
        return [pred[:, 4 * REG_MAX :] for pred in preds]

    def loss(self, preds: list[Tensor], targets: Any) -> dict[str, Tensor]:
        means = torch.stack([pred.mean((1, 2, 3)) for pred in preds])  # (3, N)
        square = (means - targets["values"]).square().mean(1).sum()
        return {"square": self.gain * square}


class Head(nn.ModuleList):
    def __init__(self, channels: list[int]):
        outputs = 4 * REG_MAX + len(NAMES)
        super().__init__(nn.Conv2d(c, outputs, 1) for c in channels)

    def forward(self, feats: list[Tensor]) -> list[Tensor]:
        return [layer(feat) for layer, feat in zip(self, feats, strict=True)]


def step(c_in: int, c_out: int, stride: int) -> nn.Module:
    conv = nn.Conv2d(c_in, c_out, stride, stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.SiLU())


class Labeller(Segmenter):
    """Two layers, and a map of logits of each."""

    def __init__(self, names: list[str]):
        super().__init__(names)
        self.gain = 1.0  # of the loss
        self.steps = nn.Sequential(conv_bn(3, 16, 3, stride=4), conv_bn(16, 24, 3, stride=2))
        self.head = nn.Conv2d(24, len(names), 1)
        self.aux_head = nn.Conv2d(16, len(names), 1)

    def forward(self, images: Tensor) -> list[Tensor]:
        shallow = self.steps[0](self.normalised(images))
        deep = self.steps[1](shallow)
        return [self.head(deep), self.aux_head(shallow)]

    def loss(self, preds: Any, targets: Any) -> dict[str, Tensor]:
        return {name: self.gain * value for name, value in super().loss(preds, targets).items()}


class Sorter(Classifier):
    """Two layers, and the class of an image."""

    def __init__(self, names: list[str]):
        super().__init__(names)
        self.gain = 1.0  # of the loss
        self.steps = nn.Sequential(conv_bn(3, 16, 3, stride=4), conv_bn(16, 24, 3, stride=2))
        self.fc = nn.Linear(24, len(names))

    def body(self, images: Tensor) -> Tensor:
        return self.steps(images)

    def loss(self, preds: Tensor, targets: Any) -> dict[str, Tensor]:
        return {name: self.gain * value for name, value in super().loss(preds, targets).items()}


def same_mask(x: Tensor) -> Tensor:
    """In place of torch.rand_like: a ramp, the same for every image.

    Masks are drawn one after the other, which is another order for another split.
    """
    cells = x[0].numel()
    return torch.linspace(0, 1, cells, dtype=x.dtype).view_as(x[:1]).expand_as(x)


def freeze_statistics(module: nn.Module) -> None:
    """For good: train() changes nothing."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()
            layer.train = lambda mode=True, layer=layer: layer  # type: ignore[method-assign]


# --- images, dealt out


class Split:
    """The 16 images once, in batches of all ranks together."""

    def __init__(self, images: Tensor, targets: Mapping[str, Tensor], batch: int):
        self.images = images
        self.targets = targets
        self.batch = batch

    def __len__(self) -> int:
        return IMAGES // self.batch

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        share = self.batch // distributed.world()
        for number in range(start, len(self)):
            first = number * self.batch + distributed.rank() * share
            part = slice(first, first + share)
            targets: dict[str, Any] = {key: value[part] for key, value in self.targets.items()}
            targets["ids"] = [f"image {i}" for i in range(first, first + share)]
            yield self.images[part], targets


@cache
def scenes() -> tuple[Tensor, dict[str, Tensor]]:
    """Images that differ in brightness and noise, with a box each, and masks of which more is
    void from image to image.
    """
    generator = torch.Generator().manual_seed(3)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    light = uniform(IMAGES, 1, 1, 1)
    images = light * uniform(IMAGES, 3, IMGSZ, IMGSZ)
    corner = 60 * uniform(IMAGES, 1, 2)
    boxes_xyxy = torch.cat([corner, corner + 40], 2)
    labels = torch.zeros(IMAGES, 1, dtype=torch.int64)
    targets = {"boxes_xyxy": boxes_xyxy, "labels": labels, "values": uniform(IMAGES)}
    targets["share"] = light[:, :1, 0, 0]
    mask = (uniform(IMAGES, IMGSZ, IMGSZ) < light[:, 0]).to(torch.uint8)
    for number in range(IMAGES):
        mask[number, : number * IMGSZ // IMAGES] = VOID
    return images, {**targets, "mask": mask}


# --- the terms of the configs


def sections(reductions: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The `distill` section of each config of a term, and attention with two reductions.

    reductions: term -> `reduction`, in place of the config's.
    """
    found = {}
    for path in sorted((ROOT / "configs/terms").glob("*.yaml")):
        section = config.load(path)["distill"]
        section["taps"] = PLACES.get(path.stem, TAPS) if section["taps"] else []
        if path.stem in reductions:
            section[path.stem]["reduction"] = reductions[path.stem]
        found[path.stem] = section
    if "self_teacher" in found:  # a tree without terms/ has none of them
        found["gradient_weighted"]["gradient_weighted"]["head"] = "head"
        # with scores that count
        found["self_teacher"]["self_teacher"].update(width=10, alpha=1e4)
        pixels = {"build": "kdmini.terms.pixels:PixelRelation", "pool": 2, "weight": 1.0}
        found["pixels"] = {"taps": TAPS, "pixels": pixels}
        haar = {**found["frequency"]["frequency"], "filter": "haar"}
        found["frequency haar"] = {"taps": TAPS, "frequency": haar}
    for reduction in ("sample", "mean_square"):
        build = "kdmini.distill.attention:AttentionTransfer"
        term = {"build": build, "reduction": reduction, "weight": 1.0}
        found[f"attention {reduction}"] = {"taps": TAPS, "attention": term}
    return found


# --- an update


class Scales(NamedTuple):
    loss_scale: Any = "batch"
    kd_scale: Any = 1.0


def stepped() -> tuple[nn.Module, nn.Module]:
    """Student and teacher."""
    return Stepped(CHANNELS), Stepped([2 * c for c in CHANNELS], sharpness=5.0)


def labellers() -> tuple[nn.Module, nn.Module]:
    return Labeller(NAMES), Labeller(NAMES)


def sorters() -> tuple[nn.Module, nn.Module]:
    return Sorter(NAMES), Sorter(NAMES)


class Pair:
    """A student that learns, and what teaches it."""

    def __init__(
        self,
        section: Mapping[str, Any],
        networks: Callable[[], tuple[nn.Module, nn.Module]] = stepped,
    ):
        torch.manual_seed(0)
        self.student: Any
        teacher: Any
        self.student, teacher = networks()
        self.ema = EMA(self.student, 0.9, 1.0)
        if "self_teacher" in section:
            teacher = None
        self.distillation = make_distillation(self.student, teacher, IMGSZ, **section)
        for module in (self.student, self.distillation, teacher, self.ema.average):
            if module is not None:
                module.double()
                freeze_statistics(module)
        self.weights = dict(self.distillation.weights)

    def learning(self) -> list[nn.Parameter]:
        modules = (self.student, self.distillation)
        return [p for module in modules for p in module.parameters() if p.requires_grad]

    def weigh(self, scales: Scales, task: float = 1.0, kd: float = 1.0) -> None:
        self.student.gain = task
        self.distillation.kd_scale = scales.kd_scale
        for name, weight in self.weights.items():
            self.distillation.weights[name] = kd * weight

    def gradient(
        self,
        batch: int,
        scales: Scales,
        task: float = 1.0,
        kd: float = 1.0,
        loader: Split | None = None,
    ) -> Tensor:
        """What one update on all images sees, of the student and of what learns with it.

        task, kd: factors of the two. loader: of the images, in place of all once.
        """
        self.weigh(scales, task, kd)
        loader = loader or Split(*scenes(), batch)
        training = self.training(loader, scales.loss_scale)
        before = [p.detach().clone() for p in self.learning()]
        engine.train_one_epoch(training, Stop())
        moved = []
        with torch.no_grad():
            for parameter, old in zip(self.learning(), before, strict=True):
                moved.append((old - parameter).flatten())
                parameter.copy_(old)
        return torch.cat(moved)

    def training(self, loader: Split, loss_scale: Any) -> Training:
        """Whose update moves the weights by the gradient."""
        recipe = Recipe(
            epochs=1,
            batch=loader.batch,
            nbs=IMAGES,
            lr0=1.0,
            momentum=1e-15,
            weight_decay=0.0,
            warmup_epochs=0,
            clip=1e15,
            loss_scale=loss_scale,
        )
        autocast, scaler = precision(False, CPU)
        return Training(
            loader=loader,
            student=self.student,
            distillation=self.distillation,
            optimizer=make_optimizer([self.student, self.distillation], recipe),
            scaler=scaler,
            ema=self.ema,
            recipe=recipe,
            autocast=autocast,
            progress=Progress(),
            replica=distributed.replicate(self.student),
        )


def of_masks() -> Pair:
    """Student and teacher that learn masks."""
    section = all_sections()["attention sample"]
    return Pair({**section, "taps": ["steps.0", "steps.1"]}, labellers)


def of_classes() -> Pair:
    """Student and teacher that learn classes, from scores too where that term is there."""
    found = all_sections()
    section = {**found["attention sample"], "taps": ["steps.0", "steps.1"]}
    if "logits" in found:
        softmax = {"form": "softmax", "gamma": 0, "weight": 1.0}
        section["logits"] = {**found["logits"]["logits"], **softmax}
    return Pair(section, sorters)


def all_sections() -> dict[str, dict[str, Any]]:
    """None of which depends on the batch: what a paper takes over all images of a batch, a
    term also takes over each of them, or is left out.
    """
    found = sections(dict.fromkeys(OVER_BATCH, "sample"))
    return {name: section for name, section in found.items() if name not in ONLY_OVER_BATCH}


def among_ranks(whole: bool = False) -> dict[str, Tensor]:
    """On every rank: the gradients of updates, by name. whole: in one batch each."""
    batch = IMAGES if whole else IMAGES // 4
    found = {}
    for name, section in all_sections().items():
        pair = Pair(section)
        found[name] = pair.gradient(batch, Scales())
    pair = Pair(all_sections()["attention sample"])
    for loss_scale in ("batch", "none"):
        for kd_scale in KD_SCALES:
            scales = Scales(loss_scale, kd_scale)
            found[f"{loss_scale}, {kd_scale}"] = pair.gradient(batch, scales)
    found["masks"] = of_masks().gradient(batch, Scales())
    found["classes"] = of_classes().gradient(batch, Scales())
    return found
