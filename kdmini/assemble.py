"""From the sections of a config to the pieces of a run, for train.py, eval.py, --check, tools
and benchmarks alike. What a section names is imported by kdmini/config.py: nothing here
imports a model, a data set or a term.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from kdmini import config, distributed
from kdmini.bounds import Gain, ImageSize
from kdmini.classes import refuse_other_classes
from kdmini.contracts import UserError
from kdmini.data.loader import TrainLoader, ValLoader, refuse_few
from kdmini.data.storage import choose
from kdmini.data.unlabelled import MixedLoader, others_of
from kdmini.device import Autocast, half_of, is_compiled, precision
from kdmini.distill.step import Distillation, Weighted, freeze, tap_shapes
from kdmini.distill.taps import is_graph
from kdmini.engine import Training
from kdmini.footprint import step_bytes
from kdmini.inputs import Inputs
from kdmini.optim import EMA, Recipe, freeze_parts, grouped, make_optimizer
from kdmini.outset import refuse_lone_values, void_teacher, void_terms
from kdmini.progress import Progress
from kdmini.sections import Sections, Sets
from kdmini.typed import short


def make_model(section: Any, where: str, names: list[str], device: torch.device) -> Any:
    model = config.build(section, where, names=names)
    return model.to(device, memory_format=torch.channels_last)


def with_weights(section: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The section of a model with another weight file, and its other settings of weights."""
    weights = section.get("weights")
    if isinstance(weights, Mapping):
        return {**section, "weights": {**weights, "path": path}}
    return {**section, "weights": path}


def make_distillation(
    student: nn.Module,
    teacher: nn.Module | None,
    imgsz: ImageSize,
    taps: list[str | tuple[str, str]],
    align: Literal["all", "unequal", "none", "frozen"] = "all",
    kd_scale: Gain | Literal["batch"] = 1.0,
    **terms: Any,
) -> Distillation:
    """The `distill` section.

    taps: names of submodules, or pairs [student's name, teacher's name].
    align: which taps of the student get a convolution to the teacher's channels.
    kd_scale: multiplies the terms' mean over an update: a number, or `batch`, its images.

    Every other key is a term, with its `weight` and `schedule`.
    """
    pairs = tap_pairs(taps)
    if teacher is not None:
        freeze(teacher)  # so that its taps are tried as they will run
    all_shapes = tap_shapes(student, teacher or student, pairs, imgsz) if pairs else {}
    graphs = {tap: shape for tap, shape in all_shapes.items() if is_graph(pairs[tap])}
    shapes = {tap: shape for tap, shape in all_shapes.items() if tap not in graphs}
    for tap, (_, _, height, width) in shapes.items():
        if height * width == 1:
            print(
                f"warning: {tap} is one cell at data.imgsz={imgsz}, where a map over cells is "
                "constant; use larger images, or an earlier tap"
            )
    weighted = {}
    for name, entry in terms.items():
        where = f"distill.{name}"
        if not isinstance(entry, dict) or "build" not in entry:
            raise UserError(
                f"{where}: neither taps, align, kd_scale nor a term; a term has a `build:` key"
            )
        position = {key: entry[key] for key in ("weight", "schedule") if key in entry}
        settings = {key: value for key, value in entry.items() if key not in position}
        offered = {"shapes": shapes, "graphs": graphs, "student": student, "teacher": teacher}
        names = {"names": student.names, "teacher_names": getattr(teacher, "names", [])}
        term = config.build(settings, where, **offered, **names)
        refuse_teacher(term, where, student, teacher)
        weighted[name] = config.call(Weighted, position, where, term=term)
    return Distillation(
        student, teacher, weighted, pairs, shapes if teacher else {}, align, kd_scale
    )


def refuse_teacher(term: Any, where: str, student: Any, teacher: Any) -> None:
    """Raises UserError where the term needs another teacher, or one at all."""
    if teacher is None:
        if getattr(term, "needs_teacher", True):
            raise UserError(
                f"{where}: needs a teacher; add the section `teacher`, or set distill=null"
            )
        return

    reads = term.uses & {"preds", "classes"}
    if reads and teacher.names != student.names and not getattr(term, "by_name", False):
        raise UserError(
            f"{where}: needs a teacher with the student's classes, in the same order; name one, "
            "or take terms that read feats alone, such as pearson"
        )


