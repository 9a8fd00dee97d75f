"""The promises of the README about structure, size and safety, kept over the source itself."""

import ast
import importlib
import inspect
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from kdmini import config
from kdmini.data.loader import Augment
from kdmini.optim import Recipe

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("train", "eval")
CORE_LINES, READING_LINES = 3000, 900
READING_PATH = (
    "train",
    "kdmini.engine",
    "kdmini.distill",
    "kdmini.detection.yolo11.loss",
    "kdmini.detection.yolo11.assign",
)

# room -> what it may import from kdmini besides itself and contracts. What is not named here is
# forbidden.
LOW = ("config", "optim", "checkpoint", "runlog", "distributed", "signals", "device", "progress")
TASKS = ("detection",)
MAY_IMPORT = {
    "contracts": (),
    "config": (),
    "signals": (),
    "distributed": (),
    "device": (),
    "optim": (),
    "checkpoint": (),
    "weightfile": ("checkpoint",),
    "runlog": (),
    "progress": ("distributed", "signals"),
    "data": ("detection.truth",),
    "distill": ("distributed",),  # a term works for any model
    "detection": ("data", "checkpoint", "weightfile"),  # a model never learns that it is distilled
    "terms": ("distill", "detection.yolo11"),
    "engine": ("progress", "device", "optim", "distributed", "signals"),  # the rest are arguments
    "check": ("engine", "optim", "signals", "progress", "device"),
    "train": ("check", "engine", "data.loader", "data.store", "distill.step", *LOW),
    "eval": ("config", "device", "engine", "data.loader", "data.store", "runlog"),
}
THIRD_PARTY = {"torch", "torchvision", "numpy", "pycocotools", "tqdm", "yaml", "PIL"}
EXTRAS_THIRD_PARTY = {"optuna", "matplotlib", "tensorboard", "onnx", "onnxscript", "onnxruntime"}


