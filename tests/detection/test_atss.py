"""ATSS against plain loops in float64, torchvision's losses and counts by hand; and whole runs with
a teacher.
"""

import json
import math
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_map
from torchvision.models import resnet
from torchvision.ops import box_iou, generalized_box_iou, generalized_box_iou_loss

import eval as eval_script
import train as train_script
from kdmini import config
from kdmini.contracts import UserError, View
from kdmini.detection.atss import ATSS, LEVELS, anchors, assign, centerness_of, deltas_to_xyxy, giou
from kdmini.distill.taps import Taps
from kdmini.terms.logits import LogitDistillation

NAMES = ["circle", "square", "triangle", "star", "ring", "cross"]

CONFIG = """
run: {run}
seed: 3
device: cpu
data:
  root: {shapes}
  imgsz: 64
  limit: 8
  train: &set {{build: kdmini.detection.voc:VOC, splits: [train], names: [circle, square, triangle, star, ring, cross]}}
  val: {{<<: *set, splits: [val]}}
student: {{build: kdmini.detection.atss:ATSS, backbone: resnet18, width: 8}}
teacher: {{build: kdmini.detection.atss:ATSS, backbone: resnet18, width: 16}}
distill:
  taps: [p3, p4, p5]
  align: all
  attention: {{build: kdmini.distill.attention:AttentionTransfer, weight: 0.75}}
  logits: {{build: kdmini.terms.logits:LogitDistillation, reg_max: 0, weight: 0.1}}
metric: {{build: kdmini.detection.average_precision:DetectionMetric}}
train: {{epochs: 2, batch: 8, nbs: 8, loss_scale: none, warmup_epochs: 0, ema_tau: 2}}
"""


def tiny(num_classes: int = 3, width: int = 8) -> ATSS:
    torch.manual_seed(0)
    return ATSS(NAMES[:num_classes], "resnet18", width=width)


def empty_maps(height: int, width: int) -> list[torch.Tensor]:
    return [torch.zeros(1, 1, math.ceil(height / s), math.ceil(width / s)) for s in LEVELS.values()]


def random_targets(
    rng: np.random.Generator, n: int, g: int, size: tuple[int, int], num_classes: int = 3
) -> dict:
    """Boxes of 4 pixels to beyond the image, crowded; a third of the places is padding, wherever it
    stands.
    """
    centres = rng.uniform(0, 1, (n, g, 2)) * size[::-1]
    sides = np.exp(rng.uniform(math.log(4), math.log(200), (n, g, 2)))
    labels = torch.from_numpy(rng.integers(0, num_classes, (n, g)))
    labels[torch.from_numpy(rng.uniform(size=(n, g)) < 1 / 3)] = -1
    boxes_xyxy = torch.from_numpy(np.concatenate([centres - sides / 2, centres + sides / 2], -1))
    return {"boxes_xyxy": boxes_xyxy, "labels": labels, "ids": [str(i) for i in range(n)]}


def by_the_paper(maps: list[torch.Tensor], targets: dict) -> tuple[list[list[int]], int]:
    """Algorithm 1 in plain loops -> the object of each anchor or -1, of each image; the number
    contested.
    """
    levels = []
    for feat, stride in zip(maps, LEVELS.values(), strict=True):
        rows, columns = feat.shape[2:]
        levels.append(
            [
                ((c + 0.5) * stride, (r + 0.5) * stride, 8 * stride)
                for r in range(rows)
                for c in range(columns)
            ]
        )
    flat = [anchor for level in levels for anchor in level]
    owners, contested = [], 0
    for boxes, labels in zip(
        targets["boxes_xyxy"].tolist(), targets["labels"].tolist(), strict=True
    ):
        claims: dict[int, list[tuple[float, int]]] = {}
        for g, (x1, y1, x2, y2) in enumerate(boxes):
            if labels[g] < 0:
                continue
            picked, start = [], 0
            for level in levels:
                away = [math.hypot(x - (x1 + x2) / 2, y - (y1 + y2) / 2) for x, y, _ in level]
                picked += [start + i for i in sorted(range(len(level)), key=away.__getitem__)[:9]]
                start += len(level)
            ious = []
            for i in picked:
                x, y, side = flat[i]
                w = min(x2, x + side / 2) - max(x1, x - side / 2)
                h = min(y2, y + side / 2) - max(y1, y - side / 2)
                inter = max(w, 0) * max(h, 0)
                ious.append(inter / (side**2 + (x2 - x1) * (y2 - y1) - inter))
            threshold = statistics.fmean(ious) + statistics.stdev(ious)
            for i, iou in zip(picked, ious, strict=True):
                if iou >= threshold and x1 < flat[i][0] < x2 and y1 < flat[i][1] < y2:
                    claims.setdefault(i, []).append((iou, g))
        contested += sum(len(claim) > 1 for claim in claims.values())
        owners.append([max(claims[i])[1] if i in claims else -1 for i in range(len(flat))])
    return owners, contested


