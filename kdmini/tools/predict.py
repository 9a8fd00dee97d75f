"""Detect objects in pictures of any kind and size.

python -m kdmini.tools.predict WEIGHTS IMAGES|FOLDER... [--out FOLDER]
python -m kdmini.tools.predict runs/voc/best.pt photographs/ --out found

FOLDER then holds each picture with its boxes, and predictions.json: for every image its
file, width, height, the picture drawn, and the detections as box_xyxy (pixels of the file),
label and score, best first. Pixels are taken as stored: EXIF turns nothing, as in training.
In a name of a file that is not UTF-8 the other bytes stand as JSON's \\udc80 to \\udcff, which
Python turns back into that very name.

Legend: N images, A anchor points, K classes.
"""

import argparse
import io
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from kdmini import memory, output, signals
from kdmini.bounds import ImageSize, Share
from kdmini.contracts import Prediction, UserError
from kdmini.data.loader import ValLoader
from kdmini.data.store import Store
from kdmini.detection.boxes import select
from kdmini.detection.yolo11.model import YOLO11, decode_maps
from kdmini.device import pick_device
from kdmini.engine import on_cpu
from kdmini.files import write_whole
from kdmini.tools.load import Photographs, load_detector
from kdmini.typed import argument, printable, short

Image.init()
OUTSIDE = "EPS"  # Pillow would hand such a file to another program
FORMATS = tuple(name for name in Image.OPEN if name != OUTSIDE)
ENDINGS = {ending for ending, name in Image.registered_extensions().items() if name in FORMATS}

BATCH = 8  # images
MAX_DET = 300  # detections of an image
LONGEST_STEM = 200  # bytes; a name of a file has 255 at most

# Okabe and Ito's colours, which the colour-blind tell apart; black is left out
BLUE = "#0072B2"  # the one dark enough for white text
COLOURS = ["#E69F00", "#56B4E9", "#009E73", "#F0E442", BLUE, "#D55E00", "#CC79A7"]

# pixels of a drawn picture's long side
LEAST_SIDE = 640
MOST_SIDE = 8192

JPEG_QUALITY = 92


def predict(
    weights: str,
    inputs: Sequence[str],
    out: Path,
    imgsz: int | None = None,
    score: float = 0.25,
    iou: float = 0.7,
    device: str = "auto",
) -> int:
    """Writes pictures and predictions.json to `out` -> how many inputs could not be used.

    Each of these was named. imgsz: that of the training where it is None. Raises UserError
    where none is left.
    """
    paths, refused = find_images(inputs)
    names = picture_names(paths)
    detector, trained_imgsz = load_detector(weights, pick_device(device))
    detector.fold()
    prepare(out, paths)
    photographs = Photographs(paths, ids=[str(path) for path in paths], formats=FORMATS)
    store = readable(photographs, imgsz or trained_imgsz, next(detector.parameters()).device)

    entries: list[dict[str, Any]] = []
    with tqdm(total=len(store), desc="detect", unit="img") as bar:
        for path, prediction in detect(detector, store, score, iou):
            bar.update()
            try:
                # decoded once more: the store has it no larger than the detector sees it
                image = Image.fromarray(photographs.read(path))
                save_jpeg(draw(image, prediction, detector.names), out / names[path])
            except UserError as error:
                refused += 1
                print(error, file=sys.stderr)
                continue
            entry = {
                "file": str(path),
                "width": image.width,
                "height": image.height,
                "picture": names[path],
                "detections": as_json(prediction, detector.names),
            }
            entries.append(entry)
    # what UTF-8 cannot say becomes an escape of JSON
    text = json.dumps(entries, indent=1, ensure_ascii=False)
    write_whole(out / "predictions.json", text.encode(errors="backslashreplace"))
    objects = sum(len(entry["detections"]) for entry in entries)
    print(
        f"{len(entries):,} images, {objects:,} objects of score over {score}; "
        f"pictures and predictions.json in {out}"
    )
    return refused + len(photographs.refused)


def find_images(inputs: Sequence[str]) -> tuple[list[Path], int]:
    """Files as named, and of a folder those with the ending of a picture; each once.

    And how many folders have none, or cannot be looked into; each of these is named.
    Raises UserError where no file is left.
    """
    paths: list[Path] = []
    refused = 0
    for path in map(Path, inputs):
        try:
            inside = pictures_in(path) if os.path.isdir(path) else [path]
        except UserError as error:
            refused += 1
            print(error, file=sys.stderr)
            continue
        paths += inside
    if not paths:
        raise UserError("no image to look at; each folder is named above")
    unique = {os.path.realpath(path): path for path in paths}
    return list(unique.values()), refused


def pictures_in(folder: Path) -> list[Path]:
    """Raises UserError where there are none."""
    try:
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in ENDINGS)
    except OSError as error:
        raise UserError(
            f"{printable(folder)}: cannot be looked into ({error.strerror}); name another"
        ) from error
    if not files:
        raise UserError(
            f"{printable(folder)}: no pictures in this folder; name one that holds them, or files"
        )
    return files


def picture_names(paths: Sequence[Path]) -> dict[Path, str]:
    """A name for the drawing of each; all differ, though the images' own may not."""
    names: dict[Path, str] = {}
    taken: set[str] = set()  # in small letters, for file systems that do not tell A from a
    for path in paths:
        # so many bytes that an ending and a number still fit the file system
        stem = path.stem
        while len(os.fsencode(stem)) > LONGEST_STEM:
            stem = stem[:-1]
        name = stem
        number = 1
        while name.lower() in taken:
            number += 1
            name = f"{stem}-{number}"
        taken.add(name.lower())
        names[path] = f"{name}.jpg"
    return names


