"""Two lists of class names, compared or matched: a label is an index, so the order counts."""

from collections.abc import Sequence

from kdmini.contracts import UserError

LISTED = 8  # names in a message

# the VOC classes that COCO calls otherwise
COCO_NAME = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}


def refuse_other_classes(
    ours: Sequence[str], theirs: Sequence[str], us: str, them: str = "the data"
) -> None:
    """Raises UserError unless the two, which the message calls `us` and `them`, have the same
    classes in the same order.
    """
    if fault := difference(ours, theirs, us, them):
        raise UserError(f"{fault}; they have to be the same, in one order")


def difference(ours: Sequence[str], theirs: Sequence[str], us: str, them: str) -> str:
    """What tells the lists apart, in words that name the two; empty where they are equal."""
    if list(ours) == list(theirs):
        return ""
    only_us = [name for name in ours if name not in theirs]
    only_them = [name for name in theirs if name not in ours]
    if len(ours) != len(theirs) or only_us or only_them:
        return (
            f"{us} has {len(ours)} classes, {them} {len(theirs)} "
            f"(only in {us}: {listed(only_us)}; only in {them}: {listed(only_them)})"
        )
    first = next(i for i, name in enumerate(ours) if name != theirs[i])
    return (
        f"{us} and {them} have the same classes in another order: "
        f"class {first} is {ours[first]!r} in {us}, {theirs[first]!r} in {them}"
    )


def listed(names: Sequence[str]) -> str:
    """The first few, and how many more there are."""
    first = ", ".join(repr(name[:40]) for name in names[:LISTED])
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return (first or "none") + more


def source_rows(names_of_file: Sequence[str], names: Sequence[str]) -> dict[int, int]:
    """Row of each of `names` that the file has -> its row in the file.

    A class may stand there under its VOC or its COCO name; its own name goes first.
    """
    row_of = {COCO_NAME.get(name, name): row for row, name in enumerate(names_of_file)}
    row_of |= {name: row for row, name in enumerate(names_of_file)}
    source = {}
    for row, name in enumerate(names):
        coco_name = COCO_NAME.get(name, name)
        if name in row_of:
            source[row] = row_of[name]
        elif coco_name in row_of:
            source[row] = row_of[coco_name]
    return source
