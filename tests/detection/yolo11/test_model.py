"""The detector: its size and graph, its head, decoding, folding, a scale of one's own."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import nms

from kdmini.contracts import UserError
from kdmini.detection import boxes
from kdmini.detection.yolo11.model import YOLO11, decode_maps

TINY = [0.5, 0.0625, 1024]  # an eighth of the width of s: 20 times faster in a test


def names(count: int) -> list[str]:
    return [f"class {i}" for i in range(count)]


def on_meta(scale: Any, classes: int) -> YOLO11:
    """Shapes without numbers."""
    with torch.device("meta"):
        return YOLO11(names(classes), scale)


def tiny(classes: int = 3, seed: int = 0, scale: Any = TINY) -> YOLO11:
    """Random weights, moved BatchNorm statistics."""
    torch.manual_seed(seed)
    made = YOLO11(names(classes), scale)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return made.eval()


# --- graph


@pytest.mark.parametrize(
    "scale, classes, parameters, tensors",
    [
        ("n", 80, 2_624_080, 499),
        ("s", 80, 9_458_752, 499),
        ("s", 20, 9_435_532, 499),
        ("m", 80, 20_114_688, 649),
        ("m", 20, 20_068_428, 649),
    ],
)
def test_sizes_are_the_published_ones(
    scale: str, classes: int, parameters: int, tensors: int
) -> None:
    made = on_meta(scale, classes)
    assert sum(p.numel() for p in made.parameters()) == parameters
    assert len(made.state_dict()) == tensors


@pytest.mark.parametrize(
    "scale, channels",
    [("s", [256, 512, 256, 128, 256, 512]), ("m", [512, 512, 512, 256, 512, 512])],
)
def test_the_taps_of_the_notes_have_their_channels_and_sizes(
    scale: str, channels: list[int]
) -> None:
    made = on_meta(scale, 20)
    shapes = {}
    for tap in (6, 8, 13, 16, 19, 22):
        made.get_submodule(f"model.{tap}").register_forward_hook(
            lambda _, args, output, tap=tap: shapes.__setitem__(tap, tuple(output.shape))
        )
    preds = made(torch.zeros(2, 3, 640, 640, device="meta"))
    sides = [40, 20, 40, 80, 40, 20]
    assert list(shapes.values()) == [(2, c, s, s) for c, s in zip(channels, sides, strict=True)]
    assert [tuple(p.shape) for p in preds] == [(2, 84, 80, 80), (2, 84, 40, 40), (2, 84, 20, 20)]


def test_the_class_branch_of_n_widens_with_the_classes() -> None:
    few, many = on_meta("n", 20).state_dict(), on_meta("n", 80).state_dict()
    differ = [key for key in few if few[key].shape != many[key].shape]
    assert len(differ) == 51 and all(key.startswith("model.23.cv3.") for key in differ)
    for scale in ("s", "m"):
        few, many = on_meta(scale, 20).state_dict(), on_meta(scale, 80).state_dict()
        differ = [key for key in few if few[key].shape != many[key].shape]
        assert differ == [
            f"model.23.cv3.{level}.2.{kind}" for level in range(3) for kind in ("weight", "bias")
        ]


def test_a_half_of_s_would_fit_into_m() -> None:
    """Why loading is strict."""
    s, m = on_meta("s", 80).state_dict(), on_meta("m", 80).state_dict()
    assert s.keys() < m.keys()
    assert sum(s[key].shape == m[key].shape for key in s) == 282


@pytest.mark.parametrize("classes", [1, 20, 80])
def test_biases_begin_at_about_five_objects_an_image(classes: int) -> None:
    made = YOLO11(names(classes), TINY)
    for level, stride in enumerate((8, 16, 32)):
        box = made.get_parameter(f"model.23.cv2.{level}.2.bias")
        cls = made.get_parameter(f"model.23.cv3.{level}.2.bias")
        assert torch.equal(box, torch.ones(64))
        assert torch.allclose(
            cls, torch.full((classes,), math.log(5 / classes / (640 / stride) ** 2))
        )


def test_batchnorm_is_that_of_the_public_recipe() -> None:
    made = on_meta("n", 20)
    norms = [m for m in made.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.03)}
    before_norm = [m for m in made.modules() if isinstance(m, nn.Conv2d) and m.bias is None]
    assert len(before_norm) == len(norms) + 1  # and the bin numbers of DFL


def test_an_unknown_scale_is_refused() -> None:
    with pytest.raises(UserError, match="'xl' is not one of n, s, m, l, x"):
        YOLO11(names(2), "xl")


# --- forward


def test_preds_are_the_same_maps_in_training_and_evaluation() -> None:
    made = tiny()
    for training in (True, False):
        preds = made.train(training)(torch.rand(2, 3, 64, 96))
        assert [tuple(p.shape) for p in preds] == [(2, 67, 8, 12), (2, 67, 4, 6), (2, 67, 2, 3)]


def test_features_runs_the_layers_before_the_head_and_not_the_head() -> None:
    made = tiny()
    fired = []
    for number, layer in enumerate(made.model):
        layer.register_forward_hook(lambda *_, number=number: fired.append(number))
    assert made.features(torch.rand(1, 3, 64, 64)) is None
    assert fired == list(range(23))
    fired.clear()
    made(torch.rand(1, 3, 64, 64))
    assert fired == list(range(24))


@pytest.mark.parametrize("scale", [TINY, "n"])
def test_folding_changes_nothing_but_the_number_of_layers(scale: Any) -> None:
    made, images = tiny(scale=scale), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        before = made(images)
        after = made.fold()(images)
        again = made.fold()(images)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in made.modules())
    for a, b, c in zip(before, after, again, strict=True):
        assert (a - b).abs().max() < 1e-5 * a.abs().max()
        assert torch.equal(b, c)


def test_card_is_plain_and_rebuilds_the_detector(tmp_path: Any) -> None:
    made = tiny()
    assert made.card == {"scale": TINY, "sppf_act": True, "license": ""}
    assert YOLO11(names(2), "n").card == {"scale": "n", "sppf_act": True, "license": ""}
    content = {
        "format": "kdmini",
        "model": made.state_dict(),
        "card": made.card,
        "names": made.names,
    }
    torch.save(content, tmp_path / "best.pt")
    assert torch.load(tmp_path / "best.pt", weights_only=True)["card"] == made.card
    loaded = YOLO11(made.names, made.card["scale"], weights=str(tmp_path / "best.pt")).eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(loaded(images), made(images), strict=True))


def test_every_parameter_reaches_the_preds() -> None:
    made = tiny().train()
    sum(p.square().sum() for p in made(torch.rand(2, 3, 64, 64))).backward()  # type: ignore[union-attr]
    silent = [name for name, p in made.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == ["model.23.dfl.conv.weight"]  # the bin numbers


def test_a_scale_of_ones_own_learns() -> None:
    made = tiny().train()
    assert made.get_parameter("model.0.conv.weight").shape[0] == 8  # ceil(64 / 16 / 8) * 8
    optimizer = torch.optim.SGD(made.parameters(), 0.01, momentum=0.9)
    images = torch.rand(2, 3, 64, 64)
    boxes = torch.tensor([[[8.0, 8.0, 40.0, 48.0]], [[20.0, 4.0, 60.0, 30.0]]])
    targets: Any = {"boxes_xyxy": boxes, "labels": torch.tensor([[0], [2]])}
    totals = []
    for _ in range(8):
        loss: Any = sum(made.loss(made(images), targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        totals.append(loss.item())
    assert totals[-1] < 0.9 * totals[0]


def test_gains_multiply_their_own_loss() -> None:
    preds = tiny()(torch.rand(1, 3, 64, 64))
    targets: Any = {
        "boxes_xyxy": torch.tensor([[[8.0, 8.0, 40.0, 48.0]]]),
        "labels": torch.tensor([[1]]),
    }
    ones = YOLO11(names(3), TINY, box=1, cls=1, dfl=1).loss(preds, targets)
    gains = YOLO11(names(3), TINY, box=2, cls=3, dfl=5).loss(preds, targets)
    default = YOLO11(names(3), TINY).loss(preds, targets)
    for name, factor, public in (("box", 2, 7.5), ("cls", 3, 0.5), ("dfl", 5, 1.5)):
        assert ones[name] > 0
        assert gains[name].item() == pytest.approx(factor * ones[name].item())
        assert default[name].item() == pytest.approx(public * ones[name].item())


# --- decoding


def empty_maps(height: int, width: int, classes: int, images: int = 1) -> list[Tensor]:
    """Raw maps of an image of this size in which no class is found anywhere."""
    maps = [torch.zeros(images, 64 + classes, height // s, width // s) for s in (8, 16, 32)]
    for level in maps:
        level[:, 64:] = -20
    return maps


def put(
    maps: list[Tensor], level: int, row: int, column: int, ltrb: list[float], **logits: float
) -> None:
    """One cell: distances in strides, as two neighbouring bins, and `c3=1.5`: the logit of class 3."""
    cell = maps[level][0, :, row, column]
    for side, distance in enumerate(ltrb):
        left = int(distance)
        bins = cell[16 * side : 16 * side + 16]
        bins[:] = -100
        bins[left] = math.log(1 - (distance - left))
        if distance > left:
            bins[left + 1] = math.log(distance - left)
    for name, logit in logits.items():
        cell[64 + int(name[1:])] = logit


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_one_cell_with_known_distances_gives_the_known_box() -> None:
    maps = empty_maps(64, 96, 5)
    put(
        maps, 1, 2, 3, [1.25, 2.0, 0.5, 1.0], c3=logit(0.8), c1=logit(0.3)
    )  # centre (3.5, 2.5) * 16 = (56, 40)
    (found,) = tiny(5).decode(maps, score=0.25, iou=0.7, max_det=300)
    assert torch.allclose(
        found["boxes_xyxy"], torch.tensor([[36.0, 8.0, 64.0, 56.0]] * 2), atol=1e-4
    )
    assert torch.allclose(found["scores"], torch.tensor([0.8, 0.3]))
    assert found["labels"].tolist() == [3, 1]  # two classes of one box


@pytest.mark.parametrize(
    "level, row, column, centre", [(0, 7, 11, (92, 60)), (0, 0, 0, (4, 4)), (2, 1, 2, (80, 48))]
)
def test_cells_lie_row_by_row_in_an_image_that_is_no_square(
    level: int, row: int, column: int, centre: tuple[int, int]
) -> None:
    maps = empty_maps(64, 96, 1)
    put(maps, level, row, column, [1, 1, 1, 1], c0=2.0)
    (found,) = tiny(1).decode(maps, 0.25)
    (x, y), stride = centre, (8, 16, 32)[level]
    assert found["boxes_xyxy"].round().tolist() == [
        [x - stride, y - stride, x + stride, y + stride]
    ]


def test_nms_keeps_the_best_of_one_class_and_spares_the_others() -> None:
    maps = empty_maps(64, 64, 2)
    put(maps, 0, 2, 2, [1, 1, 1, 1], c0=logit(0.6))  # centre 20, 20
    put(maps, 0, 2, 3, [2, 1, 0, 1], c0=logit(0.9))  # the same box from the next cell
    put(maps, 0, 3, 2, [1, 2, 1, 0], c1=logit(0.7))  # and once more, of the other class
    put(maps, 0, 6, 6, [1, 1, 1, 1], c0=logit(0.5))  # elsewhere
    (found,) = tiny(2).decode(maps, 0.25, 0.7)
    assert [round(s, 3) for s in found["scores"].tolist()] == [0.9, 0.7, 0.5]
    assert found["labels"].tolist() == [0, 1, 0]


def test_decode_is_torchvisions_nms_class_by_class() -> None:
    torch.manual_seed(1)
    maps = [torch.randn(2, 64 + 4, 96 // s, 128 // s) for s in (8, 16, 32)]
    for level in maps:
        level[:, :64] *= 3
    boxes, scores = decode_maps(maps)
    for image, found in enumerate(tiny(4).decode(maps, score=0.6, iou=0.5, max_det=10_000)):
        expected = set()
        for label in range(4):
            above = (scores[image, :, label] > 0.6).nonzero().squeeze(1)
            kept = above[nms(boxes[image, above], scores[image, above, label], 0.5)]
            expected |= {(anchor, label) for anchor in kept.tolist()}
            assert len(kept) < len(above)  # or the threshold was not tried
        rows = {(tuple(boxes[image, a].tolist()), label) for a, label in expected}
        pairs = zip(found["boxes_xyxy"].tolist(), found["labels"].tolist(), strict=True)
        assert {(tuple(box), label) for box, label in pairs} == rows
        assert len(found["scores"]) == len(expected)
        assert (found["scores"].diff() <= 0).all()


def test_threshold_limit_and_cap_on_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    maps, made = [torch.randn(1, 64 + 4, 96 // s, 96 // s) for s in (8, 16, 32)], tiny(4)
    (everything,) = made.decode(maps, score=0.0, iou=1.0, max_det=10_000)
    assert len(everything["scores"]) == 4 * (144 + 36 + 9)  # every class of every cell
    (above,) = made.decode(maps, score=0.7, iou=1.0, max_det=10_000)
    assert torch.equal(above["scores"], everything["scores"][everything["scores"] > 0.7])
    (few,) = made.decode(maps, score=0.0, iou=1.0, max_det=7)
    assert torch.equal(few["scores"], everything["scores"][:7])
    monkeypatch.setattr(boxes, "MAX_CANDIDATES", 50)
    (capped,) = made.decode(maps, score=0.0, iou=1.0, max_det=10_000)
    assert torch.equal(capped["scores"], everything["scores"][:50])
    (none,) = made.decode(maps, score=1.0, iou=0.7, max_det=300)
    assert {key: tuple(value.shape) for key, value in none.items()} == {
        "boxes_xyxy": (0, 4),
        "scores": (0,),
        "labels": (0,),
    }


def test_half_precision_maps_are_decoded_in_float32() -> None:
    maps = empty_maps(640, 640, 1)
    put(maps, 0, 70, 70, [1.5, 2.5, 3.5, 4.5], c0=3.0)
    (found,) = tiny(1).decode([m.bfloat16() for m in maps], 0.25)
    assert found["boxes_xyxy"].dtype == torch.float32
    # bfloat16 has steps of 4 at 564: the box would move by as much
    assert torch.allclose(
        found["boxes_xyxy"], torch.tensor([[552.0, 544.0, 592.0, 600.0]]), atol=0.2
    )
