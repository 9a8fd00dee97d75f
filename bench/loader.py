"""What a training sample costs: decoding and rendering, beside ultralytics' loader.

python -m bench.loader [--root data] [--imgsz 640] [--rounds 9]
    [--save FOLDER]

Both take the same photographs, with the public recipe's augmentation, to float batches
in 0..1 of the same shape; annotations are parsed beforehand. With decoding: kdmini
builds a Store and renders one epoch of it, and ultralytics reads one file a sample and
takes the rest of a mosaic from the samples before it, as it does with any dataset larger
than its buffer. Without: kdmini renders an epoch of a Store that exists, and ultralytics
has cache="ram". It takes part with `PYTHONPATH=.oracle/newest`, where `make parity`
installs it.
"""

import argparse
import io
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from functools import partial
from itertools import count
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import save_image

from bench import measure
from bench.peer import peer_loaders
from kdmini.bounds import Count, ImageSize
from kdmini.contracts import UserError
from kdmini.data.loader import Augment, TrainLoader
from kdmini.data.store import Store
from kdmini.detection.voc import VOC
from kdmini.typed import argument

Epoch = Callable[[], Iterator[Tensor]]  # images (N, 3, S, S), batch by batch

AUGMENT = Augment(close_mosaic=0)  # otherwise the defaults: the public recipe
DECODED = "kdmini, compiled: decode, render"
RESIDENT = "kdmini, compiled: render"
EAGER = "kdmini: render"


def kdmini_epochs(dataset: VOC, images: int, imgsz: int, batch: int) -> dict[str, Epoch]:
    numbers = count()  # every epoch is another

    def store(compiled: bool) -> Store:
        with redirect_stderr(io.StringIO()):  # its progress bar
            return Store(
                dataset, imgsz, workers=1, storage="resident", limit=images, compiled=compiled
            )

    def epoch(store: Store) -> Iterator[Tensor]:
        number = next(numbers)
        loader = TrainLoader(store, batch, number + 1, AUGMENT)
        return (rendered for rendered, _ in loader.epoch(number))

    compiled = store(compiled=True)
    eager = store(compiled=False)
    return {
        DECODED: lambda: epoch(store(compiled=True)),
        RESIDENT: lambda: epoch(compiled),
        EAGER: lambda: epoch(eager),
    }


def exhaust(epoch: Epoch, shape: tuple[int, ...]) -> None:
    for images in epoch():
        assert images.shape == shape
        assert images.dtype == torch.float32


def save_batches(epochs: dict[str, Epoch], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, epoch in epochs.items():
        save_image(next(epoch()), folder / f"{name}.png", nrow=4)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", default="data", help="a folder in VOC layout")
    parser.add_argument("--split", default="VOC2007/test")
    parser.add_argument("--limit", type=argument(Count), default=40, help="photographs, at most")
    parser.add_argument("--imgsz", type=argument(ImageSize), default=640)
    parser.add_argument("--batch", type=argument(Count), default=8)
    parser.add_argument("--rounds", type=argument(Count), default=9)
    parser.add_argument(
        "--save", type=Path, metavar="FOLDER", help="a picture of one batch of each, to look at"
    )
    args = parser.parse_args()

    try:
        dataset = VOC(args.root, [args.split])
    except UserError as error:
        parser.error(str(error))
    images = min(args.limit, len(dataset)) // args.batch * args.batch  # whole batches
    if not images:
        parser.error(f"{args.root}, {args.split}: fewer photographs than one batch")
    print(
        f"{measure.machine()}, {images} photographs, imgsz {args.imgsz}, batch {args.batch}, "
        f"{args.rounds} rounds\n"
    )
    opponents = []
    with tempfile.TemporaryDirectory() as scratch:
        epochs = kdmini_epochs(dataset, images, args.imgsz, args.batch)
        try:
            peers = peer_loaders(dataset, images, args.imgsz, args.batch, AUGMENT, Path(scratch))
        except ImportError as error:
            print(measure.no_peer(error))
        else:
            epochs |= peers
            opponents = list(peers)
        if args.save:
            save_batches(epochs, args.save)
        shape = (args.batch, 3, args.imgsz, args.imgsz)
        works = {name: partial(exhaust, epoch, shape) for name, epoch in epochs.items()}
        seconds = measure.take_turns(works, args.rounds)
    for opponent in opponents or [DECODED]:
        print(measure.table(seconds, opponent, images, "sample") + "\n")


if __name__ == "__main__":
    main()