def modules() -> dict[str, Path]:
    """Dotted name -> file, of kdmini, the scripts and the examples."""
    found = {name: ROOT / f"{name}.py" for name in SCRIPTS}
    found |= {f"examples.{path.stem}": path for path in sorted((ROOT / "examples").glob("*.py"))}
    for path in sorted((ROOT / "kdmini").rglob("*.py")):
        found[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = (
            path
        )
    return found


MODULES = modules()
CORE = {
    name: path
    for name, path in MODULES.items()
    if not name.startswith(("kdmini.tools", "examples"))
}


def everything() -> list[Path]:
    """Every text file of the project: what git would keep, found without git."""
    kept = [ROOT / "Makefile", *(ROOT / ".ci").glob("*")]
    for suffix in ("py", "md", "yaml", "toml", "sh"):
        kept += [
            path
            for path in ROOT.rglob(f"*.{suffix}")
            if not path.relative_to(ROOT).parts[0].startswith(".")
        ]
    return [
        p
        for p in kept
        if p.is_file() and p.relative_to(ROOT).parts[0] not in ("data", "runs", "build", "weights")
    ]


# --- what each check looks for


def imports(source: str, module: str) -> Iterator[str]:
    """Dotted names that a module imports, wherever in it: `from a import b` gives both "a" and
    "a.b".
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")[: -node.level] if node.level else []
            origin = ".".join([*parts, *([node.module] if node.module else [])])
            yield origin
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if parts[0] == "kdmini" and len(parts) > 1 else parts[0]


def trespasses(source: str, module: str) -> list[str]:
    """The modules of kdmini that this one imports and may not."""
    room = room_of(module)
    allowed = [f"kdmini.{name}" for name in (*MAY_IMPORT[room], room, "contracts")]
    wrong = []
    for name in imports(source, module):
        while name not in MODULES and "." in name:  # a name in a module: look at the module
            name = name.rpartition(".")[0]
        inside = name.startswith(("kdmini.", "examples.")) or name in SCRIPTS
        if inside and not any(name == a or name.startswith(a + ".") for a in allowed):
            wrong.append(name)
    return wrong


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


FORBIDDEN_MODULES = {
    *(
        "pickle",
        "cPickle",
        "_pickle",
        "dill",
        "cloudpickle",
        "joblib",
        "marshal",
        "shelve",
    ),  # run what they read
    *("subprocess", "runpy", "pty", "code", "ctypes"),
}
FORBIDDEN_NAMES = re.compile(  # called or handed on
    r"(builtins\.)?(eval|exec|__import__)"
    r"|os\.(system|popen|exec\w+|spawn\w+|posix_spawn\w*)|asyncio\.create_subprocess_\w+"
    r"|(\w+\.)*(Unpickler|read_pickle)"
    r"|torch\.(jit\.load|hub\.load\w*|package\b.*|serialization\b.*)"
    r"|yaml\.(load|load_all|full_load|full_load_all|unsafe_load|unsafe_load_all|(Unsafe|Full)?Loader)"
)
FORBIDDEN_SETTINGS = {"shell": True, "weights_only": False, "allow_pickle": True}
PLAIN = {"os", "torch", "numpy", "yaml", "builtins", "asyncio"}  # imported under their own names
ALIASES = {"np", "F", "dist"}  # and these: numpy, torch.nn.functional, torch.distributed


def dangers(source: str) -> list[str]:
    """Names and settings that could run what a file or a text contains."""
    tree = ast.parse(source)
    found = [name for name in imports(source, "") if name.split(".")[0] in FORBIDDEN_MODULES]
    called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            origin = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                full = f"{origin}{alias.name}"
                renamed = alias.asname not in (None, *ALIASES) and full.split(".")[0] in PLAIN
                if (
                    renamed
                    or FORBIDDEN_NAMES.fullmatch(full)
                    or full in ("torch.load", "numpy.load")
                ):
                    found.append(full)
        if isinstance(node, ast.Attribute | ast.Name):
            name, call = dotted(node), called.get(id(node))
            if FORBIDDEN_NAMES.fullmatch(name):
                found.append(name)
            if re.search(r"\b(torch|np|numpy)\.load$", name):
                settings = {k.arg for k in call.keywords} if call else set()
                if call is None or len(call.args) > 1 or None in settings:
                    found.append(f"{name}, which is not called with its settings in full")
                elif name.endswith("torch.load") and "weights_only" not in settings:
                    found.append("torch.load without weights_only=True")
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                bad, value = FORBIDDEN_SETTINGS.get(keyword.arg or ""), keyword.value
                if bad is not None and not (
                    isinstance(value, ast.Constant) and bool(value.value) is not bad
                ):
                    found.append(f"{dotted(node.func)}({keyword.arg}=)")
    return found


def code_lines(source: str) -> int:
    """Lines that hold code: not blank, not a comment, not a docstring."""
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(
            node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        ) and ast.get_docstring(node):
            docstrings |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    empty = (
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    )
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in empty:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


# --- imports


@pytest.mark.parametrize("module", CORE)
def test_rooms_import_only_what_they_may(module: str) -> None:
    if module == "kdmini":
        assert not [
            name for name in imports(CORE[module].read_text(), module) if name.startswith("kdmini")
        ]
    else:
        assert room_of(module) in MAY_IMPORT, (
            f"{module}: a new room; say in MAY_IMPORT what it may import"
        )
        assert trespasses(CORE[module].read_text(), module) == []


@pytest.mark.parametrize(
    "module, line, named",
    [
        (
            "kdmini.detection.yolo11.model",
            "from kdmini.distill.taps import Taps",
            "kdmini.distill.taps",
        ),
        ("kdmini.detection.yolo11.model", "from kdmini import config", "kdmini.config"),
        ("kdmini.detection.yolo11.model", "from ..data import voc", "kdmini.detection.voc"),
        (
            "kdmini.distill.step",
            "import kdmini.detection.yolo11.model",
            "kdmini.detection.yolo11.model",
        ),
        (
            "kdmini.detection.voc",
            "from kdmini.detection.yolo11.assign import assign",
            "kdmini.detection.yolo11.assign",
        ),
        (
            "kdmini.engine",
            "def f():\n    from kdmini.detection.yolo11.model import YOLO11",
            "kdmini.detection.yolo11.model",
        ),
        ("kdmini.optim", "from .engine import evaluate", "kdmini.engine"),
        ("kdmini.detection.average_precision", "import train", "train"),
        (
            "train",
            "from kdmini.detection.yolo11.model import YOLO11",
            "kdmini.detection.yolo11.model",
        ),
        ("kdmini.detection.voc", "from examples.shapes import write_set", "examples.shapes"),
        ("train", "from kdmini.distill import attention", "kdmini.distill.attention"),
        ("eval", "from kdmini.detection.voc import VOC", "kdmini.detection.voc"),
    ],
)
def test_a_trespass_would_be_seen(module: str, line: str, named: str) -> None:
    assert named in trespasses(line, module)


def test_the_core_does_without_terms_and_tools() -> None:
    for module, path in CORE.items():
        assert not [
            name
            for name in imports(path.read_text(), module)
            if name.startswith(("kdmini.terms", "kdmini.tools"))
        ], module


def test_the_core_opens_no_connection_of_its_own() -> None:
    network = {"socket", "ssl", "urllib", "http", "ftplib", "requests", "asyncio"}
    for module, path in CORE.items():
        assert not {name.split(".")[0] for name in imports(path.read_text(), module)} & network, (
            module
        )


def test_modules_are_imported_by_name_in_one_place() -> None:
    """What is imported dynamically is what the config names, or this page would not see it."""
    users = [
        name
        for name, path in MODULES.items()
        if re.search(r"import_module|__import__|runpy", path.read_text())
    ]
    assert users == ["kdmini.config"]


def test_third_party_packages_are_the_few_that_are_declared() -> None:
    for module, path in MODULES.items():
        extra = EXTRAS_THIRD_PARTY if module not in CORE else set()
        extra = extra | {"train"} if module.startswith("examples") else extra
        packages = {name.split(".")[0] for name in imports(path.read_text(), module)}
        assert packages - set(sys.stdlib_module_names) - {"kdmini"} <= THIRD_PARTY | extra, module


def test_ultralytics_is_the_oracle_of_the_parity_tests_and_the_peer_of_the_benchmarks_alone() -> (
    None
):
    peers = (ROOT / "bench" / "peer.py", ROOT / "bench" / "peer_training.py")
    for path in everything():
        if path.suffix == ".py" and "parity" not in path.parts and path not in peers:
            names = {name.split(".")[0] for name in imports(path.read_text(), path.stem)}
            assert "ultralytics" not in names, path
    for path in (ROOT / "tests" / "parity").glob("*.py"):  # and even there in a process of its own
        assert not [
            n for n in imports(path.read_text(), path.stem) if n.split(".")[0] == "ultralytics"
        ], path


# --- safety


@pytest.mark.parametrize("module", MODULES)
def test_nothing_runs_what_a_file_contains(module: str) -> None:
    assert dangers(MODULES[module].read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        "eval(text)",
        "exec(open(path).read())",
        "import builtins; builtins.exec(text)",
        "__import__(name)",
        "os.system(command)",
        "run = os.system",
        "os.popen(command)",
        "subprocess.run(command, shell=True)",
        "subprocess.run(command, shell=flag)",
        "import pickle",
        "from pickle import loads",
        "pickle.Unpickler(file)",
        "class Mine(pickle.Unpickler): pass",
        "from pickle import Unpickler",
        "import marshal",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=trusted)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "class Mine(yaml.UnsafeLoader): pass",
        "load = torch.load",
        "from torch import load",
        "import torch as t",
        "import os as o",
        "import numpy as n",
        "import pickle as p",
        "checkpoint.torch.load(path)",
        "torch.load(path, None)",
        "torch.load(path, weights_only=0)",
        "torch.load(path, **{'weights_only': False})",
        "np.load(path, None, True)",
        "run(command, shell=1)",
        "f = eval",
        "map(exec, texts)",
        "import subprocess",
        "from runpy import run_path",
        "os.posix_spawn(path, [], {})",
        "torch.jit.load(path)",
        "torch.hub.load_state_dict_from_url(url)",
    ],
)
def test_a_danger_would_be_seen(line: str) -> None:
    assert dangers(line)


def test_the_harmless_is_let_pass() -> None:
    harmless = (
        "import numpy as np\nimport torch.nn.functional as F\nimport torch.distributed as dist\nfrom torch import nn\n"
        "model.eval()\nyaml.safe_load(text)\ntorch.load(path, map_location='cpu', weights_only=True)\n"
        "re.compile(text)\nrun([program], shell=False)\nnp.load(path)\n"
    )
    assert dangers(harmless) == []


# --- size


def test_lines_of_code_are_counted_as_people_would() -> None:
    source = '''"""Doc.

More."""

import os  # why


# a comment
def f(
    a,
):
    """One."""
    return "x" \\
        "y"
'''
    assert code_lines(source) == 6


def test_the_core_is_small() -> None:
    sizes = {name: code_lines(path.read_text()) for name, path in CORE.items()}
    assert sum(sizes.values()) <= CORE_LINES, sizes
    path = {
        n: s for n, s in sizes.items() if any(n == p or n.startswith(p + ".") for p in READING_PATH)
    }
    assert {
        "train",
        "kdmini.engine",
        "kdmini.distill.step",
        "kdmini.detection.yolo11.loss",
        "kdmini.detection.yolo11.assign",
    } <= path.keys()
    assert sum(path.values()) <= READING_LINES, path


def test_no_file_is_named_after_nothing() -> None:
    for name in MODULES:
        assert not re.search(
            r"utils?|helpers?|misc|base|managers?|common", name.rpartition(".")[2]
        ), name


def test_nothing_is_left_to_be_done() -> None:
    marks = re.compile(
        "|".join(rf"\b{mark}\b" for mark in ("TO" + "DO", "FIX" + "ME", "X" * 3, "HA" + "CK"))
    )
    assert len(everything()) > 20
    for path in everything():
        found = marks.search(path.read_text(encoding="utf-8"))
        assert not found, f"{path}: {found}"


# --- configs

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def builds(node: object, where: str = "") -> Iterator[tuple[str, dict]]:
    """Every section with `build:`, and where it stands."""
    if isinstance(node, dict):
        if "build" in node:
            yield where, node
        for key, value in node.items():
            yield from builds(value, f"{where}.{key}".lstrip("."))
    elif isinstance(node, list):
        for item in node:
            yield from builds(item, where)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_parses_and_names_what_exists(path: Path) -> None:
    settings = config.load(path)
    assert settings == config.load(path, ["run=" + settings["run"]])
    found = dict(builds(settings))
    assert {"student", "metric", "data.train", "data.val"} <= found.keys()
    for where, section in found.items():
        module, name = section["build"].split(":")
        known = inspect.signature(getattr(importlib.import_module(module), name)).parameters
        of_the_step = {"weight", "schedule"} if where.startswith("distill.") else set()
        assert section.keys() - {"build"} - of_the_step <= known.keys(), where
    config.call(Recipe, settings["train"], f"{path}: train")
    config.call(Augment, settings["data"].get("augment", {}), f"{path}: data.augment")
    train = importlib.import_module("train")
    sections = inspect.signature(train.train_detector).parameters
    assert settings.keys() <= sections.keys()
    assert settings["data"].keys() <= inspect.signature(train.make_sets).parameters.keys()
    assert path.read_text().startswith("#")  # what it is, and the command that runs it


def test_there_are_configs_and_plain_yaml_reads_them() -> None:
    assert CONFIGS
    for path in CONFIGS:
        assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_the_table_of_witnesses_in_the_readme_has_the_rows_that_were_measured() -> None:
    measured = ROOT / "tests/parity/TABLE.md"
    if not measured.exists():
        pytest.skip("`make parity` has not written its table here")

    def rows(
        text: str,
    ) -> set[tuple[str, str]]:  # what, bound; the figures differ from machine to machine
        cells = [
            line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")
        ]
        return {(row[0], row[-1]) for row in cells}

    readme = (
        (ROOT / "README.md")
        .read_text()
        .partition("<!-- witnesses -->")[2]
        .partition("<!-- /witnesses -->")[0]
    )
    assert rows(readme) == rows(measured.read_text()) != set()


def test_the_table_of_faults_in_the_readme_promises_no_more_than_was_measured() -> None:
    measured = ROOT / "tests/faults/TABLE.md"
    if not measured.exists():
        pytest.skip("`make faults` has not written its table here")

    def lost(text: str) -> dict[str, str]:  # in the worst of the attempts, which chance may spare
        cells = [
            line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")
        ]
        return {row[0]: row[2] for row in cells}

    readme = (
        (ROOT / "README.md")
        .read_text()
        .partition("<!-- faults -->")[2]
        .partition("<!-- /faults -->")[0]
    )
    promised, found = lost(readme), lost(measured.read_text())
    assert len(promised) > 40
    assert {
        fault: what
        for fault, what in found.items()
        if what != "nothing" and promised.get(fault) != what
    } == {}
    assert found.keys() <= promised.keys()
