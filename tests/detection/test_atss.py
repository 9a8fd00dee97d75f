"""The ATSS detector: its size and taps, loss and gradients, decoding, terms on it."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from kdmini.contracts import UserError, View
from kdmini.detection.atss import ATSS
from kdmini.detection.atss_loss import LEVELS
from kdmini.distill.taps import Taps
from kdmini.terms.localisation import LocalisationDistillation
from kdmini.terms.logits import LogitDistillation

NAMES = ["circle", "square", "triangle", "star", "ring", "cross"]


def tiny(num_classes: int = 3, width: int = 8, **gains: float) -> ATSS:
    torch.manual_seed(0)
    return ATSS(NAMES[:num_classes], "resnet18", width=width, **gains)


def total(losses: Any) -> Tensor:
    return torch.stack(list(losses.values())).sum()


def two_images(objects: int) -> Any:
    """Targets of two images: in each an object and a padded one, cut to this number."""
    boxes_xyxy = torch.tensor([[5.0, 5, 30, 30], [0, 0, 0, 0]]).repeat(2, 1, 1)
    labels = torch.tensor([[1, -1], [1, -1]])
    return {
        "boxes_xyxy": boxes_xyxy[:, :objects],
        "labels": labels[:, :objects],
        "ids": ["a", "b"],
    }


# --- the network


def test_the_size_is_that_of_the_paper() -> None:
    with torch.device("meta"):
        model = ATSS([str(i) for i in range(80)], "resnet50")
    backbone = 23_508_032
    fpn = 3_868_672
    head = 4_918_618  # for 80 classes
    assert sum(p.numel() for p in model.parameters()) == backbone + fpn + head


def test_the_taps_are_the_five_levels_also_without_the_head() -> None:
    with torch.device("meta"):
        model = ATSS(NAMES, "resnet50")
        taps = Taps(model, list(LEVELS))
        images = torch.zeros(2, 3, 96, 96)
        model(images)
        feats = taps.take()
        assert list(feats) == list(LEVELS)
        for feat, side in zip(feats.values(), (12, 6, 3, 2, 1), strict=True):
            assert feat.shape == (2, 256, side, side)
        model.features(images)
        assert len(taps.take()) == 5


def test_nothing_in_the_step_looks_at_values() -> None:
    """On the meta device there are none to look at."""
    with torch.device("meta"):
        model = ATSS(NAMES, "resnet50")
        targets: Any = {
            "boxes_xyxy": torch.zeros(2, 5, 4),
            "labels": torch.zeros(2, 5, dtype=torch.int64),
            "ids": ["", ""],
        }
        total(model.loss(model(torch.zeros(2, 3, 96, 96)), targets)).backward()


def test_the_detector_normalises_for_itself() -> None:
    model = tiny().eval()
    inputs = []
    model.body.conv1.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    model(mean.expand(1, 3, 32, 32) + 0.1)
    expected = 0.1 / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(inputs[0][0, :, 0, 0], expected)


# --- loss and decoding


def test_gains_multiply_their_own_loss() -> None:
    targets = two_images(1)
    preds = tiny()(torch.rand(2, 3, 32, 64))
    ones = tiny(box=1.0, cls=1.0, centerness=1.0).loss(preds, targets)
    gains = tiny(box=2.0, cls=3.0, centerness=5.0).loss(preds, targets)
    for name, factor in (("box", 2), ("cls", 3), ("centerness", 5)):
        assert ones[name] > 0
        assert gains[name].item() == pytest.approx(factor * ones[name].item())


@pytest.mark.parametrize("objects", [0, 2])
def test_losses_of_boxes_are_zero_without_objects(objects: int) -> None:
    model = tiny()
    losses = model.loss(model(torch.rand(2, 3, 32, 64)), two_images(objects))
    assert losses["cls"] > 0
    assert (losses["box"] > 0) == (objects > 0)
    assert (losses["centerness"] > 0) == (objects > 0)


@pytest.mark.parametrize("objects", [0, 2])
def test_every_parameter_gets_a_finite_gradient(objects: int) -> None:
    model = tiny()
    total(model.loss(model(torch.rand(2, 3, 32, 64)), two_images(objects))).backward()
    for name, parameter in model.named_parameters():
        silent = ".p7" in name or (objects == 0 and "head" in name)
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any() or silent, name


def low_maps() -> dict[str, list[Tensor]]:
    """Preds of 3 classes for 64 x 96 pixels: the anchors as they are, none found."""
    preds: dict[str, list[Tensor]] = {"cls": [], "box": [], "centerness": []}
    for stride in LEVELS.values():
        height = math.ceil(64 / stride)
        width = math.ceil(96 / stride)
        preds["cls"].append(torch.full((1, 3, height, width), -20.0))
        preds["box"].append(torch.zeros(1, 4, height, width))
        preds["centerness"].append(torch.zeros(1, 1, height, width))
    return preds


def test_decode_puts_boxes_where_the_anchors_are() -> None:
    preds = low_maps()
    preds["cls"][1][0, 2, 1, 4] = 0.0  # class 2 at p4, row 1, column 4: centre (72, 24), side 128
    (detections,) = tiny().decode(preds, score=0.1, iou=0.5, max_det=10)
    assert detections["labels"].tolist() == [2]
    assert detections["scores"].tolist() == [0.5 * 0.5]  # class times centerness
    assert detections["boxes_xyxy"].tolist() == [[72 - 64, 24 - 64, 72 + 64, 24 + 64]]


def test_decode_moves_and_stretches_the_anchor() -> None:
    preds = low_maps()
    # class 1 at p3, last row, first column: centre (4, 60), side 64
    preds["cls"][0][0, 1, 7, 0] = 1.0
    narrower = 5 * math.log(0.5)
    higher = 5 * math.log(2)
    preds["box"][0][0, :, 7, 0] = torch.tensor([1.0, -2.0, narrower, higher])
    (detections,) = tiny().decode(preds, score=0.1, iou=0.5, max_det=10)
    assert detections["labels"].tolist() == [1]
    x = 4 + 6.4
    y = 60 - 12.8
    expected = torch.tensor([[x - 16, y - 64, x + 16, y + 64]])
    torch.testing.assert_close(detections["boxes_xyxy"], expected)
    class_score = torch.tensor([1.0]).sigmoid()
    torch.testing.assert_close(detections["scores"], 0.5 * class_score)


def test_decode_puts_the_best_first() -> None:
    preds = low_maps()
    preds["cls"][1][0, 2, 1, 4] = 0.0
    preds["cls"][0][0, 1, 7, 0] = 1.0
    (detections,) = tiny().decode(preds, score=0.1, iou=0.5, max_det=10)
    assert detections["labels"].tolist() == [1, 2]


def test_a_single_scene_is_learnt_by_heart() -> None:
    model = tiny(width=32)
    images = torch.rand(1, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    boxes_xyxy = torch.tensor(
        [
            [3.0, 3, 25, 29],
            [30, 8, 62, 30],
        ]
    )
    targets: Any = {
        "boxes_xyxy": boxes_xyxy[None],
        "labels": torch.tensor([[0, 1]]),
        "ids": ["a"],
    }
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    for _ in range(40):
        losses = model.loss(model(images), targets)
        optimizer.zero_grad()
        total(losses).backward()
        optimizer.step()
    (detections,) = model.eval().decode(model(images), 0.2, 0.5, 10)
    assert sorted(detections["labels"].tolist()) == [0, 1]
    true = boxes_xyxy[detections["labels"]]
    assert box_iou(detections["boxes_xyxy"], true).diag().min() > 0.6


# --- terms that read preds


def two_views(model: ATSS) -> tuple[View, View]:
    """Of the same network: one of the images, one of their mirror images."""
    torch.nn.init.normal_(model.head.cls.weight)
    images = torch.rand(1, 3, 64, 64)
    views = []
    for shown in (images, images.flip(3)):
        preds = model(shown)
        views.append(View({}, preds, images, model.class_maps(preds)))
    return views[0], views[1]


def test_terms_that_read_classes_take_the_class_maps() -> None:
    model = tiny()
    student, teacher = two_views(model)
    term = LogitDistillation()
    assert term(student, student, {}).item() == 0
    value = term(student, teacher, {})
    assert value.item() > 0
    value.backward()
    assert model.head.cls.weight.grad.any()
    assert model.head.box.weight.grad is None


def test_a_term_that_expects_yolos_layout_says_so() -> None:
    student, teacher = two_views(tiny())
    with pytest.raises(UserError, match=r"a list of maps \(N, 4R \+ K, H, W\); this is a dict"):
        LocalisationDistillation()(student, teacher, {})