@pytest.mark.parametrize(
    "seed, size, g", [(0, (128, 96), 12), (1, (64, 64), 6), (2, (160, 224), 30)]
)
def test_assignment_is_that_of_the_paper(seed: int, size: tuple[int, int], g: int) -> None:
    maps = empty_maps(*size)
    targets = random_targets(np.random.default_rng(seed), 3, g, size)
    points, sides, counts = anchors(maps)
    found = assign(points.double(), sides.double(), counts, targets)
    owners, contested = by_the_paper(maps, targets)
    assert contested > 0 and (found.labels >= 0).sum() > g / 2
    for n, owner in enumerate(owners):
        expected = [targets["labels"][n, g].item() if g >= 0 else -1 for g in owner]
        assert found.labels[n].tolist() == expected
        positive = found.labels[n] >= 0
        assert torch.equal(
            found.boxes_xyxy[n][positive], targets["boxes_xyxy"][n, [g for g in owner if g >= 0]]
        )


def test_generalised_iou_is_torchvisions_also_for_boxes_without_area() -> None:
    boxes = random_targets(np.random.default_rng(0), 2, 200, (64, 64))["boxes_xyxy"]
    boxes[1, :5, 2:] = boxes[1, :5, :2]  # as the padding of a batch
    torch.testing.assert_close(
        1 - giou(*boxes), generalized_box_iou_loss(*boxes), atol=1e-6, rtol=0
    )


def test_centerness_by_hand() -> None:
    points = torch.tensor([[5.0, 5], [1, 5], [2, 1], [10, 3], [-3, 5]])
    found = centerness_of(torch.tensor([[[0.0, 0, 10, 10]] * 5]), points)[0]
    torch.testing.assert_close(found[:3], torch.tensor([1, (1 / 9) ** 0.5, (2 / 8 * 1 / 9) ** 0.5]))
    assert found[3:].max() < 1e-3 and found.isfinite().all()  # on a side, and outside


def test_losses_are_those_of_the_papers() -> None:
    rng, (n, k) = np.random.default_rng(3), (2, 3)
    model = ATSS(NAMES[:k], "resnet18", width=8, box=2.0, cls=3.0, centerness=5.0)
    maps, targets = empty_maps(64, 96), random_targets(rng, n, 6, (64, 96))
    preds = {
        key: [torch.from_numpy(rng.normal(0, spread, (n, c, *m.shape[2:]))) for m in maps]
        for key, c, spread in (("cls", k, 2.0), ("box", 4, 3.0), ("centerness", 1, 2.0))
    }
    owners, _ = by_the_paper(maps, targets)
    points, sides, _ = (x.tolist() if isinstance(x, torch.Tensor) else x for x in anchors(maps))
    cls = box = bce = weights = positives = 0.0
    for i in range(n):
        rows = {
            key: torch.cat([m[i].flatten(1) for m in preds[key]], 1).T.tolist() for key in preds
        }
        for a, g in enumerate(owners[i]):
            for c, x in enumerate(rows["cls"][a]):
                p = 1 / (1 + math.exp(-x))
                hit = g >= 0 and targets["labels"][i, g] == c
                cls -= 0.25 * (1 - p) ** 2 * math.log(p) if hit else 0.75 * p**2 * math.log(1 - p)
            if g < 0:
                continue
            (px, py), (side,), (dx, dy, dw, dh) = points[a], sides[a], rows["box"][a]
            x1, y1, x2, y2 = true = targets["boxes_xyxy"][i, g].tolist()
            across, down = (px - x1, x2 - px), (py - y1, y2 - py)
            centred = math.sqrt(min(across) / max(across) * min(down) / max(down))
            cx, cy = px + 0.1 * dx * side, py + 0.1 * dy * side
            w, h = side * math.exp(0.2 * dw), side * math.exp(0.2 * dh)
            drawn = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
            box += centred * (
                1 - generalized_box_iou(torch.tensor([drawn]), torch.tensor([true])).item()
            )
            p = 1 / (1 + math.exp(-rows["centerness"][a][0]))
            bce -= centred * math.log(p) + (1 - centred) * math.log(1 - p)
            weights, positives = weights + centred, positives + 1
    assert positives > 5 and weights > 1
    found = {
        name: loss.item() for name, loss in model.loss(preds, targets | single(targets)).items()
    }
    expected = {
        "box": 2 * box / weights,
        "cls": 3 * cls / positives,
        "centerness": 5 * bce / positives,
    }
    assert found == pytest.approx(expected, rel=1e-4)


def single(targets: dict) -> dict:
    return {"boxes_xyxy": targets["boxes_xyxy"].float()}