def tap_pairs(taps: list[str | tuple[str, str]]) -> dict[str, str]:
    """-> {student's name: teacher's name}. Raises UserError where one of the student stands
    twice.
    """
    pairs: dict[str, str] = {}
    for tap in taps:
        ours, theirs = (tap, tap) if isinstance(tap, str) else tap
        if ours in pairs:
            raise UserError(
                f"distill.taps: {short(ours)} of the student is named twice, for "
                f"{short(pairs[ours])} and {short(theirs)} of the teacher; name it once"
            )
        pairs[ours] = theirs
    return pairs


class Run(NamedTuple):
    """All pieces of a run."""

    training: Training
    teacher: Any  # frozen, in no optimiser, no average and no checkpoint
    val_loader: ValLoader
    imgsz: int
    inputs: Inputs  # what has been read
    void: dict[str, str]  # teacher, distill -> why nothing can be learned from it; or empty
    drawn: Mapping[str, bytes] = {}  # file of the run folder -> what was drawn; or empty

    @property
    def names(self) -> list[str]:
        """Of the classes, as the data sets have them."""
        return self.val_loader.store.names


class Networks(NamedTuple):
    """What is built before an image is decoded."""

    student: Any
    teacher: Any
    distillation: Distillation
    ema: EMA
    optimizer: torch.optim.Optimizer
    inputs: Inputs  # the teacher's weights and the code, so far


