"""Detect objects in pictures of any kind and size.

python -m kdmini.tools.predict WEIGHTS IMAGES|FOLDER... [--out FOLDER]
python -m kdmini.tools.predict runs/voc/best.pt photographs/ --out found

FOLDER then holds each picture with its boxes, and predictions.json: for every image its file,
width, height, the picture drawn, and the detections as box_xyxy (pixels of the file), label and
score, best first.
Pixels are taken as stored: EXIF turns nothing, as in training.
"""

import argparse
import io
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from kdmini import signals
from kdmini.contracts import Detections, Target, UserError
from kdmini.data.loader import ValLoader, check_size
from kdmini.data.pictures import decode
from kdmini.data.store import Store
from kdmini.detection.boxes import select
from kdmini.detection.yolo11.model import decode_maps
from kdmini.device import pick_device
from kdmini.runlog import write_whole
from kdmini.tools.load import load_detector, without_objects

Image.init()
FORMATS = tuple(
    name for name in Image.OPEN if name != "EPS"
)  # which Pillow would hand to an outside program
ENDINGS = {ending for ending, name in Image.registered_extensions().items() if name in FORMATS}
BATCH, MAX_DET = 8, 300
# Okabe and Ito's colours, which the colour-blind tell apart; black is left out
BLUE = "#0072B2"  # the one dark enough for white text
COLOURS = ["#E69F00", "#56B4E9", "#009E73", "#F0E442", BLUE, "#D55E00", "#CC79A7"]
SHOWN = 640, 8192  # pixels of a drawn picture's long side, at least and at most


class Photographs:
    """Image files without annotations, as a `kdmini.contracts.Dataset`; a target's id is the path."""

    def __init__(self, paths: list[Path]):
        self.names: list[str] = []
        self.paths = paths
        self.refused: list[Path] = []

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, Target]:
        path = self.paths[index]
        try:
            return pixels(path), without_objects(str(path))
        except UserError:
            self.refused.append(path)
            raise


def pixels(path: Path) -> np.ndarray:
    """An image file as (H, W, 3) uint8 RGB. Raises UserError."""
    if not path.is_file():  # a pipe would be waited for
        raise UserError(f"{path}: no such file")
    return decode(path, FORMATS)


def predict(
    weights: str,
    inputs: Sequence[str],
    out: Path,
    imgsz: int | None = None,
    score: float = 0.25,
    iou: float = 0.7,
    device: str = "auto",
) -> list[Path]:
    """Writes pictures and predictions.json to `out`; -> the images that could not be read, which
    were told of.

    imgsz: that of the training where it is None. Raises UserError.
    """
    for name, value in {"--score": score, "--iou": iou}.items():
        if not 0 <= value <= 1:
            raise UserError(f"{name}: {value} is not a number from 0 to 1")
    check_size(imgsz or 640, "--imgsz")
    photographs = Photographs(find_images(inputs))
    names = picture_names(photographs.paths)
    detector, trained = load_detector(weights, pick_device(device))
    detector.fold()
    prepare(out, photographs.paths)
    try:
        store = Store(
            photographs, imgsz or trained, next(detector.parameters()).device, on_bad="skip"
        )
    except UserError:
        if len(photographs.refused) < len(photographs):
            raise
        raise UserError("no image could be read; each is named above") from None

    found = []
    with tqdm(total=len(store), desc="detect", unit="img") as bar:
        for images, targets, inverse in ValLoader(store, BATCH):
            with torch.no_grad():
                detections = inverse(best_classes(detector(images), score, iou))
            for target, (width, height), seen in zip(
                targets, inverse.native.tolist(), detections, strict=True
            ):
                path = Path(target["id"])
                # decoded once more: the store has it no larger than the detector sees it
                picture = draw(Image.fromarray(pixels(path)), seen, detector.names)
                save_jpeg(picture, out / names[path])
                about = {
                    "file": str(path),
                    "width": width,
                    "height": height,
                    "picture": names[path],
                }
                found.append(about | {"detections": as_json(seen, detector.names)})
                bar.update()
    write_whole(out / "predictions.json", json.dumps(found, indent=1, ensure_ascii=False))
    objects = sum(len(entry["detections"]) for entry in found)
    print(
        f"{len(found):,} images, {objects:,} objects of score over {score}; pictures and predictions.json in {out}"
    )
    return photographs.refused


def find_images(inputs: Sequence[str]) -> list[Path]:
    """Files as named, and of a folder those whose ending is that of a picture; each once."""
    found: list[Path] = []
    for path in map(Path, inputs):
        inside = (
            sorted(p for p in path.iterdir() if p.suffix.lower() in ENDINGS)
            if path.is_dir()
            else [path]
        )
        if not inside:
            raise UserError(
                f"{path}: no pictures in this folder; name one that holds them, or files"
            )
        found += inside
    return list({path.resolve(): path for path in found}.values())


