"""Write a detector in a form that other programs read.

python -m kdmini.tools.export WEIGHTS --to onnx [--out FILE] [--imgsz 640]
python -m kdmini.tools.export WEIGHTS --to safetensors [--out FILE]

onnx: images (N, 3, S, S) RGB 0..1 with any N -> boxes_xyxy (N, A, 4) in pixels and scores (N, A,
K), before non-maximum suppression; BatchNorm is folded. safetensors: the state_dict under the
public keys, nothing folded. Either one carries names, scale, license and image size as metadata:
texts, what is no text in JSON."""

import argparse
import io
import json
import logging
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from kdmini import signals
from kdmini.contracts import UserError
from kdmini.data.loader import check_size
from kdmini.detection.yolo11.model import YOLO11, decode_maps
from kdmini.runlog import write_whole
from kdmini.tools.load import load_detector

ENDINGS = {"onnx": ".onnx", "safetensors": ".safetensors"}
DTYPES = {torch.float32: ("F32", "<f4"), torch.int64: ("I64", "<i8")}  # all that a YOLO11 holds
PIXELS_OFF, SCORE_OFF = 0.1, 1e-3  # by which ONNX may differ from PyTorch: float32 in another order


class Decoded(nn.Module):
    """A detector whose outputs are boxes and scores."""

    def __init__(self, detector: YOLO11):
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, S, S) -> (N, A, 4), (N, A, K)."""
        return decode_maps(self.detector(images))


def export(weights: str, to: str, out: Path | None = None, imgsz: int | None = None) -> Path:
    """Writes the file and returns its path: by default that of the weights with another ending.
    Raises UserError.
    """
    if out and out.suffix != ENDINGS[to]:  # and so never the weights themselves
        raise UserError(f"--out {out}: name a file that ends in {ENDINGS[to]}")
    check_size(imgsz or 640, "--imgsz")
    detector, trained = load_detector(weights)
    out, size = out or Path(weights).with_suffix(ENDINGS[to]), imgsz or trained
    card = {**detector.card, "names": detector.names, "imgsz": size}
    about = {
        k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in card.items()
    }
    content = (
        to_onnx(detector, size, about)
        if to == "onnx"
        else to_safetensors(detector.state_dict(), about)
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--out {out}: its folder cannot be made ({error.strerror}); name another"
        ) from error
    write_whole(out, content)
    print(f"{out}: {len(content) / 1e6:.1f} MB")
    return out


def to_safetensors(state: dict[str, Tensor], about: dict[str, str]) -> bytes:
    """The format: 8 bytes with the length of the header, the header in JSON, then the tensors'
    bytes one by one.

    https://huggingface.co/docs/safetensors: all is little-endian; offsets count from the end of the
    header."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", **about}}
    parts, end = [], 0
    for key, tensor in state.items():
        name, layout = DTYPES[tensor.dtype]
        parts.append(tensor.cpu().numpy().astype(layout).tobytes())
        start, end = end, end + len(parts[-1])
        header[key] = {"dtype": name, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors begin at a multiple of 8
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def to_onnx(detector: YOLO11, size: int, about: dict[str, str]) -> bytes:
    """An ONNX model, compared with the detector, which is folded. Raises UserError where the two
    differ.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--to onnx needs the package {error.name}: pip install 'kdmini[export]'"
        ) from None
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = decode_maps(detector(images))
    detector.fold()
    logged = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")  # the exporter tells of its own deprecations and progress
        logging.disable()
        try:
            program = torch.onnx.export(
                Decoded(detector),
                (images,),
                dynamo=True,
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
                input_names=["images"],
                output_names=["boxes_xyxy", "scores"],
            )
        finally:
            logging.disable(logged)
    assert program is not None
    program.model.metadata_props.update(about)
    content = program.model_proto.SerializeToString()
    compare(content, images, wanted)
    return content


def compare(content: bytes, images: Tensor, wanted: tuple[Tensor, Tensor]) -> None:
    """Prints by how much onnxruntime's outputs differ from PyTorch's, in batches of one and of all
    images.
    """
    try:
        import onnxruntime
    except ImportError:
        return print(
            "not compared with PyTorch, for want of onnxruntime: pip install 'kdmini[export]'"
        )
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    off = np.zeros(2)  # boxes, scores
    for count in (1, len(images)):
        outputs = session.run(["boxes_xyxy", "scores"], {"images": images[:count].numpy()})
        pairs = zip(outputs, wanted, strict=True)
        off = np.maximum(off, [np.abs(got - tensor[:count].numpy()).max() for got, tensor in pairs])
    told = f"largest difference from PyTorch in batches of 1 and {len(images)}: {off[0]:.1e} px, score {off[1]:.1e}"
    if not (off[0] <= PIXELS_OFF and off[1] <= SCORE_OFF):  # NaN too
        raise UserError(
            f"the ONNX model is not the detector ({told}); nothing was written, try other versions of torch"
        )
    print(told)


def main(argv: list[str] | None = None) -> None:
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
    parser.add_argument("--imgsz", type=int, help="S; default: that of the training")
    args = parser.parse_args(argv)
    signals.exit_on_signals()
    try:
        export(args.weights, args.to, args.out, args.imgsz)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
