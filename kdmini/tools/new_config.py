"""The text of the configs of a new project: what was found, and a recipe that fits it."""

import textwrap
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import yaml

from kdmini.tools.new_layouts import Found, Task
from kdmini.tools.new_tree import SHARE
from kdmini.typed import printable
from kdmini.yamltext import Dumper, dump

BATCH = {"boxes": 16, "masks": 16, "classes": 32}
SMALLEST = {"boxes": 64, "masks": 128, "classes": 64}  # pixels of a side
LARGEST = {"boxes": 640, "masks": 512, "classes": 224}
STRIDE = 32  # of the networks, which image sizes are multiples of
FEW = 4000  # images; up to here docs/small.md decides, and from there the public recipe
EPOCHS = {300: 150, 2000: 100}  # up to so many images
EPOCHS_OF_MORE = 60
FEW_TO_TUNE = 2000  # images; up to here a detector of public weights keeps its backbone
EPOCHS_TO_TUNE = 50
LISTED = 10  # classes in a line
BY_PREFIX = "; `by: prefix` keeps those of a film, a_001 and a_002, together"


class Start(NamedTuple):
    """What a detector begins with."""

    scale: Any
    weights: str


class Project(NamedTuple):
    """What the texts are made of."""

    folder: Path
    root: Path
    found: Found
    images: int  # to learn from
    held_out: int  # to validate on
    sides: list[int]  # the shortest long side of an image, that in the middle, the longest
    weights: str | None = None  # of a student for masks or classes
    student: Start | None = None
    teacher: Start | None = None


DATA = Template("""\
$head
# Paths are seen from the folder in which the commands are called.
run: $run
seed: 0
data:
  root: $root
  imgsz: $imgsz  # $sizes
  train:$anchor
$train
  val: $val  # $held_out images$hint
$augment$student
""")

YOLO11 = Template("""\
  build: kdmini.detection.yolo11.model:YOLO11
  scale: $scale
  weights: {path: $weights, classes: by_name}  # classes that it has begin as it knows them
""")
BOXES_TEACHER = Template("""\
teacher:  # `teacher=null distill=null` trains without
  build: kdmini.detection.yolo11.model:YOLO11
  scale: $scale
  weights: $weights
""")
BY_FEATURES = """\
distill:
  taps: [model.16, model.19, model.22]
  kd_scale: batch  # as the detection loss is multiplied by the batch size
  score_weighted:  # imitates features where the teacher is sure: docs/evidence.md
    build: kdmini.terms.score_weighted:ScoreWeighted
    weight: 6
"""
BY_SCORES = """\
distill:
  taps: []  # the scores alone: imitated features spoil weights that are good already
  kd_scale: batch  # as the detection loss is multiplied by the batch size
  logits:
    build: kdmini.terms.logits:LogitDistillation
    form: sigmoid
    temperature: 4
    weight: 0.3
"""
MASKS_DISTILLED = Template("""\
teacher:  # `teacher=null distill=null` trains without
  build: kdmini.segmentation.segformer:SegFormer
  weights: $weights
distill:
  taps:
    - [higher, stages.1.before_norm]  # after the norm every cell is as strong as another
    - [stages.0, stages.2.before_norm]
    - [pooled, stages.3.before_norm]
    - [fusion, decoder]
  kd_scale: 1
  frequency:
    build: kdmini.terms.frequency:FrequencyAttention
    low: {higher: 1, stages.0: 1, pooled: 1, fusion: 0}
    weight: 0.5
""")
CLASSES_DISTILLED = """\
distill:  # the network teaches itself; `distill=null` trains without
  taps: [layer1, layer2, layer3, layer4]
  align: none  # the self-teacher reads the network's own maps
  self_teacher:  # helped most, and CutMix beside it: docs/classification.md
    build: kdmini.terms.self_teacher:SelfTeacher
    times: 1
    form: softmax
    alpha: 2
    beta: 100
    temperature: 4
    weight: 1
"""
METRICS = {
    "boxes": "kdmini.detection.average_precision:DetectionMetric",
    "masks": "kdmini.segmentation.mean_iou:MeanIoU",
    "classes": "kdmini.classification.accuracy:Accuracy",
}
AUGMENT = {
    "boxes": "",
    "masks": "  augment: {mosaic: 0, scale: [0.5, 2.0], translate: 0.25}\n",
    "classes": """\
  augment:
    mosaic: 0
    scale: [0.8, 1.6]
    translate: 0.1
    hsv_h: 0
    hsv_s: 0.3
    hsv_v: 0.3
    cutmix: 0.5
""",
}

SHORT = Template("""\
  nbs: $batch  # every step updates the weights; the default, 64, would take $steps steps
  warmup_epochs: 1
  warmup_steps: 0  # the default, 100, would be $in_epochs epochs
""")
AVERAGED = """\
  ema_decay: 0.999  # the average that is kept follows a short run
  ema_tau: 100
"""
TUNED = """\
  freeze:  # the backbone, with its statistics, which so few images spoil: docs/small.md
    [model.0, model.1, model.2, model.3, model.4, model.5,
     model.6, model.7, model.8, model.9, model.10]
  lr0: 0.002  # the default, 0.01, is for weights that begin at random
  warmup_bias_lr: 0
"""
RECIPES = {
    "boxes": "",
    "masks": """\
  optimizer: adamw
  schedule: poly
  lr0: 0.001
  lrf: 0
  momentum: 0.9
  weight_decay: 0.01
  warmup_bias_lr: 0
  loss_scale: none
""",
    "classes": """\
  lr0: 0.05
  lrf: 0
  momentum: 0.9
  weight_decay: 5.0e-4
  warmup_bias_lr: 0
  loss_scale: none
""",
}


