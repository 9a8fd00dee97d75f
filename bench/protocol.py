"""Which runs the evidence is made of: the rows of a protocol, the config of each run.

A row is a list of overrides of bench/evidence/PROTOCOL.yaml, where PROTOCOL is `gpu` or
`cpu`. The row `notes` has none: that file is the method as the research notes have it.
"""

import json
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from kdmini import config
from kdmini.data.loader import Augment

ROOT = Path(__file__).parents[1]

# the rows that have names everywhere
TEACHER = "teacher"
BASELINE = "alone"  # the others are compared with it
PEER = "ultralytics"  # its own trainer
PEER_BASELINE = f"{PEER}_{BASELINE}"

CPU_ROWS = (
    BASELINE,
    "notes",
    "notes_batch",
    "sample",
    "sample_strong",
    "score_weighted",
    PEER_BASELINE,
    PEER,
    "score_weighted_strong",
    "sample_strongest",
    "logits",
    "lambda_constant",
)

# By these a term's gradient was about 0.3 of the task's, on YOLO11n trained alone for
# four epochs.
WEIGHTS = {
    "logits": 0.1,
    "localisation": 0.2,
    "channelwise": 0.5,
    "masked": 8,
    "pearson": 2,
    "spatial": 2,
    "frequency": 4.5,
    "affinity": 1.2,
}

MEAN_LAMBDA = 0.343  # of the notes: (40 * 1.0 + 60 * 0.15 + 50 * 0.05) / 150
COSINE_SEGMENTS = 10


class Run(NamedTuple):
    """One run of a row."""

    protocol: str
    row: str
    overrides: list[str]
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.row}-{self.seed}"

    def settings(self, runs: Path, root: Path | None = None) -> dict[str, Any]:
        """The config.

        runs: the folder of the run folders.
        root: of the photographs, where it is not the protocol's.
        """
        path = settings_file(self.protocol)
        overrides = list(self.overrides)
        if root:
            overrides.append(f"data.root={root}")
        overrides += [f"run={runs / self.name}", f"seed={self.seed}"]
        if config.load(path, self.overrides)["teacher"]:
            overrides.append(f"teacher.weights={runs / f'{TEACHER}-0/best.pt'}")
        return config.load(path, overrides)


class Protocol(NamedTuple):
    """All that is to be run."""

    name: str
    teacher: list[str]  # the overrides that make it
    rows: dict[str, list[str]]  # and those of each row
    seeds: tuple[int, ...]

    def runs(self, rows: Sequence[str] = (), seeds: Sequence[int] = ()) -> Iterator[Run]:
        """The teacher first, with one seed; then row by row.

        rows, seeds: only these.
        """
        overrides = {TEACHER: self.teacher, **self.rows}
        for row in overrides:
            if rows and row not in rows:
                continue
            own_seeds = seeds or self.seeds
            if row == TEACHER:
                own_seeds = (0,)
            for seed in own_seeds:
                yield Run(self.name, row, overrides[row], seed)


def protocol_of(name: str) -> Protocol:
    settings = config.load(settings_file(name))
    teacher = [
        f"student.scale={settings['teacher']['scale']}",
        "teacher=null",
        "distill=null",
        # all photographs
        "data.train={build: kdmini.detection.voc:VOC, splits: [train]}",
        "metric.build=kdmini.detection.average_precision:DetectionMetric",
    ]
    rows = rows_of(settings["train"]["epochs"])
    if name == "gpu":
        return Protocol(name, teacher, rows, (0, 1, 2))
    teacher += ["train.epochs=40", "train.val_every=10"]
    return Protocol(name, teacher, {row: rows[row] for row in CPU_ROWS}, (0, 1))


def rows_of(epochs: int) -> dict[str, list[str]]:
    """The overrides of each row, most informative first."""
    strong = [
        "distill.attention.reduction=sample",
        "distill.kd_scale=batch",
        "distill.attention.weight=0.25",
    ]
    score_weighted = in_place_of_attention("score_weighted")
    rows = {
        BASELINE: ["distill.attention.weight=0"],
        "notes": [],
        "notes_batch": ["distill.kd_scale=batch"],
        "sample": ["distill.attention.reduction=sample"],
        "sample_strong": strong,
        "score_weighted": [*score_weighted, "distill.score_weighted.weight=0.5"],
        PEER_BASELINE: ["teacher=null", "distill=null"],
        PEER: ["distill=null"],  # it has its own
        # the weight of PEER, 12 times that of `score_weighted`
        "score_weighted_strong": [*score_weighted, "distill.score_weighted.weight=6"],
        # 12 times that of `sample_strong`, as in the row before
        "sample_strongest": [*strong, "distill.attention.weight=3"],
    }
    for mode in ("none", "frozen", "unequal"):
        rows[f"align_{mode}"] = [*strong, f"distill.align={mode}"]
    for name, segments in schedules(epochs).items():
        rows[f"lambda_{name}"] = [*strong, f"distill.attention.schedule={segments}"]
    rows["taps_neck"] = [*strong, "distill.taps=[model.13, model.16, model.19, model.22]"]
    rows["taps_p3"] = [*strong, "distill.taps=[model.16]"]
    for term, weight in WEIGHTS.items():
        rows[term] = [*in_place_of_attention(term), f"distill.{term}.weight={weight}"]
    rows["self_teacher"] = ["teacher=null", *in_place_of_attention("self_teacher")]
    return rows


def in_place_of_attention(term: str) -> list[str]:
    """The taps and settings of configs/terms/TERM.yaml."""
    settings = config.load(ROOT / f"configs/terms/{term}.yaml")
    return [f"distill={json.dumps(settings['distill'])}"]


def schedules(epochs: int) -> dict[str, list[list[float]]]:
    """Lambdas with the mean of the notes', in segments: see distill/schedule.py."""
    falling = []
    for i in range(COSINE_SEGMENTS + 1):
        epoch = epochs * i / COSINE_SEGMENTS
        cosine = math.cos(math.pi * i / COSINE_SEGMENTS)
        falling.append((epoch, MEAN_LAMBDA * (1 + cosine)))
    closing = epochs - Augment.close_mosaic
    until_closing = MEAN_LAMBDA * epochs / closing
    return {
        "constant": [[0, MEAN_LAMBDA, epochs, MEAN_LAMBDA]],
        "cosine": [[*start, *end] for start, end in pairwise(falling)],
        # and none while the mosaic is off
        "mosaic": [[0, until_closing, closing, until_closing]],
    }


def records_of(name: str) -> Path:
    """The folder that keeps config and curve of each run of the protocol."""
    return ROOT / "bench/evidence" / name


def settings_file(name: str) -> Path:
    """What all rows of the protocol share."""
    return records_of(name).with_suffix(".yaml")
