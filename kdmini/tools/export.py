"""Write a detector in a form that other programs read.

python -m kdmini.tools.export WEIGHTS --to onnx [--out FILE] [--imgsz 640]
python -m kdmini.tools.export WEIGHTS --to safetensors [--out FILE]

onnx: images (N, 3, S, S) RGB 0..1 with any N -> the detections before non-maximum
suppression, twice: `output0` (N, 4 + K, A) is the layout that ultralytics and its like read,
as in `YOLO("best.onnx").predict(image, imgsz=S)`: centre x and y, width, height, scores.
`boxes_xyxy` (N, A, 4) in pixels and `scores` (N, A, K) are the same in two. BatchNorm is
folded. safetensors: the
state_dict under the public keys, nothing folded. Either one carries names, scale,
license and image size as metadata: texts, and what is no text in JSON.

Legend: N images, S image size, A anchors, K classes.
"""

import argparse
import io
import json
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from kdmini import memory, output, signals
from kdmini.bounds import ImageSize
from kdmini.contracts import UserError
from kdmini.detection.boxes import left_top, right_bottom
from kdmini.detection.yolo11.model import YOLO11, decode_maps
from kdmini.files import write_whole
from kdmini.tools.load import load_detector
from kdmini.typed import argument

SUFFIXES = {"onnx": ".onnx", "safetensors": ".safetensors"}

# by how much ONNX may differ from PyTorch: float32 is summed in another order
BOX_TOLERANCE = 0.1  # pixels
SCORE_TOLERANCE = 1e-3

# what they read in the file; its other keys, names and imgsz, they read as they are
FOR_READERS = {"task": "detect", "stride": "32", "batch": "1"}

# output0 (N, 4 + K, A): centre x, centre y, width, height and the scores, as programs that read
# YOLO models expect of the first output; and boxes_xyxy (N, A, 4), scores (N, A, K)
OUTPUTS = ["output0", "boxes_xyxy", "scores"]

ALIGNMENT = 8  # bytes, of which the tensors of safetensors begin at a multiple


class Stored(NamedTuple):
    """How safetensors keeps a dtype."""

    name: str  # in the header
    layout: str  # numpy's, little-endian


STORED = {  # all that a YOLO11 holds
    torch.float32: Stored("F32", "<f4"),
    torch.int64: Stored("I64", "<i8"),
}


class Decoded(nn.Module):
    """A detector whose outputs are boxes and scores, in the two layouts that are read."""

    def __init__(self, detector: YOLO11):
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """images (N, 3, S, S) -> OUTPUTS."""
        boxes_xyxy, scores = decode_maps(self.detector(images))
        low = left_top(boxes_xyxy)
        high = right_bottom(boxes_xyxy)
        fused = torch.cat([(low + high) / 2, high - low, scores], 2)
        return fused.mT, boxes_xyxy, scores


def export(weights: str, to: str, out: Path | None = None, imgsz: int | None = None) -> Path:
    """Writes the file -> its path: by default that of the weights with another suffix.

    to: a key of SUFFIXES. imgsz: S; by default that of the training. Raises UserError.
    """
    suffix = SUFFIXES[to]
    if out and out.suffix != suffix:  # and so never the weights themselves
        raise UserError(f"--out {out}: name a file that ends in {suffix}")

    detector, trained_imgsz = load_detector(weights)
    path = out or Path(weights).with_suffix(suffix)
    size = imgsz or trained_imgsz
    metadata = metadata_of(detector, size)
    if to == "onnx":
        content = to_onnx(detector, size, metadata)
    else:
        content = to_safetensors(detector.state_dict(), metadata)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--out {path}: its folder cannot be made ({error.strerror}); name another"
        ) from error
    write_whole(path, content)
    print(f"{path}: {len(content) / 1e6:.1f} MB")
    return path


