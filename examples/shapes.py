"""A VOC-layout set of generated scenes: `python -m examples.shapes --root data/shapes`.

One to four filled shapes lie on a textured ground, the later ones over the earlier. As in VOC, a
box is tight around what can be seen, and an object of which little can be seen is `difficult`.
Legend: H, W image size; h, w size of one object's stamp.
"""

import argparse
import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from kdmini.contracts import UserError

SHAPE_NAMES = ["circle", "square", "triangle", "star", "ring", "cross"]
FILLS = ["flat", "stripes", "dots", "checks"]
SIDE = 0.15, 0.45  # of an object, in long sides of the image
HIDDEN = 0.6  # more of an object under others makes it difficult
FINE = 4  # subpixels along a side, averaged away


class Thing(NamedTuple):
    """One object of a scene."""

    name: str
    box_xyxy: tuple[int, int, int, int]  # pixels, corners from 0 to width or height
    difficult: bool


def outline(name: str) -> np.ndarray:
    """Corners of a shape, (P, 2) x y, in the unit circle."""
    corners, inner = {
        "circle": (64, 1.0),
        "ring": (64, 1.0),
        "square": (4, 1.0),
        "triangle": (3, 1.0),
        "star": (10, 0.45),
        "cross": (12, 0.0),
    }[name]
    if name == "cross":
        arm = np.array([[1, 3], [-1, 3], [-1, 1]]) / math.sqrt(10)
        quarter = np.array([[0, -1], [1, 0]])
        return np.concatenate([arm @ np.linalg.matrix_power(quarter, turn).T for turn in range(4)])
    angles = np.arange(corners) * 2 * math.pi / corners
    radii = np.where(np.arange(corners) % 2, inner, 1.0) if name == "star" else np.ones(corners)
    return np.stack([np.sin(angles), -np.cos(angles)], 1) * radii[:, None]


def stamp(rng: np.random.Generator, name: str, side: float) -> tuple[np.ndarray, np.ndarray]:
    """One object whose longer side is `side` pixels -> colour (h, w, 3) float 0..255, cover (h, w)
    float 0..1.
    """
    angle = rng.uniform(-math.pi / 6, math.pi / 6) + (math.pi / 4 if name == "square" else 0)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    points = outline(name) @ turn.T * [1, rng.uniform(0.8, 1.25)]
    scale = side / np.ptp(points, axis=0).max()
    low = points.min(0)
    width, height = np.ceil(np.ptp(points, axis=0) * scale - 1e-6).astype(int)

    cover = Image.new("L", (width * FINE, height * FINE))
    draw = ImageDraw.Draw(cover)
    draw.polygon([tuple(point) for point in (points - low) * scale * FINE], fill=255)
    if name == "ring":
        draw.polygon([tuple(point) for point in (points * 0.55 - low) * scale * FINE], fill=0)

    y, x = (
        np.mgrid[: height * FINE, : width * FINE]
        / (side * FINE)
        * 2
        * math.pi
        * rng.uniform(2.5, 4)
    )
    tilt = rng.uniform(0, math.pi)
    u, v = x * math.cos(tilt) + y * math.sin(tilt), y * math.cos(tilt) - x * math.sin(tilt)
    pattern = {
        "flat": np.zeros_like(u, bool),
        "stripes": np.sin(u) > 0,
        "dots": np.cos(u) + np.cos(v) > 0.7,
        "checks": np.sin(u) * np.sin(v) > 0,
    }[FILLS[rng.integers(len(FILLS))]]
    hue = rng.uniform()
    first, second = (
        colour(hue, rng.uniform(0.7, 1), 0.9),
        colour(hue + rng.uniform(0.1, 0.9), 0.5, rng.uniform(0.3, 1)),
    )
    fine = np.where(pattern[:, :, None], second, first)  # (h * FINE, w * FINE, 3)
    return fine.reshape(height, FINE, width, FINE, 3).mean((1, 3)), np.asarray(
        cover.reduce(FINE)
    ) / 255


