"""Run folders as train.py leaves them, and the tables that compare makes of them."""

import json
import re

import yaml

SETTINGS = {
    "seed": 0,
    "student": {"build": "a.b:YOLO11", "scale": "n"},
    "metric": {"build": "kdmini.detection.average_precision:DetectionMetric"},
    "train": {"epochs": 3, "lr0": 0.01},
}


def write(folder, scores, seed=0, settings=None, speed=(10.0, 30.0, 20.0)):
    """A run folder as train.py leaves it -> its path.

    scores: AP50-95 of each epoch, None where it was not evaluated.
    """
    folder.mkdir(parents=True)
    config = {"run": str(folder), **SETTINGS, **(settings or {}), "seed": seed}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    records = [{"epoch": -1, "distance/raw": 5.0}]
    for epoch, (score, images) in enumerate(zip(scores, speed, strict=False)):
        record = {"epoch": epoch, "loss/box": 1.0, "images/s": images}
        if score is not None:
            record["score/AP50-95"] = score
            record["score/VOC"] = score + 0.1
            record["score/VOC07"] = score + 0.2
            record["distance/raw"] = 4.0 - epoch
        records.append(record)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(folder)


def rows_of(text, table=0):
    """The cells of a Markdown table, its header included; the lines have one width."""
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("| row")]
    header, rule, *body = tables[table]
    assert len({len(line) for line in tables[table]}) == 1
    assert re.fullmatch(r"[| -]+", rule)
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in [header, *body]
    ]
