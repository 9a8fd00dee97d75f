"""Generated scenes as a set of classes."""

from typing import Any

import numpy as np

from kdmini.classification.truth import Labels
from kdmini.detection.voc import VOC


class FirstShape(VOC):
    """Generated scenes, of the class of their first object."""

    truth = Labels

    def __getitem__(self, index: int) -> tuple[np.ndarray, Any]:
        image, target = super().__getitem__(index)
        return image, {"label": int(target["labels"][0]), "id": target["id"]}
