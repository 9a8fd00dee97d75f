"""Videos by PyAV, the extra `video`: frames of a file or a camera, and a video of what was
drawn of them.

Legend: H rows and W columns of a frame.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from kdmini.contracts import UserError
from kdmini.data.pictures import MAX_PIXELS
from kdmini.tools.growing import growing
from kdmini.typed import printable

# endings of a file that is a video
VIDEOS = {
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts"),
    *(".wmv", ".flv", ".3gp", ".ogv"),
}
# PyAV's names of what is read: a playlist would have it open other files, and addresses
FORMATS = "mov,matroska,avi,mpeg,mpegts,mpegvideo,asf,flv,ogg"
# by the number of a camera: what PyAV opens, and by which of its formats
CAMERAS = {"linux": ("/dev/video{}", "v4l2"), "darwin": ("{}", "avfoundation")}

RATE = Fraction(25)  # frames a second, where a file states none
TICKS = 1000  # a second, of the times in what is written
CODECS = ("libx264", "mpeg4")  # the first that PyAV has
# what may be missing of the frames that a file states, as its first may be for decoding alone
STATED = 0.02
ESTIMATED = 0.1  # where it states how long it is, which may be of the sound
QUARTER = 90  # degrees


class Frame(NamedTuple):
    """One image of a video."""

    number: int  # from 0
    seconds: float  # since the first
    pixels: np.ndarray  # (H, W, 3) uint8 RGB, turned as a player does


class Video:
    """A file, or a camera by its number. Raises UserError, also while it is read."""

    def __init__(self, name: str):
        self.name = name
        self.av = pyav(name)
        try:
            self.container = self.opened()
        except self.av.FFmpegError as error:
            raise self.unusable(error.strerror) from None
        if not self.container.streams.video:
            raise self.unusable("it has no pictures")
        self.stream = self.container.streams.video[0]
        self.stream.thread_type = "AUTO"
        self.rate = self.stream.average_rate or RATE
        seconds = (self.container.duration or 0) / self.av.time_base
        self.expected = self.stream.frames or round(seconds * self.rate)  # frames; 0: unknown
        self.missing = STATED if self.stream.frames else ESTIMATED
        self.read = 0  # frames, until now
        self.damaged = 0  # packets

    def opened(self) -> Any:
        if is_camera(self.name):
            if sys.platform not in CAMERAS:
                raise UserError(f"camera {self.name}: cameras are read on Linux and macOS alone")
            place, form = CAMERAS[sys.platform]
            return self.av.open(place.format(self.name), format=form)
        if not Path(self.name).is_file():  # a pipe would be waited for
            raise UserError(f"{printable(self.name)}: no such file")
        return self.av.open(f"file:{self.name}", options={"format_whitelist": FORMATS})

    def unusable(self, reason: str) -> UserError:
        return UserError(f"{self.title()}: not a usable video ({reason}); name another")

    def title(self) -> str:
        return f"camera {self.name}" if is_camera(self.name) else printable(self.name)

    def frames(self) -> Iterator[Frame]:
        """Those that can be decoded."""
        start = None
        try:
            for packet in self.container.demux(self.stream):
                for frame in self.decoded(packet):
                    if frame.width * frame.height > MAX_PIXELS:
                        raise self.unusable(f"more than {MAX_PIXELS:,} pixels")
                    time = self.read / float(self.rate) if frame.time is None else frame.time
                    start = time if start is None else start
                    upright = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // QUARTER)
                    yield Frame(self.read, time - start, np.ascontiguousarray(upright))
                    self.read += 1
        except self.av.FFmpegError:  # of the file: it ends here
            self.damaged += 1
        finally:
            self.container.close()
        if not self.read:
            raise self.unusable("no frame can be decoded")

    def decoded(self, packet: Any) -> list[Any]:
        try:
            return list(packet.decode())
        except self.av.FFmpegError:
            self.damaged += 1
            return []

    def fault(self) -> str:
        """What is wrong with it, once its frames are read; empty where nothing is known."""
        is_short = self.read < (1 - self.missing) * self.expected - 1
        if not is_short and not self.damaged:
            return ""
        of_all = f", of about {self.expected:,}" if self.expected else ""
        return f"{self.title()}: damaged, or cut off; {self.read:,} frames could be read{of_all}"


class Film:
    """Pages at their times, as a video in an MP4. All are as large as the first: of a larger
    one the right and the lower edge are left out.
    """

    def __init__(self, path: Path, rate: Fraction):
        self.av = pyav(str(path))
        self.path = path
        self.rate = rate
        self.last = -1  # tick
        self.container: Any = None

    def add(self, page: Image.Image, seconds: float) -> None:
        if self.container is None:
            self.begin(page)
        fitted = Image.new("RGB", (self.stream.width, self.stream.height), "white")
        fitted.paste(page)
        frame = self.av.VideoFrame.from_ndarray(np.asarray(fitted), format="rgb24")
        self.last = max(round(seconds * TICKS), self.last + 1)
        frame.pts = self.last
        frame.time_base = Fraction(1, TICKS)
        self.container.mux(self.stream.encode(frame))

    def begin(self, page: Image.Image) -> None:
        self.container = self.av.open(f"file:{self.path}", "w", format="mp4")
        codec = next(name for name in CODECS if name in self.av.codecs_available)
        self.stream = self.container.add_stream(codec, rate=self.rate)
        # colours are stored for two pixels by two
        self.stream.width = page.width + page.width % 2
        self.stream.height = page.height + page.height % 2
        self.stream.pix_fmt = "yuv420p"
        self.stream.codec_context.time_base = Fraction(1, TICKS)

    def end(self) -> None:
        self.container.mux(self.stream.encode(None))
        self.container.close()


@contextmanager
def film(path: Path, rate: Fraction) -> Iterator[Film]:
    """-> a film that is there at the end. Raises UserError where it cannot be written."""
    with growing(path) as part:
        pages = Film(part, rate)
        try:
            yield pages
            pages.end()
        except pages.av.FFmpegError as error:
            raise UserError(
                f"cannot write {printable(path)} ({error.strerror}); make room, write elsewhere, "
                "or leave pictures out with --no-pictures"
            ) from None


def pyav(name: str) -> Any:
    """The package. Raises UserError where it is not installed."""
    try:
        import av
    except ImportError:
        raise UserError(
            f"{printable(name)}: videos are read by PyAV, which is not installed: "
            "pip install -e '.[video]' in the checkout"
        ) from None
    return av


def is_camera(name: str) -> bool:
    return name.isdecimal() and not Path(name).exists()


def is_video(name: str) -> bool:
    return is_camera(name) or Path(name).suffix.lower() in VIDEOS
