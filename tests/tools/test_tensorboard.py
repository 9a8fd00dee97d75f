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

OF_TRAINING = ["loss/box", "loss/attention", "lambda/attention", "lr", "images/s", "skipped"]
SCORES = ["score/AP50-95", "score/VOC07"]
DISTANCES = ["distance/raw", "distance/aligned/model.6"]
KEYS = [*OF_TRAINING, *SCORES, *DISTANCES]
EPOCHS = range(-1, 6)


def record(epoch: int) -> dict:
    """A line of metrics.jsonl; validated every second epoch, and before training."""
    if epoch < 0:
        keys = DISTANCES
    elif epoch % 2:
        keys = OF_TRAINING
    else:
        keys = KEYS
    return {"epoch": epoch, **{key: 0.5 + epoch + KEYS.index(key) / 8 for key in keys}}


def write(run: Path, records: list[dict]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "pictures").mkdir(parents=True)
    (folder / "config.yaml").write_text("run: run\n")
    write(folder, [record(epoch) for epoch in EPOCHS])
    Image.new("RGB", (40, 30), "red").save(folder / "pictures" / "curves.png")
    return folder


def read(run: Path) -> EventAccumulator:
    reader = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    return reader.Reload()


def points(reader: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in reader.Scalars(tag)]


def expected(key: str, epochs: range) -> list[tuple[int, float]]:
    return [(epoch + 1, record(epoch)[key]) for epoch in epochs if key in record(epoch)]


def test_every_number_is_there_once_at_its_epoch_under_its_key(run: Path) -> None:
    tensorboard.main([str(run)])
    tensorboard.main([str(run)])
    reader = read(run)
    assert set(reader.Tags()["scalars"]) == set(KEYS)
    for key in KEYS:
        assert points(reader, key) == expected(key, EPOCHS), key
    assert len(list((run / "tensorboard").iterdir())) == 1


def test_what_is_no_number_is_left_out(run: Path) -> None:
    values = {"a": True, "b": 10**400, "c": "0.5", "d": None, "e": 0.5}
    record = {"epoch": 9, **{f"score/{name}": value for name, value in values.items()}}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    tensorboard.main([str(run)])
    scores = {tag for tag in read(run).Tags()["scalars"] if tag.startswith("score/")}
    assert not scores & {f"score/{name}" for name in "abcd"}
    assert points(read(run), "score/e") == [(10, 0.5)]


def test_pictures_are_shown_as_they_are(run: Path) -> None:
    tensorboard.main([str(run)])
    reader = read(run)
    assert reader.Tags()["images"] == ["pictures/curves"]
    (image,) = reader.Images("pictures/curves")
    assert image.step == 6
    assert (image.width, image.height) == (40, 30)
    assert image.encoded_image_string == (run / "pictures" / "curves.png").read_bytes()


def test_a_resumed_run_takes_back_what_it_forgot_also_where_tensorboard_is_open(run: Path) -> None:
    tensorboard.main([str(run)])
    opened = read(run)
    for epochs in (range(-1, 3), range(-1, 4)):
        write(run, [record(epoch) for epoch in epochs])
        tensorboard.main([str(run)])
        for reader in (opened.Reload(), read(run)):
            assert points(reader, "loss/box") == expected("loss/box", epochs)
            assert reader.Images("pictures/curves")[-1].step == epochs[-1] + 1
        sizes = [path.stat().st_size for path in (run / "tensorboard").iterdir()]
        assert sum(size > 0 for size in sizes) == 1


# should it ever hang, it ends, and says where
FOLLOWING = """
import faulthandler
from kdmini.tools import tensorboard
faulthandler.dump_traceback_later(100, exit=True)
tensorboard.SECONDS = 0.05
tensorboard.main()
"""


def test_follow_looks_again_until_it_is_interrupted(run: Path) -> None:
    write(run, [])
    (run / "pictures" / "curves.png").unlink()
    command = [sys.executable, "-c", FOLLOWING, str(run), "--follow"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        assert "tensorboard --logdir" in process.stdout.readline()
        assert "no epoch to show yet" in process.stdout.readline()
        write(run, [record(0)])
        assert "tfevents" in process.stdout.readline()
        time.sleep(0.2)  # looks that find nothing new say nothing
        process.terminate()
        assert process.stdout.read() == ""
        assert process.stderr.read() == ""
        assert process.wait() == 143
    assert points(read(run), "loss/box") == expected("loss/box", range(1))


def test_nothing_half_written_stays_where_the_disk_is_full(
    run: Path, monkeypatch: pytest.MonkeyPatch
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
    assert points(read(run), "loss/box") == expected("loss/box", EPOCHS)


def refusal(run: Path) -> str:
    """The one line that the tool ends with."""
    with pytest.raises(SystemExit) as left:
        tensorboard.main([str(run)])
    line = str(left.value)
    assert line.startswith("error: ")
    assert "\n" not in line
    return line


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("metrics.jsonl", b"\xff\n", "metrics.jsonl: cannot be read"),
        ("metrics.jsonl", b'{"loss/box": 1}\n', "metrics.jsonl:1: "),
        ("metrics.jsonl", b"[1]\n", "metrics.jsonl:1: '[1]' is no record of an epoch"),
        ("pictures/curves.png", b"half", "curves.png: is no PNG"),
        ("pictures/curves.png", tensorboard.PNG_SIGNATURE + b"half", "curves.png: is no PNG"),
        ("tensorboard", b"", "cannot write"),
    ],
)
def test_a_file_that_is_wrong_is_named(run: Path, name: str, content: bytes, message: str) -> None:
    (run / name).write_bytes(content)
    assert message in refusal(run)


def test_a_folder_that_is_no_run_is_named(run: Path) -> None:
    (run / "config.yaml").unlink()
    assert f"{run}: has no config.yaml, so it is no run" in refusal(run)


def test_without_the_package_it_is_named(tmp_path: Path) -> None:
    code = "import sys\nsys.modules['tensorboard'] = None\nimport kdmini.tools.tensorboard"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "pip install -e '.[tb]'" in done.stderr
