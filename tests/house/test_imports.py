"""Who may import whom: the table of the rooms, and what may come from outside."""

import re
import sys

import pytest

from tests.house.source import (
    CORE,
    MODULES,
    SCRIPTS,
    imported_modules,
    imports,
    is_in,
    module_of,
    text_files,
)

# room -> what it may import from kdmini besides itself, contracts and bounds; what is not
# named here is forbidden
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "contracts": (),
    "bounds": (),
    "signals": (),
    "output": (),
    "commands": (),
    "distributed": ("output",),
    "device": (),
    "memory": (),
    "optim": (),
    "footprint": ("device",),
    "files": (),
    "typed": (),
    "checkpoint": ("files", "typed"),
    "runlog": ("commands", "files", "output", "typed"),
    "yamltext": (),
    "config": ("files", "typed", "yamltext"),
    "weightfile": ("checkpoint", "files", "typed"),
    "weights": ("typed", "weightfile"),
    "progress": ("distributed", "signals", "typed"),
    "classes": (),
    "inputs": ("distributed", "typed"),
    "outset": ("config", "distributed", "engine", "optim"),
    "defaults": ("assemble", "config", "data", "distill", "optim", "sections"),
    "resume": (
        *("checkpoint", "commands", "config", "defaults", "distributed", "inputs", "progress"),
    ),
    "data": ("files",),
    # a term works for any model
    "distill": ("distributed",),
    "terms": ("distill",),
    # a model never learns that it is distilled
    "detection": (
        *("data", "checkpoint", "classes", "files", "typed", "weightfile", "weights", "yamltext"),
    ),
    "segmentation": ("data", "checkpoint", "classes", "files", "typed", "weightfile", "weights"),
    "classification": ("data", "checkpoint", "classes", "files", "typed", "weightfile", "weights"),
    # of other packages: their networks are named in the config
    "teachers": ("config", "typed", "weightfile", "weights"),
    # models, data and terms arrive as arguments
    "engine": ("progress", "device", "optim", "distributed", "signals"),
    # models, data sets and terms are named in the config
    "sections": ("classes", "config", "data", "optim", "typed"),
    "assemble": (
        *("classes", "config", "data", "device", "distill", "distributed", "engine", "inputs"),
        *("footprint", "optim", "outset", "progress", "sections", "typed"),
    ),
    "check": ("assemble", "distill", "engine", "inputs", "signals"),
    "train": (
        *("assemble", "check", "checkpoint", "commands", "config", "data.loader", "defaults"),
        *("device", "distributed", "engine", "memory", "optim", "outset", "output", "progress"),
        *("resume", "runlog", "sections", "signals"),
    ),
    "eval": (
        *("assemble", "classes", "config", "data.loader", "data.store", "defaults", "device"),
        *("engine", "memory", "outset", "output", "sections", "signals"),
    ),
}
ANYTHING = ("tools", "examples")  # these may import all rooms, and none imports them
THIRD_PARTY = {"torch", "torchvision", "numpy", "pycocotools", "tqdm", "yaml", "PIL"}
OF_TOOLS = {
    "optuna",
    "sqlalchemy",
    "matplotlib",
    "tensorboard",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "av",
    "wandb",
}
NETWORK = {"socket", "ssl", "urllib", "http", "ftplib", "requests", "asyncio"}
PEERS = ("bench/peer.py", "bench/peer_training.py")


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if parts[0] == "kdmini" and len(parts) > 1 else parts[0]


def trespasses(source: str, module: str) -> list[str]:
    """The modules of kdmini that this one imports and may not."""
    room = room_of(module)
    allowed = [f"kdmini.{name}" for name in (*MAY_IMPORT[room], room, "contracts", "bounds")]
    wrong = []
    for name in imports(source, module):
        if module_of(name) != "kdmini":  # else it is of a room that is not there
            name = module_of(name)
        inside = name.startswith(("kdmini.", "examples.")) or name in SCRIPTS
        if inside and not any(is_in(name, room) for room in allowed):
            wrong.append(name)
    return wrong


ROOMED = [name for name in MODULES if name != "kdmini" and room_of(name) not in ANYTHING]


@pytest.mark.parametrize("module", ROOMED)
def test_rooms_import_only_what_they_may(module: str) -> None:
    assert room_of(module) in MAY_IMPORT, f"{module}: a new room; say what it may import"
    assert trespasses(MODULES[module].read_text(), module) == []


def test_the_package_itself_imports_nothing() -> None:
    assert imported_modules("kdmini") == set()


