"""The pictures of a report: curves, where teacher and student look, images before and after.

Legend: N images, S image size, H, W cells of a map.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.ticker import MaxNLocator
from PIL import Image

from kdmini.contracts import UserError
from kdmini.data.store import Store
from kdmini.distill.attention import attention_map, to_largest
from kdmini.tools.compare import draw_curve
from kdmini.tools.draw import DIMMED, LUMA, WHITE, Figure, blank, grid, style
from kdmini.tools.maps import apart_by, maps_at, same_size
from kdmini.tools.report_page import Look, captioned, picture, source_of_figure, source_of_image
from kdmini.tools.scenes import Material, Scenes, scenes_at

SIDE = 160  # pixels of an attention map
IMAGES = 4  # of which maps are shown
FEW = 5  # images that are the worst, and that have changed most


def curve(title: str, of_rows: Mapping[str, dict[int, list[float]]]) -> Figure:
    """of_rows: name -> epoch -> the number of each run; a row without any keeps its colour."""
    figure = blank(6, 4, "")
    (axis,) = grid(figure, 1, 1)
    for number, (name, points) in enumerate(of_rows.items()):
        if points:
            draw_curve(axis, number, name, points)
    style(axis, title, "epoch")
    axis.set_xlim(left=0)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(fontsize="small", frameon=False)
    return figure


def looks(teacher: Any, student: Any, scenes: Scenes, pairs: Mapping[str, str]) -> Iterator[Look]:
    """The maps of both at each tap, image by image, on one scale.

    pairs: {student's tap: teacher's tap}.
    """
    own = maps_at(list(pairs), student, scenes.images)
    theirs = maps_at(list(pairs.values()), teacher, scenes.images)
    greys = scenes.pictures @ LUMA  # (N, S, S)
    for n, name in enumerate(scenes.ids):
        for tap, of_student, of_teacher in zip(pairs, own, theirs, strict=True):
            feats = same_size([of_teacher[n : n + 1], of_student[n : n + 1]])
            maps = [attention_map(to_largest(feat))[0].cpu().numpy() for feat in feats]
            largest = max(float(values.max()) for values in maps)
            one, other = (source_of_image(over(greys[n], values, largest)) for values in maps)
            (distance,) = apart_by(*feats)
            yield Look(name, f"{tap}: distance {distance:.3f}", one, other)


def over(grey: np.ndarray, values: np.ndarray, largest: float) -> Image.Image:
    """A map (H, W) over its image in grey, (S, S) 0..1. largest: value of the last colour."""
    shares = values / (largest or 1)
    colours = Image.fromarray((colormaps["viridis"](shares)[..., :3] * 255).astype(np.uint8))
    beneath = Image.fromarray((grey / WHITE * 255).clip(0, 255).astype(np.uint8)).convert("RGB")
    size = (SIDE, SIDE)
    return Image.blend(
        colours.resize(size, Image.Resampling.BILINEAR),
        beneath.resize(size, Image.Resampling.BILINEAR),
        DIMMED,
    )


def worst(after: Mapping[str, float]) -> list[str]:
    """The ids of the images of the lowest score."""
    return sorted(after, key=lambda id: after[id])[:FEW]


def most_changed(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    """The ids of the images whose score has changed most, if it has."""
    moved = {id: abs(after[id] - before[id]) for id in after if id in before}
    changed = [id for id in moved if moved[id] > 0]
    return sorted(changed, key=lambda id: -moved[id])[:FEW]


def drawn(
    draw: Callable[[Material], Iterator[tuple[str, Any]]],
    networks: Mapping[str, Any],
    store: Store,
    ids: Sequence[str],
    scores: Mapping[str, Mapping[str, float]],
) -> list[str]:
    """-> figures in HTML: each image as each network sees it, with its score.

    networks: by name. scores: of each, by image.
    """
    place = {target["id"]: index for index, target in enumerate(store.targets)}
    missing = [id for id in ids if id not in place]
    if missing:
        raise UserError(f"image {missing[0]} is not in the validation set; name runs of one set")
    parts = []
    for id in ids:
        scenes = scenes_at(store, np.array([place[id]]))
        for name, network in networks.items():
            material = Material(student=network, weights=name, scenes=scenes)
            for _, figure in draw(material):
                figure.suptitle("")  # the caption says it
                caption = f"{id}, {name}: {scores[name].get(id, math.nan):.2f}"
                parts.append(captioned(picture(source_of_figure(figure), caption), caption))
    return parts
