"""Weight files: what is read, what is carried over, and that nothing in a hostile file ever runs."""

import contextlib
import hashlib
import io
import pickle
import re
import resource
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import SSD300_VGG16_Weights

from kdmini import weightfile
from kdmini.contracts import UserError
from kdmini.detection.yolo11 import pickled, weights
from kdmini.detection.yolo11.model import YOLO11
from tests.faults.hostile import BOMBS, PAYLOADS, Reduced, payloads, text

COCO = [
    n for n in SSD300_VGG16_Weights.COCO_V1.meta["categories"] if n not in ("N/A", "__background__")
]
VOC = [
    *(
        "aeroplane",
        "bicycle",
        "bird",
        "boat",
        "bottle",
        "bus",
        "car",
        "cat",
        "chair",
        "cow",
        "diningtable",
        "dog",
    ),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
]
LICENSE = "AGPL-3.0 License (https://ultralytics.com/license)"
ROWS = [f"model.23.cv3.{level}.2.{kind}" for level in range(3) for kind in ("weight", "bias")]


# --- nothing may run

FORBIDDEN = (
    "exec",
    "compile",
    "import",
    "os.",
    "subprocess.",
    "socket.",
    "pickle.find_class",
    "ctypes.",
    "shutil.",
)
happened: list[str] = []
armed = False


def watch(event: str, args: tuple[Any, ...]) -> None:
    if armed and event.startswith(FORBIDDEN) and event not in ("os.listdir", "os.scandir"):
        happened.append(event)


sys.addaudithook(watch)  # for the life of the process, idle unless armed


def read(path: Path) -> weights.WeightFile:
    """weights.read, watched."""
    global armed
    armed = True
    try:
        return weights.read(path)
    finally:
        armed = False


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file that no reading may create. Nor may reading import, execute, connect or start
    anything.
    """
    weights.read(
        own_file(tmp_path / "first.pt")
    )  # zipfile and torch import parts of their own with the first file
    happened.clear()
    yield tmp_path / "CANARY"
    assert not (tmp_path / "CANARY").exists()
    assert not happened


def refused(path: Path, match: str | None = None) -> None:
    with pytest.raises(UserError, match=match) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message and len(message) < 600 + len(str(path)) and message.isprintable()


# --- files made here


def own_content(**changes: Any) -> dict[str, Any]:
    state = {
        key: torch.rand(2, 4, 1, 1) if key.endswith("weight") else torch.rand(2) for key in ROWS
    }
    card = {"scale": "n", "sppf_act": True, "license": "of the data"}
    return {"format": "kdmini", "model": state, "names": ["cat", "dog"], "card": card} | changes


def own_file(path: Path, **changes: Any) -> Path:
    torch.save(own_content(**changes), path)
    return path


def zipped(path: Path, pickled: bytes, **storages: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("f/data.pkl", pickled)
        for name, content in storages.items():
            archive.writestr(f"f/data/{name[1:]}", content)
    return path


def rezipped(path: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """The file again, with entries changed and right checksums."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    change(entries)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


MODULES = {
    "ultralytics.nn.modules.conv": "Conv Concat",
    "ultralytics.nn.modules.block": "Attention Bottleneck C2PSA C3k C3k2 DFL PSABlock SPPF",
    "ultralytics.nn.modules.head": "Detect",
    "ultralytics.nn.tasks": "DetectionModel PoseModel",
}


@pytest.fixture(scope="module")
def public() -> Iterator[dict[str, type]]:
    """Empty classes of the public names, so that torch.save writes the pickle that a public file
    has.
    """
    made: dict[str, type] = {}
    with pytest.MonkeyPatch.context() as patch:
        for module, names in MODULES.items():
            fake = types.ModuleType(module)
            for name in names.split():
                made[name] = type(name, (nn.Module,), {"__module__": module})
                setattr(fake, name, made[name])
            patch.setitem(sys.modules, module, fake)
        for parent in ("ultralytics", "ultralytics.nn", "ultralytics.nn.modules"):
            patch.setitem(sys.modules, parent, types.ModuleType(parent))
        yield made


