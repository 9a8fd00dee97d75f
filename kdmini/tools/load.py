"""Weights by themselves: what visualize, predict and export begin with.

A weight file says what network it is of, its size, its classes and the image size it was
trained at, so that no config is needed.
"""

from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kdmini import checkpoint, config
from kdmini.classification.truth import Labels
from kdmini.contracts import Truth, UserError
from kdmini.detection.truth import Boxes
from kdmini.detection.yolo11 import weights
from kdmini.detection.yolo11.model import YOLO11
from kdmini.segmentation.truth import VOID, Masks
from kdmini.typed import short
from kdmini.weightfile import find

DEFAULT_IMGSZ = 640  # pixels, of a file that states no size to work with
MAX_IMGSZ = 4096  # pixels; a file that states more is not believed
STRIDE = 32  # pixels; an image size is a multiple of it


class Known(NamedTuple):
    """A network that the card of a best.pt may name."""

    build: str
    truth: type[Truth]  # of its task


# `network` on the card -> what builds it; a file without one is a YOLO11's
NETWORKS = {
    "SegFormer": Known("kdmini.segmentation.segformer:SegFormer", Masks),
    "Fast-SCNN": Known("kdmini.segmentation.fast_scnn:FastSCNN", Masks),
    "VMamba": Known("kdmini.segmentation.mamba:VMamba", Masks),
    "ResNet": Known("kdmini.classification.resnet:ResNet", Labels),
    "WRN": Known("kdmini.classification.wide_resnet:WideResNet", Labels),
}
NO_SETTINGS = ("network", "license")  # on a card
TITLE = ("size", "depth", "width")  # of a card, what stands beside the network's name


class Loaded(NamedTuple):
    """A network out of a weight file."""

    network: Any  # in eval mode
    imgsz: int  # that it was trained at
    truth: type[Truth]  # of its task


def load_network(path: str | Path, device: str | torch.device = "cpu") -> Loaded:
    """The network of a best.pt of kdmini, or of a public YOLO11 file; its classes are kept.

    Prints one line that says what it is; raises UserError.
    """
    found = find(path)
    try:
        content = checkpoint.load(found)
    except UserError:
        content = {}  # of a public file, or none: the reader of those tells
    card = content.get("card")
    network = card.get("network") if isinstance(card, Mapping) else None
    if not (isinstance(network, str) and network in NETWORKS):
        detector, imgsz = load_detector(found, device)
        return Loaded(detector, imgsz, Boxes)
    known = NETWORKS[network]
    built = build_known(known, found, content).to(device)
    return Loaded(built, usable_imgsz(content.get("imgsz")), known.truth)


def load_detector(path: str | Path, device: str | torch.device = "cpu") -> tuple[YOLO11, int]:
    """-> the detector in eval mode, and the image size that it was trained at.

    path: best.pt of kdmini or a public YOLO11 file. Prints one line that says what it is;
    raises UserError.
    """
    weights_path = find(path)
    with redirect_stdout(None):  # YOLO11 reads the file again, and says what it is
        file = weights.read(weights_path)

    detector = YOLO11(
        names=[],
        scale=file.scale or "s",  # every file that names its classes states its scale too
        weights={"path": str(weights_path), "classes": "keep"},
    )
    return detector.eval().to(device), usable_imgsz(file.imgsz)


def build_known(known: Known, path: Path, content: Mapping[str, Any]) -> Any:
    """-> the network in eval mode.

    content: of the file, a best.pt whose card names the network. Prints one line that says
    what it is; raises UserError.
    """
    card = content["card"]
    names = content.get("names")
    if not (type(names) is list and names and all(type(name) is str for name in names)):
        raise UserError(f"{path}: its names are {short(names)}, no list of texts; obtain it again")
    if known.truth is Masks and len(names) > VOID:
        raise UserError(f"{path}: has {len(names):,} classes; a mask holds {VOID} at most")
    settings = {key: value for key, value in card.items() if key not in NO_SETTINGS}
    section = {**settings, "build": known.build, "weights": str(path)}
    with redirect_stdout(None):  # not every network says what it has read
        network = config.build(section, str(path), names=names)
    size = "-".join(str(settings[key]) for key in TITLE if key in settings)
    license_text = short(network.card.get("license") or "not stated")[1:-1]
    title = f"{card['network']} {size}".rstrip()
    print(f"{path}: {title}, {len(names)} classes, license {license_text}")
    return network.eval()


def usable_imgsz(stated: Any) -> int:
    """The image size that a file states, or DEFAULT_IMGSZ for one that is not to be used."""
    usable = type(stated) is int and 0 < stated <= MAX_IMGSZ and stated % STRIDE == 0
    return stated if usable else DEFAULT_IMGSZ