def test_decode_puts_boxes_where_the_anchors_are() -> None:
    model = tiny()
    preds = {key: [m.expand(-1, c, -1, -1) - low for m in empty_maps(64, 96)] for key, c, low in
             (("cls", 3, 20.0), ("box", 4, 0.0), ("centerness", 1, 0.0))}  # fmt: skip
    preds = tree_map(torch.clone, preds)
    preds["cls"][1][0, 2, 1, 4] = 0.0  # class 2 at p4, row 1, column 4: centre (72, 24), side 128
    preds["cls"][0][0, 1, 7, 0] = (
        1.0  # class 1 at p3, last row, first column: centre (4, 60), side 64
    )
    preds["box"][0][0, :, 7, 0] = torch.tensor([1.0, -2.0, 5 * math.log(0.5), 5 * math.log(2)])
    (found,) = model.decode(preds, score=0.1, iou=0.5, max_det=10)
    assert found["labels"].tolist() == [1, 2]
    torch.testing.assert_close(
        found["scores"], torch.tensor([0.5 * torch.tensor(1.0).sigmoid(), 0.25])
    )
    expected = [[10.4 - 16, 47.2 - 64, 10.4 + 16, 47.2 + 64], [72 - 64, 24 - 64, 72 + 64, 24 + 64]]
    torch.testing.assert_close(found["boxes_xyxy"], torch.tensor(expected))
    huge = deltas_to_xyxy(torch.full((1, 1, 4), 1e4), torch.zeros(1, 2), torch.ones(1, 1))
    assert huge.isfinite().all()


def test_nothing_in_the_step_looks_at_values_and_the_size_is_that_of_the_paper() -> None:
    """On the meta device there are none to look at. ResNet-50: 23,508,032; FPN: 3,868,672; head for
    80: 4,918,618.
    """
    with torch.device("meta"):
        model = ATSS([str(i) for i in range(80)], "resnet50")
        taps = Taps(model, [*LEVELS])
        targets = {
            "boxes_xyxy": torch.zeros(2, 5, 4),
            "labels": torch.zeros(2, 5, dtype=torch.int64),
            "ids": ["", ""],
        }
        sum(model.loss(model(torch.zeros(2, 3, 96, 96)), targets).values()).backward()
        assert [tuple(feat.shape[1:]) for feat in taps.take().values()] == [
            (256, s, s) for s in (12, 6, 3, 2, 1)
        ]
        model.features(torch.zeros(2, 3, 96, 96))
        assert len(taps.take()) == 5
    assert sum(p.numel() for p in model.parameters()) == 23_508_032 + 3_868_672 + 4_918_618


@pytest.mark.parametrize("g", [0, 2])
def test_every_parameter_gets_a_finite_gradient(g: int) -> None:
    model = tiny()
    targets = {
        "boxes_xyxy": torch.tensor([[[5.0, 5, 30, 30], [0, 0, 0, 0]]] * 2),
        "labels": torch.tensor([[1, -1]] * 2),
    }
    targets = {"ids": ["a", "b"], **{key: value[:, :g] for key, value in targets.items()}}
    losses = model.loss(model(torch.rand(2, 3, 32, 64)), targets)
    assert (losses["box"] > 0) == (losses["centerness"] > 0) == (g > 0) and losses["cls"] > 0
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any() or (g == 0 and "head" in name) or ".p7" in name, name


def test_the_detector_normalises_for_itself() -> None:
    model = tiny().eval()
    seen = []
    model.body.conv1.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    model(torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1).expand(1, 3, 32, 32) + 0.1)
    torch.testing.assert_close(seen[0][0, :, 0, 0], 0.1 / torch.tensor([0.229, 0.224, 0.225]))


def test_a_single_scene_is_learnt_by_heart() -> None:
    model, images = (
        tiny(width=32),
        torch.rand(1, 3, 32, 64, generator=torch.Generator().manual_seed(0)),
    )
    boxes_xyxy, labels = torch.tensor([[[3.0, 3, 25, 29], [30, 8, 62, 30]]]), torch.tensor([[0, 1]])
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    for _ in range(40):
        preds = model(images)
        optimizer.zero_grad()
        sum(
            model.loss(preds, {"boxes_xyxy": boxes_xyxy, "labels": labels, "ids": ["a"]}).values()
        ).backward()
        optimizer.step()
    (found,) = model.eval().decode(model(images), 0.2, 0.5, 10)
    assert sorted(found["labels"].tolist()) == [0, 1]
    assert box_iou(found["boxes_xyxy"], boxes_xyxy[0, found["labels"]]).diag().min() > 0.6