def colour(hue: float, saturation: float, value: float) -> np.ndarray:
    """Hue, saturation, value in 0..1 (hue wraps) -> (3,) RGB 0..255."""
    ramp = np.clip(np.abs((hue * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    return 255 * value * (1 - saturation + saturation * ramp)


def ground(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """-> (H, W, 3) float 0..255: two muted colours run into each other, under clouds and grain."""
    one, other = (
        colour(rng.uniform(), rng.uniform(0, 0.4), rng.uniform(0.25, 0.85)) for _ in range(2)
    )
    y, x = np.mgrid[:height, :width] / max(height, width)
    tilt = rng.uniform(0, 2 * math.pi)
    mix = np.clip(0.5 + (x - 0.5) * math.cos(tilt) + (y - 0.5) * math.sin(tilt), 0, 1)[:, :, None]
    cells = rng.integers(4, 12, 2)
    coarse = Image.fromarray(rng.normal(0, rng.uniform(8, 22), cells).astype(np.float32))
    clouds = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))[:, :, None]
    return (
        one * (1 - mix)
        + other * mix
        + clouds
        + rng.normal(0, rng.uniform(2, 9), (height, width, 3))
    )


def draw_scene(seed: int, index: int, size: int) -> tuple[Image.Image, list[Thing], np.ndarray]:
    """The scene of that number -> image, its objects, owner (H, W): number of the object seen
    there, -1 the ground.
    """
    rng = np.random.default_rng([seed, index])
    long = round(size * rng.uniform(0.8, 1.25))
    short = round(long * rng.uniform(0.7, 1))
    height, width = (long, short) if rng.uniform() < 0.5 else (short, long)
    pixels, owner = ground(rng, height, width), np.full((height, width), -1)
    names, areas = [], []
    for number in range(rng.integers(1, 5)):
        names.append(SHAPE_NAMES[rng.integers(len(SHAPE_NAMES))])
        stamped, cover = stamp(rng, names[-1], long * rng.uniform(*SIDE))
        top, left = (
            int(rng.integers(room - used + 1))
            for room, used in zip((height, width), cover.shape, strict=True)
        )
        place = slice(top, top + cover.shape[0]), slice(left, left + cover.shape[1])
        pixels[place] += (stamped - pixels[place]) * cover[:, :, None]
        owner[place][cover >= 0.5] = number
        areas.append((cover >= 0.5).sum())

    things = []
    for number, (name, area) in enumerate(zip(names, areas, strict=True)):
        rows, columns = np.nonzero(owner == number)
        if len(rows):
            box_xyxy = (
                int(columns.min()),
                int(rows.min()),
                int(columns.max()) + 1,
                int(rows.max()) + 1,
            )
            things.append(Thing(name, box_xyxy, bool(len(rows) < (1 - HIDDEN) * area)))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), things, owner


def to_xml(name: str, image: Image.Image, things: list[Thing]) -> str:
    """The annotation as VOC writes it: corners counted from 1, the last pixel included."""
    objects = "".join(
        f"  <object>\n    <name>{thing.name}</name>\n    <difficult>{int(thing.difficult)}</difficult>\n    <bndbox>"
        f"<xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox>\n  </object>\n"
        for thing in things
        for x0, y0, x1, y1 in [thing.box_xyxy]
    )
    size = f"<width>{image.width}</width><height>{image.height}</height><depth>3</depth>"
    return f"<annotation>\n  <filename>{name}.jpg</filename>\n  <size>{size}</size>\n{objects}</annotation>\n"


def write_set(root: Path, train: int = 320, val: int = 80, size: int = 128, seed: int = 0) -> None:
    """Write the whole set, or keep the one that is there. Raises UserError if that was made
    otherwise.
    """
    settings = json.dumps(
        {"train": train, "val": val, "size": size, "seed": seed, "names": SHAPE_NAMES}
    )
    if min(train, val) < 1 or size < 32 or seed < 0:
        raise UserError(
            f"shapes: train and val are at least 1, size 32, seed 0; got {train}, {val}, {size}, {seed}"
        )
    root = root.expanduser().absolute()
    note = root / "settings.json"
    if note.is_file() and note.read_text() == settings:
        print(f"{root}: {train} + {val} scenes are there already")
        return
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        what = f"was made with {note.read_text()}" if note.is_file() else "holds something else"
        raise UserError(f"{root}: {what}; name another --root or delete it")

    temporary = root.with_name(f".{root.name}.part")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # an earlier run was killed
        for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (temporary / folder).mkdir(parents=True)
        for index in tqdm(range(train + val), "shapes", unit="img"):
            image, things, _ = draw_scene(seed, index, size)
            image.save(temporary / "JPEGImages" / f"{index:06}.jpg", quality=92)
            (temporary / "Annotations" / f"{index:06}.xml").write_text(
                to_xml(f"{index:06}", image, things)
            )
        for split, indices in {"train": range(train), "val": range(train, train + val)}.items():
            (temporary / "ImageSets" / "Main" / f"{split}.txt").write_text(
                "".join(f"{i:06}\n" for i in indices)
            )
        (temporary / note.name).write_text(settings)
        os.replace(temporary, root)
    except OSError as error:
        raise UserError(
            f"{root}: cannot be written ({error}); make room or name another --root"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.shapes", description="Write a set of drawn shapes."
    )
    parser.add_argument("--root", type=Path, required=True, help="folder to write")
    for name, default, what in [
        ("train", 320, "scenes to train on"),
        ("val", 80, "scenes to evaluate on"),
        ("size", 128, "about the long side, in pixels"),
        ("seed", 0, "another seed, another set"),
    ]:
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"{what} (default: {default})"
        )
    try:
        write_set(**vars(parser.parse_args(argv)))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
