"""docs/demo.ipynb as it is kept: executed, of this code, small, and of no machine.

tests/long/test_notebook.py runs it; `python -m bench.notebook` makes its outputs anew.
"""

import ast
import base64
import copy
import io
import re
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from PIL import Image

from bench.notebook import NOTEBOOK, code_cells, digest, outputs, read, text_of

LARGEST = 400_000  # bytes of the file
WIDEST = 900  # pixels of a picture
CELLS = range(10, 17)
PATH = r"(?<![\w.:/])/(?:\w[\w.-]*/)+|[A-Z]:\\|file://"  # absolute
HERE = socket.gethostname()  # a host may be called as a word of the notebook
HOSTS = {"localhost", "127.0.0.1"} | ({HERE} if not HERE.isalpha() else set())

Notebook = dict[str, Any]


def faults(notebook: Notebook) -> list[str]:
    """What is wrong with it, in words."""
    if (notebook["nbformat"], notebook["nbformat_minor"]) != (4, 5):
        return ["not of format 4.5"]
    found = [*faults_of_form(notebook["cells"])]
    cells = code_cells(notebook)
    if [cell["execution_count"] for cell in cells] != [*range(1, len(cells) + 1)]:
        found.append("not executed in order")
    if notebook["metadata"].get("executed") != digest(notebook):
        found.append("other code than was executed")
    for number, cell in enumerate(cells, 1):
        found += [f"cell {number}: {fault}" for fault in faults_of_code(text_of(cell["source"]))]
    for output in outputs(notebook):
        found += faults_of_output(output)
    return found


def faults_of_form(cells: list[dict[str, Any]]) -> Iterator[str]:
    keys = {"cell_type", "id", "metadata", "source"}
    kinds = {"markdown": keys, "code": keys | {"execution_count", "outputs"}}
    for cell in cells:
        if kinds.get(cell["cell_type"]) != cell.keys():
            yield f"a cell of {sorted(cell)}"
    if len({cell["id"] for cell in cells}) < len(cells):
        yield "two cells of one id"


def faults_of_code(source: str) -> Iterator[str]:
    """Plain Python, and a test: at the end, but for what is shown and the other branches."""
    try:
        body = ast.parse(source).body
    except SyntaxError:
        yield "not plain Python"
        return
    if body and isinstance(body[-1], ast.Expr):
        body.pop()
    nodes = [node for last in body[-1:] for node in ast.walk(last)]
    if not any(isinstance(node, ast.Assert) for node in nodes):
        yield "does not end in an assertion"


def faults_of_output(output: dict[str, Any]) -> Iterator[str]:
    """Of one that is no text on stdout, nor a value."""
    if output["output_type"] == "stream" and output["name"] == "stdout":
        yield from faults_of_text(text_of(output["text"]))
    elif output["output_type"] == "execute_result":
        yield from faults_of_value(output["data"])
    else:
        yield f"{output['output_type']} {output.get('name', '')}"


def faults_of_text(text: str) -> Iterator[str]:
    for path in re.findall(PATH, text):
        yield f"a path of a machine: {path}"
    for name in HOSTS:
        if re.search(rf"\b{re.escape(name)}\b", text):
            yield f"the name {name}"


def faults_of_value(data: dict[str, Any]) -> Iterator[str]:
    if not data.keys() <= {"text/plain", "image/png"}:
        yield f"a value as {sorted(data)}"
    if "image/png" in data:
        picture = Image.open(io.BytesIO(base64.b64decode(text_of(data["image/png"]))))
        picture.load()
        if picture.width > WIDEST:
            yield f"a picture of {picture.width} pixels"


def test_it_is_executed_and_of_no_machine() -> None:
    assert faults(read()) == []


def test_it_is_short_and_small() -> None:
    notebook = read()
    assert NOTEBOOK.stat().st_size < LARGEST
    assert len(code_cells(notebook)) in CELLS
    pictures = [output for output in outputs(notebook) if "image/png" in output.get("data", {})]
    assert len(pictures) >= 4


def test_its_links_lead_somewhere() -> None:
    pages = [cell for cell in read()["cells"] if cell["cell_type"] == "markdown"]
    prose = "\n".join(text_of(cell["source"]) for cell in pages)
    links = re.findall(r"\]\(([^)\s]+)\)", prose)
    assert links
    for link in links:
        assert (NOTEBOOK.parent / link.partition("#")[0]).exists(), link


def with_error(notebook: Notebook) -> None:
    error = {"output_type": "error", "ename": "E", "evalue": "", "traceback": []}
    code_cells(notebook)[2]["outputs"].append(error)


def with_text(text: str, name: str = "stdout") -> Callable[[Notebook], None]:
    def change(notebook: Notebook) -> None:
        output = {"output_type": "stream", "name": name, "text": [text]}
        code_cells(notebook)[2]["outputs"].append(output)

    return change


def with_code(source: str) -> Callable[[Notebook], None]:
    def change(notebook: Notebook) -> None:
        code_cells(notebook)[2]["source"] = source
        notebook["metadata"]["executed"] = digest(notebook)

    return change


def with_wide_picture(notebook: Notebook) -> None:
    content = io.BytesIO()
    Image.new("L", (WIDEST + 1, 1)).save(content, "PNG")
    data = {"image/png": base64.b64encode(content.getvalue()).decode()}
    output = {"output_type": "execute_result", "data": data, "execution_count": 3, "metadata": {}}
    code_cells(notebook)[2]["outputs"].append(output)


def not_executed(notebook: Notebook) -> None:
    code_cells(notebook)[2]["execution_count"] = None


def out_of_order(notebook: Notebook) -> None:
    code_cells(notebook)[2]["execution_count"] = 7


def edited(notebook: Notebook) -> None:
    code_cells(notebook)[2]["source"] = "assert len('a') == 1"


def of_another_format(notebook: Notebook) -> None:
    notebook["nbformat"] = 3


@pytest.mark.parametrize(
    "change, fault",
    [
        (not_executed, "not executed in order"),
        (out_of_order, "not executed in order"),
        (edited, "other code than was executed"),
        (of_another_format, "not of format 4.5"),
        (with_error, "error "),
        (with_text("a warning", "stderr"), "stream stderr"),
        (with_text("saved in /home/mine/best.pt"), "a path of a machine: /home/mine/"),
        (with_text("saved in /tmp/kdmini-1/runs"), "a path of a machine: /tmp/kdmini-1/"),
        (with_text("on localhost:8888"), "the name localhost"),
        (with_code("print(1)"), "cell 3: does not end in an assertion"),
        (with_code("assert read()\nwrite()\n1"), "cell 3: does not end in an assertion"),
        (with_code("%matplotlib inline\nassert 1"), "cell 3: not plain Python"),
        (with_wide_picture, f"a picture of {WIDEST + 1} pixels"),
    ],
)
def test_a_fault_would_be_seen(change: Callable[[Notebook], None], fault: str) -> None:
    notebook = copy.deepcopy(read())
    change(notebook)
    assert faults(notebook) == [fault]
