"""What the terms of a run have to show of themselves: filters their spectra, a self-teacher
where it looks.

Legend: N images, C channels, H W cells of a map.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kdmini import checkpoint, config
from kdmini.assemble import make_distillation
from kdmini.contracts import UserError
from kdmini.data.store import Store
from kdmini.distill.align import same_size
from kdmini.distill.step import Distillation
from kdmini.terms.self_teacher import SelfTeacher
from kdmini.tools.draw import Figure
from kdmini.tools.maps import GRAPH, Figures, Networks, attention
from kdmini.tools.scenes import Scenes, feats_at, random_scenes
from kdmini.tools.spectra import spectra

SHOWN = 12  # images of which a self-teacher is looked at


def of_terms(
    folder: Path, distill: Mapping[str, Any], networks: Networks, scenes: Scenes, store: Store
) -> Figures:
    """Of a run folder and its section `distill`. It folds the teacher.

    store: the validation set.
    """
    pieces = {"student": networks.after, "teacher": networks.teacher}
    distillation = config.call(
        make_distillation, distill, "distill", imgsz=store.imgsz, **pieces
    ).to(scenes.images.device)
    filters = [name for name, term in distillation.terms.items() if hasattr(term, "bands")]
    if filters and networks.teacher is not None and distillation.taps:
        yield from of_filters(filters, distillation, networks, scenes)

    taught = [name for name, term in distillation.terms.items() if isinstance(term, SelfTeacher)]
    if not taught:
        return
    student = copy.deepcopy(networks.before)
    try:
        restore(folder, student, distillation)
    except UserError as error:
        print(f"left out: {', '.join(taught)}.png, as nothing of it is in best.pt: {error}")
        return
    held_out = random_scenes(store, SHOWN)
    for name in taught:
        term: Any = distillation.terms[name]
        yield name, of_self_teacher(term, student, held_out)


def of_filters(
    filters: list[str], distillation: Distillation, networks: Networks, scenes: Scenes
) -> Figures:
    """The spectra of each term that filters, at the taps that are maps."""
    pairs = distillation.taps
    maps = {ours: theirs for ours, theirs in pairs.items() if not theirs.endswith(GRAPH)}
    ours = feats_at(list(maps), networks.after, scenes.images)
    theirs = feats_at(list(maps.values()), networks.teacher, scenes.images)
    student, teacher = same_size(
        dict(zip(maps, ours, strict=True)), dict(zip(maps, theirs, strict=True))
    )
    for name in filters:
        sides = {"teacher": teacher, "student": student}
        yield f"spectra_{name}", spectra(distillation.terms[name], name, sides)


@torch.no_grad()
def of_self_teacher(term: SelfTeacher, student: Any, scenes: Scenes) -> Figure:
    """The maps of the student beside those that its self-teacher makes of them."""
    taps = list(term.channels)
    feats = feats_at(taps, student, scenes.images)
    refined = [raw.relu() for raw in term.eval().refine(feats)]
    return attention(scenes, {"student": feats, "self-teacher": refined}, taps)


def restore(folder: Path, student: Any, distillation: Distillation) -> None:
    """Both as in the newest checkpoint of a run folder: a self-teacher reads the maps of the
    weights that it was trained with, not of their average. Raises UserError.
    """
    path, content = checkpoint.newest(folder / "ckpt")
    parts = {"student": student, "distillation": distillation}
    fresh = {name: part.state_dict() for name, part in parts.items()}
    saved = {name: content[name] for name in parts if name in content}
    if fault := checkpoint.misfit(fresh, saved):
        raise UserError(f"{path} is not of this run: {fault}")
    for name, part in parts.items():
        part.load_state_dict(saved[name])
