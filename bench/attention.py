"""What attention transfer transfers in a detector: maps, distances and gradients, measured.

python -m bench.attention bench/evidence/head.yaml --runs RUNS --root data/voc320
python -m bench.attention bench/evidence/head.yaml --table  # nothing is measured: page and pictures

On PHOTOGRAPHS of the validation set, by the teacher and the students (seed SEED) of the runs
that have been made of a protocol of bench/rows.py. What was measured goes to
bench/evidence/attention.json; tables and pictures of docs/attention.md are made of that and of
the protocol's records alone.

Legend: N images, C channels, H W cells.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.attention_pictures import draw
from bench.protocol import ROOT
from bench.rows import Protocol, protocol_at, settings_of
from bench.scene_pictures import in_square
from bench.students import BACKBONE
from kdmini import config, engine
from kdmini.assemble import make_distillation, make_model
from kdmini.contracts import UserError, View
from kdmini.data.loader import ValLoader
from kdmini.detection.truth import Targets
from kdmini.device import precision
from kdmini.distill.attention import attention_map, map_distance, to_largest
from kdmini.distill.step import freeze
from kdmini.distill.taps import feats_of
from kdmini.files import write_whole
from kdmini.optim import freeze_parts
from kdmini.sections import Sections
from kdmini.terms.gradient_weighted import GradientWeighted
from kdmini.terms.pearson import standardise
from kdmini.tools.compare import markdown
from kdmini.tools.scenes import Scenes, spread_scenes

PHOTOGRAPHS = 192
BATCH = 16
SEED = 1
SHOWN = 4  # photographs whose maps are kept
TAPS = ["model.16", "model.19", "model.22"]
# of maps: what attention transfer compares, the same of standardised channels, and the gradient of
# the teacher's scores
KINDS = ("activation", "standardised", "standardised, p = 4", "gradient")
YOLO11 = "kdmini.detection.yolo11.model:YOLO11"
CPU = torch.device("cpu")
KEPT = ROOT / "bench/evidence/attention.json"
PAGE = ROOT / "docs/attention.md"
MARKS = ("<!-- measured -->", "<!-- /measured -->")

# name -> the term whose gradient is looked at
TERMS: dict[str, dict[str, Any]] = {
    "attention": {
        "build": "kdmini.distill.attention:AttentionTransfer",
        "reduction": "sample",
    },
    "centred": {"build": "kdmini.terms.centred:CentredAttention"},
    "standardised": {"build": "kdmini.terms.standardised:StandardisedAttention"},
    "pearson": {"build": "kdmini.terms.pearson:PearsonDistillation"},
    "spatial": {"build": "kdmini.terms.spatial:SpatialImitation"},
    "score_weighted": {"build": "kdmini.terms.score_weighted:ScoreWeighted"},
    "gradient_weighted": {"build": "kdmini.terms.gradient_weighted:GradientWeighted"},
    "logits": {"build": "kdmini.terms.logits:LogitDistillation"},
    "localisation": {"build": "kdmini.terms.localisation:LocalisationDistillation"},
}


def batches(scenes: Scenes) -> Iterator[slice]:
    for start in range(0, len(scenes.images), BATCH):
        yield slice(start, start + BATCH)


# --- what the maps show


def inside(scenes: Scenes, size: tuple[int, int]) -> Tensor:
    """(N, H, W) bool: cells whose middle lies in a box."""
    height, width = size
    cell = scenes.images.shape[2] / height
    middles_y = (torch.arange(height) + 0.5) * cell
    middles_x = (torch.arange(width) + 0.5) * cell
    masks = []
    for target, frame in zip(scenes.targets, scenes.frames, strict=True):
        mask = torch.zeros(height, width, dtype=torch.bool)
        for x1, y1, x2, y2 in in_square(target, frame)["boxes_xyxy"][0]:
            rows = (middles_y >= y1) & (middles_y < y2)
            columns = (middles_x >= x1) & (middles_x < x2)
            mask |= rows[:, None] & columns[None]
        masks.append(mask)
    return torch.stack(masks)


def area_under_curve(values: Tensor, positive: Tensor) -> float | None:
    """How often a cell in a box has more than one outside, of an image; None without either."""
    flat = values.flatten().numpy()
    of_boxes = positive.flatten().numpy()
    inner = flat[of_boxes]
    outer = np.sort(flat[~of_boxes])
    if not len(inner) or not len(outer):
        return None
    below = np.searchsorted(outer, inner, "left")
    not_above = np.searchsorted(outer, inner, "right")
    return float((below + not_above).mean() / 2 / len(outer))


def maps_of(teacher: Any, scenes: Scenes) -> dict[str, dict[str, Tensor]]:
    """tap -> kind of map, those of KINDS: (N, H, W)."""
    term = GradientWeighted(teacher)
    parts: dict[str, dict[str, list[Tensor]]] = {}
    for part in batches(scenes):
        feats = feats_of(teacher, TAPS, scenes.images[part])
        weights = term.weights([*feats.values()])
        for (tap, feat), weight in zip(feats.items(), weights, strict=True):
            kinds = parts.setdefault(tap, {kind: [] for kind in KINDS})
            even = standardise(feat)
            kinds["activation"].append(feat.square().mean(1))
            kinds["standardised"].append(even.square().mean(1))
            kinds["standardised, p = 4"].append(even.pow(4).mean(1))
            kinds["gradient"].append(weight)
    return {tap: {kind: torch.cat(x) for kind, x in kinds.items()} for tap, kinds in parts.items()}


def about_map(energy: Tensor, mask: Tensor) -> dict[str, float]:
    """energy: (N, H, W). mask: the same, in the boxes."""
    share = energy / energy.sum((1, 2), keepdim=True)
    entropy = -(share * share.clamp(min=1e-30).log()).sum((1, 2))
    areas = [area_under_curve(e, m) for e, m in zip(energy, mask, strict=True)]
    known = [area for area in areas if area is not None]
    return {
        "entropy": float(entropy.mean() / np.log(energy[0].numel())),
        "inside": float((share * mask).sum((1, 2)).mean()),
        "auc": float(np.mean(known)),
    }


def look(teacher: Any, scenes: Scenes) -> dict[str, Any]:
    """What the maps are like, and some of them."""
    found: dict[str, Any] = {}
    examples = []
    maps = maps_of(teacher, scenes)
    for tap, kinds in maps.items():
        height, width = kinds["activation"].shape[1:]
        mask = inside(scenes, (height, width))
        found[tap] = {kind: about_map(energy, mask) for kind, energy in kinds.items()}
        found[tap]["area"] = float(mask.float().mean())
    # those whose boxes cover about a quarter of the image
    covered = inside(scenes, (28, 28)).float().mean((1, 2))
    chosen = (covered - 0.25).abs().argsort()[:SHOWN].sort().values.tolist()
    size = scenes.images.shape[2]
    for index in chosen:
        boxes = in_square(scenes.targets[index], scenes.frames[index])["boxes_xyxy"][0] / size
        example: dict[str, Any] = {"id": scenes.ids[index], "boxes": rounded(boxes)}
        for kind in ("activation", "gradient"):
            energy = maps[TAPS[0]][kind][index]
            example[kind] = rounded(energy / energy.max())
        examples.append(example)
    return {"taps": found, "examples": examples}


def rounded(x: Tensor) -> Any:
    return [[round(value, 3) for value in row] for row in x.tolist()]


# --- what the distance measures


@torch.no_grad()
def distances(student: nn.Module, teacher: Any, scenes: Scenes) -> dict[str, float]:
    """Summed over the taps, a mean over the photographs: to the teacher's maps, and to those of
    the photograph before.
    """
    totals = dict.fromkeys(("raw", "rolled"), 0.0)
    for part in batches(scenes):
        images = scenes.images[part]
        ours = feats_of(student, TAPS, images)
        theirs = feats_of(teacher, TAPS, images)
        for tap in TAPS:
            goal = to_largest(theirs[tap])
            feat = to_largest(ours[tap])
            totals["raw"] += map_distance(feat, goal).sum().item()
            totals["rolled"] += map_distance(feat, goal.roll(1, 0)).sum().item()
    return {name: total / len(scenes.images) for name, total in totals.items()}


@torch.no_grad()
def without_looking(teacher: Any, scenes: Scenes) -> dict[str, dict[str, float]]:
    """The same of maps that see no photograph: one that is even, and the teacher's mean map."""
    maps: dict[str, list[Tensor]] = {tap: [] for tap in TAPS}
    for part in batches(scenes):
        for tap, feat in feats_of(teacher, TAPS, scenes.images[part]).items():
            maps[tap].append(attention_map(to_largest(feat)))
    found = {"an even map": 0.0, "the teacher's mean map": 0.0}
    for of_tap in maps.values():
        goals = torch.cat(of_tap)
        even = torch.ones_like(goals[0])
        for name, guess in (("an even map", even), ("the teacher's mean map", goals.mean(0))):
            unit = guess / torch.linalg.vector_norm(guess)
            off = torch.linalg.vector_norm(goals - unit, dim=(1, 2)).mean()
            found[name] += off.item()
    return {name: {"raw": value, "rolled": value} for name, value in found.items()}