def test_terms_that_read_preds_take_the_class_maps() -> None:
    model = tiny()
    torch.nn.init.normal_(model.head.cls.weight)
    images = torch.rand(1, 3, 64, 64)
    student, teacher = View({}, model(images), images), View({}, model(images.flip(3)), images)
    term = LogitDistillation(reg_max=0)
    assert term(student, student, {}).item() == 0 and term(student, teacher, {}).item() > 0
    term(student, teacher, {}).backward()
    assert model.head.cls.weight.grad.any() and model.head.box.weight.grad is None
    with pytest.raises(UserError, match="reg_max: 0"):
        LogitDistillation()(student, teacher, {})


# --- whole runs


def run(script, *arguments: object) -> None:
    before, sys.argv = sys.argv, [script.__name__, *map(str, arguments)]
    try:
        script.main()
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def finished(tmp_path_factory, shapes) -> Path:
    """Two epochs of one step, with attention and logits of a teacher."""
    folder = tmp_path_factory.mktemp("atss")
    (folder / "config.yaml").write_text(CONFIG.format(run=folder / "run", shapes=shapes))
    run(train_script, "--config", folder / "config.yaml")
    return folder


def test_a_run_with_a_teacher_is_resumed_bit_for_bit_and_scored(finished: Path, capsys) -> None:
    folder = finished / "run"
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in records] == [-1, 0, 1]
    for name in ("box", "cls", "centerness", "attention", "logits"):
        assert 0 < records[-1][name] < 100, name
    last = folder / "ckpt/step_00000002.pt"
    whole = torch.load(last, weights_only=True)
    last.unlink()
    run(train_script, "--resume", folder)
    resumed = torch.load(last, weights_only=True)
    for part in ("student", "distillation"):
        assert whole[part].keys() == resumed[part].keys()
        assert all(torch.equal(value, resumed[part][key]) for key, value in whole[part].items())
    capsys.readouterr()
    run(eval_script, "--config", finished / "config.yaml", "--weights", folder / "best.pt")
    assert "all classes" in capsys.readouterr().out


def test_best_pt_is_loaded_whole(finished: Path) -> None:
    path = finished / "run/best.pt"
    saved = torch.load(path, weights_only=True)
    assert saved["card"] == {"detector": "ATSS", "backbone": "resnet18", "width": 8}
    model = ATSS(NAMES, "resnet18", weights=str(path), width=8)
    assert all(torch.equal(value, saved["model"][key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"backbone": "resnet51"}, "resnet50"),
        ({"backbone": "resnet18", "width": 12}, "multiple of 8"),
        ({"weights": "BEST", "backbone": "resnet34", "width": 8}, "resnet34"),
        ({"weights": "BEST", "backbone": "resnet18", "width": 16}, "'width': 8"),
        (
            {"weights": "BEST", "backbone": "resnet18", "width": 8, "names": NAMES[::-1]},
            "has the classes ['circle'",
        ),
        ({"weights": "absent.pt", "backbone": "resnet18", "width": 8}, "no such file"),
        ({"backbone_weights": "TEXT", "backbone": "resnet18", "width": 8}, "no file of weights"),
        ({"weights": "PLAIN", "backbone": "resnet18", "width": 8}, "no best.pt of kdmini"),
        ({"backbone_weights": "BEST", "backbone": "resnet18", "width": 8}, "does not fit"),
        ({"weights": "DAMAGED", "backbone": "resnet18", "width": 8}, "damaged"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(
    finished: Path, tmp_path: Path, settings: dict, told: str
) -> None:
    best = finished / "run/best.pt"
    (tmp_path / "TEXT").write_text("weights")
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "PLAIN")
    if "DAMAGED" in settings.values():
        content = bytearray(best.read_bytes())
        content[len(content) // 2] ^= 1
        (tmp_path / "DAMAGED").write_bytes(content)
    files = {
        "BEST": str(best),
        **{name: str(tmp_path / name) for name in ("TEXT", "PLAIN", "DAMAGED")},
    }
    section = {
        key: files.get(value, value) if isinstance(value, str) else value
        for key, value in settings.items()
    }
    with pytest.raises(UserError) as refusal:
        config.build({"build": "kdmini.detection.atss:ATSS", "names": NAMES, **section}, "student")
    assert told in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_backbone_begins_from_a_file_of_torchvision(tmp_path: Path, zipped: bool) -> None:
    """Old files are no zip, hold parameters, and lack the counters of BatchNorm."""
    source = resnet.resnet18()
    tensors = source.state_dict(keep_vars=not zipped)
    if not zipped:
        tensors = {key: value for key, value in tensors.items() if "num_batches" not in key}
    torch.save(tensors, tmp_path / "resnet18.pth", _use_new_zipfile_serialization=zipped)
    body = ATSS(
        NAMES, "resnet18", backbone_weights=str(tmp_path / "resnet18.pth"), width=8
    ).body.state_dict()
    assert len(body) == 120 and all(
        torch.equal(value, source.state_dict()[key]) for key, value in body.items()
    )
