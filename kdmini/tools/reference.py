"""Every key of a config, in a page: `python -m kdmini.tools.reference > docs/config.md`.

Keys, types, defaults and ranges are those of the signatures, and the meanings are those of
the docstrings: the constructor is the schema.
"""

import inspect
import re
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, get_args, get_origin

from kdmini import output
from kdmini.bounds import Range
from kdmini.config import locate
from kdmini.typed import title

HEAD = """\
# Every key of a config

A config is YAML. A section `{build: package.module:Name, key: value, ...}` is the call
`Name(key=value, ...)`: the path can be opened, and its keys are checked against its
signature before anything is read. Any key can be set on the command line, as in
`train.epochs=2 data.limit=400`; `section=null` removes a section. A mapping takes over
another's keys with `<<`, by YAML's own rule: its own keys win.

This page is written by `python -m kdmini.tools.reference > docs/config.md`, from the
signatures and docstrings, and a test holds it to them. A key without a default has to be
given. A number outside its range is refused: infinity too, unless the range ends there, and
NaN always. A list or a mapping has a range for each kind of number in it.
"""


class Section(NamedTuple):
    """A heading of the page."""

    title: str
    target: str  # package.module:Name
    about: str
    given: tuple[str, ...] = ()  # parameters that a config does not set
    doc: str = ""  # where the keys are described, if not in the target's own docstring


SECTIONS = [
    Section("The sections", "kdmini.sections:Sections", "The keys at the top."),
    Section("data", "kdmini.sections:make_sets", "Images and their ground truth."),
    Section("data.augment", "kdmini.data.loader:Augment", "What training images go through."),
    Section(
        "data.val: a share",
        "kdmini.data.share:Share",
        "Images of `data.train`, in the place of a data set: `val: {share: 0.2}`.",
    ),
    Section(
        "data.train, data.val: VOC",
        "kdmini.detection.voc:VOC",
        "Folders with an XML file for each image. A set of your own: [own.md](own.md).",
    ),
    Section(
        "data.train, data.val: YoloTxt",
        "kdmini.detection.yolo_txt:YoloTxt",
        "A folder with a text file for each image.",
    ),
    Section(
        "data.train, data.val: CocoJson",
        "kdmini.detection.coco_json:CocoJson",
        "One JSON for each set, and a folder of images.",
    ),
    Section(
        "data.train, data.val: VOC with masks",
        "kdmini.segmentation.voc:VOC",
        "A folder laid out like PASCAL VOC, for segmentation.",
    ),
    Section(
        "data.train, data.val: Folders",
        "kdmini.classification.folders:Folders",
        "A folder for each class, for classification.",
    ),
    Section(
        "data.train, data.val: CIFAR",
        "kdmini.classification.cifar:CIFAR",
        "CIFAR-10 or CIFAR-100 in their binary form.",
    ),
    Section("student, teacher: YOLO11", "kdmini.detection.yolo11.model:YOLO11", "", ("names",)),
    Section("student, teacher: ATSS", "kdmini.detection.atss:ATSS", "", ("names",)),
    Section(
        "student, teacher: SegFormer",
        "kdmini.segmentation.segformer:SegFormer",
        "",
        ("names",),
    ),
    Section(
        "student, teacher: Fast-SCNN",
        "kdmini.segmentation.fast_scnn:FastSCNN",
        "",
        ("names",),
    ),
    Section("student, teacher: ResNet", "kdmini.classification.resnet:ResNet", "", ("names",)),
    Section(
        "student, teacher: wide ResNets",
        "kdmini.classification.wide_resnet:WideResNet",
        "",
        ("names",),
    ),
    Section(
        "teacher: a network from elsewhere",
        "kdmini.teachers:Frozen",
        "It teaches by its features: [own.md](own.md#a-teacher-from-elsewhere).",
    ),
    Section(
        "metric: DetectionMetric",
        "kdmini.detection.average_precision:DetectionMetric",
        "AP50-95, AP50 and AP75 as COCO has them, VOC07 and VOC.",
        ("names",),
    ),
    Section(
        "metric: MeanIoU",
        "kdmini.segmentation.mean_iou:MeanIoU",
        "mIoU, the accuracy of pixels and its mean over classes, mAcc.",
        ("names",),
    ),
    Section(
        "metric: Accuracy",
        "kdmini.classification.accuracy:Accuracy",
        "top1, and with more than five classes top5.",
        ("names",),
    ),
    Section("train", "kdmini.optim:Recipe", "How a run is trained."),
    Section(
        "distill",
        "kdmini.assemble:make_distillation",
        "What is imitated. Every other key is a term.",
        ("student", "teacher", "imgsz", "terms"),
    ),
    Section(
        "distill.TERM",
        "kdmini.distill.step:Weighted",
        "Beside the keys of its constructor, below.",
        ("term",),
    ),
    Section(
        "log: TensorBoard",
        "kdmini.tools.loggers:TensorBoard",
        "Needs tensorboard. A logger of your own: [runs.md](runs.md#records-elsewhere).",
        ("run",),
    ),
    Section("log: W&B", "kdmini.tools.loggers:WandB", "Needs wandb.", ("run",)),
]
TERMS = [
    "kdmini.distill.attention:AttentionTransfer",
    "kdmini.terms.affinity:AffinityDistillation",
    "kdmini.terms.centred:CentredAttention",
    "kdmini.terms.channelwise:ChannelWise",
    "kdmini.terms.cosine:CosineDistance",
    "kdmini.terms.cross_head:CrossHead",
    "kdmini.terms.frequency:FrequencyAttention",
    "kdmini.terms.gradient_weighted:GradientWeighted",
    "kdmini.terms.localisation:LocalisationDistillation",
    "kdmini.terms.logits:LogitDistillation",
    "kdmini.terms.masked:MaskedGeneration",
    "kdmini.terms.pearson:PearsonDistillation",
    "kdmini.terms.pixels:PixelRelation",
    "kdmini.terms.score_weighted:ScoreWeighted",
    "kdmini.terms.self_teacher:SelfTeacher",
    "kdmini.terms.spatial:SpatialImitation",
    "kdmini.terms.standardised:StandardisedAttention",
]
# what nn.Module's own constructor has, of a term that takes no settings
UNNAMED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
# to a term, by kdmini.assemble
OFFERED = ("shapes", "graphs", "names", "teacher_names", "student", "teacher")