def public_model(public: dict[str, type], detector: YOLO11) -> nn.Module:
    """The detector's tree as the public classes spell it."""
    root = public["DetectionModel"]()
    root.model = nn.Sequential(*detector.model)
    root.names = dict(enumerate(detector.names))
    for module in root.modules():
        module.__class__ = public.get(type(module).__name__, type(module))
    return root.half()


def public_file(path: Path, model: Any, **changes: Any) -> Path:
    facts = {
        "date": "2024",
        "version": "8.3.0",
        "license": LICENSE,
        "docs": "",
        "epoch": -1,
        "best_fitness": None,
    }
    torch.save(
        facts
        | {"model": model, "ema": None, "optimizer": None, "train_args": {"lr0": 0.01}}
        | changes,
        path,
    )
    return path


def detector(scale: Any, names: list[str]) -> YOLO11:
    """Random weights, moved BatchNorm statistics."""
    torch.manual_seed(0)
    made = YOLO11(names, scale)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.num_batches_tracked += 7
    return made


def rounded(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        key: value.half().float() if value.is_floating_point() else value.clone()
        for key, value in state.items()
    }


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key


@pytest.fixture(scope="module")
def coco_n(
    public: dict[str, type], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Tensor]]:
    """A public-looking YOLO11n of 80 classes, and the tensors in it."""
    made = detector("n", COCO)
    state = rounded(made.state_dict())
    return public_file(
        tmp_path_factory.mktemp("coco") / "yolo11n.pt", public_model(public, made)
    ), state


# --- public files


