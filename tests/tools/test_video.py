"""Videos: those that are whole, cut off, turned or none, and the film that is made of one."""

import json
import os
import signal
import struct
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kdmini.contracts import UserError
from kdmini.tools import video
from kdmini.tools.predict import main

av = pytest.importorskip("av", reason="PyAV, the extra `video`, is not installed")

WIDTH = 64
HEIGHT = 48
FRAMES = 20
RATE = 10
# what stands in the header of an MP4 for a picture as it is stored, and for one that players
# turn by a quarter to the right
AS_STORED = struct.pack(">9i", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
TO_THE_RIGHT = struct.pack(">9i", 0, 0x10000, 0, -0x10000, 0, 0, 0, 0, 0x40000000)
LOW = 0.0002  # a score that a detector reaches without training


def pixels_of(number: int) -> np.ndarray:
    """Ever brighter; the upper left corner is black, and the rest noisy, so that a frame takes
    some bytes.
    """
    noise = np.random.default_rng(number).integers(0, 30, (HEIGHT, WIDTH, 3))
    frame = (60 + 8 * number + noise).astype(np.uint8)
    frame[:16, :16] = 0
    return frame


def write_video(path: Path, frames: int = FRAMES, **settings: Any) -> Path:
    with av.open(str(path), "w", **settings) as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.width = WIDTH
        stream.height = HEIGHT
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 4_000_000
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(pixels_of(number), format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """Its table of frames stands first, so that a part of it can be read."""
    return write_video(tmp_path / "clip.mp4", options={"movflags": "faststart"})


def cut(path: Path, share: float) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def told(weights: Path, *arguments: object) -> None:
    main([str(weights), *map(str, arguments), "--device", "cpu"])


def refused(weights: Path, *arguments: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        told(weights, *arguments)
    message = str(stopped.value.code)
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


# --- read


def test_all_frames_are_read_in_order_with_their_times(clip: Path) -> None:
    film = video.Video(str(clip))
    frames = list(film.frames())
    assert [frame.number for frame in frames] == [*range(FRAMES)]
    assert [frame.seconds for frame in frames] == pytest.approx([n / RATE for n in range(FRAMES)])
    for frame in frames:
        assert frame.pixels.shape == (HEIGHT, WIDTH, 3)
        assert frame.pixels.mean() == pytest.approx(pixels_of(frame.number).mean(), abs=4)
    assert (film.expected, film.rate, film.fault()) == (FRAMES, RATE, "")


def test_a_telephone_that_was_held_upright_is_seen_upright(clip: Path) -> None:
    content = clip.read_bytes()
    start = content.index(b"tkhd")
    matrix = content.index(AS_STORED, start)
    rest = content[matrix + len(AS_STORED) :]
    clip.write_bytes(content[:matrix] + TO_THE_RIGHT + rest)
    pixels = next(iter(video.Video(str(clip)).frames())).pixels
    assert pixels.shape == (WIDTH, HEIGHT, 3)
    expected = np.rot90(pixels_of(0), -1)  # a quarter to the right, as players do
    assert np.abs(pixels.astype(float) - expected).mean() < 12
    assert pixels[:16, -16:].mean() < 20


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.avi"])
def test_of_a_file_that_is_cut_off_the_rest_is_read(tmp_path: Path, name: str) -> None:
    options = {"movflags": "faststart"} if name.endswith("mp4") else {}
    film = video.Video(str(cut(write_video(tmp_path / name, options=options), 0.6)))
    read = len(list(film.frames()))
    assert 3 < read < FRAMES - 3
    assert film.fault() == (
        f"{tmp_path / name}: damaged, or cut off; {read} frames could be read, of about {FRAMES}"
    )


def test_damage_in_the_middle_costs_the_frames_that_it_hit(clip: Path) -> None:
    with av.open(str(clip)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux() if packet.size]
    place, size = packets[FRAMES // 2]
    content = bytearray(clip.read_bytes())
    content[place : place + size] = bytes(size)
    clip.write_bytes(content)
    film = video.Video(str(clip))
    assert len(list(film.frames())) == FRAMES - 1
    assert "19 frames could be read, of about 20" in film.fault()


@pytest.mark.parametrize("kind", ["empty", "text", "list", "pipe", "folder"])
def test_what_is_no_video_is_one_line(clip: Path, kind: str) -> None:
    path = clip.with_name("a\x1b.mp4")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        texts = {"empty": "", "text": "a text", "list": f"ffconcat version 1.0\nfile {clip.name}\n"}
        path.write_text(texts[kind])
    with pytest.raises(UserError) as caught:
        list(video.Video(str(path)).frames())
    assert "a\\x1b.mp4" in str(caught.value)
    assert "\n" not in str(caught.value)


# --- written


def pages(size: tuple[int, int], count: int) -> list[Image.Image]:
    return [Image.new("RGB", size, (40 * number, 0, 0)) for number in range(count)]


def written(path: Path) -> list[video.Frame]:
    return list(video.Video(str(path)).frames())


def test_a_film_has_its_pages_at_their_times(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    times = [0.0, 0.1, 0.25, 0.25, 1.0]
    with video.film(path, Fraction(10)) as film:
        for page, seconds in zip(pages((31, 17), 4) + pages((40, 8), 1), times, strict=True):
            film.add(page, seconds)
        assert not path.exists()
    assert [*tmp_path.iterdir()] == [path]
    frames = written(path)
    assert [frame.seconds for frame in frames] == pytest.approx([0, 0.1, 0.25, 0.251, 1.0])
    assert {frame.pixels.shape for frame in frames} == {(18, 32, 3)}  # even sides
    reds = [frame.pixels[2:6, 2:20, 0].mean() for frame in frames]
    assert reds == pytest.approx([0, 40, 80, 120, 0], abs=6)


def test_of_a_film_that_fails_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), video.film(tmp_path / "film.mp4", Fraction(10)) as film:
        film.add(pages((32, 16), 1)[0], 0.0)
        raise RuntimeError
    (tmp_path / "taken.mp4").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*taken\.mp4 \(Is a directory\)"):  # noqa: SIM117
        with video.film(tmp_path / "taken.mp4", Fraction(10)) as film:
            film.add(pages((32, 16), 1)[0], 0.0)
    assert [*tmp_path.iterdir()] == [tmp_path / "taken.mp4"]


# --- looked at


def test_a_video_gives_a_film_and_an_entry_of_every_frame(
    teacher_file: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    told(teacher_file, clip, "--out", out, "--score", LOW)
    assert {path.name for path in out.iterdir()} == {"clip.mp4", "predictions.json"}
    entries = json.loads((out / "predictions.json").read_text())
    assert [(entry["frame"], entry["seconds"]) for entry in entries] == [
        (number, number / RATE) for number in range(FRAMES)
    ]
    first = entries[0]
    assert (first["file"], first["picture"]) == (str(clip), "clip.mp4")
    assert (first["width"], first["height"]) == (WIDTH, HEIGHT)
    assert any(entry["detections"] for entry in entries)
    film = written(out / "clip.mp4")
    assert len(film) == FRAMES
    assert film[0].pixels.shape == (480, 640, 3)
    assert "images/s" in capsys.readouterr().out


def test_frames_are_told_of_as_pictures_are(
    teacher_file: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As JSON lines on the standard output, where nothing else is then."""
    still = next(iter(video.Video(str(clip)).frames())).pixels
    Image.fromarray(still).save(tmp_path / "still.png")
    settings = ["--out", tmp_path / "out", "--score", LOW, "--no-pictures", "--jsonl", "-"]
    told(teacher_file, tmp_path / "still.png", clip, *settings)
    picture, frame, *rest = map(json.loads, capsys.readouterr().out.splitlines())
    assert len(rest) == FRAMES - 1
    assert picture["detections"] == frame["detections"] != []
    assert not (tmp_path / "out").exists()


def test_a_video_that_ends_in_the_middle_gives_what_there_is(
    teacher_file: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    text = tmp_path / "text.mp4"
    text.write_text("a text")
    assert "above: 2;" in refused(teacher_file, text, cut(clip, 0.6), "--out", out)
    entries = json.loads((out / "predictions.json").read_text())
    assert 3 < len(entries) < FRAMES - 3
    assert len(written(out / "clip.mp4")) == len(entries)
    lines = [line for line in capsys.readouterr().err.splitlines() if ".mp4" in line]
    assert "text.mp4: not a usable video" in lines[0]
    assert f"clip.mp4: damaged, or cut off; {len(entries)} frames could be read" in lines[1]
    assert {path.name for path in out.iterdir()} == {"clip.mp4", "predictions.json"}


def test_a_camera_is_named_by_its_number(
    teacher_file: Path,
    clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert "no image could be used" in refused(teacher_file, "73", "--out", out)
    assert "camera 73: not a usable video (No such file" in capsys.readouterr().err
    clip.rename(tmp_path / "clip7.mp4")
    monkeypatch.setitem(video.CAMERAS, sys.platform, (f"{tmp_path}/clip{{}}.mp4", "mp4"))
    told(teacher_file, "7", "--out", out)
    assert {path.name for path in out.iterdir()} == {"camera7.mp4", "predictions.json"}
    assert len(written(out / "camera7.mp4")) == FRAMES


def test_a_signal_ends_it_and_what_there_is_becomes_whole(
    teacher_file: Path,
    clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    add = video.Film.add

    def signalled(self: video.Film, page: Image.Image, seconds: float) -> None:
        add(self, page, seconds)
        if round(seconds * RATE) == 9:  # of the second batch
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(video.Film, "add", signalled)
    with pytest.raises(SystemExit, match="143"):
        told(teacher_file, clip, tmp_path / "never.mp4", "--out", out)
    assert "never" not in capsys.readouterr().err
    assert len(written(out / "clip.mp4")) == 16
    assert len(json.loads((out / "predictions.json").read_text())) == 16
    assert {path.name for path in out.iterdir()} == {"clip.mp4", "predictions.json"}
