"""Event files: read back with TensorBoard's own reader."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("tensorboard")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kdmini.tools import tensorboard

SCALARS = {
    "loss/box": "box",
    "loss/attention": "attention",
    "score/AP50-95": "AP50-95",
    "score/VOC07": "VOC07",
    "lambda/attention": "lambda/attention",
    "distance/raw": "distance/raw",
    "distance/aligned/model.6": "distance/aligned/model.6",
    "lr": "lr",
    "images/s": "images/s",
    "skipped": "skipped",
}


def record(epoch: int) -> dict:
    """A line of metrics.jsonl; validated every second epoch, and before training."""
    lines = {name: 0.5 + epoch + number / 8 for number, name in enumerate(SCALARS.values())}
    every = {"distance/raw", "distance/aligned/model.6"}
    if epoch < 0:
        lines = {name: lines[name] for name in every}
    elif epoch % 2:
        lines = {
            name: value for name, value in lines.items() if name not in every | {"AP50-95", "VOC07"}
        }
    return {"epoch": epoch, **lines}


def write(run: Path, records: list[dict]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "pictures").mkdir(parents=True)
    (folder / "config.yaml").write_text("run: run\n")
    write(folder, [record(epoch) for epoch in range(-1, 6)])
    Image.new("RGB", (40, 30), "red").save(folder / "pictures" / "curves.png")
    return folder


def read(run: Path) -> EventAccumulator:
    reader = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    return reader.Reload()


def points(reader: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in reader.Scalars(tag)]


def expected(name: str, epochs: range) -> list[tuple[int, float]]:
    return [(epoch + 1, record(epoch)[name]) for epoch in epochs if name in record(epoch)]


def test_every_number_is_there_once_at_its_epoch_in_its_group(run: Path) -> None:
    tensorboard.main([str(run)])
    tensorboard.main([str(run)])
    reader = read(run)
    assert set(reader.Tags()["scalars"]) == set(SCALARS)
    for tag, name in SCALARS.items():
        assert points(reader, tag) == expected(name, range(-1, 6)), tag
    assert len(list((run / "tensorboard").iterdir())) == 1


def test_pictures_are_shown_as_they_are(run: Path) -> None:
    tensorboard.main([str(run)])
    reader = read(run)
    assert reader.Tags()["images"] == ["pictures/curves"]
    (image,) = reader.Images("pictures/curves")
    assert (image.step, image.width, image.height) == (6, 40, 30)
    assert image.encoded_image_string == (run / "pictures" / "curves.png").read_bytes()


def test_a_resumed_run_takes_back_what_it_forgot_also_where_tensorboard_is_open(run: Path) -> None:
    tensorboard.main([str(run)])
    opened = read(run)
    for epochs in (range(-1, 3), range(-1, 4)):
        write(run, [record(epoch) for epoch in epochs])
        tensorboard.main([str(run)])
        for reader in (opened.Reload(), read(run)):
            assert points(reader, "loss/box") == expected("box", epochs)
            assert [image.step for image in reader.Images("pictures/curves")][-1] == epochs[-1] + 1
        assert sum(path.stat().st_size > 0 for path in (run / "tensorboard").iterdir()) == 1


def test_follow_looks_again_until_it_is_interrupted(run: Path) -> None:
    write(run, [])
    (run / "pictures" / "curves.png").unlink()
    code = "from kdmini.tools import tensorboard\ntensorboard.SECONDS = 0.05\ntensorboard.main()"
    command = [sys.executable, "-c", code, str(run), "--follow"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout and process.stderr
        told = [process.stdout.readline() for _ in range(2)]
        write(run, [record(0)])
        told.append(process.stdout.readline())
        time.sleep(0.2)  # looks that find nothing new say nothing
        process.terminate()
        assert (process.stdout.read(), process.stderr.read(), process.wait()) == ("", "", 143)
    assert "no epoch to show yet" in told[1]
    assert "tfevents" in told[2]
    assert points(read(run), "loss/box") == expected("box", range(1))


def test_nothing_half_written_stays_where_the_disk_is_full(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    tensorboard.main([str(run)])
    before = sorted((run / "tensorboard").iterdir())
    write(run, [record(0)])

    def full(self: Path, content: bytes) -> int:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(SystemExit, match="No space left on device"):
        tensorboard.main([str(run)])
    assert sorted((run / "tensorboard").iterdir()) == before
    assert points(read(run), "loss/box") == expected("box", range(6))


@pytest.mark.parametrize(
    "damage, told",
    [
        (lambda run: (run / "config.yaml").unlink(), "it is no run"),
        (
            lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\n"),
            "metrics.jsonl: cannot be read",
        ),
        (
            lambda run: (run / "metrics.jsonl").write_text('{"box": 1}\n'),
            "metrics.jsonl: cannot be read",
        ),
        (lambda run: (run / "metrics.jsonl").write_text("[1]\n"), "metrics.jsonl: cannot be read"),
        (lambda run: (run / "pictures" / "curves.png").write_text("half"), "curves.png: is no PNG"),
        (lambda run: (run / "tensorboard").write_text(""), "cannot write"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(run: Path, damage, told: str) -> None:
    damage(run)
    with pytest.raises(SystemExit) as raised:
        tensorboard.main([str(run)])
    assert (
        told in str(raised.value)
        and str(raised.value).startswith("error: ")
        and "\n" not in str(raised.value)
    )


def test_without_the_package_it_is_named(tmp_path: Path) -> None:
    code = "import sys\nsys.modules['tensorboard'] = None\nimport kdmini.tools.tensorboard"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "pip install 'kdmini[tb]'" in done.stderr
