"""Where a weight file is looked for, and what is said where it is not."""

import re
from pathlib import Path

import pytest

from kdmini import weightfile
from kdmini.contracts import UserError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the cache in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KDMINI_CACHE", str(tmp_path / "cache"))
    return tmp_path


def touched(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_a_name_alone_is_looked_for_here_then_in_weights_then_in_the_cache(here: Path) -> None:
    in_cache = touched(here / "cache/yolo11s.pt")
    assert weightfile.find("yolo11s.pt") == in_cache
    in_weights = touched(Path("weights/yolo11s.pt"))
    assert weightfile.find("yolo11s.pt") == in_weights
    right_here = touched(Path("yolo11s.pt"))
    assert weightfile.find("yolo11s.pt") == right_here


def test_a_path_is_meant_as_it_stands(here: Path) -> None:
    touched(here / "cache/runs/best.pt")
    with pytest.raises(UserError, match="are not there"):
        weightfile.find("runs/best.pt")


@pytest.mark.parametrize("missing", ["best.pt", "runs/yolo11s.pt", "yolo11z.pt", "yolo11s.pt"])
def test_a_missing_file_is_named_with_the_command_that_fetches_public_ones(
    here: Path, missing: str
) -> None:
    message = rf"'{re.escape(missing)}' are not there.*kdmini\.tools\.download"
    with pytest.raises(UserError, match=message) as caught:
        weightfile.find(missing)
    assert ("--weights yolo11s.pt" in str(caught.value)) == (missing == "yolo11s.pt")


def test_a_folder_is_refused(here: Path) -> None:
    (here / "weights").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        weightfile.find("weights")
