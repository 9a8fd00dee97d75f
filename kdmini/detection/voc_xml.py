"""One XML file of PASCAL VOC, as the tools of many people write it.

An XML counts pixels from 1 and names the last one inside; boxes here are continuous and
start at 0, so `xmin, ymin` lose 1 and `xmax, ymax` stay.
Legend: G objects of an image.
"""

import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kdmini.contracts import UserError
from kdmini.data.folders import composed
from kdmini.files import check_kind
from kdmini.typed import short

MAX_COORDINATE = 1e9  # pixels; what lies further out is a slip of the pen
YES = ("1", "1.0", "true", "yes")  # of <difficult>, whatever the case
NO = ("", "0", "0.0", "false", "no")
UNSAID = ("unspecified", "unknown")  # as makesense.ai writes


class Annotation(NamedTuple):
    """What one XML file says."""

    size: tuple[int, int] | None  # width, height; None where it does not say
    classes: list[str]  # G
    boxes_xyxy: np.ndarray  # (G, 4) float32, pixels, not yet clipped
    difficult: np.ndarray  # (G,) bool
    faults: list[str]  # of the objects that cannot be used, a line for each
    unsaid: int = 0  # objects that do not say whether they are difficult


class Object(NamedTuple):
    """One <object> of an XML file."""

    class_name: str
    box_xyxy: list[float]  # pixels, from 0
    difficult: bool | None  # None where it does not say


NOTHING = Annotation(None, [], np.zeros((0, 4), np.float32), np.zeros(0, bool), [])


def read_annotation(path: Path, enclose: bool = False) -> Annotation:
    """Read one XML file. enclose: of a rotated box, the upright one around it.

    Raises UserError with file and line for anything that is not VOC.
    """
    text = read_text(path)
    try:
        root = ET.fromstring(text)
    except (ET.ParseError, ValueError) as error:
        line = error.position[0] if isinstance(error, ET.ParseError) else 1
        raise UserError(
            f"{path}:{line}: not an XML file ({error}); repair it or take it out of the split"
        ) from None
    if root.tag != "annotation":
        raise UserError(
            f"{path}:1: <{root.tag[:60]}> instead of <annotation>; is this a VOC annotation?"
        )
    check_depth(path, root)

    objects: list[Object] = []
    faults: list[str] = []
    for number, element in enumerate(root.findall("object"), 1):
        try:
            objects.append(read_object(f"{path}: object {number}", element, enclose))
        except UserError as error:
            faults.append(str(error))
    boxes = [thing.box_xyxy for thing in objects]
    return Annotation(
        size=read_size(root),
        classes=[thing.class_name for thing in objects],
        boxes_xyxy=np.array(boxes, np.float32).reshape(-1, 4),
        difficult=np.array([bool(thing.difficult) for thing in objects], bool),
        faults=faults,
        unsaid=sum(thing.difficult is None for thing in objects),
    )


def check_depth(path: Path, root: ET.Element) -> None:
    """Objects are children of the root. A <part> of one, with a box of its own, is no object."""
    for parent in root.iter():
        if parent is not root and parent.find("object") is not None:
            inside = sum(1 for _ in parent.iter("object")) - (parent.tag == "object")
            raise UserError(
                f"{path}: {inside:,} <object> within <{parent.tag[:60]}>, where none is looked "
                "for; move them up into <annotation>"
            )


def read_text(path: Path) -> str:
    """The text of an XML file without entities, which can grow without bound or name other
    files.

    They are refused before the parser sees them. So is a zero byte, for then the parser
    would read UTF-16, and find entities that this search cannot.
    """
    check_kind(path)
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None

    refused = re.search(r"<!DOCTYPE|<!ENTITY|\0", text)
    if refused:
        line = text.count("\n", 0, refused.start()) + 1
        raise UserError(
            f"{path}:{line}: {refused[0]!r} has no place in an annotation; remove it, save as UTF-8"
        )
    return text


def read_size(root: ET.Element) -> tuple[int, int] | None:
    """-> width, height; None where the file does not say, or says no number."""
    try:
        width = round(float(root.findtext("size/width", "")))
        height = round(float(root.findtext("size/height", "")))
    except (ValueError, OverflowError):
        return None
    return width, height


def read_object(where: str, element: ET.Element, enclose: bool) -> Object:
    """One object, checked. `where` names it in an error."""
    class_name = composed((element.findtext("name") or "").strip())
    where += f" ({short(class_name)})"
    box_xyxy = read_box(where, element, enclose)
    text = (element.findtext("difficult") or "").strip()
    word = text.lower()
    if not class_name or word not in (*YES, *NO, *UNSAID):
        raise UserError(
            f"{where}: <name> is empty or <difficult> is {short(text)}, not 0 or 1; correct it"
        )
    return Object(class_name, box_xyxy, None if word in UNSAID else word in YES)


def read_box(where: str, element: ET.Element, enclose: bool) -> list[float]:
    """The <bndbox> of an object, from 0; or the one around its <robndbox>."""
    if element.find("bndbox") is None:
        if enclose and element.find("robndbox") is not None:
            return enclosing(where, element)
        others = ", ".join(f"<{child.tag[:20]}>" for child in element if len(child))
        rotated = "; `enclose: true` takes the box around it" if "<robndbox>" in others else ""
        raise UserError(
            f"{where}: it has no <bndbox> but {others or 'nothing'}{rotated}; remove it"
        )
    sides = ("xmin", "ymin", "xmax", "ymax")
    box = [read_number(where, element, f"bndbox/{side}") for side in sides]
    xmin, ymin, xmax, ymax = box
    if xmin > xmax or ymin > ymax:
        raise UserError(f"{where}: corners are swapped in {box}; xmin, ymin come before xmax, ymax")
    in_parts = all(0 <= side <= 1 for side in box)
    if in_parts and any(side % 1 for side in box):
        raise UserError(
            f"{where}: {box} are parts of the sides, from 0 to 1; multiply by width and height"
        )
    return [xmin - 1, ymin - 1, xmax, ymax]


def enclosing(where: str, element: ET.Element) -> list[float]:
    """The upright box around a <robndbox>, from 0: its centre, sides, and angle in radians."""
    fields = ("cx", "cy", "w", "h", "angle")
    cx, cy, w, h, angle = (read_number(where, element, f"robndbox/{field}") for field in fields)
    cosine = abs(math.cos(angle))
    sine = abs(math.sin(angle))
    half_width = (w * cosine + h * sine) / 2
    half_height = (w * sine + h * cosine) / 2
    return [cx - half_width - 1, cy - half_height - 1, cx + half_width, cy + half_height]


def read_number(where: str, element: ET.Element, path: str) -> float:
    """The number at a path below an object."""
    text = (element.findtext(path) or "").strip()
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not abs(number) < MAX_COORDINATE:  # NaN too
        outer, _, field = path.partition("/")
        raise UserError(
            f"{where}: {field} is {short(text)}, not a number of pixels; correct its <{outer}>"
        )
    return number