def prepare(out: Path, paths: Sequence[Path]) -> None:
    """Makes the folder.

    Raises UserError where an image lies in it, or would be overwritten through a link.
    """
    of_links = {os.path.realpath(path.parent) for path in paths}
    of_files = {os.path.dirname(os.path.realpath(path)) for path in paths}
    if os.path.realpath(out) in of_links | of_files:
        raise UserError(
            f"--out {out}: the images lie there, and are never overwritten; name another folder"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--out {out}: cannot be made ({error.strerror}); name another folder"
        ) from error


def readable(photographs: Photographs, imgsz: int, device: torch.device) -> Store:
    """Those that can be read; the others are named. Raises UserError where none can."""
    try:
        return Store(photographs, imgsz, device, on_bad="skip")
    except UserError:
        if len(photographs.refused) < len(photographs):
            raise
        raise UserError("no image could be read; each is named above") from None


def detect(
    detector: YOLO11, store: Store, score: float, iou: float
) -> Iterator[tuple[Path, Prediction]]:
    """-> each image and what is detected in it, in pixels of the file."""
    for images, targets, to_file in ValLoader(store, BATCH):
        with torch.no_grad():
            predictions = to_file(on_cpu(best_classes(detector(images), score, iou)))
        for target, prediction in zip(targets, predictions, strict=True):
            yield Path(target["id"]), prediction


def best_classes(preds: list[Tensor], score: float, iou: float) -> list[Prediction]:
    """As YOLO11.decode, but of each box the best class alone.

    Evaluation counts several; a picture shows one.
    """
    boxes_xyxy, scores = decode_maps(preds)  # (N, A, 4), (N, A, K)
    best, label = scores.max(2, keepdim=True)
    only_best = torch.zeros_like(scores).scatter_(2, label, best)
    return [
        select(boxes, scores_of_boxes, score, iou, MAX_DET)
        for boxes, scores_of_boxes in zip(boxes_xyxy, only_best, strict=True)
    ]


def as_json(prediction: Prediction, names: list[str]) -> list[dict[str, Any]]:
    rows = zip(
        prediction["boxes_xyxy"].tolist(),
        prediction["scores"].tolist(),
        prediction["labels"].tolist(),
        strict=True,
    )
    return [
        {
            "box_xyxy": [round(side, 2) for side in box],
            "label": names[label],
            "score": round(score, 4),
        }
        for box, score, label in rows
    ]


# --- drawing


def draw(image: Image.Image, prediction: Prediction, names: list[str]) -> Image.Image:
    """A copy with boxes, class names and scores; small images are enlarged for these."""
    long_side = max(image.size)
    factor = min(max(long_side, LEAST_SIDE), MOST_SIDE) / long_side
    width, height = (max(round(side * factor), 1) for side in image.size)
    picture = image.resize((width, height), Image.Resampling.BICUBIC)
    text_size = max(round(math.sqrt(width * height) / 36), 14)
    line = max(text_size // 5, 3)
    font = ImageFont.load_default(text_size)
    pen = ImageDraw.Draw(picture)

    # reversed: the best are drawn last, on top
    boxes = (prediction["boxes_xyxy"] * factor).tolist()[::-1]
    labels = prediction["labels"].tolist()[::-1]
    scores = prediction["scores"].tolist()[::-1]
    colours = [COLOURS[label % len(COLOURS)] for label in labels]
    for box, colour in zip(boxes, colours, strict=True):
        pen.rectangle(box, outline="black", width=line + 1)  # a dark rim shows on any ground
        pen.rectangle(box, outline=colour, width=line)
    for box, label, score, colour in zip(boxes, labels, scores, colours, strict=True):
        name = short(names[label])[1:-1]  # it is out of a file
        write(pen, font, f"{name} {score:.2f}", box, colour, line, width)
    return picture


def write(
    pen: ImageDraw.ImageDraw,
    font: Any,
    text: str,
    box: Sequence[float],
    colour: str,
    margin: int,
    picture_width: int,
) -> None:
    """On a coloured plate above the box, or inside it at the picture's upper edge."""
    left, top = box[:2]
    text_width, text_height = pen.textbbox((0, 0), text, font)[2:]
    width = text_width + 2 * margin
    height = text_height + margin
    x = max(min(left, picture_width - width), 0)
    y = top - height if top >= height else top
    pen.rectangle((x, y, x + width, y + height), colour)
    pen.text((x + margin, y), text, "white" if colour == BLUE else "black", font)


def save_jpeg(picture: Image.Image, path: Path) -> None:
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=JPEG_QUALITY)
    write_whole(path, content.getvalue())


def main(argv: list[str] | None = None) -> None:
    output.guard(needed=True)
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
    parser.add_argument("--imgsz", type=argument(ImageSize), help="default: that of the training")
    parser.add_argument(
        "--score",
        type=argument(Share),
        default=0.25,
        help="objects under it are not shown; default: 0.25",
    )
    parser.add_argument(
        "--iou",
        type=argument(Share),
        default=0.7,
        help="boxes that overlap more are one; default: 0.7",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    args = parser.parse_args(argv)
    signals.exit_on_signals()
    try:
        with memory.bounded("lower --imgsz, name fewer images, or take --device cpu"):
            refused = predict(
                args.weights, args.inputs, args.out, args.imgsz, args.score, args.iou, args.device
            )
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    if refused:
        sys.exit(
            f"error: images and folders that could not be used, and are named above: {refused:,}; "
            "the others are done"
        )


if __name__ == "__main__":
    main()
