"""Room to breathe: how long, wide and dense the code may be."""

import ast
import re

import pytest

from tests.house.source import (
    CORE,
    MODULES,
    ROOT,
    code,
    code_lines,
    functions,
    is_in,
    text_files,
)

FILE_LINES = 350
FUNCTION_LINES = 60
COLUMNS = 100
USUAL_COLUMNS = 88
BEYOND_USUAL = 0.08  # share of the lines of the core
TOKENS_PER_LINE = 10  # of the core, on average
READING_LINES = 900
READING_PATH = (
    "train",
    "kdmini.engine",
    "kdmini.distill",
    "kdmini.detection.yolo11.loss",
    "kdmini.detection.yolo11.assign",
)


def reading_path() -> dict[str, int]:
    """Module -> lines of code, of the way from train.py to the loss."""
    return {
        name: code_lines(path.read_text())
        for name, path in CORE.items()
        if any(is_in(name, room) for room in READING_PATH)
    }


@pytest.mark.parametrize("module", MODULES)
def test_a_file_is_read_in_one_go(module: str) -> None:
    text = MODULES[module].read_text()
    assert text.count("\n") <= FILE_LINES
    assert max(map(len, text.splitlines()), default=0) <= COLUMNS


@pytest.mark.parametrize("module", MODULES)
def test_a_function_is_seen_at_a_glance(module: str) -> None:
    for function in functions(MODULES[module].read_text()):
        lines = (function.end_lineno or 0) - function.lineno + 1
        assert lines <= FUNCTION_LINES, f"{function.name}: {lines} lines"


def test_the_way_from_train_to_the_loss_is_short() -> None:
    sizes = reading_path()
    assert {
        "train",
        "kdmini.engine",
        "kdmini.distill.step",
        "kdmini.detection.yolo11.loss",
        "kdmini.detection.yolo11.assign",
    } <= sizes.keys()
    assert sum(sizes.values()) <= READING_LINES, sizes


def test_the_core_is_not_packed() -> None:
    lines = tokens = wide = total = 0
    for path in CORE.values():
        text = path.read_text()
        counts = code(text)
        lines += counts[0]
        tokens += counts[1]
        wide += sum(len(line) > USUAL_COLUMNS for line in text.splitlines())
        total += len(text.splitlines())
    assert tokens / lines <= TOKENS_PER_LINE
    assert wide / total < BEYOND_USUAL


def test_assignments_are_not_fused() -> None:
    """`a, b = x, y` saves a line; only a swap has a reason for it."""
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            fused = isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)
            if fused and isinstance(node.targets[0], ast.Tuple):
                names = {ast.unparse(target) for target in node.targets[0].elts}
                values = {ast.unparse(value) for value in node.value.elts}
                assert names == values, f"{module}:{node.lineno}"


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
    assert code(source) == (6, 12)


def test_no_file_is_named_after_nothing() -> None:
    empty_names = r"utils?|helpers?|misc|base|managers?|common"
    for name in MODULES:
        assert not re.search(empty_names, name.rpartition(".")[2]), name


def test_nothing_is_left_to_be_done() -> None:
    words = ("TO" + "DO", "FIX" + "ME", "X" * 3, "HA" + "CK")
    marks = re.compile("|".join(rf"\b{word}\b" for word in words))
    files = text_files()
    assert len(files) > 20
    for path in files:
        mark = marks.search(path.read_text(encoding="utf-8"))
        assert not mark, f"{path.relative_to(ROOT)}: {mark}"
