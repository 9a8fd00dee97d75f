"""The detector: its size and graph, its head, folding, a scale of one's own."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kdmini.contracts import UserError
from kdmini.detection.yolo11.model import YOLO11
from tests.pretended import Operations

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
    model = YOLO11(names(classes), scale)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return model.eval()


def one_object(box_xyxy: list[float], label: int) -> Any:
    """Targets of one image."""
    return {"boxes_xyxy": torch.tensor([[box_xyxy]]), "labels": torch.tensor([[label]])}


# --- graph


@pytest.mark.parametrize(
    ("scale", "classes", "parameters", "tensors"),
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
    model = on_meta(scale, classes)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.state_dict()) == tensors


@pytest.mark.parametrize(
    ("scale", "channels"),
    [("s", [256, 512, 256, 128, 256, 512]), ("m", [512, 512, 512, 256, 512, 512])],
)
def test_the_taps_of_the_notes_have_their_channels_and_sizes(
    scale: str, channels: list[int]
) -> None:
    model = on_meta(scale, 20)
    shapes = []
    for tap in (6, 8, 13, 16, 19, 22):
        layer = model.get_submodule(f"model.{tap}")
        layer.register_forward_hook(lambda _, args, output: shapes.append(tuple(output.shape)))
    preds = model(torch.zeros(2, 3, 640, 640, device="meta"))

    sides = [40, 20, 40, 80, 40, 20]
    assert shapes == [(2, c, side, side) for c, side in zip(channels, sides, strict=True)]
    assert [tuple(level.shape) for level in preds] == [
        (2, 84, 80, 80),
        (2, 84, 40, 40),
        (2, 84, 20, 20),
    ]


def keys_that_differ(scale: str) -> list[str]:
    """Tensors of another shape for 20 classes than for 80."""
    few = on_meta(scale, 20).state_dict()
    many = on_meta(scale, 80).state_dict()
    return [key for key in few if few[key].shape != many[key].shape]


def test_the_class_branch_of_n_widens_with_the_classes() -> None:
    keys = keys_that_differ("n")
    assert len(keys) == 51
    assert all(key.startswith("model.23.cv3.") for key in keys)


@pytest.mark.parametrize("scale", ["s", "m"])
def test_of_s_and_m_only_the_class_rows_depend_on_the_classes(scale: str) -> None:
    rows = []
    for level in range(3):
        rows += [f"model.23.cv3.{level}.2.weight", f"model.23.cv3.{level}.2.bias"]
    assert keys_that_differ(scale) == rows


def test_a_half_of_s_would_fit_into_m() -> None:
    """Why loading is strict."""
    s = on_meta("s", 80).state_dict()
    m = on_meta("m", 80).state_dict()
    assert s.keys() < m.keys()
    assert sum(s[key].shape == m[key].shape for key in s) == 282


@pytest.mark.parametrize("classes", [1, 20, 80])
def test_biases_begin_at_about_five_objects_an_image(classes: int) -> None:
    model = YOLO11(names(classes), TINY)
    for level, stride in enumerate((8, 16, 32)):
        box = model.get_parameter(f"model.23.cv2.{level}.2.bias")
        cls = model.get_parameter(f"model.23.cv3.{level}.2.bias")
        prior = math.log(5 / classes / (640 / stride) ** 2)
        assert torch.equal(box, torch.ones(64))
        assert torch.allclose(cls, torch.full((classes,), prior))


def test_batchnorm_is_that_of_the_public_recipe() -> None:
    model = on_meta("n", 20)
    norms = 0
    before_norm = 0
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            norms += 1
            assert module.eps == 1e-3
            assert module.momentum == 0.03
        if isinstance(module, nn.Conv2d) and module.bias is None:
            before_norm += 1
    assert before_norm == norms + 1  # and the bin numbers of DFL


def test_an_unknown_scale_is_refused() -> None:
    with pytest.raises(UserError, match="'xl' is not one of n, s, m, l, x"):
        YOLO11(names(2), "xl")


# --- forward


@pytest.mark.parametrize("training", [True, False])
def test_preds_are_the_same_maps_in_training_and_evaluation(training: bool) -> None:
    model = tiny().train(training)
    preds = model(torch.rand(2, 3, 64, 96))
    assert [tuple(level.shape) for level in preds] == [
        (2, 67, 8, 12),
        (2, 67, 4, 6),
        (2, 67, 2, 3),
    ]


def test_features_runs_the_layers_before_the_head_and_not_the_head() -> None:
    model = tiny()
    fired = []
    for number, layer in enumerate(model.model):
        layer.register_forward_hook(lambda *_, number=number: fired.append(number))
    assert model.features(torch.rand(1, 3, 64, 64)) is None
    assert fired == list(range(23))
    fired.clear()
    model(torch.rand(1, 3, 64, 64))
    assert fired == list(range(24))


def test_a_fresh_head_gives_preds_that_loss_takes() -> None:
    model = tiny()
    head = model.make_head([8, 16, 24])
    feats = [torch.rand(1, 8, 8, 8), torch.rand(1, 16, 4, 4), torch.rand(1, 24, 2, 2)]
    preds = head(feats)
    assert [tuple(level.shape) for level in preds] == [
        (1, 67, 8, 8),
        (1, 67, 4, 4),
        (1, 67, 2, 2),
    ]
    losses = model.loss(preds, one_object([8.0, 8.0, 40.0, 48.0], 1))
    assert all(value.isfinite() for value in losses.values())
    assert not set(head.parameters()) & set(model.parameters())


@pytest.mark.parametrize("scale", [TINY, "n"])
def test_folding_changes_nothing_but_the_number_of_layers(scale: Any) -> None:
    model = tiny(scale=scale)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        before = model(images)
        after = model.fold()(images)
        again = model.fold()(images)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    for a, b, c in zip(before, after, again, strict=True):
        assert (a - b).abs().max() < 1e-5 * a.abs().max()
        assert torch.equal(b, c)


def test_a_frozen_copy_held_in_half_precision_computes_the_same_bits() -> None:
    """Autocast then has none of its weights to cast at every step."""

    model = tiny(scale="n").fold()
    images = torch.rand(2, 3, 64, 64)
    counts = []
    outputs = []
    for _ in range(2):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Operations() as operations:
            outputs.append(model(images))
        counts.append(operations.counts["_to_copy"])
        model.hold_in(torch.bfloat16)
    for cast_each_time, held in zip(*outputs, strict=True):
        assert cast_each_time.dtype == torch.bfloat16
        assert torch.equal(cast_each_time, held)
    assert counts[0] > 150
    assert counts[1] < 5


def test_a_folded_copy_makes_its_activations_in_place_and_one_that_learns_does_not() -> None:
    def in_place(model: nn.Module) -> set[bool]:
        return {m.inplace for m in model.modules() if isinstance(m, nn.SiLU)}

    model = tiny()
    folded = copy.deepcopy(model).fold()
    assert in_place(model) == {False}  # autograd would clone what it needs
    assert in_place(folded) == {True}


def test_card_names_the_scale_the_activation_and_the_license() -> None:
    card = {"scale": TINY, "cls_width": 16, "sppf_act": True, "license": ""}
    assert tiny().card == card
    assert on_meta("n", 2).card == card | {"scale": "n", "cls_width": 64}
    assert on_meta("n", 80).card["cls_width"] == 80


def test_card_is_plain_and_rebuilds_the_detector(tmp_path: Path) -> None:
    model = tiny()
    path = tmp_path / "best.pt"
    content = {
        "format": "kdmini",
        "model": model.state_dict(),
        "card": model.card,
        "names": model.names,
    }
    torch.save(content, path)
    card = torch.load(path, weights_only=True)["card"]
    assert card == model.card

    loaded = YOLO11(model.names, card["scale"], weights=str(path)).eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for ours, original in zip(loaded(images), model(images), strict=True):
            assert torch.equal(ours, original)


def test_every_parameter_reaches_the_preds() -> None:
    model = tiny().train()
    preds = model(torch.rand(2, 3, 64, 64))
    torch.stack([level.square().sum() for level in preds]).sum().backward()
    silent = []
    for name, parameter in model.named_parameters():
        if parameter.grad is None or not parameter.grad.any():
            silent.append(name)
    assert silent == ["model.23.dfl.conv.weight"]  # the bin numbers


def test_a_scale_of_ones_own_learns() -> None:
    model = tiny().train()
    assert model.get_parameter("model.0.conv.weight").shape[0] == 8  # ceil(64 / 16 / 8) * 8
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    images = torch.rand(2, 3, 64, 64)
    first = [8.0, 8.0, 40.0, 48.0]
    second = [20.0, 4.0, 60.0, 30.0]
    targets: Any = {
        "boxes_xyxy": torch.tensor([[first], [second]]),
        "labels": torch.tensor([[0], [2]]),
    }
    totals = []
    for _ in range(8):
        losses = model.loss(model(images), targets)
        total = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < 0.9 * totals[0]


def test_gains_multiply_their_own_loss() -> None:
    preds = tiny()(torch.rand(1, 3, 64, 64))
    targets = one_object([8.0, 8.0, 40.0, 48.0], 1)
    ones = YOLO11(names(3), TINY, box=1, cls=1, dfl=1).loss(preds, targets)
    gains = YOLO11(names(3), TINY, box=2, cls=3, dfl=5).loss(preds, targets)
    for name, gain in {"box": 2, "cls": 3, "dfl": 5}.items():
        assert ones[name] > 0
        assert gains[name].item() == pytest.approx(gain * ones[name].item())


def test_gains_are_the_public_ones_unless_given() -> None:
    preds = tiny()(torch.rand(1, 3, 64, 64))
    targets = one_object([8.0, 8.0, 40.0, 48.0], 1)
    ones = YOLO11(names(3), TINY, box=1, cls=1, dfl=1).loss(preds, targets)
    default = YOLO11(names(3), TINY).loss(preds, targets)
    for name, gain in {"box": 7.5, "cls": 0.5, "dfl": 1.5}.items():
        assert default[name].item() == pytest.approx(gain * ones[name].item())


def test_the_neck_stays_in_half_precision() -> None:
    """Autocast would double its maps in float32, and the concatenation behind them."""
    model = YOLO11(["a"], "n")
    kinds = []
    for layer in (11, 12, 14, 15):
        model.get_submodule(f"model.{layer}").register_forward_hook(
            lambda _, args, output: kinds.append(output.dtype)
        )
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.rand(2, 3, 64, 64))
    assert kinds == [torch.bfloat16] * 4
