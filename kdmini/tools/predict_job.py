"""What predict does with each of its inputs: files and videos are looked at in batches, drawn
upon, and told of.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from kdmini.contracts import Prediction, UserError
from kdmini.signals import Stop
from kdmini.tools.canvas import save_jpeg
from kdmini.tools.entries import Add
from kdmini.tools.photographs import read_together, stems
from kdmini.tools.predictor import BATCH, Predictor
from kdmini.tools.video import Film, Frame, Video, film, is_camera

TITLE = 20  # characters of a progress bar's


@dataclass
class Job:
    """What is written, and what is known of it so far."""

    predictor: Predictor
    out: Path
    pictures: bool  # whether they are drawn
    add: Add
    stop: Stop
    found: Counter[str] = field(default_factory=Counter)  # objects, by class
    images: int = 0
    refused: int = 0

    def refuse(self, fault: object) -> None:
        self.refused += 1
        tqdm.write(str(fault), file=sys.stderr)

    def look_at(self, paths: Sequence[Path], videos: Sequence[str]) -> None:
        """Raises UserError where nothing is left."""
        titles = [f"camera{name}" if is_camera(name) else name for name in videos]
        names = stems([*map(str, paths), *titles])
        if paths:
            self.look_at_files(paths, names)
        for video, name in zip(videos, names[len(paths) :], strict=True):
            if self.stop.signum:
                break
            try:
                self.look_at_video(video, name)
            except UserError as error:
                self.refuse(error)
        if not self.images:
            raise UserError("no image could be used; each is named above")

    def look_at_files(self, paths: Sequence[Path], names: Sequence[str]) -> None:
        """names: of what is written of each, without an ending."""
        stem_of = dict(zip(paths, names, strict=False))
        with tqdm(total=len(paths), desc="predict", unit="img", disable=None) as bar:
            for pictures in read_together(paths, BATCH):
                usable = []
                for picture in pictures:
                    if picture.pixels is None:
                        self.refuse(picture.fault)
                    else:
                        usable.append((picture.path, picture.pixels))
                predictions = self.predictor.predictions([pixels for _, pixels in usable])
                for (path, pixels), prediction in zip(usable, predictions, strict=True):
                    try:
                        written = self.write(pixels, prediction, stem_of[path])
                    except UserError as error:
                        self.refuse(error)
                        continue
                    self.tell({"file": str(path)}, pixels, written, prediction)
                bar.update(len(pictures))
                if self.stop.signum:
                    return

    def write(self, pixels: np.ndarray, prediction: Prediction, stem: str) -> dict[str, str]:
        """Of one file -> what: name of the file that was written. Raises UserError."""
        writer = self.predictor.writer
        written = {}
        if self.pictures:
            written["picture"] = f"{stem}.jpg"
            image = Image.fromarray(pixels)
            save_jpeg(writer.draw(image, prediction), self.out / written["picture"])
        save = getattr(writer, "save", None)
        if save:
            written |= save(prediction, self.out, stem)
        return written

    def tell(
        self,
        what: dict[str, Any],
        pixels: np.ndarray,
        written: dict[str, str],
        prediction: Prediction,
    ) -> None:
        """The entry of an image. what: it is. written: of it."""
        height, width = pixels.shape[:2]
        entry = self.predictor.writer.entry(prediction)
        self.add({**what, "width": width, "height": height, **written, **entry})
        self.found.update(self.predictor.writer.named(entry))
        self.images += 1

    def look_at_video(self, name: str, stem: str) -> None:
        """Raises UserError where no frame can be used, or no film written."""
        video = Video(name)
        drawn = f"{stem}.mp4"
        written = {"picture": drawn} if self.pictures else {}
        frames = video.frames()
        filming: AbstractContextManager[Film | None] = nullcontext()
        if self.pictures:
            filming = film(self.out / drawn, video.rate)
        total = video.expected or None
        with (
            filming as pages,
            tqdm(total=total, desc=stem[:TITLE], unit="img", disable=None) as bar,
        ):
            while some := list(islice(frames, BATCH)):
                predictions = self.predictor.predictions([frame.pixels for frame in some])
                for frame, prediction in zip(some, predictions, strict=True):
                    if pages:
                        pages.add(self.page(frame, prediction), frame.seconds)
                    place = {"frame": frame.number, "seconds": round(frame.seconds, 3)}
                    self.tell({"file": name, **place}, frame.pixels, written, prediction)
                bar.update(len(some))
                if self.stop.signum:
                    return
        if fault := video.fault():
            self.refuse(fault)

    def page(self, frame: Frame, prediction: Prediction) -> Image.Image:
        image = Image.fromarray(frame.pixels)
        return self.predictor.writer.draw(image, prediction, steady=True)