def metadata_of(detector: YOLO11, imgsz: int) -> dict[str, str]:
    """What the file says of itself: texts as they are, all else as JSON."""
    card = {**detector.card, "names": detector.names, "imgsz": imgsz}
    return {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in card.items()
    }


def to_safetensors(state: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """The length of the header in 8 bytes, the header in JSON, the bytes of each tensor.

    https://huggingface.co/docs/safetensors: all is little-endian; offsets count from the
    end of the header.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    parts = []
    start = 0
    for key, tensor in state.items():
        stored = STORED[tensor.dtype]
        part = tensor.cpu().numpy().astype(stored.layout).tobytes()
        end = start + len(part)
        header[key] = {
            "dtype": stored.name,
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        parts.append(part)
        start = end

    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def to_onnx(detector: YOLO11, imgsz: int, metadata: dict[str, str]) -> bytes:
    """An ONNX model, compared with the detector, which is folded.

    Raises UserError where a package is missing or the two differ.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--to onnx needs the package {error.name}: pip install -e '.[export]' in the checkout"
        ) from None

    seeded = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, imgsz, imgsz, generator=seeded)
    with torch.no_grad():
        expected = Decoded(detector)(images)

    detector.fold()
    with silenced():
        program = torch.onnx.export(
            Decoded(detector),
            (images,),
            dynamo=True,
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            input_names=["images"],
            output_names=OUTPUTS,
        )
    assert program is not None  # it is where dynamo=True
    program.model.metadata_props.update(metadata | FOR_READERS)
    content = program.model_proto.SerializeToString()
    compare(content, images, expected)
    return content


@contextmanager
def silenced() -> Iterator[None]:
    """Prints, warns and logs nothing: the exporter tells of its own deprecations."""
    level = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable()
        try:
            yield
        finally:
            logging.disable(level)


def compare(content: bytes, images: Tensor, expected: Sequence[Tensor]) -> None:
    """Prints how far onnxruntime's outputs are from PyTorch's, in batches of 1 and N.

    images: (N, 3, S, S). expected: OUTPUTS, PyTorch's. Raises UserError where the two are
    too far apart.
    """
    try:
        import onnxruntime
    except ImportError:
        print(
            "not compared with PyTorch, for want of onnxruntime: "
            "pip install -e '.[export]' in the checkout"
        )
        return

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    box_error = np.float64(0)
    score_error = np.float64(0)
    for count in (1, len(images)):
        batch = {"images": images[:count].numpy()}
        pairs = zip(session.run(OUTPUTS, batch), expected, strict=True)
        fused, boxes, scores = (np.abs(found - true[:count].numpy()) for found, true in pairs)
        for errors in (fused[:, :4], boxes):
            box_error = np.maximum(box_error, errors.max())  # NaN wins
        for errors in (fused[:, 4:], scores):
            score_error = np.maximum(score_error, errors.max())

    difference = (
        f"largest difference from PyTorch in batches of 1 and {len(images)}: "
        f"{box_error:.1e} px, score {score_error:.1e}"
    )
    if not (box_error <= BOX_TOLERANCE and score_error <= SCORE_TOLERANCE):  # NaN too
        raise UserError(
            f"the ONNX model is not the detector ({difference}); nothing was written, "
            "try other versions of torch"
        )
    print(difference)


def main(argv: list[str] | None = None) -> None:
    output.guard(needed=True)
    parser = argparse.ArgumentParser(
        prog="python -m kdmini.tools.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("weights", help="best.pt of a run, or a public file such as yolo11s.pt")
    parser.add_argument("--to", choices=SUFFIXES, required=True)
    parser.add_argument(
        "--out", type=Path, help="default: the name of the weights, with another ending"
    )
    parser.add_argument(
        "--imgsz", type=argument(ImageSize), help="S; default: that of the training"
    )
    args = parser.parse_args(argv)
    signals.exit_on_signals()
    try:
        with memory.bounded("lower --imgsz"):
            export(args.weights, args.to, args.out, args.imgsz)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
