"""The files in a folder, by name: found whatever their ending and spelling, or refused."""

import os
import unicodedata
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

from kdmini.contracts import UserError

ANNOTATIONS = (".xml",)
APPLE_DOUBLE = "._"  # begins the names of the files that macOS leaves beside others


def composed(name: str) -> str:
    """A name with each character in one piece (NFC): macOS takes those of Hangul apart."""
    return unicodedata.normalize("NFC", name)


def folders_in(folder: Path) -> list[str]:
    """The names of those directly in it, in their order; hidden ones and those that macOS
    leaves beside others are passed over, and so are links.
    """
    with os.scandir(folder) as items:
        names = [item.name for item in items if item.is_dir(follow_symlinks=False)]
    return sorted(name for name in names if not name.startswith((".", "__MACOSX")))


def folders_below(folder: Path) -> Iterator[Path]:
    """The folder, and all that are in it, and in these."""
    yield folder
    for name in folders_in(folder):
        yield from folders_below(folder / name)


def files(folder: Path, recursive: bool = False) -> dict[str, list[str]]:
    """Name without ending, composed -> paths of the files that have it, in their order.

    recursive: those in the folders below too; the name of such a one is "more/a".
    What macOS leaves beside a file is passed over.
    """
    paths: dict[str, list[str]] = {}
    if not folder.is_dir():
        return paths
    for place in folders_below(folder) if recursive else [folder]:
        inside = "" if place == folder else f"{place.relative_to(folder).as_posix()}/"
        for item in sorted(os.scandir(place), key=attrgetter("name")):
            # a pipe would be waited for
            if item.name.startswith(APPLE_DOUBLE) or not item.is_file():
                continue
            name = composed(inside + os.path.splitext(item.name)[0])
            paths.setdefault(name, []).append(item.path)
    return paths


def has_ending(path: str, endings: tuple[str, ...]) -> bool:
    return path.lower().endswith(endings)


def one_of(same: list[str], endings: tuple[str, ...]) -> str:
    """The path that has one of the endings, of files that have one name; "" if none has.

    Raises UserError where two have.
    """
    fitting = [path for path in same if has_ending(path, endings)]
    if len(fitting) > 1:
        others = " and ".join(repr(os.path.basename(path)) for path in fitting[1:])
        raise UserError(f"{fitting[0]}: {others} has the same name; which is meant? Rename one")
    return fitting[0] if fitting else ""


def find_file(
    paths: dict[str, list[str]], name: str, wanted: Path, endings: tuple[str, ...], inside: Path
) -> str:
    """The path of that name, among those of `files`.

    wanted: where it is missed. inside: the folder of the set. Raises UserError where there is
    none or two, and for a link that leads out of the set.
    """
    same = paths.get(name, [])
    path = one_of(same, endings)
    remedy = f"take {name!r} out of the split"
    if not same:
        raise UserError(f"{wanted}: no such file; restore it or {remedy}")
    if not path:
        raise UserError(f"{same[0]}: not one of {' '.join(endings)}; convert it or {remedy}")
    if leads_out(path, inside):
        raise UserError(
            f"{wanted}: a link that leads out of the set; put a copy in its place or {remedy}"
        )
    return path


def leads_out(path: str, inside: Path) -> bool:
    """Whether a file is a link to one that lies neither beside it nor in the folder."""
    if not os.path.islink(path):
        return False
    folders = (os.path.dirname(path), inside)
    within = tuple(os.path.join(os.path.realpath(folder), "") for folder in folders)
    return not os.path.realpath(path).startswith(within)


def names_with(paths: dict[str, list[str]], endings: tuple[str, ...]) -> set[str]:
    """Those of which a file has one of the endings."""
    return {name for name, same in paths.items() if any(has_ending(path, endings) for path in same)}
