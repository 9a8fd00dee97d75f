"""The rows of the class branch, one a class, carried over by class name."""

from collections.abc import Mapping

from torch import Tensor

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
