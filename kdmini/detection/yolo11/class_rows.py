"""The rows of the class branch, one a class, carried over by class name."""

from collections.abc import Mapping, Sequence

from torch import Tensor

# the VOC classes that COCO calls otherwise
COCO_NAME = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}

# what has one row a class, at the three levels
CLASS_ROWS = [f"model.23.cv3.{level}.2.{kind}" for level in range(3) for kind in ("weight", "bias")]


def class_tensors(
    of_file: Mapping[str, Tensor], fresh: Mapping[str, Tensor], source: Mapping[int, int]
) -> dict[str, Tensor]:
    """The CLASS_ROWS, by key: the file's rows where it has the class, else the fresh ones.

    source: row -> row in the file.
    """
    tensors = {key: fresh[key].clone() for key in CLASS_ROWS}
    for key, tensor in tensors.items():
        for row, row_of_file in source.items():
            tensor[row] = of_file[key][row_of_file]
    return tensors


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
