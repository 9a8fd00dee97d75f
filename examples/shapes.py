"""A VOC-layout set of generated scenes: `python -m examples.shapes --root data/shapes`.

One to four filled shapes lie on a textured ground, the later ones over the earlier. As
in VOC, a box is tight around what can be seen, and an object of which little can be seen
is `difficult`. A mask has the index of the shape in each pixel, 0 of the ground, and 255,
void, along borders: for segmentation, the names are `ground` and the shapes. With
`--folders` there is one shape in an image, which lies in a folder of its name, train/circle or
val/circle, for classification.

Legend: H, W image size.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from examples.paint import ground, stamp
from kdmini import output
from kdmini.bounds import Count, Range, Seed
from kdmini.contracts import UserError
from kdmini.data.palette import with_palette
from kdmini.data.render import NO_LABEL
from kdmini.typed import argument

SHAPE_NAMES = ["circle", "square", "triangle", "star", "ring", "cross"]
SIDE = (0.15, 0.45)  # lowest and highest of an object, in long sides of the image
HIDDEN = 0.6  # share of an object under others, above which it is difficult
QUALITY = 92  # of the JPEGs

Size = Annotated[int, Range(32, 8192)]
Side = Annotated[float, Range(0.05, 0.65)]  # of 0.7 at least is the short side


class Thing(NamedTuple):
    """One object of a scene."""

    name: str
    box_xyxy: tuple[int, int, int, int]  # pixels, corners from 0 to width or height
    difficult: bool


class Scene(NamedTuple):
    """A picture, and what is in it."""

    image: Image.Image
    things: list[Thing]  # without those of which nothing can be seen
    owner: np.ndarray  # (H, W) number of the object seen there, -1 the ground
    mask: np.ndarray  # (H, W) uint8, 1 + the place of its name, 0 the ground, 255 void


def draw_scene(
    seed: int,
    index: int,
    size: int,
    names: Sequence[str] = SHAPE_NAMES,
    side: tuple[float, float] = SIDE,
    most: int = 4,
) -> Scene:
    """Scene `index` of the set of `seed`; size: about the long side, in pixels.

    names: of the shapes. side: lowest and highest of an object, in long sides of the image.
    most: objects.
    """
    rng = np.random.default_rng([seed, index])
    long = round(size * rng.uniform(0.8, 1.25))
    short = round(long * rng.uniform(0.7, 1))
    height, width = (long, short) if rng.uniform() < 0.5 else (short, long)

    pixels = ground(rng, height, width)
    owner = np.full((height, width), -1)
    drawn = []  # names
    areas = []  # pixels, also of what later objects hide
    for number in range(rng.integers(1, most + 1)):
        name = names[int(rng.integers(len(names)))]
        colours, cover = stamp(rng, name, long * rng.uniform(*side))
        top = int(rng.integers(height - cover.shape[0] + 1))
        left = int(rng.integers(width - cover.shape[1] + 1))
        window = (slice(top, top + cover.shape[0]), slice(left, left + cover.shape[1]))
        pixels[window] += (colours - pixels[window]) * cover[:, :, None]
        solid = cover >= 0.5
        owner[window][solid] = number
        drawn.append(name)
        areas.append(int(solid.sum()))

    things = []
    for number, (name, area) in enumerate(zip(drawn, areas, strict=True)):
        seen = owner == number
        if seen.any():
            difficult = bool(seen.sum() < (1 - HIDDEN) * area)
            things.append(Thing(name, box_around(seen), difficult))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    indices = [names.index(name) + 1 for name in drawn]
    return Scene(image, things, owner, mask_of(owner, indices))


def mask_of(owner: np.ndarray, indices: list[int]) -> np.ndarray:
    """Which object is seen where, (H, W) -> the index of its shape, (H, W) uint8.

    Void are pixels that have another object, or the ground, above, below or beside them.
    """
    mask = np.array([*indices, 0], np.uint8)[owner]  # -1, the ground, is the last
    upright = owner[1:] != owner[:-1]
    level = owner[:, 1:] != owner[:, :-1]
    mask[1:][upright] = NO_LABEL
    mask[:-1][upright] = NO_LABEL
    mask[:, 1:][level] = NO_LABEL
    mask[:, :-1][level] = NO_LABEL
    return mask


def box_around(mask: np.ndarray) -> tuple[int, int, int, int]:
    """(H, W) bool, somewhere true -> x0, y0, x1, y1, tight around what is true."""
    rows, columns = np.nonzero(mask)
    x0 = int(columns.min())
    y0 = int(rows.min())
    x1 = int(columns.max()) + 1
    y1 = int(rows.max()) + 1
    return x0, y0, x1, y1


def to_xml(name: str, image: Image.Image, things: list[Thing]) -> str:
    """An annotation as VOC writes it: corners count from 1, the last pixel included."""
    lines = [
        "<annotation>",
        f"  <filename>{name}.jpg</filename>",
        f"  <size><width>{image.width}</width><height>{image.height}</height>"
        "<depth>3</depth></size>",
    ]
    for thing in things:
        x0, y0, x1, y1 = thing.box_xyxy
        lines += [
            "  <object>",
            f"    <name>{thing.name}</name>",
            f"    <difficult>{int(thing.difficult)}</difficult>",
            f"    <bndbox><xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin>"
            f"<xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox>",
            "  </object>",
        ]
    return "\n".join([*lines, "</annotation>", ""])


def write_set(
    root: Path,
    train: int = 320,
    val: int = 80,
    size: int = 128,
    seed: int = 0,
    names: Sequence[str] = SHAPE_NAMES,
    side: tuple[float, float] = SIDE,
    folders: bool = False,
) -> None:
    """Write the whole set, or keep the one that is there.

    folders: of classes, with one shape an image. Raises UserError where another set is there,
    made with other settings or otherwise.
    """
    settings = json.dumps(
        {
            "train": train,
            "val": val,
            "size": size,
            "seed": seed,
            "names": list(names),
            "side": list(side),
            "folders" if folders else "masks": True,
        }
    )
    root = root.expanduser().absolute()
    note = root / "settings.json"
    if side[0] > side[1]:
        raise UserError(f"--side: {side[0]} to {side[1]}; the lowest goes first")
    if note.is_file() and note.read_text() == settings:
        print(f"{root}: {train} + {val} scenes are there already")
        return
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        what = f"was made with {note.read_text()}" if note.is_file() else "holds something else"
        raise UserError(f"{root}: {what}; name another --root or delete it")

    temporary = root.with_name(f".{root.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)  # an earlier run was killed
    try:
        draw = partial(draw_scene, seed, size=size, names=names, side=side)
        if folders:
            write_folders(temporary, {"train": train, "val": val}, names, draw)
        else:
            write_scenes(temporary, train, val, draw)
        (temporary / note.name).write_text(settings)
        os.replace(temporary, root)
    except OSError as error:
        raise UserError(
            f"{root}: cannot be written ({error}); make room or name another --root"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_scenes(root: Path, train: int, val: int, draw: Callable[[int], Scene]) -> None:
    """Images, boxes, masks and split lists; those to validate on come after the others."""
    images = root / "JPEGImages"
    annotations = root / "Annotations"
    masks = root / "SegmentationClass"
    lists = [root / "ImageSets" / task for task in ("Main", "Segmentation")]
    for folder in (images, annotations, masks, *lists):
        folder.mkdir(parents=True)

    ids = [f"{index:06}" for index in range(train + val)]
    for index, id in enumerate(tqdm(ids, "shapes", unit="img")):
        scene = draw(index)
        scene.image.save(images / f"{id}.jpg", quality=QUALITY)
        (annotations / f"{id}.xml").write_text(to_xml(id, scene.image, scene.things))
        with_palette(scene.mask).save(masks / f"{id}.png")
    for split, members in {"train": ids[:train], "val": ids[train:]}.items():
        for folder in lists:
            (folder / f"{split}.txt").write_text("".join(f"{id}\n" for id in members))


def write_folders(
    root: Path, counts: dict[str, int], names: Sequence[str], draw: Callable[..., Scene]
) -> None:
    """ROOT/train/circle/000000.jpg: images of one shape, as many of each."""
    splits = [split for split, count in counts.items() for _ in range(count)]
    for split in counts:
        for name in names:
            (root / split / name).mkdir(parents=True)
    for index, split in enumerate(tqdm(splits, "shapes", unit="img")):
        name = names[index % len(names)]
        scene = draw(index, names=[name], most=1)
        scene.image.save(root / split / name / f"{index:06}.jpg", quality=QUALITY)


def main(argv: list[str] | None = None) -> None:
    output.guard()
    parser = argparse.ArgumentParser(
        prog="python -m examples.shapes", description="Write a set of drawn shapes."
    )
    parser.add_argument("--root", type=Path, required=True, help="folder to write")
    for name, kind, default, what in [
        ("train", Count, 320, "scenes to train on"),
        ("val", Count, 80, "scenes to evaluate on"),
        ("size", Size, 128, "about the long side, in pixels"),
        ("seed", Seed, 0, "another seed, another set"),
    ]:
        parser.add_argument(
            f"--{name}", type=argument(kind), default=default, help=f"{what} (default: {default})"
        )
    parser.add_argument(
        "--names",
        nargs="+",
        choices=SHAPE_NAMES,
        default=SHAPE_NAMES,
        metavar="NAME",
        help=f"the shapes, in the order of their indices (default: {' '.join(SHAPE_NAMES)})",
    )
    parser.add_argument(
        "--side",
        nargs=2,
        type=argument(Side),
        default=SIDE,
        metavar=("LOWEST", "HIGHEST"),
        help=f"of an object, in long sides of the image (default: {SIDE[0]} {SIDE[1]})",
    )
    parser.add_argument(
        "--folders", action="store_true", help="one shape an image, in folders of classes"
    )
    settings = vars(parser.parse_args(argv))
    settings["side"] = tuple(settings["side"])
    try:
        write_set(**settings)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
