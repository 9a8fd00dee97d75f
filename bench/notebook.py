"""Runs docs/demo.ipynb anew, and keeps what its cells put out: `python -m bench.notebook`.

This takes a kernel of Jupyter, `pip install nbclient ipykernel`, which nothing else here
needs: tests/long/test_notebook.py runs the same cells as a plain program. Edit the cells with
anything, then run this; tests/docs/test_notebook.py fails until it has been done.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs" / "demo.ipynb"
KEPT = {"text/plain", "image/png"}  # of the forms in which a value is shown

Cell = dict[str, Any]


def read() -> dict[str, Any]:
    return json.loads(NOTEBOOK.read_text())


def code_cells(notebook: dict[str, Any]) -> list[Cell]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def text_of(lines: str | list[str]) -> str:
    """The format has a text as one string, or as its lines."""
    return lines if isinstance(lines, str) else "".join(lines)


def program(notebook: dict[str, Any]) -> str:
    """All code as one program, with the number of each cell."""
    texts = [text_of(cell["source"]) for cell in code_cells(notebook)]
    return "\n".join(f"# cell {number}\n{text}\n" for number, text in enumerate(texts, 1))


def digest(notebook: dict[str, Any]) -> str:
    """Of the code, by which what was executed is known."""
    return hashlib.sha256(program(notebook).encode()).hexdigest()


def outputs(notebook: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for cell in code_cells(notebook):
        yield from cell["outputs"]


def tidy(notebook: dict[str, Any]) -> None:
    """Leaves out when and on what it ran, and second forms of the pictures."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    language = {"name": "python", "file_extension": ".py", "mimetype": "text/x-python"}
    notebook["metadata"] = {
        "kernelspec": kernel,
        "language_info": language,
        "executed": digest(notebook),
    }
    for cell in notebook["cells"]:
        cell["metadata"] = {}
    for output in outputs(notebook):
        if "data" in output:
            output["data"] = {form: output["data"][form] for form in KEPT & output["data"].keys()}


def main() -> None:
    try:
        import nbformat
        from nbclient import NotebookClient
    except ImportError as missing:
        sys.exit(f"error: {missing}; pip install nbclient ipykernel")

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    where = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=None, kernel_name="python3", resources=where).execute()
    tidy(notebook)
    text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True)
    NOTEBOOK.write_text(f"{text}\n")
    print(f"{NOTEBOOK.name}: {len(text) / 1000:.0f} kB")


if __name__ == "__main__":
    main()