def test_no_circle() -> None:
    graph = {name: imported_modules(name) for name in MODULES}
    while graph:
        ready = [name for name, targets in graph.items() if not targets & graph.keys()]
        assert ready, f"these import each other in a circle: {sorted(graph)}"
        for name in ready:
            del graph[name]


def test_the_table_itself_has_no_circle() -> None:
    """So that "downwards" has a meaning."""
    left = {room: {target.split(".")[0] for target in may} for room, may in MAY_IMPORT.items()}
    while left:
        ready = [room for room, targets in left.items() if not targets & left.keys()]
        assert ready, sorted(left)
        for room in ready:
            del left[room]


@pytest.mark.parametrize(
    "module, line, named",
    [
        (
            "kdmini.detection.yolo11.model",
            "from kdmini.distill.taps import Taps",
            "kdmini.distill.taps",
        ),
        ("kdmini.detection.yolo11.model", "from kdmini import config", "kdmini.config"),
        ("kdmini.detection.yolo11.model", "from ...engine import evaluate", "kdmini.engine"),
        (
            "kdmini.distill.step",
            "import kdmini.detection.yolo11.model",
            "kdmini.detection.yolo11.model",
        ),
        (
            "kdmini.terms.logits",
            "from kdmini.detection.boxes import ciou",
            "kdmini.detection.boxes",
        ),
        ("kdmini.data.loader", "from kdmini.detection.truth import pad", "kdmini.detection.truth"),
        ("kdmini.data.store", "from kdmini.distill.taps import Taps", "kdmini.distill.taps"),
        (
            "kdmini.engine",
            "def f():\n    from kdmini.detection.voc import VOC",
            "kdmini.detection.voc",
        ),
        ("kdmini.optim", "from .engine import evaluate", "kdmini.engine"),
        ("kdmini.assemble", "from kdmini.detection.voc import VOC", "kdmini.detection.voc"),
        ("kdmini.assemble", "import train", "train"),
        ("kdmini.engine", "from kdmini.assemble import Run", "kdmini.assemble"),
        (
            "train",
            "from kdmini.detection.yolo11.model import YOLO11",
            "kdmini.detection.yolo11.model",
        ),
        ("train", "from kdmini.terms.spatial import SpatialImitation", "kdmini.terms.spatial"),
        ("train", "from kdmini.tools.compare import read_run", "kdmini.tools.compare"),
        ("train", "from kdmini.distill import attention", "kdmini.distill.attention"),
        ("eval", "from kdmini.detection.voc import VOC", "kdmini.detection.voc"),
        (
            "kdmini.detection.voc",
            "from examples.shapes import write_set",
            "examples.shapes",
        ),
    ],
)
def test_a_trespass_would_be_seen(module: str, line: str, named: str) -> None:
    assert named in trespasses(line, module)


def test_nobody_imports_a_tool() -> None:
    for module in MODULES:
        tools = {name for name in imported_modules(module) if is_in(name, "kdmini.tools")}
        assert not tools or is_in(module, "kdmini.tools") or is_in(module, "examples"), module


def test_the_core_opens_no_connection_of_its_own() -> None:
    for module, path in CORE.items():
        packages = {name.split(".")[0] for name in imports(path.read_text(), module)}
        assert not packages & NETWORK, module


def test_modules_are_imported_by_name_where_a_config_or_the_user_names_them() -> None:
    """What is imported dynamically is what the config names, or this page would not see it."""
    dynamic = re.compile(r"import_module|__import__|runpy")
    users = [name for name, path in MODULES.items() if dynamic.search(path.read_text())]
    assert users == ["kdmini", "kdmini.config"]


def test_third_party_packages_are_the_few_that_are_declared() -> None:
    for module, path in MODULES.items():
        allowed = THIRD_PARTY | {"kdmini"}
        if module not in CORE:
            allowed |= OF_TOOLS
        if module.startswith("examples"):
            allowed |= {"examples", "train"}
        packages = {name.split(".")[0] for name in imports(path.read_text(), module)}
        assert packages - set(sys.stdlib_module_names) <= allowed, module


def test_ultralytics_is_the_oracle_of_the_parity_tests_and_the_peer_of_the_benchmarks_alone() -> (
    None
):
    for path in text_files():
        if path.suffix != ".py" or path.as_posix().endswith(PEERS):
            continue
        # even in the parity tests it runs in a process of its own
        packages = {name.split(".")[0] for name in imports(path.read_text(), path.stem)}
        assert "ultralytics" not in packages, path
