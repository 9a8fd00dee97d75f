"""The small set of photographs that the evidence is measured on, out of VOC 2007 and VOC 2012.

python -m kdmini.tools.download --root data
python -m bench.make_voc320 --voc data/VOCdevkit --out data/voc320

3,000 photographs to train on and 800 to evaluate on, reduced to a long side of 320 pixels, without
difficult objects. Which they are stands in bench/voc320/: an id of six digits is of VOC 2007, any
other of VOC 2012. Figures measured on this set are not comparable with published ones. The
photographs are from Flickr, under its terms."""

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
from kdmini.detection.voc import read_annotation

IDS = Path(__file__).with_name("voc320")
SIDE, QUALITY = 320, 65


def place_of(voc: Path, name: str) -> Path:
    """The year's folder that a photograph is in."""
    return voc / ("VOC2007" if re.fullmatch(r"\d{6}", name) else "VOC2012")


def reduced(voc: Path, name: str) -> tuple[Image.Image, str]:
    """-> the photograph and its annotation, boxes rounded to whole pixels."""
    folder = place_of(voc, name)
    annotation = read_annotation(folder / "Annotations" / f"{name}.xml")
    native = Image.fromarray(decode(folder / "JPEGImages" / f"{name}.jpg"))
    ratio = SIDE / max(native.size)
    picture = native.resize([round(side * ratio) for side in native.size], Image.Resampling.BICUBIC)
    boxes = (
        np.round(annotation.boxes_xyxy * np.tile(np.divide(picture.size, native.size), 2))
        .astype(int)
        .tolist()
    )
    rows = zip(annotation.classes, boxes, annotation.difficult, strict=True)
    things = [
        Thing(class_name, tuple(box), False) for class_name, box, difficult in rows if not difficult
    ]
    return picture, to_xml(name, picture, things)


def make(voc: Path, out: Path, ids: Path = IDS) -> None:
    """Writes the set whole or not at all. Raises UserError."""
    if out.exists():
        raise UserError(f"{out} is there already; name another --out, or delete it")
    if absent := [path for path in (voc / "VOC2007", voc / "VOC2012") if not path.is_dir()]:
        raise UserError(
            f"{absent[0]}: no such folder; `python -m kdmini.tools.download --root data` fetches it"
        )
    temporary = out.with_name(f".{out.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)  # an earlier run was killed
    try:
        for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (temporary / folder).mkdir(parents=True)
        for split in sorted(ids.glob("*.txt")):
            for name in tqdm(split.read_text().split(), split.stem, unit="img", disable=None):
                image, xml = reduced(voc, name)
                image.save(temporary / "JPEGImages" / f"{name}.jpg", quality=QUALITY)
                (temporary / "Annotations" / f"{name}.xml").write_text(xml)
            shutil.copy(split, temporary / "ImageSets/Main")
        os.replace(temporary, out)
    except OSError as error:
        raise UserError(
            f"{out}: cannot be written ({error}); make room or name another --out"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{out}: complete; train on it with data.root={out}")


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