def page() -> str:
    sections = [
        *SECTIONS,
        *(Section(f"Term: {spec.split(':')[1]}", spec, "", OFFERED) for spec in TERMS),
    ]
    return HEAD + "".join(map(chapter, sections))


def chapter(section: Section) -> str:
    target = locate(section.target, "reference")
    parameters = [
        parameter
        for parameter in inspect.signature(target, eval_str=True).parameters.values()
        if parameter.name not in section.given and parameter.kind not in UNNAMED
    ]
    lines = [f"\n## {section.title}\n", f"`{section.target}`. {section.about}".rstrip() + "\n"]
    if not parameters:
        return "\n".join([*lines, "No keys.\n"])
    lines += ["| key | type | default | range | meaning |", "|---|---|---|---|---|"]
    meanings = described(target)
    for parameter in parameters:
        cells = (
            f"`{parameter.name}`",
            kind_of(parameter),
            default_of(parameter),
            "; ".join(map(str, ranges(parameter.annotation))),
            meanings.get(parameter.name, ""),
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def described(target: Callable[..., Any]) -> dict[str, str]:
    """Key -> meaning, from the entries `key: meaning` or `key, key: meaning` of a docstring."""
    entries: dict[str, str] = {}
    keys: list[str] = []
    for line in (inspect.getdoc(target) or "").splitlines():
        entry = re.fullmatch(r"(\w+(?:, \w+)*): (.+)", line)
        if entry:
            keys = entry[1].split(", ")
            entries |= dict.fromkeys(keys, entry[2])
        elif keys and line.startswith(" "):
            for key in keys:
                entries[key] += " " + line.strip()
        else:
            keys = []
    return entries


def kind_of(parameter: inspect.Parameter) -> str:
    annotation = parameter.annotation
    if annotation in (parameter.empty, Any):
        return "section"
    text = title(annotation).replace("typing.", "").replace("collections.abc.", "")
    text = text.replace("Sequence[", "list[")  # as YAML has it
    text = re.sub(r"Literal\[([^\]]*)\]", lambda match: match[1].replace(", ", " or "), text)
    return text.replace("'", "").replace(" | ", " or ").replace("None", "null")


def ranges(kind: Any) -> list[Range]:
    """Those of the numbers in an annotation, each once, in order."""
    if get_origin(kind) is Annotated:
        return [note for note in get_args(kind) if isinstance(note, Range)]
    found = [within for part in get_args(kind) for within in ranges(part)]
    return list(dict.fromkeys(found))


def default_of(parameter: inspect.Parameter) -> str:
    default = parameter.default
    if default is parameter.empty:
        return "-"
    if default is None:
        return "`null`"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, tuple):
        return (
            "`"
            + str([list(item) if isinstance(item, tuple) else item for item in default]).replace(
                "inf", ".inf"
            )
            + "`"
        )
    return f"`{default}`"


def main() -> None:
    output.guard(needed=True)
    print(page(), end="")


if __name__ == "__main__":
    main()
