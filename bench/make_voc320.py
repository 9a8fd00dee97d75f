"""The small set of photographs that the evidence is measured on, out of VOC 2007 and VOC 2012.

python -m kdmini.tools.download --root data
python -m bench.make_voc320 --voc data/VOCdevkit --out data/voc320

3,000 photographs to train on and 800 to evaluate on, reduced to a long side of 320 pixels,
without difficult objects. Which they are stands in bench/voc320/: an id of six digits is of
VOC 2007, any other of VOC 2012. Figures measured on this set are not comparable with published
ones. The photographs are from Flickr, under its terms.
"""

import argparse
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from examples.shapes import Thing, to_xml
from kdmini.contracts import UserError
from kdmini.data.pictures import decode
from kdmini.detection.voc_xml import read_annotation

IDS = Path(__file__).with_name("voc320")
YEARS = ("VOC2007", "VOC2012")
SIDE = 320  # pixels, the longer one
QUALITY = 65  # of the JPEG files


def year_of(name: str) -> str:
    """The folder that a photograph is in."""
    return "VOC2007" if re.fullmatch(r"\d{6}", name) else "VOC2012"


def reduced(voc: Path, name: str) -> tuple[Image.Image, str]:
    """-> the photograph and its annotation, boxes rounded to whole pixels."""
    folder = voc / year_of(name)
    annotation = read_annotation(folder / "Annotations" / f"{name}.xml")
    if annotation.faults:
        raise UserError(annotation.faults[0])
    native = Image.fromarray(decode(folder / "JPEGImages" / f"{name}.jpg"))
    ratio = SIDE / max(native.size)
    size = [round(side * ratio) for side in native.size]
    picture = native.resize(size, Image.Resampling.BICUBIC)

    scale = np.tile(np.divide(picture.size, native.size), 2)
    boxes = np.round(annotation.boxes_xyxy * scale).astype(int).tolist()
    things = []
    for class_name, box, difficult in zip(
        annotation.classes, boxes, annotation.difficult, strict=True
    ):
        if not difficult:
            things.append(Thing(class_name, tuple(box), False))
    return picture, to_xml(name, picture, things)


def make(voc: Path, out: Path, ids: Path = IDS) -> None:
    """Writes the set whole or not at all. Raises UserError."""
    if out.exists():
        raise UserError(f"{out} is there already; name another --out, or delete it")
    for year in YEARS:
        if not (voc / year).is_dir():
            fetch = "`python -m kdmini.tools.download --root data` fetches it"
            raise UserError(f"{voc / year}: no such folder; {fetch}")

    temporary = out.with_name(f".{out.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)  # an earlier run was killed
    try:
        for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (temporary / part).mkdir(parents=True)
        for split in sorted(ids.glob("*.txt")):
            write_split(voc, split, temporary)
        os.replace(temporary, out)
    except OSError as error:
        raise UserError(
            f"{out}: cannot be written ({error}); make room or name another --out"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{out}: complete; train on it with data.root={out}")


def write_split(voc: Path, split: Path, out: Path) -> None:
    """The photographs that a list names, and the list."""
    for name in tqdm(split.read_text().split(), split.stem, unit="img", disable=None):
        image, xml = reduced(voc, name)
        image.save(out / "JPEGImages" / f"{name}.jpg", quality=QUALITY)
        (out / "Annotations" / f"{name}.xml").write_text(xml)
    shutil.copy(split, out / "ImageSets/Main")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--voc", type=Path, required=True, help="the folder with VOC2007/ and VOC2012/"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args(argv)
    try:
        make(args.voc, args.out)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
