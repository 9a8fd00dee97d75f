"""Detect objects in pictures of any kind and size, label their pixels, or say their class.

python -m kdmini.tools.predict WEIGHTS IMAGES|FOLDER... [--out FOLDER]
python -m kdmini.tools.predict runs/voc/best.pt photographs/ --out found

Of a detector FOLDER then holds each picture with its boxes, NAME.jpg; of a network for
segmentation the index of a class for each pixel of the file, NAME.png with VOC's palette, and
the same over the picture, NAME.jpg; of a classifier each picture with its class and the
score, NAME.jpg. Beside them is predictions.json: for every image its file, width, height,
what was written of it, and the detections as box_xyxy (pixels of the file), label and score,
best first; or the classes and their shares of the pixels; or the best five classes and their
scores, best first. Pixels are taken as stored: EXIF turns nothing, as in training. In a name
of a file that is not UTF-8 the other bytes stand as JSON's \\udc80 to \\udcff, which Python
turns back into that very name.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from tqdm import tqdm

from kdmini import memory, output, signals
from kdmini.bounds import ImageSize, Share
from kdmini.classification.truth import Labels
from kdmini.contracts import Prediction, Truth, UserError
from kdmini.data.loader import ValLoader
from kdmini.data.store import Store
from kdmini.detection.truth import Boxes
from kdmini.device import pick_device
from kdmini.engine import on_cpu
from kdmini.files import write_whole
from kdmini.segmentation.truth import Masks
from kdmini.tools.load import Loaded, load_network
from kdmini.tools.photographs import READABLE, Photographs, find_images, prepare, stems, stored
from kdmini.tools.predict_boxes import BoxWriter
from kdmini.tools.predict_classes import ClassWriter
from kdmini.tools.predict_masks import MaskWriter
from kdmini.typed import argument

BATCH = 8  # images


class Writer(Protocol):
    """What is written of one task's predictions; its constructor takes the network and, by
    name, those of `options` that were given.
    """

    options: tuple[str, ...]

    def decode(self, preds: Any) -> list[Prediction]:
        """What the network returned -> of each image, what can be taken to its file."""
        ...

    def write(
        self, image: Image.Image, prediction: Prediction, out: Path, stem: str
    ) -> dict[str, Any]:
        """Writes the files of one image, named after the stem -> its part of the JSON.

        image, prediction: in pixels of the file. Raises UserError.
        """
        ...

    def summary(self, entries: Sequence[dict[str, Any]]) -> str:
        """What was found in all images, and what kinds of files show it."""
        ...


WRITERS: dict[type[Truth], Any] = {
    Boxes: BoxWriter,
    Masks: MaskWriter,
    Labels: ClassWriter,
}


def predict(
    weights: str,
    inputs: Sequence[str],
    out: Path,
    imgsz: int | None = None,
    device: str = "auto",
    **options: Any,
) -> int:
    """Writes pictures and predictions.json to `out` -> how many inputs could not be used.

    Each of these was named. imgsz: that of the training where it is None. options: of the
    writer, None where not given. Raises UserError where no image is left.
    """
    paths, refused = find_images(inputs)
    names = stems(paths)
    loaded = load_network(weights, pick_device(device))
    network = loaded.network
    writer = make_writer(loaded, options)
    network.fold()
    prepare(out, paths)
    ids = [str(path) for path in paths]
    photographs = Photographs(paths, ids, loaded.truth, formats=READABLE)
    store = stored(photographs, imgsz or loaded.imgsz, next(network.parameters()).device)

    entries: list[dict[str, Any]] = []
    with tqdm(total=len(store), desc="predict", unit="img") as bar:
        for path, prediction in predictions(network, store, writer):
            bar.update()
            try:
                # decoded once more: the store has it no larger than the network sees it
                image = Image.fromarray(photographs.read(path))
                written = writer.write(image, prediction, out, names[path])
            except UserError as error:
                refused += 1
                print(error, file=sys.stderr)
                continue
            entry = {"file": str(path), "width": image.width, "height": image.height, **written}
            entries.append(entry)
    # what UTF-8 cannot say becomes an escape of JSON
    text = json.dumps(entries, indent=1, ensure_ascii=False)
    write_whole(out / "predictions.json", text.encode(errors="backslashreplace"))
    print(f"{len(entries):,} images, {writer.summary(entries)} and predictions.json in {out}")
    return refused + len(photographs.refused)


def make_writer(loaded: Loaded, options: dict[str, Any]) -> Writer:
    """Raises UserError for an option that its task does not have."""
    kind = WRITERS[loaded.truth]
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in kind.options:
            network = type(loaded.network).__name__
            raise UserError(f"--{name}: is for detections, and {network} gives none; leave it out")
    writer: Writer = kind(loaded.network, **given)
    return writer


def predictions(network: Any, store: Store, writer: Writer) -> Iterator[tuple[Path, Prediction]]:
    """-> each image and what is said of it, in pixels of the file."""
    for images, targets, to_file in ValLoader(store, BATCH):
        with torch.no_grad():
            in_file = to_file(on_cpu(writer.decode(network(images))))
        for target, prediction in zip(targets, in_file, strict=True):
            yield Path(target["id"]), prediction


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
        help="objects under it are not shown; default: 0.25",
    )
    parser.add_argument(
        "--iou",
        type=argument(Share),
        help="boxes that overlap more are one; default: 0.7",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    args = parser.parse_args(argv)
    signals.exit_on_signals()
    try:
        with memory.bounded("lower --imgsz, name fewer images, or take --device cpu"):
            options = {"score": args.score, "iou": args.iou}
            refused = predict(
                args.weights, args.inputs, args.out, args.imgsz, args.device, **options
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
