"""The source of the project as the tests of the house see it: files, imports, sizes."""

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("train", "eval")
OUTSIDE = ("kdmini.tools", "kdmini.terms", "examples")  # what the core does without
NOT_KEPT = ("data", "runs", "build", "weights")

# tokens that are no code
EMPTY = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def modules() -> dict[str, Path]:
    """Dotted name -> file, of kdmini, the scripts and the examples."""
    files = {name: ROOT / f"{name}.py" for name in SCRIPTS}
    for folder in ("examples", "kdmini"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.is_symlink():  # to a script
                continue
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            files[name.removesuffix(".__init__")] = path
    return files


MODULES = modules()
CORE = {name: path for name, path in MODULES.items() if not name.startswith(OUTSIDE)}


def text_files() -> list[Path]:
    """Every text file of the project: what git would keep, found without git."""
    files = [ROOT / "Makefile", *(ROOT / ".ci").glob("*")]
    for suffix in ("py", "md", "yaml", "toml", "sh"):
        for path in ROOT.rglob(f"*.{suffix}"):
            top = path.relative_to(ROOT).parts[0]
            if not top.startswith(".") and top not in NOT_KEPT:
                files.append(path)
    return [path for path in files if path.is_file()]


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


def imported_modules(name: str) -> set[str]:
    """The modules of this project that one of them imports."""
    targets = {module_of(target) for target in imports(MODULES[name].read_text(), name)}
    return (targets & MODULES.keys()) - {name, "kdmini"}


def module_of(name: str) -> str:
    """The module that a dotted name is, or is in; the first part of one from elsewhere."""
    while name not in MODULES and "." in name:
        name = name.rpartition(".")[0]
    return name


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def functions(source: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def docstring_lines(source: str) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        has_body = isinstance(
            node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        )
        if has_body and ast.get_docstring(node):
            first = node.body[0]
            lines |= set(range(first.lineno, (first.end_lineno or 0) + 1))
    return lines


def code(source: str) -> tuple[int, int]:
    """-> lines that hold code (not blank, no comment, no docstring), and the tokens on them."""
    docstrings = docstring_lines(source)
    lines: set[int] = set()
    tokens = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in EMPTY or token.start[0] in docstrings:
            continue
        tokens += 1
        lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines), tokens


def code_lines(source: str) -> int:
    return code(source)[0]


def is_in(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")
