"""What predict writes: for each task a writer."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, Protocol

from PIL import Image

from kdmini.classification.truth import Labels
from kdmini.contracts import Prediction, Truth, UserError
from kdmini.detection.truth import Boxes
from kdmini.segmentation.truth import Masks
from kdmini.tools.load import Loaded
from kdmini.tools.predict_boxes import BoxWriter
from kdmini.tools.predict_classes import ClassWriter
from kdmini.tools.predict_masks import MaskWriter


class Writer(Protocol):
    """What is said and drawn of one task's predictions; its constructor takes the network and,
    by name, those of `options` that were given.

    Optional: `save(prediction, out, stem)` writes what is said and no text, such as a mask,
    and returns {what: name of the file}; it raises UserError.
    """

    options: tuple[str, ...]

    def decode(self, preds: Any) -> list[Prediction]:
        """What the network returned -> of each image, what can be taken to its file."""
        ...

    def entry(self, prediction: Prediction) -> dict[str, Any]:
        """What the JSON says of an image. prediction: in pixels of the file."""
        ...

    def draw(self, image: Image.Image, prediction: Prediction, steady: bool = False) -> Image.Image:
        """The image with what was found on it.

        steady: no higher for what is found, as the pages of a video are.
        """
        ...

    def named(self, entry: Mapping[str, Any]) -> list[str]:
        """The classes that an entry finds, one as often as it does."""
        ...

    def summary(self, found: Counter[str]) -> str:
        """What was found in all images, by what `named` gave of each."""
        ...


WRITERS: dict[type[Truth], Any] = {
    Boxes: BoxWriter,
    Masks: MaskWriter,
    Labels: ClassWriter,
}


def make_writer(loaded: Loaded, options: Mapping[str, Any]) -> Writer:
    """Raises UserError for an option that its task does not have."""
    kind = WRITERS[loaded.truth]
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in kind.options:
            network = type(loaded.network).__name__
            raise UserError(f"--{name}: is for detections, and {network} gives none; leave it out")
    writer: Writer = kind(loaded.network, **given)
    return writer
