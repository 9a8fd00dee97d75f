"""Nothing in kdmini could run what a file or a text contains."""

import ast
import re

import pytest

from tests.house.source import MODULES, dotted, imports

# these run what they read, or start another program
FORBIDDEN_MODULES = {
    *("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"),
    *("subprocess", "runpy", "pty", "code", "ctypes"),
}
# called or handed on
FORBIDDEN_NAMES = re.compile(
    r"(builtins\.)?(eval|exec|__import__)"
    r"|os\.(system|popen|exec\w+|spawn\w+|posix_spawn\w*)|asyncio\.create_subprocess_\w+"
    r"|(\w+\.)*(Unpickler|read_pickle)"
    r"|torch\.(jit\.load|hub\.load\w*|package\b.*|serialization\b.*)"
    r"|yaml\.(load|load_all|full_load|full_load_all|unsafe_load|unsafe_load_all)"
    r"|yaml\.(Unsafe|Full)?Loader"
)
FORBIDDEN_SETTINGS = {"shell": True, "weights_only": False, "allow_pickle": True}
LOADERS = ("torch.load", "numpy.load")
PLAIN = {"os", "torch", "numpy", "yaml", "builtins", "asyncio"}  # imported under their own names
ALIASES = {"np", "F", "dist"}  # and these: numpy, torch.nn.functional, torch.distributed


def dangers(source: str) -> list[str]:
    """Names and settings that could run what a file or a text contains."""
    tree = ast.parse(source)
    dangerous = [name for name in imports(source, "") if name.split(".")[0] in FORBIDDEN_MODULES]
    called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            dangerous += in_import(node)
        if isinstance(node, ast.Attribute | ast.Name):
            dangerous += in_name(dotted(node), called.get(id(node)))
        if isinstance(node, ast.Call):
            dangerous += in_settings(node)
    return dangerous


def in_import(node: ast.Import | ast.ImportFrom) -> list[str]:
    """A forbidden name, or a module under a name that would hide what it does."""
    origin = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
    dangerous = []
    for alias in node.names:
        full = f"{origin}{alias.name}"
        renamed = alias.asname not in (None, *ALIASES) and full.split(".")[0] in PLAIN
        if renamed or FORBIDDEN_NAMES.fullmatch(full) or full in LOADERS:
            dangerous.append(full)
    return dangerous


def in_name(name: str, call: ast.Call | None) -> list[str]:
    """A forbidden name, or a loader that is not called with its settings in full."""
    dangerous = []
    if FORBIDDEN_NAMES.fullmatch(name):
        dangerous.append(name)
    if re.search(r"\b(torch|np|numpy)\.load$", name):
        settings = {keyword.arg for keyword in call.keywords} if call else set()
        if call is None or len(call.args) > 1 or None in settings:
            dangerous.append(f"{name}, which is not called with its settings in full")
        elif name.endswith("torch.load") and "weights_only" not in settings:
            dangerous.append("torch.load without weights_only=True")
    return dangerous


def in_settings(call: ast.Call) -> list[str]:
    dangerous = []
    for keyword in call.keywords:
        bad = FORBIDDEN_SETTINGS.get(keyword.arg or "")
        if bad is None:
            continue
        value = keyword.value
        harmless = isinstance(value, ast.Constant) and bool(value.value) is not bad
        if not harmless:
            dangerous.append(f"{dotted(call.func)}({keyword.arg}=)")
    return dangerous


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
        "import numpy as np\nimport torch.nn.functional as F\n"
        "import torch.distributed as dist\nfrom torch import nn\n"
        "model.eval()\nyaml.safe_load(text)\n"
        "torch.load(path, map_location='cpu', weights_only=True)\n"
        "re.compile(text)\nrun([program], shell=False)\nnp.load(path)\n"
    )
    assert dangers(harmless) == []
