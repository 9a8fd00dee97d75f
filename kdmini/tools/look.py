"""What a run would learn from, looked at before a day of training.

python -m kdmini.tools.look CONFIG [--out FOLDER] [--images 12]
    [key.path=value ...]

Every image of both sets is read as train.py reads it. Printed are: files and
objects that cannot be used, each on a line; what was set right, in a line for
each set; how many images and objects each class has; how large boxes are beside
the strides of a detector; and images that are in both sets under other names.
Of a few images of each set, with every class among them where there is room,
train.png and val.png show boxes, masks or classes. They go into RUN/look, for
the RUN that the config names. Nothing else is written, and no network is
needed.
"""

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from kdmini import config, memory, output, signals
from kdmini.bounds import Range
from kdmini.contracts import Dataset, UserError
from kdmini.data.store import Picture, decode_all, picture_of, print_report, subset
from kdmini.defaults import no_option
from kdmini.files import write_whole
from kdmini.sections import Sections, Sets
from kdmini.tools import look_boxes, look_classes, look_masks
from kdmini.tools.draw import Figure
from kdmini.tools.look_masks import counted
from kdmini.tools.photographs import prepare
from kdmini.tools.sheet import Read, Split
from kdmini.typed import argument

Images = Annotated[int, Range(1, 48)]  # of a sheet
IMAGES = 12
REMEDY = "set data.workers=1, or data.limit to look at fewer images"


def look(settings: dict[str, Any], source: str, out: Path | None, images: int = IMAGES) -> None:
    """settings: the config. source: the file it is from. images: of each sheet."""
    sections = config.call(Sections, settings, source)
    sets = sections.sets()
    folder = out or Path(sections.run) / "look"
    prepare(folder, [])
    splits = [read_all(sets, "train", sets.train), read_all(sets, "val", sets.val)]
    print("\n".join(["", *counts(splits), *repeated(splits)]))

    for split in splits:
        figure = sheet(split, images, sets.imgsz)
        if figure is None:
            continue
        content = io.BytesIO()
        figure.savefig(content, format="png")
        path = folder / f"{split.name}.png"
        write_whole(path, content.getvalue())
        print(f"picture: {path}")


def read_all(sets: Sets, name: str, dataset: Dataset) -> Split:
    """All images of a set that can be used, without their pixels. The others are named."""
    kept: dict[int, Read] = {}

    def read(index: int) -> Picture | str:
        picture = picture_of(dataset, index, sets.imgsz, training=False)
        if isinstance(picture, Picture):
            kept[index] = Read(index, counted(picture.target), picture.native, picture.digest)
        return picture

    indices = subset(len(dataset), sets.storing["limit"])
    if not indices:
        raise UserError(f"{name}: the dataset has no images")
    faults = 0
    for picture in decode_all(read, indices, sets.storing["workers"], "skip", name):
        faults += len(picture.faults)
    if sets.storing["on_bad"] == "stop" and (faults or len(kept) < len(indices)):
        print(f"{name}: train.py stops for these, unless data.on_bad=skip")
    try:
        print_report(dataset, name)
    except UserError as error:
        print(f"{error}; train.py stops for this")
    return Split(name, dataset, [kept[index] for index in sorted(kept)], sets.imgsz)


def counts(splits: Sequence[Split]) -> list[str]:
    """The lines of the tables."""
    lines = [split.line_of_images() for split in splits]
    keys = splits[0].keys
    if {"boxes_xyxy", "labels"} <= keys:
        return lines + look_boxes.tables(splits)
    if "pixels" in keys:
        return lines + look_masks.tables(splits)
    if "label" in keys:
        return lines + look_classes.tables(splits)
    held = ", ".join(sorted(keys))
    return [*lines, f"the targets hold {held}: no boxes, masks or classes to count"]


def sheet(split: Split, images: int, imgsz: int) -> Figure | None:
    """A few images with what is on them, if it is known how that is drawn."""
    makers: dict[str, Callable[[Split, int], Figure]] = {
        "boxes_xyxy": look_boxes.sheet,
        "pixels": look_masks.sheet,
        "label": look_classes.sheet,
    }
    for key, make in makers.items():
        if key in split.keys:
            return make(split, images)
    return None


def repeated(splits: Sequence[Split]) -> list[str]:
    """What is said of images with the same pixels: in both sets, or twice in one."""
    lines = []
    train, val = ({read.pixels: read.id for read in split.images} for split in splits)
    both = [pixels for pixels in val if pixels in train]
    if both:
        first = both[0]
        lines.append(
            f"warning: {len(both):,} images of val have the pixels of one of train, as "
            f"{val[first]} those of {train[first]}: scores will be too good"
        )
    for split in splits:
        twice = len(split.images) - len({read.pixels for read in split.images})
        if twice:
            lines.append(f"{split.name}: {twice:,} images have the pixels of another one in it")
    return lines


def main(argv: list[str] | None = None) -> None:
    output.guard(needed=True)
    parser = argparse.ArgumentParser(
        prog="python -m kdmini.tools.look",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, such as mine/config.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="where the pictures go")
    parser.add_argument(
        "--images", type=argument(Images), default=IMAGES, help="of each picture, 12 by default"
    )
    args, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        parser.error(no_option(unknown, sys.argv))
    signals.exit_on_signals()
    try:
        settings = config.load(args.config, args.overrides)
        with memory.bounded(REMEDY):
            look(settings, args.config, args.out, args.images)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