def texts(project: Project) -> dict[str, str]:
    """File -> text: config.yaml, and teacher.yaml where a teacher is trained first."""
    task = project.found.task
    run = project.folder / "student"
    if task == "classes":
        network = "  build: kdmini.classification.resnet:ResNet\n  depth: 18\n"
        return {"config.yaml": text(project, run, network + begun(project), CLASSES_DISTILLED)}

    taught = project.folder / "teacher"
    weights = flow(str(taught / "best.pt"))
    if task == "masks":
        network = "  build: kdmini.segmentation.fast_scnn:FastSCNN\n"
        distilled = MASKS_DISTILLED.substitute(weights=weights)
        teacher = "  build: kdmini.segmentation.segformer:SegFormer\n"
        return {
            "config.yaml": text(project, run, network + begun(project), distilled),
            "teacher.yaml": text(project, taught, teacher),
        }
    assert project.student
    student = yolo11(project.student)
    if not project.teacher:
        return {"config.yaml": text(project, run, student)}
    teacher = BOXES_TEACHER.substitute(scale=flow(project.teacher.scale), weights=weights)
    distilled = teacher + (BY_SCORES if is_tuned(task, project.images) else BY_FEATURES)
    return {
        "config.yaml": text(project, run, student, distilled),
        "teacher.yaml": text(project, taught, yolo11(project.teacher)),
    }


def begun(project: Project) -> str:
    return f"  weights: {flow(project.weights)}\n" if project.weights else ""


def yolo11(start: Start) -> str:
    return YOLO11.substitute(scale=flow(start.scale), weights=flow(start.weights))


def text(project: Project, run: Path, network: str, distilled: str = "") -> str:
    """One config. network: the section `student`, but for its first line."""
    found = project.found
    is_shared = found.val is SHARE
    what = "student" if run.name == "student" else "teacher, which learns alone"
    head = (
        f"The {what}, of {project.images:,} images, made by kdmini.tools.new. "
        f"Found: {found.layout}, {len(found.counts)} classes; {counted(found)}."
    )
    shortest, middle, longest = project.sides
    data = DATA.substitute(
        head=textwrap.fill(head, 88, initial_indent="# ", subsequent_indent="# "),
        run=flow(str(run)),
        root=flow(str(project.root)),
        imgsz=image_size(found.task, middle),
        sizes=f"long sides of the images: {shortest} to {longest}, {middle} in the middle",
        train=textwrap.indent(dump(found.train).rstrip(), "    "),
        anchor="" if is_shared else " &set",
        val=flow(found.val) if is_shared else validation(found),
        hint=BY_PREFIX if is_shared else "",
        held_out=f"{project.held_out:,}",
        augment=AUGMENT[found.task],
        student=f"student:\n{network.rstrip()}",
    )
    metric = f"metric: {{build: {METRICS[found.task]}}}\n"
    return f"{data}{distilled}{metric}{recipe(found.task, project.images)}"


def counted(found: Found) -> str:
    """The classes by how often they occur, the most frequent first."""
    counts = sorted(found.counts.items(), key=lambda pair: -pair[1])
    first = ", ".join(f"{count:,} {printable(name)}" for name, count in counts[:LISTED])
    more = f", and {len(counts) - LISTED:,} more" if len(counts) > LISTED else ""
    return f"{found.counted}: {first}{more}"


def validation(found: Found) -> str:
    """The section `val`, by what is another than in `train`."""
    changed = {key: value for key, value in found.val.items() if found.train.get(key) != value}
    return f"{{<<: *set, {flow(changed)[1:]}"


def is_tuned(task: Task, images: int) -> bool:
    """Whether public weights are there, and too few images to learn all of them anew."""
    return task == "boxes" and images < FEW_TO_TUNE


def recipe(task: Task, images: int) -> str:
    """The section `train`."""
    batch = BATCH[task] if images < FEW else 64
    while batch > max(images, 1):
        batch //= 2
    if is_tuned(task, images):
        epochs = EPOCHS_TO_TUNE
        own = TUNED
    else:
        epochs = next((epochs for most, epochs in EPOCHS.items() if images < most), EPOCHS_OF_MORE)
        own = RECIPES[task]
    lines = f"train:\n  epochs: {epochs}\n  batch: {batch}\n"
    if images < FEW:
        in_epochs = f"{100 / (images // batch):.1f}"
        lines += SHORT.substitute(batch=batch, steps=64 // batch, in_epochs=in_epochs) + AVERAGED
    return f"{lines}{own}  val_every: 5\n"


def image_size(task: Task, side: int) -> int:
    """About the long side of an image in the middle, at most what is usual, and so large that
    the last maps have some cells.
    """
    near = round(side / STRIDE) * STRIDE
    return min(max(near, SMALLEST[task]), LARGEST[task])


def flow(value: Any) -> str:
    """YAML in one line."""
    line = yaml.dump(
        value, Dumper=Dumper, default_flow_style=True, width=float("inf"), allow_unicode=True
    )
    return line.removesuffix("\n").removesuffix("\n...")