def make_networks(
    sections: Sections,
    recipe: Recipe,
    names: list[str],
    imgsz: int,
    device: torch.device,
    autocast: Autocast,
    compiled: bool,
) -> Networks:
    """The order matters. The copy for the average comes after the weights were loaded, and
    before taps are attached, which it would take along; taps come before compilation, for a
    compiled network ignores hooks that are set later.
    """
    student = make_model(sections.student, "student", names, device)
    refuse_other_classes(student.names, names, "the student")
    freeze_parts(student, recipe.freeze)
    ema = EMA(student, recipe.ema_decay, recipe.ema_tau)
    inputs = Inputs()
    teacher = None
    if sections.teacher is not None and sections.distill is not None:
        teacher = make_model(sections.teacher, "teacher", names, device)
        inputs.add_weights("teacher", teacher)  # as read: they will be folded
        inputs.add_code([teacher])
    distillation = config.call(
        make_distillation,
        {"taps": []} if sections.distill is None else sections.distill,
        "distill",
        student=student,
        teacher=teacher,
        imgsz=imgsz,
    )
    inputs.add_code([student, *distillation.terms.values()])
    distillation.to(device)
    half = half_of(autocast, device)
    if half and teacher is not None and hasattr(teacher, "hold_in"):
        teacher.hold_in(half)
    refuse_lone_values(student, distillation, recipe.batch // distributed.world(), imgsz)
    if compiled:
        student.compile(dynamic=False)
        student.loss = torch.compile(student.loss, dynamic=False)
        distillation.compile(dynamic=False)
    # align modules and terms learn too; the teacher does not
    learners = [student, distillation]
    if isinstance(recipe.optimizer, dict):
        groups = grouped(learners, recipe)
        optimizer = config.build(recipe.optimizer, "train.optimizer", groups=groups, recipe=recipe)
    else:
        optimizer = make_optimizer(learners, recipe)
    return Networks(student, teacher, distillation, ema, optimizer, inputs)


def void_pieces(sections: Sections, recipe: Recipe, networks: Networks) -> dict[str, str]:
    """Teacher, distill -> why nothing can be learned from it; empty where something can."""
    distillation = networks.distillation
    void = {}
    frozen = recipe.freeze or recipe.freeze_statistics
    # or backbone_weights
    has_weights = any(sections.student[key] for key in sections.student if key.endswith("weights"))
    if frozen and not has_weights:
        key = "freeze" if recipe.freeze else "freeze_statistics"
        void["student"] = (
            f"train.{key}: the student has no weights, so what is frozen has learned nothing; "
            "give student.weights"
        )
    if sections.distill is not None:
        void["distill"] = void_terms(distillation, recipe.epochs)
    if networks.teacher is not None:
        void["teacher"] = void_teacher(sections.teacher, networks.teacher, distillation)
    return void


def refuse_few_images(sets: Sets, batch: int) -> None:
    """Raises UserError where a batch takes more images of a kind than there are."""
    if sets.unlabelled:
        batch -= others_of(batch, sets.share, distributed.world())
    if images := sets.images():  # a set without any has a line of its own
        refuse_few(images, batch)


def refuse_readers(distillation: Distillation) -> None:
    """Raises UserError where images without ground truth teach nothing, or a term needs it."""
    if not distillation.terms:
        raise UserError("data.unlabelled: only terms learn from it; add `distill`, or take it out")
    for name, term in distillation.terms.items():
        uses: Any = term.uses
        if "targets" in uses:
            raise UserError(
                f"distill.{name}: it reads the ground truth, and data.unlabelled has none; take "
                "one of the two out"
            )


def storage_settings(
    sets: Sets,
    recipe: Recipe,
    networks: Networks,
    device: torch.device,
    autocast: Autocast,
    limit: int | None,
) -> dict[str, Any]:
    """In place of the config's, the same for both sets, which share what memory there is.

    limit: images of each set, whatever the config says.
    """
    settings: dict[str, Any] = {"limit": limit} if limit else {}
    if distributed.ranks_here() > 1:
        settings["once"] = distributed.once_a_machine
    if sets.storing["storage"] != "auto":
        return settings

    step = None  # of a CPU, half of the memory is left free
    if device.type == "cuda":
        images = recipe.batch // distributed.world()
        step = step_bytes(networks.student, sets.imgsz, autocast, images)
        networks.distillation.student_taps.take()  # what they kept of it
    expected = distributed.once_a_machine(lambda: sets.expected_bytes(limit))
    settings["storage"] = choose(expected, device, step)
    return settings


def make_run(
    sections: Sections,
    recipe: Recipe,
    device: torch.device,
    progress: Progress,
    limit: int | None = None,
) -> Run:
    """limit: for --check; decode only so many images of each set, whatever the config says, and
    leave it to the caller what to do where nothing would be distilled.

    Whatever can be found wrong without the images is found before they are decoded.
    """
    sets = sections.sets()
    names = sets.train.names
    sections.make_metric(names)
    refuse_few_images(sets, recipe.batch)
    autocast, scaler = precision(recipe.amp, device)
    compiled = is_compiled(sections.compile, device)
    networks = make_networks(sections, recipe, names, sets.imgsz, device, autocast, compiled)
    void = void_pieces(sections, recipe, networks)
    if sets.unlabelled:
        refuse_readers(networks.distillation)
    faults = "; ".join(filter(None, void.values()))
    if faults and not limit and not sections.allow_void:
        raise UserError(f"{faults}; or train all the same with allow_void=true")

    settings = storage_settings(sets, recipe, networks, device, autocast, limit)
    settings["compiled"] = compiled
    inputs = networks.inputs
    store = sets.store("train", device, **settings)
    ranks = (distributed.rank(), distributed.world())
    order = (recipe.batch, recipe.epochs, sets.augment, sections.seed, *ranks)
    loader: TrainLoader | MixedLoader
    if sets.unlabelled:
        others = sets.store("unlabelled", device, **settings)
        inputs.add_set("data.unlabelled", others)
        loader = MixedLoader(store, others, sets.share, *order)
    else:
        loader = TrainLoader(store, *order)
    val_store = sets.store("val", device, **settings)
    inputs.add_set("data.train", store)
    inputs.add_set("data.val", val_store)
    distributed.wait_for_all()  # another machine may decode for longer than the timeout
    inputs.check_ranks()
    training = Training(
        loader=loader,
        student=networks.student,
        distillation=networks.distillation,
        optimizer=networks.optimizer,
        scaler=scaler,
        ema=networks.ema,
        recipe=recipe,
        autocast=autocast,
        progress=progress,
    )
    val_loader = ValLoader(val_store, recipe.batch, *ranks)
    return Run(training, networks.teacher, val_loader, sets.imgsz, inputs, void, sets.drawn)
