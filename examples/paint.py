"""What the scenes of examples/shapes.py are made of: outlines, fills, grounds.

Legend: H, W image size; h, w size of one object's stamp; P corners of an outline.
"""

import math

import numpy as np
from PIL import Image, ImageDraw

FILLS = ["flat", "stripes", "dots", "checks"]
CORNERS = {"circle": 64, "ring": 64, "square": 4, "triangle": 3, "star": 10}
STAR_INNER = 0.45  # radius of every second corner of a star, whose others are at 1
RING_HOLE = 0.55  # radius of the hole of a ring, whose outside is at 1
FINE = 4  # subpixels along a side, averaged away


def outline(name: str) -> np.ndarray:
    """Corners of a shape, (P, 2) x y, in the unit circle."""
    if name == "cross":
        arm = np.array([[1, 3], [-1, 3], [-1, 1]]) / math.sqrt(10)
        quarter = np.array([[0, -1], [1, 0]])
        turns = [np.linalg.matrix_power(quarter, turn) for turn in range(4)]
        return np.concatenate([arm @ turn.T for turn in turns])
    numbers = np.arange(CORNERS[name])
    angles = numbers * 2 * math.pi / CORNERS[name]
    radii = np.ones(len(numbers))
    if name == "star":
        radii[1::2] = STAR_INNER
    return np.stack([np.sin(angles), -np.cos(angles)], 1) * radii[:, None]


def stamp(rng: np.random.Generator, name: str, side: float) -> tuple[np.ndarray, np.ndarray]:
    """An object `side` pixels long -> colours (h, w, 3) 0..255, cover (h, w) 0..1."""
    points = turned_outline(rng, name)
    extent = np.ptp(points, axis=0)  # x, y
    scale = side / extent.max()
    width, height = np.ceil(extent * scale - 1e-6).astype(int)

    low = points.min(0)
    cover = Image.new("L", (width * FINE, height * FINE))
    draw = ImageDraw.Draw(cover)
    draw.polygon(list(map(tuple, (points - low) * scale * FINE)), fill=255)
    if name == "ring":
        hole = (points * RING_HOLE - low) * scale * FINE
        draw.polygon(list(map(tuple, hole)), fill=0)

    lit = pattern(rng, width * FINE, height * FINE, side * FINE)
    hue = rng.uniform()
    first = colour(hue, rng.uniform(0.7, 1), 0.9)
    second = colour(hue + rng.uniform(0.1, 0.9), 0.5, rng.uniform(0.3, 1))
    fine = np.where(lit[:, :, None], second, first)  # (h * FINE, w * FINE, 3)
    colours = fine.reshape(height, FINE, width, FINE, 3).mean((1, 3))
    return colours, np.asarray(cover.reduce(FINE)) / 255


def turned_outline(rng: np.random.Generator, name: str) -> np.ndarray:
    """Corners (P, 2) x y of a shape that is turned a little, then stretched along y."""
    angle = rng.uniform(-math.pi / 6, math.pi / 6)
    if name == "square":  # whose outline stands on a corner
        angle += math.pi / 4
    cos = math.cos(angle)
    sin = math.sin(angle)
    turn = np.array([[cos, -sin], [sin, cos]])
    return outline(name) @ turn.T * [1, rng.uniform(0.8, 1.25)]


def pattern(rng: np.random.Generator, width: int, height: int, side: float) -> np.ndarray:
    """Where a random fill has its second colour, (height, width) bool.

    side: of the object, in the same pixels.
    """
    grid = np.mgrid[:height, :width] / side
    y, x = grid * 2 * math.pi * rng.uniform(2.5, 4)  # waves along a side
    tilt = rng.uniform(0, math.pi)
    cos = math.cos(tilt)
    sin = math.sin(tilt)
    u = x * cos + y * sin
    v = y * cos - x * sin
    fill = FILLS[rng.integers(len(FILLS))]
    if fill == "stripes":
        return np.sin(u) > 0
    if fill == "dots":
        return np.cos(u) + np.cos(v) > 0.7
    if fill == "checks":
        return np.sin(u) * np.sin(v) > 0
    return np.zeros_like(u, bool)


def colour(hue: float, saturation: float, value: float) -> np.ndarray:
    """Hue, saturation, value in 0..1 (hue wraps) -> (3,) RGB 0..255."""
    ramp = np.clip(np.abs((hue * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    return 255 * value * (1 - saturation + saturation * ramp)


def muted(rng: np.random.Generator) -> np.ndarray:
    """A random colour of little saturation, (3,) RGB 0..255."""
    return colour(rng.uniform(), rng.uniform(0, 0.4), rng.uniform(0.25, 0.85))


def ground(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """-> (H, W, 3) float 0..255: two muted colours, blended, under clouds and grain."""
    one = muted(rng)
    other = muted(rng)
    y, x = np.mgrid[:height, :width] / max(height, width)
    tilt = rng.uniform(0, 2 * math.pi)
    slope = 0.5 + (x - 0.5) * math.cos(tilt) + (y - 0.5) * math.sin(tilt)
    mix = np.clip(slope, 0, 1)[:, :, None]

    cells = rng.integers(4, 12, 2)
    coarse = rng.normal(0, rng.uniform(8, 22), cells).astype(np.float32)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    clouds = np.asarray(smooth)[:, :, None]
    grain = rng.normal(0, rng.uniform(2, 9), (height, width, 3))
    return one * (1 - mix) + other * mix + clouds + grain
