"""Hostile weight files through the command line: refused in a line, and nothing runs.

Where a test runs every payload, a control shows that each would do harm to a plain
unpickler, and that the same file without a payload is read.
"""

import io
import pickle
import re
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import train as train_script
from kdmini import checkpoint
from kdmini.detection.yolo11 import weights
from kdmini.weights.pickled import Pickled
from tests.faults.attempts import assert_one_line, assert_refused, attempts
from tests.faults.children import run, script
from tests.faults.entries import ENTRIES, Finished, finish, good_file, newest, put_back
from tests.faults.hostile import BOMBS, bare, fragments, spliced
from tests.faults.record import survived


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Finished:
    return finish(tmp_path_factory.mktemp("finished"), shapes)


@pytest.fixture
def private(finished: Finished, tmp_path: Path) -> Iterator[Finished]:
    with put_back(finished, tmp_path / "copy") as run_as_before:
        yield run_as_before


# --- payloads

ALL = ".*"
QUICK = "exec|INST|STACK_GLOBAL|BUILD on a class"  # by the entries that take two seconds a file

quick_or_all = [
    pytest.param("student", ALL, id="student"),
    pytest.param("eval", ALL, id="eval"),
    pytest.param("teacher", QUICK, id="teacher"),
    pytest.param("teacher", ALL, id="teacher, all", marks=pytest.mark.long),
    pytest.param("eval --teacher", QUICK, id="eval --teacher"),
    pytest.param("eval --teacher", ALL, id="eval --teacher, all", marks=pytest.mark.long),
    pytest.param("resume", QUICK, id="resume"),
    pytest.param("resume", ALL, id="resume, all", marks=pytest.mark.long),
]


@pytest.mark.parametrize("entry, names", quick_or_all)
def test_a_hostile_file_is_refused_in_one_line_and_nothing_runs(
    entry: str, names: str, private: Finished, tmp_path: Path
) -> None:
    files = hostile_files(tmp_path, good_file(entry, private), names)
    calls = {name: ENTRIES[entry](file, private) for name, file in files.items()}
    for name, attempt in attempts(calls, tmp_path / "CANARY", tmp_path / "out").items():
        assert_refused(attempt.done, entry, files[name], private, name)
        assert not attempt.traces, f"{name} ran, and left {attempt.traces}"
        survived("Weights: pickle that calls something")


def hostile_files(folder: Path, good: Path, names: str) -> dict[str, Path]:
    """Each payload whose name matches, as a file of its own and inside a good one."""
    good = Path(shutil.copy(good, folder / "good.pt"))
    files = {}
    for number, (name, (protocol, fragment)) in enumerate(fragments(folder / "CANARY").items()):
        if not re.fullmatch(names, name):
            continue
        alone = folder / f"bare{number}.pt"
        inside = folder / f"inside{number}.pt"
        files[f"{name}, bare"] = bare(alone, protocol, fragment)
        files[f"{name}, inside"] = spliced(inside, good, protocol, fragment)
    assert len(files) >= 8
    return files


@pytest.mark.parametrize(
    "entry, names",
    [
        pytest.param("eval", ALL, id="eval"),
        pytest.param("resume", QUICK, id="resume"),
        pytest.param("resume", ALL, id="resume, all", marks=pytest.mark.long),
    ],
)
def test_control_with_a_plain_unpickler_every_payload_runs(
    entry: str, names: str, private: Finished, tmp_path: Path
) -> None:
    files = hostile_files(tmp_path, good_file(entry, private), names)
    calls = {name: ENTRIES[entry](file, private) for name, file in files.items()}
    made = attempts(calls, tmp_path / "CANARY", tmp_path / "out", unpickle_plainly)
    for name, attempt in made.items():
        expected = {"CANARY"}
        if name.startswith(("socket", "__import__")):
            expected = {"socket.connect", "import"}
        assert expected & set(attempt.traces), f"{name} did nothing:\n{attempt.done.text}"


def unpickle_plainly() -> None:
    """What this project must never do: unpickle files as pickle and torch offer it."""

    class Plain(pickle.Unpickler):
        def persistent_load(self, reference: Any) -> Any:
            """A storage; what is in it is of no interest here."""
            _, kind, _, _, length = reference
            content = torch.UntypedStorage(8 * length)
            return torch.storage.TypedStorage(
                wrap_storage=content, dtype=kind.dtype, _internal=True
            )

    load = torch.load

    def load_plainly(path: Path, **settings: Any) -> Any:
        return load(path, map_location="cpu", weights_only=False)

    weights.interpret = lambda pickled: Pickled(Plain(io.BytesIO(pickled)).load(), set())
    checkpoint.torch.load = load_plainly


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param("student", marks=pytest.mark.long),
        pytest.param("teacher", marks=pytest.mark.long),
        "eval",
        "eval --teacher",
        "resume",
    ],
)
def test_control_a_spliced_file_without_a_payload_is_read(
    entry: str, private: Finished, tmp_path: Path
) -> None:
    file = spliced(tmp_path / "f.pt", good_file(entry, private), 2, b"N")
    calls = {entry: ENTRIES[entry](file, private)}
    attempt = attempts(calls, tmp_path / "CANARY", tmp_path / "out")[entry]
    assert attempt.done.code == 0, attempt.done.text
    assert attempt.traces == []


def test_a_hostile_checkpoint_is_skipped_by_name_and_the_one_before_it_resumed(
    private: Finished, tmp_path: Path
) -> None:
    newest(private.run).unlink()  # so that there is something left to do
    good = newest(private.run)
    hostile = checkpoint.numbered(private.run / "ckpt", 6)
    protocol, fragment = fragments(tmp_path / "CANARY")["os.system"]
    spliced(hostile, good, protocol, fragment)
    done = run(script(train_script, "--resume", private.run), tmp_path / "out")
    assert done.code == 0, done.text
    assert f"skipped: {hostile}" in done.text
    assert f"resumed from {good}" in done.text
    assert not (tmp_path / "CANARY").exists()


# --- bombs


@pytest.mark.parametrize("entry", ["eval", pytest.param("resume", marks=pytest.mark.long)])
def test_a_bomb_is_refused_in_one_line_and_small_memory(
    entry: str, private: Finished, tmp_path: Path
) -> None:
    key = "config" if entry == "resume" else "names"  # what is looked at
    files = bombs(tmp_path, good_file(entry, private), key)
    calls = {name: ENTRIES[entry](file, private) for name, file in files.items()}
    calls["memory"] = lambda: print(peak_memory())
    before = peak_memory()
    made = attempts(calls, tmp_path / "CANARY", tmp_path / "out")
    after = int(made.pop("memory").done.text)
    assert after - before < 400_000  # the run itself included
    for name, attempt in made.items():
        # a config that was changed is told key by key, with the name of the run
        named = private.run if entry == "resume" else files[name]
        assert_one_line(attempt.done, named, name)
        survived("Weights: pickle that fills the memory or the stack")


def bombs(folder: Path, good: Path, key: str) -> dict[str, Path]:
    """Each as a file of its own, and under this key of a good one."""
    good = Path(shutil.copy(good, folder / "good.pt"))
    files = {}
    for number, (name, fragment) in enumerate(BOMBS.items()):
        alone = folder / f"bare{number}.pt"
        inside = folder / f"inside{number}.pt"
        files[f"{name}, bare"] = bare(alone, 2, fragment)
        files[f"{name}, inside"] = spliced(inside, good, 2, fragment, key)
    return files


def peak_memory() -> int:
    """KiB, of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
