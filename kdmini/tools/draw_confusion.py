"""What each class was taken for, as a table of colours. Nothing here knows a metric.

Legend: K classes.
"""

from collections.abc import Sequence

import numpy as np

from kdmini.tools.draw import SMALL, Figure, blank

# inches
CELL = 0.45  # that a class is wide, where there are few
LEAST_SIDE = 3.0
MOST_SIDE = 30.0
LEGIBLE = 0.16  # the least that a class with its name takes

WRITTEN = 12  # classes, of which shares are written into the cells
DARK = 0.6  # a share under which a cell is dark


def confusion(
    counts: np.ndarray, names: Sequence[str], rows: Sequence[str], title: str, of_what: str
) -> Figure:
    """A row for each true class, a column for each answer: shares of the row.

    counts: (K, K), of true and predicted class. rows: K, what stands beside them. of_what:
    what was counted.
    """
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    count = len(names)
    side = min(max(CELL * count, LEAST_SIDE), MOST_SIDE)
    figure = blank(side + 3.5, side + 2, title)
    axis = figure.subplots()
    image = axis.imshow(shares, "viridis", vmin=0, vmax=1)
    if side / count >= LEGIBLE:
        axis.set_xticks(range(count), names, rotation=90, fontsize=SMALL)
        axis.set_yticks(range(count), rows, fontsize=SMALL)
    axis.set_xlabel("predicted", fontsize=SMALL + 1)
    axis.set_ylabel("true", fontsize=SMALL + 1)
    if count <= WRITTEN:
        for (row, column), share in np.ndenumerate(shares):
            colour = "white" if share < DARK else "black"
            text = f"{share:.2f}"
            axis.text(column, row, text, ha="center", va="center", color=colour, fontsize=SMALL)
    scale = figure.colorbar(image, shrink=0.6)
    scale.set_label(f"share of the true class's {of_what}", fontsize=SMALL)
    return figure