# --- what the gradient does


def gradient(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """All of it, as one vector."""
    parts = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    flat = [
        torch.zeros_like(parameter).flatten() if part is None else part.flatten()
        for part, parameter in zip(parts, parameters, strict=True)
    ]
    return torch.cat(flat)


def rolled(view: View) -> View:
    """Each image with what the teacher made of the one before."""
    feats = {tap: feat.roll(1, 0) for tap, feat in view.feats.items()}
    preds = [pred.roll(1, 0) for pred in view.preds]
    classes = [level.roll(1, 0) for level in view.classes or []]
    return view._replace(feats=feats, preds=preds, classes=classes)


def cosines(student: Any, teacher: Any, scenes: Scenes) -> dict[str, float]:
    """Term -> cosine of its gradient with the one towards another photograph's teacher, a mean
    over the batches; and "detection loss", with another photograph's boxes.
    """
    student.eval()
    parameters = [p for p in student.parameters() if p.requires_grad]
    imgsz = scenes.images.shape[2]
    terms = {name: {**term, "weight": 1} for name, term in TERMS.items()}
    distillation = make_distillation(student, teacher, imgsz, list(TAPS), "none", **terms)
    found: dict[str, list[float]] = {name: [] for name in ("detection loss", *TERMS)}
    for part in batches(scenes):
        images = scenes.images[part]
        targets = boxes_of(scenes, part)
        preds = student(images)
        feats = distillation.student_taps.take()
        right = distillation.teacher_view(images)
        assert right is not None
        losses = {
            name: [
                distillation.losses((name,), feats, view, preds, images, targets)[name]
                for view in (right, rolled(right))
            ]
            for name in TERMS
        }
        losses["detection loss"] = [
            torch.stack([*student.loss(preds, truth).values()]).sum()
            for truth in (targets, boxes_of(scenes, part, roll=1))
        ]
        for name, pair in losses.items():
            one, other = (gradient(loss, parameters) for loss in pair)
            found[name].append(torch.cosine_similarity(one, other, 0).item())
    distillation.student_taps.remove()
    return {name: float(np.mean(values)) for name, values in found.items()}


def boxes_of(scenes: Scenes, part: slice, roll: int = 0) -> Targets:
    """The objects of a batch. roll: by so many images they are given to later ones."""
    pairs = [*zip(scenes.targets[part], scenes.frames[part], strict=True)]
    each = [in_square(target, frame) for target, frame in pairs[-roll:] + pairs[:-roll]]
    longest = max(one["labels"].shape[1] for one in each)
    boxes_xyxy = torch.zeros(len(each), longest, 4)
    labels = torch.full((len(each), longest), -1)
    for row, one in enumerate(each):
        count = one["labels"].shape[1]
        boxes_xyxy[row, :count] = one["boxes_xyxy"][0]
        labels[row, :count] = one["labels"][0]
    return {"boxes_xyxy": boxes_xyxy, "labels": labels, "ids": scenes.ids[part]}


# --- statistics of the averaged model


def with_statistics_measured(network: Any, loader: ValLoader) -> None:
    """In place: the BatchNorm behind the frozen backbone gets the mean statistics of images, in
    place of those that were averaged in training.
    """
    for module in network.model[BACKBONE:].modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # a mean of all batches
            module.train()
    with torch.no_grad():
        for images, _, _ in loader:
            network(images)


def averaged_and_measured(network: Any, sections: Sections) -> list[float]:
    """AP50-95 as it is, and with statistics measured on the training photographs."""
    sets = sections.sets()
    autocast, _ = precision(False, CPU)
    held_out = ValLoader(sets.store("val", CPU), BATCH)

    def score() -> float:
        metric = sections.make_metric(sets.val.names)
        return engine.evaluate(network, held_out, metric, autocast)["AP50-95"]

    averaged = score()
    with_statistics_measured(network, ValLoader(sets.store("train", CPU), BATCH))
    return [averaged, score()]


# --- all of it


def tables(found: dict[str, Any]) -> str:
    """What was measured, for docs/attention.md."""
    taps = []
    for tap, about in found["taps"].items():
        for kind in KINDS:
            numbers = about[kind]
            shares = (numbers["entropy"], about["area"], numbers["inside"], numbers["auc"])
            taps.append([tap, kind, *(f"{share:.2f}" for share in shares)])
    header = ["tap", "map", "entropy", "boxes: share of cells", "of the map", "AUC"]
    distances = []
    for name, sides in found["distances"].items():
        gap = sides["rolled"] - sides["raw"]
        numbers = (sides["raw"], sides["rolled"], gap)
        distances.append([name, *(f"{number:.2f}" for number in numbers)])
    of_photographs = ["", "of this photograph", "of another", "transfer"]
    cosines = found["cosines"]
    gradients = []
    for name in next(iter(cosines.values())):
        gradients.append([name, *(f"{values[name]:.2f}" for values in cosines.values())])
    students = ["cosine", *cosines]
    scores = []
    for name, pair in found["statistics"].items():
        scores.append([name, *(f"{100 * score:.2f}" for score in pair)])
    statistics = ["AP50-95", "statistics averaged", "measured again"]
    blocks = [
        markdown(header, taps),
        markdown(of_photographs, distances),
        markdown(students, gradients),
        markdown(statistics, scores),
    ]
    return "\n\n".join(blocks)


def write_page(found: dict[str, Any], page: Path) -> None:
    """Puts the tables between the marks of the page."""
    before, _, rest = page.read_text().partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    middle = f"{MARKS[0]}\n{tables(found)}\n{MARKS[1]}"
    write_whole(page, before + middle + after)


def network_at(path: Path, names: list[str]) -> Any:
    if not path.exists():
        raise UserError(f"{path} is not there: make that row of the protocol first")
    return make_model({"build": YOLO11, "scale": "n", "weights": str(path)}, "network", names, CPU)


def measure(protocol: Protocol, runs: Path, root: str | None) -> dict[str, Any]:
    """Raises UserError where a run that is looked at has not been made."""
    settings = settings_of(protocol, protocol.baseline, SEED, runs, root)
    sections = config.call(Sections, settings, "settings")
    sets = sections.sets()
    names = sets.val.names
    scenes = spread_scenes(sets.store("val", CPU), PHOTOGRAPHS)
    taught = [name for name in protocol.rows if protocol.row(name).teacher]
    teacher = network_at(runs / f"{protocol.row(taught[0]).teacher}-0/best.pt", names)
    freeze(teacher)

    torch.manual_seed(SEED)
    new = make_model(sections.student, "student", names, CPU)
    found: dict[str, Any] = {"photographs": len(scenes.images), **look(teacher, scenes)}
    found["statistics"] = {}
    found["distances"] = {
        **without_looking(teacher, scenes),
        "a new student": distances(new, teacher, scenes),
    }
    for name in (protocol.baseline, *taught):
        path = runs / f"{name}-{SEED}/best.pt"
        if path.exists() and protocol.row(name).ultralytics is None:
            student = network_at(path, names)
            found["distances"][name] = distances(student, teacher, scenes)
            if name in (protocol.baseline, "attention"):
                found["statistics"][name] = averaged_and_measured(student, sections)
    alone = network_at(runs / f"{protocol.baseline}-{SEED}/best.pt", names)
    found["cosines"] = {}
    for name, student in (("new", new), ("trained alone", alone)):
        freeze_parts(student, sections.recipe().freeze)
        found["cosines"][name] = cosines(student, teacher, scenes)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("protocol", type=Path, metavar="PROTOCOL.yaml")
    parser.add_argument("--runs", type=Path, help="default: runs/evidence/PROTOCOL")
    parser.add_argument("--root", help="folder of the data (default: that of the config)")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    args = parser.parse_args()
    runs = args.runs or Path("runs/evidence") / args.protocol.stem
    try:
        protocol = protocol_at(args.protocol)
        if not args.table:
            found = measure(protocol, runs, args.root)
            write_whole(KEPT, json.dumps(found, indent=1) + "\n")
        kept = json.loads(KEPT.read_text())
        draw(kept, protocol, args.protocol.with_suffix(""))
        write_page(kept, PAGE)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