def picture_names(paths: Sequence[Path]) -> dict[Path, str]:
    """A name for the drawing of each, all different, though the images' own may not be."""
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for path in paths:
        name, number = path.stem, 1
        while name.lower() in taken:  # for file systems that do not tell A from a
            number += 1
            name = f"{path.stem}-{number}"
        taken.add(name.lower())
        names[path] = f"{name}.jpg"
    return names


def prepare(out: Path, paths: Sequence[Path]) -> None:
    """Makes the folder. Raises UserError where an image lies in it, or would be overwritten through
    a link.
    """
    if out.resolve() in {
        folder for path in paths for folder in (path.parent.resolve(), path.resolve().parent)
    }:
        raise UserError(
            f"--out {out}: the images lie there, and are never overwritten; name another folder"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--out {out}: cannot be made ({error.strerror}); name another folder"
        ) from error


def best_classes(preds: list[Tensor], score: float, iou: float) -> list[Detections]:
    """As YOLO11.decode, but of each box the best class alone: evaluation counts several, a picture
    shows one.
    """
    boxes_xyxy, scores = decode_maps(preds)  # (N, A, 4), (N, A, K)
    best, label = scores.max(2, keepdim=True)
    only = torch.zeros_like(scores).scatter_(2, label, best)
    return [select(b, s, score, iou, MAX_DET) for b, s in zip(boxes_xyxy, only, strict=True)]


def as_json(seen: Detections, names: list[str]) -> list[dict[str, object]]:
    columns = (seen[key].tolist() for key in ("boxes_xyxy", "scores", "labels"))
    return [
        {
            "box_xyxy": [round(side, 2) for side in box],
            "label": names[label],
            "score": round(score, 4),
        }
        for box, score, label in zip(*columns, strict=True)
    ]


def draw(image: Image.Image, seen: Detections, names: list[str]) -> Image.Image:
    """A copy with boxes, class names and scores; a small image is enlarged, that they can be read."""
    long = max(image.size)
    factor = min(max(long, SHOWN[0]), SHOWN[1]) / long
    picture = image.resize(
        [max(round(side * factor), 1) for side in image.size], Image.Resampling.BICUBIC
    )
    size = max(round(math.sqrt(picture.width * picture.height) / 36), 14)
    line = max(size // 5, 3)
    font = ImageFont.load_default(size)
    pen = ImageDraw.Draw(picture)
    shown = list(
        zip((seen["boxes_xyxy"] * factor).tolist(), seen["scores"], seen["labels"], strict=True)
    )[::-1]
    for box, _, label in shown:  # the best come last, on top
        pen.rectangle(box, outline="black", width=line + 1)  # a dark rim shows on any ground
        pen.rectangle(box, outline=COLOURS[label % len(COLOURS)], width=line)
    for (x, y, _, _), score, label in shown:
        text, colour = f"{names[label]} {score:.2f}", COLOURS[label % len(COLOURS)]
        right, below = pen.textbbox((0, 0), text, font)[2:]
        width, height = right + 2 * line, below + line
        x = max(min(x, picture.width - width), 0)
        y = y - height if y >= height else y  # above the box, or inside it at the upper edge
        pen.rectangle((x, y, x + width, y + height), colour)
        pen.text((x + line, y), text, "white" if colour == BLUE else "black", font)
    return picture


def save_jpeg(picture: Image.Image, path: Path) -> None:
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=92)
    write_whole(path, content.getvalue())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m kdmini.tools.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("weights", help="best.pt of a run, or a public file such as yolo11s.pt")
    parser.add_argument("inputs", nargs="+", metavar="image|folder")
    parser.add_argument(
        "--out", type=Path, default=Path("predictions"), help="default: predictions"
    )
    parser.add_argument("--imgsz", type=int, help="default: that of the training")
    parser.add_argument(
        "--score", type=float, default=0.25, help="objects under it are not shown; default: 0.25"
    )
    parser.add_argument(
        "--iou", type=float, default=0.7, help="boxes that overlap more are one; default: 0.7"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    args = parser.parse_args(argv)
    signals.exit_on_signals()
    try:
        refused = predict(
            args.weights, args.inputs, args.out, args.imgsz, args.score, args.iou, args.device
        )
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    if refused:
        sys.exit(
            f"error: images that could not be read, and are named above: {len(refused):,}; the others are done"
        )


if __name__ == "__main__":
    main()
