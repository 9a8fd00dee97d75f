"""What is read from YOLO11 weight files: from public ones, and from kdmini's own."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kdmini.contracts import UserError
from kdmini.detection.yolo11 import weights
from kdmini.detection.yolo11.model import YOLO11
from kdmini.tools.load import load_detector
from tests.detection.yolo11.watched import refused
from tests.detection.yolo11.weight_files import (
    COCO_NAMES,
    LICENSE,
    ROWS,
    TINY,
    CocoFile,
    PublicClasses,
    assert_equal,
    detector,
    own_content,
    own_file,
    public_file,
    public_model,
    rounded,
    tiny_n,
    zipped,
)

# --- public files


def test_a_public_file_is_read_whole(coco_n: CocoFile) -> None:
    file = weights.read(coco_n.path)
    assert_equal(file.state, coco_n.state)
    assert len(file.state) == 499  # as published
    assert {value.dtype for value in file.state.values()} == {torch.float32, torch.int64}
    assert file.names == COCO_NAMES
    assert file.scale == "n"
    assert file.sppf_act
    assert file.license == LICENSE
    assert file.version == "8.3.0"
    assert file.sha256 == hashlib.sha256(coco_n.path.read_bytes()).hexdigest()


def test_one_line_says_what_a_file_is(coco_n: CocoFile, capsys: pytest.CaptureFixture[str]) -> None:
    file = weights.read(coco_n.path)
    line = capsys.readouterr().out
    assert line == (
        f"{coco_n.path}: YOLO11n, 80 classes, "
        f"version '8.3.0', license '{LICENSE}', sha256 {file.sha256[:12]}\n"
    )


def test_a_model_loads_it_strictly(coco_n: CocoFile) -> None:
    model = YOLO11(COCO_NAMES, "n", weights=str(coco_n.path))
    assert_equal(model.state_dict(), coco_n.state)


@pytest.mark.parametrize("stripped", [False, True])
def test_ema_is_preferred_to_the_model_that_was_stepped(
    public: PublicClasses, tmp_path: Path, stripped: bool
) -> None:
    average = tiny_n()
    state = rounded(average.state_dict())
    path = public_file(
        tmp_path / "last.pt",
        None if stripped else public["DetectionModel"](),
        ema=public_model(public, average),
        optimizer={
            "state": {0: {"momentum_buffer": torch.rand(3)}},
            "param_groups": [{"lr": 0.1}],
        },
        epoch=3,
    )
    assert_equal(weights.read(path).state, state)


def test_a_detector_without_the_silu_in_sppf_is_seen(
    public: PublicClasses, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_n()
    model.model[9].cv1.act = nn.Identity()
    file = weights.read(public_file(tmp_path / "f.pt", public_model(public, model)))
    assert not file.sppf_act
    assert "YOLO11n (no SiLU in SPPF)" in capsys.readouterr().out


def of_width(width: int, blocks: int) -> YOLO11:
    """channels of layer 0, blocks in layer 2: by these a scale is known."""
    model = detector(TINY, ["a", "b"])
    model.model[0].conv = nn.Conv2d(3, width, 3, bias=False)
    model.model[2].m = nn.ModuleList(nn.Conv2d(1, 1, 1) for _ in range(blocks))
    return model


@pytest.mark.parametrize(
    "scale, width, blocks", [("n", 16, 1), ("s", 32, 1), ("m", 64, 1), ("l", 64, 2), ("x", 96, 2)]
)
def test_the_scale_is_that_of_the_tensors_whatever_the_file_is_called(
    public: PublicClasses, tmp_path: Path, scale: str, width: int, blocks: int
) -> None:
    model = public_model(public, of_width(width, blocks))
    assert weights.read(public_file(tmp_path / "yolo11m.pt", model)).scale == scale


@pytest.mark.parametrize("blocks", [1, 2])
def test_a_detector_of_no_public_scale_is_refused(
    public: PublicClasses, tmp_path: Path, blocks: int
) -> None:
    model = public_model(public, of_width(24, blocks))
    refused(public_file(tmp_path / "yolo11m.pt", model), "no YOLO11 of the scales")


def test_hooks_in_the_file_are_ignored(public: PublicClasses, tmp_path: Path) -> None:
    root = public_model(public, tiny_n())
    root._forward_hooks[0] = nn.SiLU()
    root.anything = [nn.Conv2d(1, 1, 1)]
    assert weights.read(public_file(tmp_path / "f.pt", root)).scale == "n"


def test_a_file_of_another_task_is_called_what_it_is(public: PublicClasses, tmp_path: Path) -> None:
    path = public_file(tmp_path / "yolo11n-pose.pt", public["PoseModel"]())
    refused(path, "is a pose checkpoint")


@pytest.mark.parametrize("task", ["Segmentation", "Classification", "OBB"])
def test_other_tasks_are_known_by_the_name_of_their_model(tmp_path: Path, task: str) -> None:
    model = f"\x80\x02cultralytics.nn.tasks\n{task}Model\n)R.".encode("latin1")
    refused(zipped(tmp_path / "f.pt", model), f"is a {task.lower()} checkpoint")


@pytest.mark.parametrize(
    "model, message",
    [
        (None, "no YOLO11 detector"),
        ({"model.0.conv.weight": torch.rand(3)}, "a bare state_dict without 'model.23"),
        (torch.rand(3), "no YOLO11 detector, but 'torch._utils._rebuild_tensor_v2'"),
    ],
)
def test_a_file_without_the_tree_of_a_detector_is_refused(
    tmp_path: Path, model: Any, message: str
) -> None:
    refused(public_file(tmp_path / "f.pt", model), message)


# --- kdmini's own files


@pytest.mark.parametrize("scale, read_as", [("n", "n"), (TINY, tuple(TINY))])
def test_an_own_file_comes_back_as_it_was_saved(tmp_path: Path, scale: Any, read_as: Any) -> None:
    model = detector(scale, ["cat", "dog"])
    path = saved(tmp_path / "best.pt", model, license="AGPL-3.0", sppf_act=False)
    file = weights.read(path)
    assert_equal(file.state, model.state_dict())
    assert file.names == ["cat", "dog"]
    assert file.scale == read_as
    assert not file.sppf_act
    assert file.license == "AGPL-3.0"
    assert_equal(weights.fit(file, model.state_dict(), model.names, scale, None), file.state)


@pytest.mark.parametrize("scale", ["n", TINY])
def test_an_own_file_that_states_another_scale_does_not_fit(tmp_path: Path, scale: Any) -> None:
    model = detector(scale, ["cat", "dog"])
    path = saved(tmp_path / "best.pt", model, scale="m")
    with pytest.raises(UserError, match="is YOLO11m, the config says YOLO11"):
        YOLO11(model.names, scale, weights=str(path))
    with pytest.raises(UserError, match=r"other shapes in 'model\..*so it is no YOLO11m"):
        YOLO11(model.names, "m", weights=str(path))


@pytest.mark.parametrize(
    "claimed, message",
    [
        ([1e6, 0.0625, 256], "has 1 blocks in 'model.2'"),
        ([0.5, 1e6, 256], "other shapes in 'model.0.conv.weight'"),
        ([0.5, 0.0625, 1e6], "other shapes in 'model.7.conv.weight'"),
    ],
)
def test_a_size_that_the_tensors_do_not_bear_out_is_not_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, claimed: list[float], message: str
) -> None:
    model = detector(TINY, ["cat", "dog"])
    path = saved(tmp_path / "best.pt", model, scale=claimed)
    monkeypatch.setattr("kdmini.detection.yolo11.model.build_layers", None)
    with pytest.raises(UserError, match=message):
        load_detector(path)


def saved(path: Path, model: YOLO11, **changes: Any) -> Path:
    """A best.pt as train.py writes it, with these changes to its card."""
    content = {
        "format": "kdmini",
        "model": model.state_dict(),
        "names": model.names,
        "card": model.card | changes,
        "imgsz": 128,
    }
    torch.save(content, path)
    return path


def test_memory_formats_and_views_come_out_contiguous(tmp_path: Path) -> None:
    state = own_content()["model"]
    state["channels last"] = torch.rand(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    state["view"] = state["channels last"][1:3, :, 2]
    state["parameter"] = nn.Parameter(torch.rand(3))
    read_back = weights.read(own_file(tmp_path / "f.pt", model=state)).state
    for key, tensor in state.items():
        assert torch.equal(read_back[key], tensor)
        assert read_back[key].is_contiguous()


def test_tensors_that_shared_their_storage_no_longer_do(tmp_path: Path) -> None:
    shared = torch.rand(3)
    state = own_content()["model"] | {"one": shared, "other": shared}
    read_back = weights.read(own_file(tmp_path / "f.pt", model=state)).state
    assert torch.equal(read_back["one"], shared)
    read_back["one"].zero_()
    assert torch.equal(read_back["other"], shared)


@pytest.mark.parametrize(
    "changes",
    [
        {"names": ["cat"]},
        {"names": ["cat", 3]},
        {"names": "no"},
        {"card": {}},
        {"card": {"scale": "z", "sppf_act": True}},
        {"card": {"scale": [0.5], "sppf_act": True}},
        {"model": {}},
        {"model": None},
        {"model": {ROWS[0]: 3}},
        {"format": "other"},
    ],
)
def test_an_own_file_with_nonsense_in_it_is_refused(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    refused(own_file(tmp_path / "best.pt", **changes))


# --- text of the file


def test_text_of_the_file_cannot_write_to_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = {
        "scale": "n",
        "sppf_act": True,
        "license": "\x1b[2J" + "x" * 10_000,
        "version": "\n\x07",
    }
    weights.read(own_file(tmp_path / "f.pt", card=card))
    line = capsys.readouterr().out
    assert line[:-1].isprintable()
    assert len(line) < 300


def test_a_key_of_the_file_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    state = own_content()["model"] | {"\x1b[2J" * 1000: torch.full((1,), torch.nan)}
    refused(own_file(tmp_path / "f.pt", model=state), "NaN or infinity in '")


def test_a_path_with_spaces_and_korean(tmp_path: Path) -> None:
    folder = tmp_path / "한글 폴더"
    folder.mkdir()
    assert weights.read(own_file(folder / "best.pt")).scale == "n"
