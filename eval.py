"""Score weights on the validation set of a config: VOC 2007, VOC area and COCO average precision,
per class.

python eval.py --config configs/voc.yaml --weights runs/voc/best.pt [--teacher] [--save FOLDER]
[key.path=value ...]"""

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from kdmini import config, engine
from kdmini.contracts import UserError
from kdmini.data.loader import ValLoader, check_size
from kdmini.data.store import Store
from kdmini.device import pick_device, precision
from kdmini.runlog import write_whole


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True)
    parser.add_argument(
        "--weights", help="a file for the student; without it, the config's student.weights"
    )
    parser.add_argument(
        "--teacher", action="store_true", help="score the config's teacher too, side by side"
    )
    parser.add_argument("--save", metavar="FOLDER", help="write the detections there, as NAME.json")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    args = parser.parse_intermixed_args()  # overrides may stand anywhere
    try:
        settings = config.load(args.config, args.overrides)
        config.call(
            evaluate,
            settings,
            args.config,
            weights=args.weights,
            with_teacher=args.teacher,
            save=args.save,
        )
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def evaluate(
    weights: str | None,
    with_teacher: bool,
    save: str | None,
    data: dict[str, Any],
    student: dict[str, Any],
    metric: dict[str, Any],
    train: dict[str, Any],
    teacher: dict[str, Any] | None = None,
    device: str = "auto",
    **others: Any,  # sections that only training reads
) -> None:
    """Builds the detectors, scores each, prints one table. The parameters after `save` are sections
    of the config.
    """
    place = pick_device(device)
    autocast, _ = precision(train.get("amp", True), place)
    if weights:
        given = student.get("weights")
        student = {
            **student,
            "weights": {**given, "path": weights} if isinstance(given, Mapping) else weights,
        }
    sections = {"student": student}
    if with_teacher:
        if not teacher:
            raise UserError("--teacher: the config has no teacher")
        sections["teacher"] = teacher
    for name, section in sections.items():
        if not section.get("weights"):
            raise UserError(f"{name}: no weights to evaluate; give --weights FILE")

    offered = {"root": data["root"]} if data.get("root") else {}
    val_set = config.build(data["val"], "data.val", **offered)
    detectors = {}
    for name, section in sections.items():
        detectors[name] = config.build(section, name, names=val_set.names).to(
            place, memory_format=torch.channels_last
        )
        if detectors[name].names != val_set.names:
            raise UserError(
                f"{name}: its classes are not the data set's; it cannot be scored on it"
            )
        if hasattr(detectors[name], "fold"):
            detectors[name].eval().fold()

    keys = ("imgsz", "workers", "storage", "limit", "on_bad")
    storing = {"imgsz": 640} | {key: data[key] for key in keys if key in data}
    check_size(storing["imgsz"])
    store = config.call(Store, storing, "data", dataset=val_set, device=place, name="val")
    loader = ValLoader(store, train["batch"])
    metrics, means, costs = {}, {}, {}
    for name, detector in detectors.items():
        metrics[name] = config.build(metric, "metric", names=val_set.names)
        started = time.perf_counter()
        means[name] = engine.evaluate(detector, loader, metrics[name], autocast)
        costs[name] = cost(detector, store, (time.perf_counter() - started) / len(store))
    print(table(metrics, means))
    for name, told in costs.items():
        print(f"{name}: {told}")
    for name, scored in metrics.items():
        if hasattr(scored, "official"):
            print(
                f"{name}, by pycocotools: "
                + ", ".join(f"{k} {v:.4f}" for k, v in scored.official().items())
            )
    if save:
        Path(save).mkdir(parents=True, exist_ok=True)
        for name, scored in metrics.items():
            write_whole(Path(save) / f"{name}.json", json.dumps(scored.detections_json()))
            print(f"detections: {Path(save) / name}.json")


@torch.no_grad()
def cost(detector: Any, store: Store, seconds: float) -> str:
    """Size and speed in words. A multiply-add is two operations; seconds: of an image, from pixels
    to scores.
    """
    with FlopCounterMode(display=False) as counter:
        detector(torch.zeros(1, 3, store.imgsz, store.imgsz, device=store.device))
    millions, giga = (
        sum(p.numel() for p in detector.parameters()) / 1e6,
        counter.get_total_flops() / 1e9,
    )
    return f"{millions:.2f} M parameters, {giga:.3g} GFLOPs at {store.imgsz} px, {1000 * seconds:.1f} ms an image"


def table(metrics: Mapping[str, Any], means: Mapping[str, dict[str, float]]) -> str:
    """One row for all classes, the means, and one for each; the columns that every row has, for
    every detector.
    """
    rows = {"all classes": {name: dict(m) for name, m in means.items()}}
    for name, metric in metrics.items():
        for label, values in metric.per_class().items() if hasattr(metric, "per_class") else ():
            rows.setdefault(label, {})[name] = values
    columns = [
        c
        for c in next(iter(means.values()))
        if all(c in v for row in rows.values() for v in row.values())
    ]
    width = max(len(label) for label in rows)
    heads = [f"{name:^{9 * len(columns)}}" for name in metrics]
    lines = [
        " " * (width + 9) + " |".join(heads),
        f"{'':{width}}  objects"
        + " |".join("".join(f"{column:>9}" for column in columns) for _ in metrics),
    ]
    for label, values in rows.items():
        objects = next(iter(values.values())).get("objects", math.nan)
        count = f"{objects:9.0f}" if math.isfinite(objects) else " " * 9
        cells = (
            "".join(f"{values[name][c]:9.3f}".replace("nan", "  -") for c in columns)
            for name in metrics
        )
        lines.append(f"{label:{width}}" + count + " |".join(cells))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