def test_a_public_file_is_read_whole(coco_n: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path, state = coco_n
    file = weights.read(path)
    assert_equal(file.state, state)
    assert len(file.state) == 499  # as published
    assert {value.dtype for value in file.state.values()} == {torch.float32, torch.int64}
    assert (file.names, file.scale, file.sppf_act) == (COCO, "n", True)
    assert (file.license, file.version) == (LICENSE, "8.3.0")
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    for part in ("yolo11n.pt", "YOLO11n", "80 classes", "'8.3.0'", LICENSE, file.sha256[:12]):
        assert part in line


def test_a_model_loads_it_strictly(coco_n: Any) -> None:
    path, state = coco_n
    assert_equal(dict(YOLO11(COCO, "n", weights=str(path)).state_dict()), state)


def test_ema_is_preferred_and_identity_in_sppf_is_seen(
    public: dict[str, type], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ema = detector([0.5, 0.0625, 256], ["a", "b"])
    ema.model[0].conv = nn.Conv2d(3, 16, 3)  # the width by which a scale is told
    ema.model[9].cv1.act = nn.Identity()
    state = rounded(ema.state_dict())
    optimizer = {"state": {0: {"momentum_buffer": torch.rand(3)}}, "param_groups": [{"lr": 0.1}]}
    root = public_model(public, ema)
    stepped = public["DetectionModel"]()
    for model in (stepped, None):
        file = weights.read(
            public_file(tmp_path / "last.pt", model, ema=root, optimizer=optimizer, epoch=3)
        )
        assert_equal(file.state, state)
        assert not file.sppf_act and "YOLO11n (no SiLU in SPPF)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "scale, width, blocks", [("n", 16, 1), ("s", 32, 1), ("m", 64, 1), ("l", 64, 2), ("x", 96, 2)]
)
def test_the_scale_is_told_by_the_tensors(
    public: dict[str, type], tmp_path: Path, scale: str, width: int, blocks: int
) -> None:
    made = detector([0.5, 0.0625, 256], ["a", "b"])
    made.model[0].conv = nn.Conv2d(3, width, 3, bias=False)
    made.model[2].m = nn.ModuleList(nn.Conv2d(1, 1, 1) for _ in range(blocks))
    path = public_file(tmp_path / "yolo11m.pt", public_model(public, made))
    assert weights.read(path).scale == scale
    made.model[0].conv = nn.Conv2d(3, 24, 3).half()
    refused(public_file(path, public_model(public, made)), "no YOLO11 of the scales")


def test_hooks_in_the_file_are_ignored(public: dict[str, type], tmp_path: Path) -> None:
    root = public_model(public, detector([0.5, 0.0625, 256], ["a", "b"]))
    root.model[0].conv = nn.Conv2d(3, 16, 3).half()
    root._forward_hooks[0] = nn.SiLU()
    root.anything = [nn.Conv2d(1, 1, 1)]
    assert weights.read(public_file(tmp_path / "f.pt", root)).scale == "n"


def test_other_tasks_and_other_detectors_are_named(public: dict[str, type], tmp_path: Path) -> None:
    refused(
        public_file(tmp_path / "yolo11n-pose.pt", public["PoseModel"]()), "is a pose checkpoint"
    )
    for task in ("Segmentation", "Classification", "OBB"):
        pickled = f"\x80\x02cultralytics.nn.tasks\n{task}Model\n.".encode("latin1")
        refused(zipped(tmp_path / "task.pt", pickled), f"is a {task.lower()} checkpoint")
    refused(zipped(tmp_path / "f.pt", b"\x80\x02c__builtin__\ngetattr\n."), "__builtin__.getattr")
    refused(
        zipped(tmp_path / "f.pt", b"\x80\x02cultralytics.nn.modules.block\nC2f\n."), "block.C2f"
    )
    refused(public_file(tmp_path / "f.pt", None), "no YOLO11 detector")
    refused(
        public_file(tmp_path / "f.pt", {"model.0.conv.weight": torch.rand(3)}), "no YOLO11 detector"
    )


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
    assert line[:-1].isprintable() and len(line) < 300
    state = own_content()["model"] | {"\x1b[2J" * 1000: torch.full((1,), torch.nan)}
    refused(own_file(tmp_path / "f.pt", model=state), "NaN or infinity in '")


# --- which file


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KDMINI_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_a_name_alone_is_looked_for_here_then_in_weights_then_in_the_cache(here: Path) -> None:
    for found in (here / "cache/yolo11s.pt", Path("weights/yolo11s.pt"), Path("yolo11s.pt")):
        found.parent.mkdir(exist_ok=True)
        found.touch()
        assert weightfile.find("yolo11s.pt") == found
    (here / "cache/runs").mkdir()
    (here / "cache/runs/best.pt").touch()
    with pytest.raises(UserError, match="are not there"):
        weightfile.find("runs/best.pt")  # a path is meant as it stands


@pytest.mark.parametrize("missing", ["best.pt", "runs/yolo11s.pt", "yolo11z.pt", "yolo11s.pt"])
def test_a_missing_file_is_named(here: Path, missing: str) -> None:
    with pytest.raises(
        UserError, match=rf"'{re.escape(missing)}' are not there.*kdmini\.tools\.download"
    ) as told:
        weightfile.find(missing)
    assert ("--weights yolo11s.pt" in str(told.value)) == (missing == "yolo11s.pt")


def test_a_folder_is_refused(here: Path) -> None:
    (here / "weights").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        weightfile.find("weights")


# --- class transfer


def weight_file(names: list[str], **changes: Any) -> weights.WeightFile:
    """A file whose row k holds the number k everywhere."""
    numbers = torch.arange(float(len(names)))
    state = {"model.0.conv.weight": torch.rand(32, 3, 3, 3)}
    state |= {
        key: numbers[:, None, None, None].expand(-1, 8, 1, 1) if "weight" in key else numbers
        for key in ROWS
    }
    fields = {
        "path": Path("yolo11s.pt"),
        "sha256": "",
        "state": state,
        "names": names,
        "scale": "s",
    }
    return weights.WeightFile(
        **(fields | {"sppf_act": True, "license": "", "version": ""} | changes)
    )


def initial(classes: int, width: int = 8) -> dict[str, Tensor]:
    state = {"model.0.conv.weight": torch.full((32, 3, 3, 3), -1.0)}
    return state | {
        key: torch.full((classes, width, 1, 1) if "weight" in key else (classes,), -1.0)
        for key in ROWS
    }


def test_every_voc_class_takes_its_coco_row(capsys: pytest.CaptureFixture[str]) -> None:
    coco = weight_file(COCO)
    result = weights.fit(coco, initial(20), VOC, "s", "by_name")
    # aeroplane is COCO's fifth class, person its first, tvmonitor its 63rd: the published order
    published = [4, 1, 14, 8, 39, 5, 2, 15, 56, 19, 60, 16, 17, 3, 0, 58, 18, 57, 6, 62]
    for key in ROWS:
        assert [row.unique().item() for row in result[key]] == published
    assert torch.equal(result["model.0.conv.weight"], coco.state["model.0.conv.weight"])
    line = capsys.readouterr().out
    assert (
        "20 of 80 class rows" in line
        and "airplane = aeroplane" in line
        and line.endswith("new: none\n")
    )


def test_the_synonyms_work_in_both_directions_and_new_classes_stay_as_initialised(
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = ["unicorn", "tv", "couch", "person", "sofa"]
    result = weights.fit(weight_file(VOC), initial(5), names, "s", "by_name")
    assert result[ROWS[1]].tolist() == [
        -1,
        VOC.index("tvmonitor"),
        VOC.index("sofa"),
        14,
        VOC.index("sofa"),
    ]
    assert "new: 'unicorn'" in capsys.readouterr().out
    both = weight_file(["couch", "sofa"])  # each its own class here
    assert weights.fit(both, initial(2), ["sofa", "couch"], "s", "by_name")[ROWS[1]].tolist() == [
        1,
        0,
    ]


def test_a_class_branch_of_another_width_starts_anew(
    coco_n: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path, state = coco_n
    torch.manual_seed(3)
    fresh = YOLO11(VOC, "n").state_dict()
    torch.manual_seed(3)
    loaded = YOLO11(VOC, "n", weights={"path": str(path), "classes": "by_name"}).state_dict()
    assert "80 wide for 80 classes and 64 for 20" in capsys.readouterr().out
    for key in loaded:
        assert torch.equal(
            loaded[key], (fresh if key.startswith("model.23.cv3.") else state)[key]
        ), key


def test_other_classes_need_a_decision() -> None:
    with pytest.raises(UserError) as caught:
        weights.fit(weight_file(COCO), initial(20), VOC, "s", None)
    for part in (
        "yolo11s.pt",
        "80",
        "20",
        "'airplane'",
        "'aeroplane'",
        ROWS[0],
        "classes: by_name",
        "classes: keep",
    ):
        assert part in str(caught.value)
    with pytest.raises(UserError, match="classes: by_name"):  # equal tensors, other meaning
        weights.fit(weight_file(["cat", "dog"]), initial(2), ["dog", "cat"], "s", None)
    with pytest.raises(UserError, match="'by_nam'"):
        weights.fit(weight_file(VOC), initial(20), VOC, "s", "by_nam")


@pytest.mark.parametrize("classes", [None, "keep", "by_name"])
def test_a_file_that_does_not_fit_is_refused_by_name(classes: str | None) -> None:
    file, state = weight_file(VOC), initial(20)
    assert_equal(weights.fit(file, state, VOC, "s", classes), file.state)
    with pytest.raises(UserError, match=r"yolo11s\.pt is YOLO11s, the config says YOLO11m"):
        weights.fit(file, state, VOC, "m", classes)
    with pytest.raises(UserError, match=r"YOLO11s, the config says YOLO11 \[0.5, 0.25, 64\]"):
        weights.fit(file, state, VOC, [0.5, 0.25, 64], classes)
    with pytest.raises(UserError, match=r"yolo11s.pt lacks 'model.7.conv.weight'"):
        weights.fit(file, state | {"model.7.conv.weight": torch.rand(1)}, VOC, "s", classes)
    with pytest.raises(UserError, match=r"yolo11s.pt has unknown 'model.0.conv.weight'"):
        weights.fit(file, {key: state[key] for key in ROWS}, VOC, "s", classes)
    for key in ("model.0.conv.weight", ROWS[1], ROWS[4]):
        broken = weight_file(VOC, state=file.state | {key: torch.rand(3)})
        with pytest.raises(UserError, match=f"yolo11s.pt has other shapes in '{re.escape(key)}'"):
            weights.fit(broken, state, VOC, "s", classes)


# --- kdmini's own files


@pytest.mark.parametrize("scale, read_as", [("n", "n"), ([0.5, 0.0625, 256], (0.5, 0.0625, 256))])
def test_own_file_round_trip(tmp_path: Path, scale: Any, read_as: Any) -> None:
    made = detector(scale, ["cat", "dog"])
    card = made.card | {"license": "AGPL-3.0", "sppf_act": False}
    content = {
        "format": "kdmini",
        "model": made.state_dict(),
        "names": made.names,
        "card": card,
        "imgsz": 128,
    }
    torch.save(content, tmp_path / "best.pt")
    file = weights.read(tmp_path / "best.pt")
    assert_equal(file.state, dict(made.state_dict()))
    assert (file.names, file.scale, file.sppf_act, file.license) == (
        ["cat", "dog"],
        read_as,
        False,
        "AGPL-3.0",
    )
    assert_equal(weights.fit(file, made.state_dict(), made.names, scale, None), file.state)
    content["card"]["scale"] = "m"
    torch.save(content, tmp_path / "best.pt")
    with pytest.raises(UserError, match="YOLO11m"):
        weights.fit(weights.read(tmp_path / "best.pt"), made.state_dict(), made.names, scale, None)


def test_channels_last_and_shared_storage_come_out_as_they_are(tmp_path: Path) -> None:
    state = own_content()["model"]
    state["a"] = torch.rand(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    state["b"] = state["a"][1:3, :, 2]
    state["c"] = nn.Parameter(torch.rand(3))
    state["d"] = state["e"] = torch.rand(3)
    read = weights.read(own_file(tmp_path / "f.pt", model=state)).state
    for key in state:
        assert torch.equal(read[key], state[key]) and read[key].is_contiguous()
    read["d"].zero_()
    assert torch.equal(read["e"], state["e"])


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
def test_own_file_with_nonsense_in_it_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    refused(own_file(tmp_path / "best.pt", **changes))


# --- hostile files


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("name", [*PAYLOADS, "harmless"])
def test_a_payload_is_refused_wherever_it_stands(
    tmp_path: Path, canary: Path, name: str, protocol: int
) -> None:
    payload = (payloads(canary) | {"harmless": Reduced(print, "x")})[name]
    for content in (
        payload,
        {"model": payload, "license": "x"},
        own_content(extra=[payload]),
        own_content(model={ROWS[0]: payload}),
        own_content(names=["cat", payload]),
    ):
        torch.save(content, tmp_path / "f.pt", pickle_protocol=protocol)
        refused(tmp_path / "f.pt")


def test_a_payload_in_the_state_of_a_module_is_refused(
    public: dict[str, type], tmp_path: Path, canary: Path
) -> None:
    for place in ("_forward_hooks", "_parameters", "_modules", "_buffers"):
        root = public["DetectionModel"]()
        getattr(root, place)["x"] = payloads(canary)["os.system"]
        refused(public_file(tmp_path / "f.pt", root), "nothing was run")


def test_opcodes_that_call_or_look_up_in_other_ways_are_refused(
    tmp_path: Path, canary: Path
) -> None:
    touch = f"touch {canary}".encode()
    short = bytes([len(touch)]) + touch
    model = b"cultralytics.nn.tasks\nDetectionModel\n"
    for stream, reason in (
        (b"(S'" + touch + b"'\nios\nsystem\n.", "opcode STRING"),
        (b"\x80\x02(ios\nsystem\n.", "opcode INST"),
        (b"(cos\nsystem\nX\1\0\0\0ao.", "'os.system'"),
        (b"\x80\x02(" + model + b"o.", "opcode OBJ"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c" + short + b"\x85R.", "opcode PROTO '4'"),
        (b"\x80\x02X\x02\0\0\0osX\x06\0\0\0system\x93.", "opcode STACK_GLOBAL"),
        (b"\x80\x02ctorch\n_utils.os.system\n.", "'torch._utils.os.system'"),  # dotted names
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2.__globals__\n.", "__globals__"),
        (b"\x80\x02ctorch.nn.modules\nconv.Conv2d\n.", "'torch.nn.modules.conv.Conv2d'"),
        (b"\x80\x02cos\nsystem\n.", "'os.system'"),
        (b"\x80\x02\x82\x01.", "opcode EXT1"),
        (b"\x80\x02" + model + b"}X\x01\0\0\0aK\x01sb.", "FrozenInstanceError"),  # BUILD on a class
        (b"\x80\x02" + model + b"N}X\x01\0\0\0aK\x01s\x86b.", "FrozenInstanceError"),
        (b"\x80\x02" + model + b")R)R.", "a call of what is no function"),
        (b"\x80\x02" + model + b")\x81)\x81.", "a call of what is no function"),
        (b"\x80\x02]}Q.", "no YOLO11 detector"),  # a persistent id that is none
        (b"\x80\x02P0\n.", "opcode PERSID"),
        (b"\x80\x02" + model + b")}\x92.", "opcode NEWOBJ_EX"),
        (b"\x80\x02N2.", "opcode DUP"),
        (b"\x80\x05\x96\x01\0\0\0\0\0\0\0x.", "opcode PROTO '5'"),
        (b"\x80\x02\x96\x01\0\0\0\0\0\0\0x.", "opcode BYTEARRAY8"),
        (
            b"\x80\x02})Ns.",
            "no list or dict",
        ),  # a tuple for a key: its hash may recurse until the stack is full
        (b"\x80\x02" + model + b"Na.", "no list or dict"),
    ):
        refused(zipped(tmp_path / "f.pt", pickled), reason)


def test_broken_pickles_are_refused(tmp_path: Path, canary: Path) -> None:
    good = pickle.dumps(
        {"format": "kdmini", "model": {}, "names": ["a"], "card": {"scale": "n"}}, 2
    )
    for cut in range(len(good)):
        refused(zipped(tmp_path / "f.pt", good[:cut]))
    for stream in (
        b".",
        b"\x80\x02.",
        b"\x80\x02e.",
        b"\x80\x02Nb.",
        b"\x80\x02h\x07.",
        b"\x80\x02(t.",
        b"\xff",
    ):
        refused(zipped(tmp_path / "f.pt", pickled))


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_in_an_otherwise_good_file_goes_off_nowhere(
    tmp_path: Path, canary: Path, bomb: str
) -> None:
    with zipfile.ZipFile(own_file(tmp_path / "good.pt")) as archive:
        good = {name: archive.read(name) for name in archive.namelist()}
    value = BOMBS[bomb]
    card = b"}" + text("scale") + text("n") + b"s" + text("sppf_act") + b"\x88s"
    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v2\n(("
        + text("storage")
        + b"ctorch\nFloatStorage\n%sNK\x08tQ%s(K\1t\x89NtR"
    )
    values = {
        key: text(key) + value for key in ("names", "model", "card", "format", "ema", "anything")
    }
    for key in ("scale", "sppf_act", "license"):
        values[f"card {key}"] = text("card") + card + text(key) + value + b"s"
    for key, storage, place in (
        ("storage", value, b"K\0(K\1t"),
        ("offset", text("0"), value),
        ("size", text("0"), b"K\0" + value),
    ):
        values[f"tensor {key}"] = (
            text("model") + b"}" + text(ROWS[0]) + tensor % (storage, place) + b"s"
        )
    values["control"] = (
        text("model") + b"}" + text(ROWS[0]) + tensor % (text("0"), b"K\0(K\2t") + b"s"
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for place, added in values.items():
        with zipfile.ZipFile(tmp_path / "f.pt", "w") as archive:
            for name, content in good.items():
                archive.writestr(
                    name, content[:-1] + added + b"s." if name.endswith("data.pkl") else content
                )
        if place == "control":
            assert read(tmp_path / "f.pt").state[ROWS[0]].shape == (2,)
        elif place in ("ema", "anything", "card license", "card sppf_act"):  # may be of no interest
            with contextlib.suppress(UserError):
                assert read(tmp_path / "f.pt").license in ("", "of the data")
        else:
            refused(tmp_path / "f.pt")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_a_pickle_without_end_is_refused(
    tmp_path: Path, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pickled, "MAX_OPCODES", 1000)
    refused(zipped(tmp_path / "f.pt", b"\x80\x02" + b"N" * 1001 + b"."), "over 1000 steps")


def test_a_tree_that_is_cyclic_or_explodes_is_refused(
    public: dict[str, type], tmp_path: Path, canary: Path
) -> None:
    circle = public["DetectionModel"]()
    circle._modules["again"] = circle
    wide = public["DetectionModel"]()
    for _ in range(40):
        layer, wide = wide, public["DetectionModel"]()
        wide._modules |= {"a": layer, "b": layer}
    nameless = public["DetectionModel"]()
    nameless._modules[""] = nameless
    long = public["DetectionModel"]()
    long._modules["x" * 1_000_000] = long
    many = public["DetectionModel"]()
    many._parameters = dict.fromkeys(map(str, range(30_000)))
    for root in (circle, wide, nameless, long, many):
        root.names = {0: "a"}
        refused(public_file(tmp_path / "f.pt", root), "without end")


@pytest.mark.parametrize(
    "offset, size, stride",
    [
        (0, (5,), (1,)),
        (5, (1,), (1,)),
        (0, (2, 2), (4, 1)),
        (0, (2,), (4,)),
        (-1, (2,), (1,)),
        (0, (-1,), (1,)),
        (3, (2,), (-1,)),
        (0, (1 << 30,), (0,)),
        (0, (1 << 62, 1 << 62), (0, 0)),
        (0, (2,), (1, 1)),
        (0, (True,), (1,)),
        (0, (2.0,), (1,)),
        (0, "ab", "cd"),
        (0, 2, 1),
        ([], (2,), (1,)),
    ],
)
def test_a_tensor_outside_its_storage_is_refused(
    tmp_path: Path, canary: Path, offset: Any, size: Any, stride: Any
) -> None:
    storage = torch.storage.TypedStorage(
        wrap_storage=torch.rand(4).untyped_storage(), dtype=torch.float32, _internal=True
    )
    crafted = Reduced(
        torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, OrderedDict()
    )
    refused(
        own_file(tmp_path / "f.pt", model=own_content()["model"] | {"x": crafted}),
        "ValueError|TypeError",
    )


def test_one_storage_named_many_times_is_refused(tmp_path: Path, canary: Path) -> None:
    shared = torch.rand(1 << 16)
    state = own_content()["model"] | {str(n): shared for n in range(1000)}
    refused(own_file(tmp_path / "f.pt", model=state), "outside its storage")


def test_a_storage_of_another_length_is_refused(tmp_path: Path, canary: Path) -> None:
    for change in (lambda b: b[:-4], lambda b: b + b"1234", lambda b: b""):
        path = own_file(tmp_path / "f.pt")
        refused(
            rezipped(
                path,
                lambda entries, change=change: entries.update(
                    {"f/data/0": change(entries["f/data/0"])}
                ),
            )
        )
    refused(
        rezipped(own_file(tmp_path / "f.pt"), lambda entries: entries.pop("f/data/0")), "KeyError"
    )
    refused(
        rezipped(
            own_file(tmp_path / "f.pt"), lambda entries: entries.update({"f/byteorder": b"big"})
        ),
        "big-endian",
    )


# --- the zip around it


def test_zip_tricks_are_refused(tmp_path: Path, canary: Path) -> None:
    path = own_file(tmp_path / "f.pt")
    with zipfile.ZipFile(path) as archive:
        good = {name: archive.read(name) for name in archive.namelist()}

    def written(
        change: Callable[[zipfile.ZipFile], None], method: int = zipfile.ZIP_STORED
    ) -> Path:
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, content in good.items():
                archive.writestr(name, content)
            change(archive)
        return path

    assert read(written(lambda archive: None)).names == ["cat", "dog"]
    with pytest.warns(UserWarning, match="Duplicate name"):
        twice = written(lambda archive: archive.writestr("f/data.pkl", good["f/data.pkl"]))
    refused(twice, "an entry twice")
    refused(
        written(lambda archive: archive.writestr("g/data.pkl", good["f/data.pkl"])),
        "more than one root",
    )
    refused(
        written(lambda archive: archive.writestr("data.pkl", good["f/data.pkl"])),
        "more than one root",
    )
    refused(written(lambda archive: None, zipfile.ZIP_DEFLATED), "compressed")
    refused(written(lambda archive: archive.writestr("f/constants.pkl", b"")), "TorchScript")


def test_every_flipped_byte_of_a_tensor_is_found(tmp_path: Path, canary: Path) -> None:
    path = own_file(tmp_path / "f.pt")
    data = path.read_bytes()
    state = own_content()["model"]
    with zipfile.ZipFile(path) as archive:
        start = data.index(archive.read("f/data/0"))
    for at in range(start, start + 4 * state[ROWS[0]].numel()):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        refused(path, "CRC")


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path, canary: Path) -> None:
    data = own_file(tmp_path / "f.pt").read_bytes()
    for length in range(0, len(data) - 1, 37):
        (tmp_path / "f.pt").write_bytes(data[:length])
        refused(tmp_path / "f.pt")


def test_a_file_without_checksums_is_read(tmp_path: Path, canary: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = own_file(tmp_path / "f.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    state = torch.load(path, weights_only=True)["model"]
    assert_equal(read(path).state, state)
    data = bytearray(path.read_bytes())
    for signature, at in (
        (b"PK\3\4", 14),
        (b"PK\1\2", 16),
        (b"PK\7\x08", 4),
    ):  # where the format keeps a CRC
        for match in re.finditer(re.escape(signature), bytes(data)):
            data[match.start() + at : match.start() + at + 4] = bytes(4)
    path.write_bytes(data)
    with zipfile.ZipFile(path) as archive:
        assert {info.CRC for info in archive.infolist()} == {0}
    assert_equal(weights.read(path).state, state)


def torchscript() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(nn.Conv2d(1, 1, 1), torch.rand(1, 1, 2, 2)), buffer)
    return buffer.getvalue()


def legacy() -> bytes:
    buffer = io.BytesIO()
    torch.save({"model": torch.rand(2)}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize(
    "content, match",
    [
        (lambda: b"", "is empty"),
        (lambda: b"\r\n<!DOCTYPE html><html><title>Not Found</title>", "web page"),
        (lambda: b"<html>", "web page"),
        (torchscript, "TorchScript"),
        (legacy, "before PyTorch 1.6"),
        (lambda: b"storages".ljust(257, b"\0") + b"ustar\x0000", "before PyTorch 1.6"),
        (lambda: pickle.dumps({"model": 1}), "bare pickle"),
        (lambda: struct.pack("<Q", 2) + b"{}", "safetensors"),
        (lambda: b"\x08\x0a\x12\x07pytorch\x1a\x062.15.0:\x04\x0a\x02hi", "ONNX"),
        (lambda: b"hello", "no weight file"),
        (lambda: b"PK\3\4", "damaged"),
    ],
)
def test_other_files_are_called_what_they_are(
    tmp_path: Path, content: Callable[[], bytes], match: str
) -> None:
    (tmp_path / "f.pt").write_bytes(content())
    refused(tmp_path / "f.pt", match)


def test_a_file_larger_than_any_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "f.pt").open("wb") as file:
        file.truncate((1 << 30) + 1)  # sparse
    refused(tmp_path / "f.pt", "larger than")


def test_a_path_with_spaces_and_korean(tmp_path: Path) -> None:
    (tmp_path / "한글 폴더").mkdir()
    assert weights.read(own_file(tmp_path / "한글 폴더" / "best.pt")).scale == "n"
