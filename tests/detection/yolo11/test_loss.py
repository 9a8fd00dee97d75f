"""Assignment and detection loss, against plain loops, torchvision's CIoU and cases worked out by
hand.
"""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import complete_box_iou

from kdmini.detection.boxes import anchor_points
from kdmini.detection.yolo11.assign import assign, best_object
from kdmini.detection.yolo11.loss import detection_loss, distribution_focal, expected_dist

STRIDES, BINS = (8, 16, 32), 16
HEIGHT, WIDTH, CLASSES = 64, 96, 3
SIZES = [(HEIGHT // s, WIDTH // s) for s in STRIDES]


def random_maps(images: int, seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(images, 4 * BINS + CLASSES, h, w).mul(2).requires_grad_() for h, w in SIZES]


def targets_of(*images: list[tuple[list[float], int]]) -> Any:
    """[(box, label), ...] for each image, padded."""
    most = max(map(len, images))
    boxes, labels = torch.zeros(len(images), most, 4), torch.full((len(images), most), -1)
    for n, objects in enumerate(images):
        for g, (box, label) in enumerate(objects):
            boxes[n, g], labels[n, g] = torch.tensor(box, dtype=torch.float32), label
    return {"boxes_xyxy": boxes, "labels": labels}


CROWD: list[tuple[list[float], int]] = [
    ([4, 6, 60, 50], 0),
    ([10, 10, 58, 52], 0),
    ([8, 4, 66, 60], 2),
    ([50, 20, 94, 62], 1),
    ([30.5, 12.25, 47.75, 39], 1),
]
SCENES = ([*CROWD], [], [([70, 3, 92, 30], 2)])


def loss_of(maps: list[Tensor], targets: Any) -> dict[str, Tensor]:
    return detection_loss(maps, targets, STRIDES, BINS)


# --- the whole, in plain loops


def looped_loss(maps: list[Tensor], scenes: Any) -> tuple[float, float, float]:
    """The public recipe, one anchor and one object at a time."""
    cells = [  # level, row, column, centre x, centre y, stride
        (level, row, column, (column + 0.5) * stride, (row + 0.5) * stride, stride)
        for level, stride in enumerate(STRIDES)
        for row in range(HEIGHT // stride)
        for column in range(WIDTH // stride)
    ]
    box = cls = dfl = total = 0.0
    for n, objects in enumerate(scenes):
        values = [maps[level][n, :, row, column].double() for level, row, column, *_ in cells]
        boxes = []
        for value, (_, _, _, x, y, stride) in zip(values, cells, strict=True):
            bins = value[: 4 * BINS].view(4, BINS).softmax(1)
            left, top, right, bottom = (
                sum(i * p.item() for i, p in enumerate(side)) * stride for side in bins
            )
            boxes.append([x - left, y - top, x + right, y + bottom])
        predicted = torch.tensor(boxes, dtype=torch.float64)

        claims: list[set[int]] = [set() for _ in cells]  # objects that claim the anchor
        overlap, alignment = torch.zeros(2, len(objects), len(cells), dtype=torch.float64)
        for g, (corners, label) in enumerate(objects):
            x1, y1, x2, y2 = corners
            ciou = complete_box_iou(torch.tensor([corners], dtype=torch.float64), predicted)[0]
            for a, (_, _, _, x, y, _) in enumerate(cells):
                if x1 < x < x2 and y1 < y < y2:
                    overlap[g, a] = max(ciou[a].item(), 0)
                    score = values[a][4 * BINS + label].sigmoid().item()
                    alignment[g, a] = score**0.5 * overlap[g, a] ** 6
            best = sorted(range(len(cells)), key=lambda a: -alignment[g, a])[:10]
            for a in best:
                if x1 < cells[a][3] < x2 and y1 < cells[a][4] < y2:
                    claims[a].add(g)
        owners = {
            a: min(c) if len(c) == 1 else int(overlap[:, a].argmax())
            for a, c in enumerate(claims)
            if c
        }

        for a, value in enumerate(values):
            target = torch.zeros(CLASSES, dtype=torch.float64)
            if a in owners:
                g = owners[a]
                own = [b for b, owner in owners.items() if owner == g]
                most = alignment[g, own].max()
                target[objects[g][1]] = (
                    alignment[g, a] / most * overlap[g, own].max() if most > 0 else 0
                )
            weight = target.sum().item()
            total += weight
            logits = value[4 * BINS :]
            cls -= (
                (target * F.logsigmoid(logits) + (1 - target) * F.logsigmoid(-logits)).sum().item()
            )
            if weight:
                corners = objects[owners[a]][0]
                ciou = complete_box_iou(
                    torch.tensor([corners], dtype=torch.float64), predicted[a : a + 1]
                )
                box += weight * (1 - ciou.item())
                _, _, _, x, y, stride = cells[a]
                ltrb = [x - corners[0], y - corners[1], corners[2] - x, corners[3] - y]
                for side, distance in zip(
                    value[: 4 * BINS].view(4, BINS).log_softmax(1), ltrb, strict=True
                ):
                    place = min(max(distance / stride, 0), 14.99)
                    low = math.floor(place)
                    dfl -= (
                        weight
                        / 4
                        * ((low + 1 - place) * side[low] + (place - low) * side[low + 1]).item()
                    )
    total = max(total, 1)
    return box / total, cls / total, dfl / total


@pytest.mark.parametrize("seed", range(3))
def test_equals_plain_loops(seed: int) -> None:
    maps = random_maps(3, seed)
    with torch.no_grad():
        for level in maps:
            level[:, : 4 * BINS] += (
                torch.arange(4 * BINS).view(1, -1, 1, 1) % BINS * -0.4
            )  # boxes of about their size
    found = loss_of(maps, targets_of(*SCENES))
    expected = looped_loss(maps, SCENES)
    assert [found[name].item() for name in ("box", "cls", "dfl")] == pytest.approx(
        expected, rel=2e-5
    )
    assert min(expected) > 0.05


def test_one_object_worked_out_by_hand() -> None:
    """A single anchor of stride 32 at (16, 16), whose sides are a quarter in bin 0 and three
    quarters in bin 1.
    """
    level = torch.full((1, 65, 1, 1), -100.0)
    level[0, 64] = 0
    for side in range(4):
        level[0, side * BINS] = math.log(1)
        level[0, side * BINS + 1] = math.log(3)
    assert expected_dist(level[..., 0].mT[..., :64], BINS).flatten().tolist() == pytest.approx(
        [0.75] * 4
    )
    found = detection_loss([level], targets_of([([0, 0, 32, 32], 0)]), [32], BINS)
    iou = (
        32 * 32 / 48**2
    )  # the box is -8 -8 40 40: same centre, same aspect, so CIoU is IoU, and the target score
    assert found["box"].item() == pytest.approx(
        iou * (1 - iou), rel=1e-4
    )  # divided by 1, the least
    assert found["cls"].item() == pytest.approx(
        math.log(2), rel=1e-4
    )  # logit 0, whatever the target
    assert found["dfl"].item() == pytest.approx(
        -iou * (math.log(1 / 4) + math.log(3 / 4)) / 2, rel=1e-4
    )


def test_dfl_equals_a_plain_loop() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 4 * BINS)
    dist = torch.rand(2, 5, 4) * 18 - 1.5  # some negative, some beyond the last bin
    found = distribution_focal(logits, dist, BINS)
    for n in range(2):
        for a in range(5):
            terms = []
            for side in range(4):
                d = min(max(dist[n, a, side].item(), 0), 14.99)
                low, row = int(d), logits[n, a, side * BINS : (side + 1) * BINS].unsqueeze(0)
                two = [F.cross_entropy(row, torch.tensor([i])).item() for i in (low, low + 1)]
                terms.append((low + 1 - d) * two[0] + (d - low) * two[1])
            assert found[n, a].item() == pytest.approx(sum(terms) / 4, rel=1e-5)


# --- no objects, padding, strange objects


@pytest.mark.parametrize("padding", [0, 3])
def test_images_without_objects(padding: int) -> None:
    maps = random_maps(2)
    targets: Any = {
        "boxes_xyxy": torch.zeros(2, padding, 4),
        "labels": torch.full((2, padding), -1),
    }
    found = loss_of(maps, targets)
    assert found["box"] == 0 and found["dfl"] == 0
    logits = torch.cat([m[:, 4 * BINS :].flatten() for m in maps])
    assert found["cls"].item() == pytest.approx(F.softplus(logits).sum().item())
    sum(found.values()).backward()  # type: ignore[union-attr]
    for level in maps:
        assert level.grad is not None
        assert not level.grad[:, : 4 * BINS].any()
        assert torch.allclose(level.grad[:, 4 * BINS :], level[:, 4 * BINS :].sigmoid(), atol=1e-6)


def test_padding_changes_nothing() -> None:
    maps, targets = random_maps(3), targets_of(*SCENES)
    found = loss_of(maps, targets)
    rubbish = torch.tensor([2.0, 2, 90, 60]).expand(3, 4, 4)
    none = torch.full((3, 4), -1)
    for order in (1, -1):  # after the objects, and before them
        padded: Any = {
            "boxes_xyxy": torch.cat([targets["boxes_xyxy"], rubbish][::order], 1),
            "labels": torch.cat([targets["labels"], none][::order], 1),
        }
        for name, value in loss_of(maps, padded).items():
            assert value.item() == pytest.approx(found[name].item(), rel=1e-6), name


STRANGE = {
    "no area": [20, 20, 20, 20],
    "no height": [10, 20, 50, 20],
    "turned round": [50, 50, 10, 10],
    "outside": [200, 200, 260, 240],
    "left of it": [-60, 5, -2, 40],
    "a tenth of a pixel": [20.0, 20.0, 20.1, 20.1],
    "tiny, round an anchor": [19.99, 19.99, 20.01, 20.01],
    "beyond the last bin": [-900, -900, 900, 900],
}


@pytest.mark.parametrize("box", STRANGE.values(), ids=STRANGE)
def test_strange_objects_leave_loss_and_gradient_finite(box: list[float]) -> None:
    maps = random_maps(1)
    usual = ([50, 20, 94, 62], 1)
    found = loss_of(maps, targets_of([(box, 0), usual]))
    assert all(value.isfinite() for value in found.values())
    sum(found.values()).backward()  # type: ignore[union-attr]
    assert all(level.grad is not None and level.grad.isfinite().all() for level in maps)
    x1, y1, x2, y2 = box
    points, _ = anchor_points(SIZES, STRIDES, torch.device("cpu"))
    if not any(x1 < x < x2 and y1 < y < y2 for x, y in points.tolist()):
        without = loss_of(maps, targets_of([usual]))
        assert all(found[name] == without[name] for name in found)


@pytest.mark.parametrize("value", [1e4, -1e4])
def test_huge_logits_leave_loss_and_gradient_finite(value: float) -> None:
    maps = [torch.full((1, 4 * BINS + CLASSES, h, w), value).requires_grad_() for h, w in SIZES]
    with torch.no_grad():
        for level in maps:
            level[:, ::3] *= -1
    found = loss_of(maps, targets_of(CROWD))
    sum(found.values()).backward()  # type: ignore[union-attr]
    assert all(value.isfinite() for value in found.values())
    assert all(level.grad is not None and level.grad.isfinite().all() for level in maps)


# --- the assigner


def answers(images: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """scores, boxes, points: boxes spread around their own anchors."""
    torch.manual_seed(seed)
    points, stride_of = anchor_points(SIZES, STRIDES, torch.device("cpu"))
    reach = torch.rand(images, len(points), 4) * 3 * stride_of
    boxes = torch.cat([points - reach[..., :2], points + reach[..., 2:]], -1)
    return torch.rand(images, len(points), CLASSES), boxes, points


def test_a_batch_is_its_images_one_by_one() -> None:
    scores, boxes, points = answers(3)
    together = assign(scores, boxes, points, targets_of(*SCENES))
    for n, scene in enumerate(SCENES):
        alone = assign(scores[n : n + 1], boxes[n : n + 1], points, targets_of(scene))
        assert torch.allclose(together.scores[n], alone.scores[0], atol=1e-7)
        owned = alone.scores[0].any(-1)
        assert owned.any() == bool(scene)
        assert torch.equal(together.boxes_xyxy[n][owned], alone.boxes_xyxy[0][owned])


def test_the_order_of_objects_does_not_matter() -> None:
    scores, boxes, points = answers(1)
    one, other = (
        assign(scores, boxes, points, targets_of(objects)) for objects in (CROWD, CROWD[::-1])
    )
    assert torch.equal(one.scores, other.scores)
    owned = one.scores.any(-1)
    assert torch.equal(one.boxes_xyxy[owned], other.boxes_xyxy[owned])


def test_at_most_ten_anchors_and_only_with_their_centre_inside() -> None:
    scores, boxes, points = answers(1)
    corners = [10.0, 10.0, 90.0, 60.0]
    found = assign(scores, boxes, points, targets_of([(corners, 1)]))
    owned = found.scores[0].any(-1)
    assert owned.sum() == 10
    x, y = points[owned].T
    assert ((x > 10) & (x < 90) & (y > 10) & (y < 60)).all()
    assert not found.scores[0, :, [0, 2]].any()
    ciou = complete_box_iou(torch.tensor([corners]), boxes[0])[0]
    assert found.scores.max().item() == pytest.approx(
        ciou[owned].max().item(), rel=1e-4
    )  # the best gets the best


def test_an_anchor_claimed_twice_goes_to_the_highest_ciou() -> None:
    points = torch.tensor([[20.0, 20.0], [28.0, 20.0]])
    boxes = torch.tensor([[[10.0, 10, 30, 30], [18.0, 10, 38, 30]]])
    near, far = [11.0, 10.0, 31.0, 30.0], [16.0, 10.0, 37.0, 30.0]  # both hold both points
    for objects in ([(near, 0), (far, 1)], [(far, 1), (near, 0)]):
        found = assign(torch.full((1, 2, 3), 0.5), boxes, points, targets_of(objects))
        assert found.boxes_xyxy[0].tolist() == [near, far]
        ciou = complete_box_iou(torch.tensor([near, far]), boxes[0])
        assert found.scores[0, 0].tolist() == pytest.approx([ciou[0, 0].item(), 0, 0], abs=1e-4)
        assert found.scores[0, 1].tolist() == pytest.approx([0, ciou[1, 1].item(), 0], abs=1e-4)


def test_only_contested_anchors_change_hands() -> None:
    candidate = torch.tensor(
        [[[True, True, False], [True, False, False], [False, False, False]]]
    )  # (1, 3, 3)
    overlap = torch.tensor([[[0.1, 0.2, 0.9], [0.4, 0.9, 0.1], [0.3, 0.3, 0.3]]])
    owned = best_object(candidate, overlap)
    assert owned[0].tolist() == [[False, True, False], [True, False, False], [False, False, False]]


def test_fewer_anchors_than_candidates() -> None:
    found = detection_loss(
        [torch.randn(1, 66, 1, 2)], targets_of([([2, 2, 60, 30], 1)]), [32], BINS
    )
    assert all(value.isfinite() and value > 0 for value in found.values())


# --- the perfect answer, precision


def perfect_maps(objects: list[tuple[list[float], int]]) -> list[Tensor]:
    """Every anchor inside an object gives its box exactly, and its class as good as surely."""
    maps = [torch.full((1, 4 * BINS + CLASSES, h, w), -30.0) for h, w in SIZES]
    for level, stride in enumerate(STRIDES):
        for row in range(SIZES[level][0]):
            for column in range(SIZES[level][1]):
                x, y = (column + 0.5) * stride, (row + 0.5) * stride
                for (x1, y1, x2, y2), label in objects:
                    if x1 < x < x2 and y1 < y < y2:
                        cell = maps[level][0, :, row, column]
                        cell[4 * BINS + label] = 30
                        for side, distance in enumerate((x - x1, y - y1, x2 - x, y2 - y)):
                            place = min(distance / stride, BINS - 1.001)
                            low = int(place)
                            cell[side * BINS + low] = math.log(1 - (place - low) + 1e-12)
                            cell[side * BINS + low + 1] = math.log(place - low + 1e-12)
    return [level.requires_grad_() for level in maps]


def test_the_perfect_answer_is_the_minimum() -> None:
    objects = [([4.0, 6.0, 40.0, 50.0], 0), ([50.0, 20.0, 94.0, 62.0], 2)]
    targets, maps = targets_of(objects), perfect_maps(objects)
    found = loss_of(maps, targets)
    assert abs(found["box"].item()) < 1e-4
    found[
        "dfl"
    ].backward()  # what is left of it is the spread over two bins, and no step makes it smaller
    assert all(level.grad is not None and level.grad.abs().max() < 1e-4 for level in maps)

    worse = [level.detach().clone() for level in maps]
    for level in worse:
        level[:, :BINS] = level[:, :BINS].roll(1, 1)  # every left side a stride too far
    spoilt = loss_of(worse, targets)
    assert spoilt["box"] > 0.1 and spoilt["dfl"] > found["dfl"] + 1


def test_maps_fitted_to_one_scene_find_its_boxes() -> None:
    maps, targets = random_maps(1), targets_of([([4, 6, 40, 50], 0), ([50, 20, 94, 62], 2)])
    first = {name: value.item() for name, value in loss_of(maps, targets).items()}
    optimizer = torch.optim.Adam(maps, 0.1)
    for _ in range(150):
        found = loss_of(maps, targets)
        optimizer.zero_grad()
        sum(found.values()).backward()  # type: ignore[union-attr]
        optimizer.step()
    assert found["box"].item() < 0.02 < 0.1 < first["box"]
    assert found["cls"].item() < 0.1 * first["cls"]


def test_half_precision_maps_are_scored_in_float32() -> None:
    targets = targets_of(*SCENES)
    halves = [level.detach().bfloat16() for level in random_maps(3)]
    plain = loss_of([h.float() for h in halves], targets)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss_of(halves, targets)
    for name, value in found.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(plain[name].item(), rel=1e-5), name
    exact = loss_of(random_maps(3), targets)
    assert all(found[name].item() == pytest.approx(exact[name].item(), rel=0.02) for name in found)
