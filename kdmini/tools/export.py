"""Write a network in a form that other programs read.

python -m kdmini.tools.export WEIGHTS --to onnx [--out FILE] [--imgsz 640]
python -m kdmini.tools.export WEIGHTS --to safetensors [--out FILE]

onnx: images (N, 3, S, S) RGB 0..1 with any N. A detector gives the detections before
non-maximum suppression, twice: `output0` (N, 4 + K, A) is the layout that ultralytics and its
like read, as in `YOLO("best.onnx").predict(image, imgsz=S)`: centre x and y, width, height,
scores; `boxes_xyxy` (N, A, 4) in pixels and `scores` (N, A, K) are the same in two. A network
for segmentation gives `logits` (N, K, S, S), upsampled to the image: the largest is the class
of a pixel. A classifier gives `logits` and `scores`, (N, K) both; the scores sum to 1. BatchNorm
is folded. safetensors: the state_dict under its own keys, of a YOLO11
the public ones, nothing folded. Either one carries names, size, license and image size as
metadata, and of segmentation ONNX has the palette: texts, and what is no text in JSON.

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
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from kdmini import memory, output, signals
from kdmini.bounds import ImageSize
from kdmini.classification.truth import Labels
from kdmini.contracts import Truth, UserError
from kdmini.detection.truth import Boxes
from kdmini.files import write_whole
from kdmini.segmentation.truth import Masks
from kdmini.tools.export_boxes import Decoded
from kdmini.tools.export_classes import Scored
from kdmini.tools.export_masks import Upsampled
from kdmini.tools.load import load_network
from kdmini.typed import argument

SUFFIXES = {"onnx": ".onnx", "safetensors": ".safetensors"}

ALIGNMENT = 8  # bytes, of which the tensors of safetensors begin at a multiple


class Stored(NamedTuple):
    """How safetensors keeps a dtype."""

    name: str  # in the header
    layout: str  # numpy's, little-endian


STORED = {  # all that a network holds
    torch.float32: Stored("F32", "<f4"),
    torch.int64: Stored("I64", "<i8"),
}


class Form(Protocol):
    """A network as an nn.Module whose outputs are what other programs read: one of a task."""

    outputs: Sequence[str]  # their names
    facts: dict[str, str]  # for those programs, beside the metadata of every network

    def __call__(self, images: Tensor) -> Any: ...

    def difference(
        self, found: Sequence[np.ndarray], expected: Sequence[np.ndarray]
    ) -> tuple[str, bool]:
        """-> how far apart two sets of outputs are, in words, and whether that is little.

        Of what is not finite it is not.
        """
        ...


FORMS: dict[type[Truth], Any] = {Boxes: Decoded, Masks: Upsampled, Labels: Scored}


def export(weights: str, to: str, out: Path | None = None, imgsz: int | None = None) -> Path:
    """Writes the file -> its path: by default that of the weights with another suffix.

    to: a key of SUFFIXES. imgsz: S; by default that of the training. Raises UserError.
    """
    suffix = SUFFIXES[to]
    if out and out.suffix != suffix:  # and so never the weights themselves
        raise UserError(f"--out {out}: name a file that ends in {suffix}")

    network, trained_imgsz, truth = load_network(weights)
    path = out or Path(weights).with_suffix(suffix)
    size = imgsz or trained_imgsz
    metadata = metadata_of(network, size)
    if to == "onnx":
        content = to_onnx(network, FORMS[truth](network), size, metadata)
    else:
        content = to_safetensors(network.state_dict(), metadata)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--out {path}: its folder cannot be made ({error.strerror}); name another"
        ) from error
    write_whole(path, content)
    print(f"{path}: {len(content) / 1e6:.1f} MB")
    return path


def metadata_of(network: Any, imgsz: int) -> dict[str, str]:
    """What the file says of itself: texts as they are, all else as JSON."""
    card = {**network.card, "names": network.names, "imgsz": imgsz}
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


def to_onnx(network: Any, form: Any, imgsz: int, metadata: dict[str, str]) -> bytes:
    """An ONNX model, compared with the network, which is folded.

    form: a Form of it.

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
        expected = form(images)

    network.fold()
    with silenced():
        program = torch.onnx.export(
            form,
            (images,),
            dynamo=True,
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            input_names=["images"],
            output_names=form.outputs,
        )
    assert program is not None  # it is where dynamo=True
    program.model.metadata_props.update(metadata | form.facts)
    content = program.model_proto.SerializeToString()
    compare(content, images, expected if isinstance(expected, tuple) else [expected], form)
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


def compare(content: bytes, images: Tensor, expected: Sequence[Tensor], form: Form) -> None:
    """Prints how far onnxruntime's outputs are from PyTorch's, in batches of 1 and N.

    images: (N, 3, S, S). expected: PyTorch's outputs. Raises UserError where the two are too
    far apart.
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
    counts = (1, len(images))
    batches = [session.run(form.outputs, {"images": images[:n].numpy()}) for n in counts]
    found = [np.concatenate(of_output) for of_output in zip(*batches, strict=True)]
    true = [np.concatenate([tensor[:n].numpy() for n in counts]) for tensor in expected]
    words, is_small = form.difference(found, true)
    difference = f"largest difference from PyTorch in batches of 1 and {len(images)}: {words}"
    if not is_small:
        raise UserError(
            f"the ONNX model is not the network ({difference}); nothing was written, "
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
