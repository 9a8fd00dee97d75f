"""CIFAR's binary files, byte by byte."""

from pathlib import Path

import numpy as np
import pytest

from kdmini.classification.cifar import CIFAR
from kdmini.contracts import UserError

TEN = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
HUNDRED = [f"class_{label}" for label in range(100)]


def image_of(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)


def record(image: np.ndarray, *labels: int) -> bytes:
    """As the authors say it: labels, then 1024 red, 1024 green, 1024 blue, row by row."""
    planes = [bytes(image[row, column, channel] for row in range(32) for column in range(32))
              for channel in range(3)]  # fmt: skip
    return bytes(labels) + b"".join(planes)


@pytest.fixture
def ten(tmp_path: Path) -> Path:
    """CIFAR-10 with two images a file; image 2 n and 2 n + 1 of file n, labels n and 9."""
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    (folder / "batches.meta.txt").write_text("\n".join(TEN) + "\n\n")
    for n in range(6):
        name = f"data_batch_{n + 1}.bin" if n < 5 else "test_batch.bin"
        content = record(image_of(2 * n), n) + record(image_of(2 * n + 1), 9)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def hundred(tmp_path: Path) -> Path:
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    (folder / "fine_label_names.txt").write_text("\n".join(HUNDRED))
    (folder / "train.bin").write_bytes(record(image_of(0), 3, 77) + record(image_of(1), 4, 99))
    (folder / "test.bin").write_bytes(record(image_of(2), 0, 5))
    return folder


def test_the_images_and_labels_of_ten_classes(ten: Path) -> None:
    for root in (ten, ten.parent):
        train = CIFAR(str(root), "train")
        assert train.names == TEN
        assert len(train) == 10
        for index in range(10):
            image, target = train[index]
            assert np.array_equal(image, image_of(index))
            assert target["label"] == (9 if index % 2 else index // 2)
        assert train[3][1]["id"] == "data_batch_2.bin 1"
    test = CIFAR(str(ten), "test")
    assert [test[index][1]["label"] for index in range(len(test))] == [5, 9]
    assert not train.photographs & test.photographs
    assert train.report() == f"10 images in {ten}, where 50,000 are published"


def test_the_fine_labels_of_a_hundred_classes(hundred: Path) -> None:
    train = CIFAR(str(hundred), "train")
    assert [train[index][1]["label"] for index in range(2)] == [77, 99]
    assert np.array_equal(train[1][0], image_of(1))
    assert train.names == HUNDRED
    assert CIFAR(str(hundred), "test")[0][1] == {"label": 5, "id": "test.bin 0"}


# --- refused


def refused(root: Path, split: str = "train") -> str:
    with pytest.raises(UserError) as error:
        CIFAR(str(root), split)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("size", [0, 1, 3073, 3072 * 2, 2 * 3073 - 1, 2 * 3074])
def test_a_size_that_records_do_not_fill_is_refused(ten: Path, size: int) -> None:
    path = ten / "data_batch_4.bin"
    path.write_bytes(bytes(size))
    if size == 3073:
        assert len(CIFAR(str(ten), "train")) == 9
        return
    assert f"{path}: {size:,} bytes, no multiple of a record's 3,073" in refused(ten)


def test_a_missing_file_is_refused(ten: Path) -> None:
    (ten / "data_batch_3.bin").unlink()
    assert "data_batch_3.bin: no such file; unpack the binary version whole" in refused(ten)
    assert len(CIFAR(str(ten), "test")) == 2


def test_a_folder_without_the_names_or_with_both_is_refused(ten: Path, hundred: Path) -> None:
    assert "both" in refused(ten.parent)
    (ten / "batches.meta.txt").unlink()
    assert "has no batches.meta.txt or fine_label_names.txt" in refused(ten)


def test_names_that_are_too_few_are_refused(ten: Path) -> None:
    (ten / "batches.meta.txt").write_text("\n".join(TEN[:9]))
    assert "batches.meta.txt: 9 names, not 10" in refused(ten)


def test_a_label_beyond_the_classes_is_refused(ten: Path) -> None:
    (ten / "test_batch.bin").write_bytes(record(image_of(0), 10))
    with pytest.raises(UserError, match=r"test_batch\.bin: label 10 in record 0, of 10 classes"):
        CIFAR(str(ten), "test")[0]
