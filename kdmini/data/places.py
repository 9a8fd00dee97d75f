"""Where images and annotations lie in a folder: as in VOC, or as they are found.

photos/a.jpg a.xml                          side by side
photos/images/a.jpg annotations/a.xml       in two folders, whatever they are called
photos/train/a.jpg a.xml valid/b.jpg b.xml  a folder for each split, as Roboflow exports
"""

from pathlib import Path
from typing import NamedTuple

from kdmini.contracts import UserError
from kdmini.data.folders import ANNOTATIONS, files, folders_below, folders_in, names_with
from kdmini.data.pictures import IMAGES

LIST = ".txt"
HERE = "."


class Places(NamedTuple):
    """Where images and annotations lie in a folder, and what an image alone is."""

    images: str = "JPEGImages"
    annotations: str = "Annotations"  # an absolute path stands for itself
    background: bool = False  # an image without an annotation is one without objects
    recursive: bool = False  # the folders below these two are read too
    lists: str = "Main"  # folder in ImageSets
    endings: tuple[str, ...] = ANNOTATIONS

    def pictured(self, folder: Path) -> dict[str, list[str]]:
        """Name -> paths of the files among the images."""
        return files(folder / self.images, self.recursive)

    def annotated(self, folder: Path) -> dict[str, list[str]]:
        """Name -> paths of the files among the annotations."""
        return files(folder / self.annotations, self.recursive)

    def found(self) -> bool:
        """Whether these are others than VOC's, of XML files."""
        usual = (VOC_PLACES.images, VOC_PLACES.annotations)
        return self.endings == ANNOTATIONS and (self.images, self.annotations) != usual

    def words(self) -> str:
        """Where images were found, as in "60 annotated images in 'photos'"."""
        if not self.found():
            return ""
        if self.images == self.annotations:
            below = " and the folders below" if self.recursive else ""
            return f" in {self.images!r}{below}, their XML files beside them"
        return f" in {self.images!r}, their XML files in {self.annotations!r}"


VOC_PLACES = Places()


def has_places(folder: Path, places: Places) -> bool:
    return folder.is_dir() and (folder / places.annotations).is_dir()


def candidates(root: Path, name: str) -> list[Path]:
    """The folders that a split may mean, by the name of a folder in it."""
    return [root / name, root / "VOCdevkit" / name]


def located(root: Path, splits: list[str], places: Places) -> Places:
    """Those given, or where they are VOC's and the folder of the first split is laid out in
    another way, where images and XML files lie in it.

    Raises UserError where that could be meant in several ways.
    """
    first = splits[0] if splits else ""
    is_own_list = first.endswith(LIST)
    if places.found() or places.endings != ANNOTATIONS or "\0" in first or ".." in first:
        return places
    folder_name = "" if is_own_list else first.rpartition("/")[0]
    above = candidates(root, folder_name)
    if any((path / places.images).is_dir() and has_places(path, places) for path in above):
        return places
    is_folder = not is_own_list and (root / first).is_dir()
    folder = root / first if is_folder else root / folder_name
    if has_places(folder, places) or not folder.is_dir():
        return places
    return sought(folder, places)


def sought(folder: Path, places: Places) -> Places:
    """Where images and XML files are: in the folder itself or in those in it, and with
    `recursive` anywhere below these. The places as given, where there are no XML files.
    """
    deep = places.recursive
    children = folders_in(folder)
    names_of = {HERE: names_with(files(folder), places.endings)}
    for child in children:
        names_of[child] = names_with(files(folder / child, deep), places.endings)
    annotated = [place for place, names in names_of.items() if names]
    if not annotated:
        refuse_deeper(folder, places)
        return places

    is_spread = len(annotated) > 1
    if is_spread and HERE not in annotated and not deep:
        raise UserError(
            f"{folder}: XML files lie in {', '.join(annotated)}; name those that are meant in "
            "`splits`, or take all with `recursive: true`"
        )
    if HERE in annotated or is_spread:
        at = HERE
        names = names_with(files(folder, deep), places.endings)
    else:
        [at] = annotated
        names = names_of[at]
    beside = [at] if at == HERE and deep else [at, HERE, *children]
    shared = {
        place: len(names & names_with(files(folder / place, deep), IMAGES)) for place in beside
    }
    images = max(shared, key=shared.__getitem__)  # the first of equals
    if not shared[images]:
        raise UserError(
            f"{folder}: no image has the name of an XML file in {at!r}; name the folders of both "
            "in `images` and `annotations`"
        )
    return places._replace(images=images, annotations=at)


def refuse_deeper(folder: Path, places: Places) -> None:
    """Raises UserError where XML files lie deeper than is looked, and not as in VOC."""
    for place in folders_below(folder):
        if place.name != places.annotations and names_with(files(place), places.endings):
            both = place if names_with(files(place), IMAGES) else place.parent
            split = both.relative_to(folder).as_posix()
            raise UserError(
                f"{folder}: XML files lie further down, as in {place.relative_to(folder)}; write "
                f"`splits: [{split}]`, or take all with `recursive: true`"
            )
