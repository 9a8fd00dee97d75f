"""Predictions from Python are those of the command."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import kdmini
from kdmini import Predictor
from kdmini.checkpoint import save_best
from kdmini.contracts import UserError
from kdmini.segmentation.fast_scnn import FastSCNN
from kdmini.tools.predict import main

ORIENTATION = 0x0112  # EXIF's tag
LEFT = 8  # to be turned by a quarter to the left
LOW = 0.0002  # a score that a detector reaches without training


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of three sizes, one larger than the networks see it."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    paths = []
    for number, size in enumerate(((48, 64), (200, 90), (33, 31))):
        path = folder / f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(path)
        paths.append(path)
    return paths


def commanded(weights: Path, pictures: list[Path], out: Path, *options: str) -> list[dict]:
    main([str(weights), *map(str, pictures), "--out", str(out), "--device", "cpu", *options])
    return json.loads((out / "predictions.json").read_text())


def test_boxes_are_those_of_the_command(
    teacher_file: Path, pictures: list[Path], tmp_path: Path
) -> None:
    entries = commanded(teacher_file, pictures, tmp_path / "out", "--score", str(LOW))
    predictor = Predictor(teacher_file, device="cpu", score=LOW)
    answers = predictor(pictures)
    assert len(answers) == len(entries) == 3
    assert sum(len(answer["scores"]) for answer in answers) > 20
    for answer, entry in zip(answers, entries, strict=True):
        boxes = np.array([found["box_xyxy"] for found in entry["detections"]]).reshape(-1, 4)
        np.testing.assert_allclose(answer["boxes_xyxy"], boxes, atol=0.006)
        assert answer["names"] == [found["label"] for found in entry["detections"]]
        assert [predictor.names[label] for label in answer["labels"]] == answer["names"]
        scores = [found["score"] for found in entry["detections"]]
        np.testing.assert_allclose(answer["scores"], scores, atol=6e-5)


def test_masks_are_those_of_the_command(pictures: list[Path], tmp_path: Path) -> None:
    weights = tmp_path / "best.pt"
    save_best(weights, FastSCNN(["ground", "cup", "fork"]), 64, 0, 0.0)
    entries = commanded(weights, pictures, tmp_path / "out")
    for picture, entry in zip(pictures, entries, strict=True):
        mask = Predictor(weights, device="cpu")(picture)["mask"]
        with Image.open(tmp_path / "out" / entry["mask"]) as image:
            np.testing.assert_array_equal(mask, np.asarray(image))


def test_a_picture_may_be_a_path_an_array_or_an_image(
    teacher_file: Path, pictures: list[Path]
) -> None:
    predictor = Predictor(teacher_file, device="cpu", score=LOW, imgsz=96)
    expected = predictor(str(pictures[1]))
    with Image.open(pictures[1]) as image:
        array = np.asarray(image)
        given = [array, array[::-1][::-1], image, pictures[1]]
        for picture, answer in zip(given, predictor(given), strict=True):
            np.testing.assert_array_equal(answer["boxes_xyxy"], expected["boxes_xyxy"])
            np.testing.assert_array_equal(predictor(picture)["boxes_xyxy"], expected["boxes_xyxy"])
    assert predictor([]) == []


def test_a_file_is_turned_as_people_look_at_it_and_an_array_is_not(
    teacher_file: Path, pictures: list[Path], tmp_path: Path
) -> None:
    with Image.open(pictures[1]) as image:
        exif = Image.Exif()
        exif[ORIENTATION] = LEFT
        image.save(tmp_path / "a.png", exif=exif)
        stored = np.asarray(image)
    predictor = Predictor(teacher_file, device="cpu", score=LOW)
    found, expected = predictor([tmp_path / "a.png", np.rot90(stored)])
    np.testing.assert_array_equal(found["boxes_xyxy"], expected["boxes_xyxy"])
    assert len(expected["scores"]) > 0


@pytest.mark.parametrize(
    "picture, said",
    [
        (np.zeros((8, 8), np.uint8), r"no uint8 of \(8, 8\)"),
        (np.zeros((8, 8, 3), np.float32), "no float32"),
        (np.zeros((0, 8, 3), np.uint8), r"no uint8 of \(0, 8, 3\)"),
        (7, "no int"),
        ("nowhere.jpg", "nowhere.jpg"),
    ],
)
def test_what_is_no_picture_is_one_line(teacher_file: Path, picture: object, said: str) -> None:
    predictor = Predictor(teacher_file, device="cpu")
    with pytest.raises(UserError, match=said) as error:
        predictor([picture])
    assert "\n" not in str(error.value)


def test_options_are_those_of_the_task(tmp_path: Path) -> None:
    weights = tmp_path / "best.pt"
    save_best(weights, FastSCNN(["ground", "cup"]), 64, 0, 0.0)
    with pytest.raises(UserError, match="score"):
        Predictor(weights, score=0.5)
    with pytest.raises(AttributeError, match="no attribute 'Predictr'"):
        _ = kdmini.Predictr
