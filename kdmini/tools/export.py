"""Write a network in a form that other programs read.

python -m kdmini.tools.export WEIGHTS --to onnx [--free none|batch|all]
    [--nms] [--half]
python -m kdmini.tools.export WEIGHTS --to torchscript [--half]
python -m kdmini.tools.export WEIGHTS --to safetensors
python -m kdmini.tools.export WEIGHTS --to ultralytics

onnx, torchscript: images (N, 3, S, S) RGB 0..1 with any N. A detector gives the
detections before non-maximum suppression, twice: `output0` (N, 4 + K, A) is the
layout that ultralytics and its like read, as in
`YOLO("best.onnx").predict(image, imgsz=S)`: centre x and y, width, height,
scores; `boxes_xyxy` (N, A, 4) in pixels and `scores` (N, A, K) are the same in
two. With --nms it gives what is left after it, the best 300 with scores above
0.001, best first: `output0` (N, 300, 6) with corners, score and class; the same
as `boxes_xyxy` (N, 300, 4), `scores` (N, 300) and `labels` (N, 300); where
there are fewer, zeros with the label -1. A network for segmentation gives
`logits` (N, K, S, S), upsampled to the image: the largest is the class of a
pixel. A classifier gives `logits` and `scores`, (N, K) both; the scores sum to
1. TorchScript gives them in that order. BatchNorm is folded. Images and outputs
are float32, with --half too. What is made is compared with PyTorch before it is
written.

safetensors: the state_dict under its own keys, of a YOLO11 the public ones,
nothing folded. ultralytics: a YOLO11 as the file that ultralytics itself
writes: `YOLO("FILE.pt")`.

Each one carries names, size, license and image size, ONNX and safetensors as
metadata, TorchScript in its `config.txt`, and of segmentation the palette:
texts, and what is no text in JSON.

Legend: N images, S image size, A anchors, K classes.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from kdmini import memory, output, signals
from kdmini.bounds import ImageSize, Share
from kdmini.classification.truth import Labels
from kdmini.contracts import Truth, UserError
from kdmini.detection.truth import Boxes
from kdmini.files import write_whole
from kdmini.segmentation.truth import Masks
from kdmini.tools.export_boxes import Decoded
from kdmini.tools.export_classes import Scored
from kdmini.tools.export_masks import Upsampled
from kdmini.tools.export_nms import Suppressed
from kdmini.tools.export_onnx import to_onnx
from kdmini.tools.export_safetensors import to_safetensors
from kdmini.tools.export_torchscript import to_torchscript
from kdmini.tools.export_ultralytics import to_ultralytics
from kdmini.tools.load import Loaded, load_network
from kdmini.typed import argument
from kdmini.weightfile import find

ENDINGS = {  # of the names that are chosen here
    "onnx": ".onnx",
    "torchscript": ".torchscript",
    "safetensors": ".safetensors",
    "ultralytics": "_ultralytics.pt",
}
# the options of `How` that have a meaning
OPTIONS = {
    "onnx": ("free", "nms", "iou", "half"),
    "torchscript": ("half",),
    "safetensors": (),
    "ultralytics": (),
}

FORMS: dict[type[Truth], Any] = {Boxes: Decoded, Masks: Upsampled, Labels: Scored}

Free = Literal["none", "batch", "all"]


class How(NamedTuple):
    """What is left open in an exported network, and what it does."""

    free: Free = "batch"  # none: one image of S x S; all: N, and sides that divide by 32
    nms: bool = False
    iou: float = 0.7  # of NMS
    half: bool = False  # computes in fp16


AS_IT_IS = How()


def export(
    weights: str, to: str, out: Path | None = None, imgsz: int | None = None, how: How = AS_IT_IS
) -> Path:
    """Writes the file -> its path: by default that of the weights with another ending.

    to: a key of ENDINGS. imgsz: S; by default that of the training. Raises UserError.
    """
    path = out or Path(weights).with_name(Path(weights).stem + ENDINGS[to])
    check_options(to, how)
    check_path(path, weights, to)
    loaded = load_network(weights)
    content = made(loaded, to, imgsz or loaded.imgsz, how)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--out {path}: its folder cannot be made ({error.strerror}); name another"
        ) from error
    write_whole(path, content)
    print(f"{path}: {len(content) / 1e6:.1f} MB")
    return path


def check_options(to: str, how: How) -> None:
    """Raises UserError for an option that would change nothing."""
    for option, value in how._asdict().items():
        if value != getattr(AS_IT_IS, option) and option not in OPTIONS[to]:
            fits = [name for name, options in OPTIONS.items() if option in options]
            raise UserError(f"--{option} is for --to {' or '.join(fits)}, not for {to}: drop it")
    if how.iou != AS_IT_IS.iou and not how.nms:
        raise UserError("--iou is of non-maximum suppression: give --nms too")


def check_path(path: Path, weights: str, to: str) -> None:
    """Raises UserError for another kind of file, and for the weights themselves."""
    suffix = Path(f"name{ENDINGS[to]}").suffix
    if path.suffix != suffix:
        raise UserError(f"--out {path}: name a file that ends in {suffix}")
    if path.exists() and path.samefile(find(weights)):
        raise UserError(f"--out {path}: these are the weights themselves; name another file")


def made(loaded: Loaded, to: str, imgsz: int, how: How) -> bytes:
    """The content of the file. Raises UserError."""
    network = loaded.network
    metadata = metadata_of(network, imgsz)
    if to == "safetensors":
        return to_safetensors(network.state_dict(), metadata)
    if to == "ultralytics":
        return to_ultralytics(network, imgsz)
    if how.nms and loaded.truth is not Boxes:
        raise UserError("--nms is for detectors, which this network is not: drop it")
    form = Suppressed(network, how.iou) if how.nms else FORMS[loaded.truth](network)
    if to == "onnx":
        return to_onnx(network, form, imgsz, metadata, how.free, how.half)
    return to_torchscript(network, form, imgsz, metadata, how.half)


def metadata_of(network: Any, imgsz: int) -> dict[str, str]:
    """What the file says of itself: texts as they are, all else as JSON."""
    card = {**network.card, "names": network.names, "imgsz": imgsz}
    return {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in card.items()
    }


def main(argv: list[str] | None = None) -> None:
    output.guard(needed=True)
    parser = argparse.ArgumentParser(
        prog="python -m kdmini.tools.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("weights", help="best.pt of a run, or a public file such as yolo11s.pt")
    parser.add_argument("--to", choices=ENDINGS, required=True)
    parser.add_argument(
        "--out", type=Path, help="default: the name of the weights, with another ending"
    )
    parser.add_argument(
        "--imgsz", type=argument(ImageSize), help="S; default: that of the training"
    )
    parser.add_argument(
        "--free",
        choices=get_args(Free),
        default=AS_IT_IS.free,
        help="what may differ from call to call: none, the number of images alone (the default), "
        "or all, the sides too, which divide by 32",
    )
    parser.add_argument("--nms", action="store_true", help="of a detector: suppress inside")
    parser.add_argument(
        "--iou",
        type=argument(Share),
        default=AS_IT_IS.iou,
        help="of --nms: of boxes of a class that overlap by more one is left; default: 0.7",
    )
    parser.add_argument("--half", action="store_true", help="compute in fp16")
    args = parser.parse_args(argv)
    signals.exit_on_signals()
    how = How(args.free, args.nms, args.iou, args.half)
    try:
        with memory.bounded("lower --imgsz"):
            export(args.weights, args.to, args.out, args.imgsz, how)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
