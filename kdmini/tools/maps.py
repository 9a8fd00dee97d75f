"""Where networks look: attention maps of a run's networks, and how far apart they are.

The maps of a student are those of its own features, not aligned to the teacher's: a sum over
channels needs no alignment, and a trained align module could look like the teacher in the
student's place.

Legend: N images, C channels, H W cells of a map.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from kdmini.distill.attention import attention_map, map_distance, to_largest
from kdmini.tools import draw
from kdmini.tools.scenes import Scenes, feats_at

Figures = Iterator[tuple[str, draw.Figure]]  # name of the picture, the picture

# where no distillation names others; the first of which a network has all
TAPS = [f"model.{layer}" for layer in (6, 8, 13, 16, 19, 22)]  # of a YOLO11
STAGES = [*(f"stages.{stage}" for stage in range(4)), "decoder"]  # of SegFormer and VMamba
LAYERS = [f"layer{stage}" for stage in range(1, 5)]  # of a ResNet
GROUPS = [f"group{stage}" for stage in range(1, 4)]  # of a wide one
BRANCHES = ["higher", *(f"stages.{stage}" for stage in range(3)), "pooled", "fusion"]  # Fast-SCNN

# of the blocks of a transformer; its stages end in a LayerNorm, which evens out the sum of
# squares over the channels
ATTENTION = r"stages\.\d+\.blocks\.\d+\.attn\.graph"
GRAPH = ".graph"  # how a tap ends whose output is no map but (N, heads, positions, positions)


class Networks(NamedTuple):
    """The networks of a run."""

    before: Any  # the student as training began with it
    after: Any  # as it is in best.pt
    teacher: Any  # None where the run has none


def own_taps(network: nn.Module) -> list[str]:
    """The layers that are looked at of a network as such; none where it is not known."""
    modules = dict(network.named_modules())
    graphs = [name for name in modules if re.fullmatch(ATTENTION, name)]
    if graphs:
        last = {name.split(".")[1]: name for name in graphs}  # of each stage
        return [*last.values(), "decoder"]
    for taps in (TAPS, STAGES, BRANCHES, LAYERS, GROUPS):
        if all(tap in modules for tap in taps):
            return taps
    return []


def of_networks(networks: Networks, scenes: Scenes, pairs: Mapping[str, str]) -> Figures:
    """At the taps of the run, and at the stages of each network that are not tapped.

    pairs: {student's tap: teacher's tap}.
    """
    yield from at_taps(networks, scenes, pairs)
    for name, network, tapped in (
        ("teacher", networks.teacher, pairs.values()),
        ("student", networks.after, pairs.keys()),
    ):
        own = [] if network is None else own_taps(network)
        if set(own) - set(tapped):
            sides = {f"the {name}": maps_at(own, network, scenes.images)}
            yield f"stages_{name}", attention(scenes, sides, own)


def at_taps(networks: Networks, scenes: Scenes, pairs: Mapping[str, str]) -> Figures:
    taps = list(pairs)
    if not taps:
        print("left out: the attention maps, as the run has no taps")
        return
    before = maps_at(taps, networks.before, scenes.images)
    after = maps_at(taps, networks.after, scenes.images)
    teacher = None
    if networks.teacher is not None:
        teacher = maps_at(list(pairs.values()), networks.teacher, scenes.images)
        sides = {"teacher": teacher, "student": after}
        both = [ours if ours == theirs else f"{theirs} → {ours}" for ours, theirs in pairs.items()]
        yield "attention", attention(scenes, sides, both)
    else:
        print(
            "left out: attention.png, as the run has no teacher; "
            "before_after.png has the student's maps"
        )
    sides = {"before": before, "after": after}
    yield "before_after", attention(scenes, sides, taps, goal=teacher)


def maps_at(taps: Sequence[str], network: nn.Module, images: Tensor) -> list[Tensor]:
    """-> (N, C, H, W) of each tap; of a graph, what each position gets of all others'
    attention, on average.
    """
    feats = feats_at(taps, network, images)
    return [
        received(feat) if tap.endswith(GRAPH) else feat
        for tap, feat in zip(taps, feats, strict=True)
    ]


def received(graph: Tensor) -> Tensor:
    """(N, heads, L, P), P positions of a square -> (N, heads, H, W)."""
    side = math.isqrt(graph.shape[3])
    return graph.mean(2).unflatten(2, (side, side))


def attention(
    scenes: Scenes,
    sides: Mapping[str, Sequence[Tensor]],
    taps: Sequence[str],
    goal: Sequence[Tensor] | None = None,
) -> draw.Figure:
    """The maps of one network, or of two networks or moments with their distances.

    sides: name -> the features at each tap, (N, C, H, W).
    taps: what each is called.
    goal: those of the teacher, from which the distance of either side is given too.
    """
    columns = {}
    for number, tap in enumerate(taps):
        feats = same_size([of_side[number] for of_side in sides.values()])
        maps = [attention_map(to_largest(feat)).cpu().numpy() for feat in feats]
        captions = [""] * len(scenes.targets)
        if len(feats) == 2:
            one, other = feats
            captions = distances(one, other, goal[number] if goal else None)
        # what a graph is of, and on a line of its own that it is one
        columns[tap.removesuffix(GRAPH).replace(".attn", "\nattn")] = draw.Column(maps, captions)

    names = list(sides)
    title = f"Where {names[0]} looks: sum of squares over the channels or heads"
    if len(names) == 2:
        title = (
            f"Where the network looks, {' and '.join(names)}: "
            "sum of squares over the channels, not aligned"
        )
    return draw.attention(scenes.pictures, scenes.ids, names, columns, title)


def distances(one: Tensor, other: Tensor, goal: Tensor | None) -> list[str]:
    """What stands under the maps of each image: how far apart they are.

    And how far each is from the goal's, if there is one. All features are (N, C, H, W), and
    compared by maps of unit norm, however weak they are.
    """
    captions = [f"distance {apart:.3f}" for apart in apart_by(one, other)]
    if goal is None:
        return captions
    first = apart_by(one, goal)
    last = apart_by(other, goal)
    return [
        f"{caption}\nto teacher {then:.3f} → {now:.3f}"
        for caption, then, now in zip(captions, first, last, strict=True)
    ]


def apart_by(one: Tensor, other: Tensor) -> list[float]:
    """The distance of each image's maps."""
    one, other = (to_largest(feat) for feat in same_size([one, other]))
    return list(map_distance(one, other).tolist())


def same_size(feats: Sequence[Tensor]) -> list[Tensor]:
    """(N, C, H, W) each -> all at the size of the smallest, as in training."""
    height, width = min(feat.shape[2:] for feat in feats)
    return [F.adaptive_avg_pool2d(feat, (height, width)) for feat in feats]
