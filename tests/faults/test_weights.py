"""Hostile, damaged and unsuitable weight files, and wrong configs, through the command line."""

import contextlib
import io
import json
import os
import pickle
import re
import resource
import shutil
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import eval as eval_script
import train as train_script
from kdmini import checkpoint
from kdmini.detection.yolo11 import weights
from tests.conftest import CONFIG, TINY
from tests.faults.children import Done, exit_code, run, script
from tests.faults.hostile import BOMBS, Reduced, bare, fragments, spliced
from tests.faults.record import survived


class Finished(NamedTuple):
    config: Path
    run: Path

    @property
    def best(self) -> Path:
        return self.run / "best.pt"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Finished:
    """A run of one epoch, and its config."""
    folder = tmp_path_factory.mktemp("finished")
    text = CONFIG.format(run=folder / "run", shapes=shapes, tiny=TINY)
    (folder / "config.yaml").write_text(
        text.replace("epochs: 4", "epochs: 1").replace("workers: 2", "workers: 0")
    )
    done = run(script(train_script, "--config", folder / "config.yaml"), folder / "out")
    assert done.code == 0, done.text
    return Finished(folder / "config.yaml", folder / "run")


Entry = Callable[[Path, Finished], Callable[[], object]]


def resumed(file: Path, run: Finished) -> Callable[[], object]:
    def work() -> None:
        for old in (run.run / "ckpt").glob("*.pt"):
            old.unlink()
        shutil.copy(file, checkpoint.numbered(run.run / "ckpt", 3))
        script(train_script, "--resume", run.run)()

    return work


ENTRIES: dict[str, Entry] = {
    "student": lambda file, run: script(
        train_script, "--config", run.config, f"run={run.run}2", f"student.weights={file}"
    ),
    "teacher": lambda file, run: script(
        train_script,
        "--config",
        run.config,
        f"run={run.run}2",
        f"teacher.weights={{path: {file}, classes: by_name}}",
    ),
    "eval": lambda file, run: script(eval_script, "--config", run.config, "--weights", file),
    "eval --teacher": lambda file, run: script(
        *(
            eval_script,
            "--config",
            run.config,
            "--weights",
            run.best,
            "--teacher",
            f"teacher.weights={file}",
        )
    ),
    "resume": resumed,
}


@pytest.fixture
def private(finished: Finished, tmp_path: Path) -> Iterator[Finished]:
    """The run, put back afterwards, for tests that put other checkpoints into it."""
    shutil.copytree(finished.run, tmp_path / "kept")
    yield finished
    shutil.rmtree(finished.run)
    shutil.copytree(tmp_path / "kept", finished.run)
    shutil.rmtree(f"{finished.run}2", ignore_errors=True)


# --- nothing runs

FORBIDDEN = (
    *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.", "pty.", "webbrowser."),
    *("socket.connect", "socket.getaddrinfo", "socket.bind", "pickle.find_class"),
)


def watch(seen: list[str], canary: Path) -> None:
    """From now on, for the life of the process, `seen` gets what no reading of a file may do."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        forbidden = (
            event.startswith(FORBIDDEN)
            or (event == "import" and args[0] == "this")
            or (
                event == "exec" and str(canary) in args[0].co_consts
            )  # importing a module is an exec too
            or (event == "open" and str(args[0]) == str(canary))
        )
        if forbidden:
            seen.append(event)

    sys.addaudithook(hook)


class Attempt(NamedTuple):
    code: int
    text: str
    traces: list[str]  # what the payload did: audit events, and whether its file appeared

    @property
    def last(self) -> str:
        return Done(self.code, self.text).last


def attempts(
    calls: Mapping[str, Callable[[], object]],
    canary: Path,
    output: Path,
    reader: Callable[[], object] = lambda: None,
) -> dict[str, Attempt]:
    """Makes the calls one after another in one child, watched; `reader` is called in the child
    before.
    """

    def work() -> None:
        reader()
        events: list[str] = []
        watch(events, canary)
        made = {}
        for name, call in calls.items():
            events.clear()
            with (
                contextlib.redirect_stdout(io.StringIO()) as text,
                contextlib.redirect_stderr(text),
            ):
                code = exit_code(call)
            made[name] = (
                code,
                text.getvalue(),
                [*events, *(["CANARY"] if canary.exists() else [])],
            )
            canary.unlink(missing_ok=True)
            sys.modules.pop("this", None)  # or importing it again would be no event
        output.with_suffix(".json").write_text(json.dumps(made))

    done = run(work, output, limit=300)
    assert done.code == 0, done.text
    return {
        name: Attempt(*made)
        for name, made in json.loads(output.with_suffix(".json").read_text()).items()
    }


def assert_one_line(attempt: Attempt | Done, file: Path, name: str, most: int = 700) -> None:
    """Exit code 1, and a last line of at most so many characters that names the file."""
    assert attempt.code == 1, f"{name}: ended with {attempt.code}\n{attempt.text}"
    assert "Traceback" not in attempt.text, f"{name}: {attempt.text}"
    assert attempt.last.startswith("error: ") and attempt.last.isprintable(), (
        f"{name}: {attempt.last!r}"
    )
    assert str(file) in attempt.last and len(attempt.last) < most + len(str(file)), (
        f"{name}: {attempt.last}"
    )
    assert ": " in attempt.last or ";" in attempt.last, f"{name}: no remedy in {attempt.last}"


def assert_refused(attempt: Attempt, entry: str, file: Path, private: Finished, name: str) -> None:
    if entry == "resume":  # skipped by name, and nothing else is there
        skipped = checkpoint.numbered(private.run / "ckpt", 3)
        assert f"skipped: {skipped}" in attempt.text, f"{name}: {attempt.text}"
        file = private.run
    assert_one_line(attempt, file, name)


QUICK = "exec|INST|STACK_GLOBAL|BUILD on a class"


def hostile_files(folder: Path, good: Path, names: str) -> dict[str, Path]:
    """Each payload whose name matches as a file of its own, and inside a file that is good
    otherwise.
    """
    files = {}
    for number, (name, (protocol, fragment)) in enumerate(fragments(folder / "CANARY").items()):
        if re.fullmatch(names, name):
            files[f"{name}, bare"] = bare(folder / f"bare{number}.pt", protocol, fragment)
            files[f"{name}, inside"] = spliced(
                folder / f"inside{number}.pt", good, protocol, fragment
            )
    assert len(files) >= 8
    return files


def newest(run: Path) -> Path:
    return checkpoint.existing(run / "ckpt")[-1]


# by the entry points that build one detector only, all of them take two seconds
ATTEMPTS = {
    entry: pytest.param(entry, ".*" if entry in ("student", "eval") else QUICK, id=entry)
    for entry in ENTRIES
}
ATTEMPTS |= {
    f"{entry}, all": pytest.param(entry, ".*", id=f"{entry}, all", marks=pytest.mark.long)
    for entry in ("teacher", "eval --teacher", "resume")
}


@pytest.mark.parametrize("entry, names", ATTEMPTS.values())
def test_a_hostile_file_is_refused_in_one_line_and_nothing_runs(
    entry: str, names: str, private: Finished, tmp_path: Path
) -> None:
    good = shutil.copy(
        newest(private.run) if entry == "resume" else private.best, tmp_path / "good.pt"
    )
    files = hostile_files(tmp_path, Path(good), names)
    calls = {name: ENTRIES[entry](file, private) for name, file in files.items()}
    for name, attempt in attempts(calls, tmp_path / "CANARY", tmp_path / "out").items():
        assert_refused(attempt, entry, files[name], private, name)
        assert not attempt.traces, f"{name} ran, and left {attempt.traces}"
        survived("Weights: pickle that calls something")


def plain_reader() -> None:
    """What this project must never do: in this process, files are unpickled as pickle and torch
    offer it.
    """

    class Plain(pickle.Unpickler):
        def persistent_load(
            self, pid: Any
        ) -> Any:  # a storage; what is in it is of no interest here
            content = torch.UntypedStorage(8 * pid[4])
            return torch.storage.TypedStorage(
                wrap_storage=content, dtype=pid[1].dtype, _internal=True
            )

    load = torch.load
    weights.interpret = lambda pickled: Plain(io.BytesIO(pickled)).load()
    checkpoint.torch.load = lambda path, **others: load(
        path, map_location="cpu", weights_only=False
    )


@pytest.mark.parametrize("entry, names", [ATTEMPTS[n] for n in ("eval", "resume", "resume, all")])
def test_control_with_a_plain_unpickler_every_payload_runs(
    entry: str, names: str, private: Finished, tmp_path: Path
) -> None:
    good = shutil.copy(
        newest(private.run) if entry == "resume" else private.best, tmp_path / "good.pt"
    )
    files = hostile_files(tmp_path, Path(good), names)
    calls = {name: ENTRIES[entry](file, private) for name, file in files.items()}
    made = attempts(calls, tmp_path / "CANARY", tmp_path / "out", plain_reader)
    for name, attempt in made.items():
        if name.startswith(("socket", "__import__")):
            assert {"socket.connect", "import"} & set(attempt.traces), (
                f"{name} did nothing:\n{attempt.text}"
            )
        else:
            assert "CANARY" in attempt.traces, f"{name} did nothing:\n{attempt.text}"


@pytest.mark.parametrize(
    "entry",
    [
        *(pytest.param(entry, marks=pytest.mark.long) for entry in ("student", "teacher")),
        "eval",
        "eval --teacher",
        "resume",
    ],
)
def test_control_a_spliced_file_without_a_payload_is_read(
    entry: str, private: Finished, tmp_path: Path
) -> None:
    good = shutil.copy(
        newest(private.run) if entry == "resume" else private.best, tmp_path / "good.pt"
    )
    file = spliced(tmp_path / "f.pt", Path(good), 2, b"N")
    made = attempts({entry: ENTRIES[entry](file, private)}, tmp_path / "CANARY", tmp_path / "out")
    assert made[entry].code == 0, made[entry].text
    assert made[entry].traces == []


def test_a_hostile_checkpoint_is_skipped_by_name_and_the_one_before_it_resumed(
    private: Finished, tmp_path: Path
) -> None:
    newest(private.run).unlink()  # so that there is something left to do
    good = newest(private.run)
    hostile = checkpoint.numbered(private.run / "ckpt", 6)
    spliced(hostile, good, *fragments(tmp_path / "CANARY")["os.system"])
    done = run(script(train_script, "--resume", private.run), tmp_path / "out")
    assert done.code == 0, done.text
    assert f"skipped: {hostile}" in done.text and f"resumed from {good}" in done.text
    assert not (tmp_path / "CANARY").exists()


@pytest.mark.parametrize("entry", ["eval", pytest.param("resume", marks=pytest.mark.long)])
def test_a_bomb_is_refused_in_one_line_and_small_memory(
    entry: str, private: Finished, tmp_path: Path
) -> None:
    good = Path(
        shutil.copy(
            newest(private.run) if entry == "resume" else private.best, tmp_path / "good.pt"
        )
    )
    key = "config" if entry == "resume" else "names"  # what is looked at
    files = {}
    for number, (name, fragment) in enumerate(BOMBS.items()):
        files[f"{name}, bare"] = bare(tmp_path / f"bare{number}.pt", 2, fragment)
        files[f"{name}, inside"] = spliced(tmp_path / f"inside{number}.pt", good, 2, fragment, key)
    calls = {name: ENTRIES[entry](file, private) for name, file in files.items()}
    calls["memory"] = lambda: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    made = attempts(calls, tmp_path / "CANARY", tmp_path / "out")
    assert int(made.pop("memory").text) - before < 400_000  # KiB, the run itself included
    for name, attempt in made.items():
        if entry == "resume":  # where another config is told key by key
            assert_one_line(attempt, private.run, name, most=700)
        else:
            assert_one_line(attempt, files[name], name)
        survived("Weights: pickle that fills the memory or the stack")


# --- what else a file may be


def content_of(path: Path, **changes: Any) -> dict[str, Any]:
    return torch.load(path, weights_only=True) | changes


def rewritten(
    change: Callable[[dict[str, bytes]], None], method: int = zipfile.ZIP_STORED
) -> Callable[..., None]:
    """-> a function that writes best.pt again with its entries changed, and right checksums."""

    def write(path: Path, best: Path) -> None:
        with zipfile.ZipFile(best) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        change(entries)
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, content in entries.items():
                archive.writestr(name, content)

    return write


def inside(entries: dict[str, bytes], name: str) -> str:
    return next(iter(entries)).partition("/")[0] + "/" + name


def twice(path: Path, best: Path) -> None:
    shutil.copy(best, path)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        name = archive.namelist()[0]
        archive.writestr(name, archive.read(name))


def flipped(path: Path, best: Path) -> None:
    data = bytearray(best.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def saved(**changes: Any) -> Callable[..., None]:
    return lambda path, best: torch.save(content_of(best, **changes), path)


def of_bytes(data: bytes) -> Callable[..., None]:
    return lambda path, best: path.write_bytes(data)


def legacy(path: Path, best: Path) -> None:
    torch.save(content_of(best), path, _use_new_zipfile_serialization=False)


def overlong(path: Path, best: Path) -> None:
    """A tensor whose strides reach beyond its storage."""
    content, storage = content_of(best), torch.rand(4)._typed_storage()
    content["model"]["x"] = Reduced(
        torch._utils._rebuild_tensor_v2, storage, 0, (1 << 20,), (1,), False, {}
    )
    torch.save(content, path)


def task(name: str) -> Callable[..., None]:
    fragment = f"cultralytics.nn.tasks\n{name}Model\n".encode()
    return lambda path, best: bare(path, 2, fragment) and None


ESCAPES = ["\x1b[2J" + "x" * 100, "\x1b]0;title\x07", "a\nerror: b", "\u202e", "\r", "\0"]
SCALE = {"sppf_act": True, "license": ""}

OTHERS: dict[
    str, tuple[str, Callable[..., None], str]
] = {  # -> row of the table, how it is written, message
    "entry twice": ("damaged", twice, "has an entry twice"),
    "two roots": (
        "damaged",
        rewritten(lambda e: e.update({"other/data.pkl": b""})),
        "more than one root",
    ),
    "deflated": ("damaged", rewritten(lambda e: None, zipfile.ZIP_DEFLATED), "compressed"),
    "cut off": (
        "damaged",
        lambda path, best: path.write_bytes(best.read_bytes()[:-1000]),
        "damaged",
    ),
    "flipped byte": ("damaged", flipped, "damaged"),
    "no data.pkl": (
        "damaged",
        rewritten(lambda e: e.pop(inside(e, "data.pkl"))),
        "without data.pkl",
    ),
    "a storage cut off": (
        "damaged",
        rewritten(lambda e: e.update({inside(e, "data/0"): b"1234"})),
        "damaged",
    ),
    "a tensor without end": ("damaged", overlong, "outside its storage"),
    "empty": ("of another kind", of_bytes(b""), "is empty"),
    "legacy": ("of another kind", legacy, "before PyTorch 1.6"),
    "tar": (
        "of another kind",
        of_bytes(b"storages".ljust(257, b"\0") + b"ustar\x0000"),
        "before PyTorch 1.6",
    ),
    "TorchScript": (
        "of another kind",
        rewritten(lambda e: e.update({inside(e, "constants.pkl"): b""})),
        "TorchScript",
    ),
    "bare pickle": ("of another kind", of_bytes(pickle.dumps({"model": 1})), "bare pickle"),
    "safetensors": ("of another kind", of_bytes(b"\2\0\0\0\0\0\0\0{}"), "safetensors"),
    "ONNX": (
        "of another kind",
        of_bytes(b"\x08\x0a\x12\x07pytorch\x1a\x062.15.0:\x04\x0a\x02hi"),
        "ONNX",
    ),
    "HTML": ("of another kind", of_bytes(b"<!DOCTYPE html><title>404</title>"), "web page"),
    "pose": ("of another kind", task("Pose"), "is a pose checkpoint"),
    "segmentation": ("of another kind", task("Segmentation"), "is a segmentation checkpoint"),
    "classification": ("of another kind", task("Classification"), "is a classification checkpoint"),
    "a run's checkpoint": (
        "of another kind",
        lambda path, best: shutil.copy(newest(best.parent), path),
        "no YOLO11",
    ),
    "scale s": (
        "of another scale or other classes",
        saved(card=SCALE | {"scale": "s"}),
        "is YOLO11s, the config says YOLO11 [0.5",
    ),
    "scale m": (
        "of another scale or other classes",
        saved(card=SCALE | {"scale": "m"}),
        "is YOLO11m, the config says YOLO11 [0.5",
    ),
    "other names": (
        "of another scale or other classes",
        saved(names=list("abcdef")),
        "classes: by_name",
    ),
    "other order": (
        "of another scale or other classes",
        saved(names=["cross", *list("abcd"), "circle"]),
        "classes: by_name",
    ),
    "terminal escapes": (
        "of another scale or other classes",
        saved(names=ESCAPES),
        r"'\x1b[2Jxxxx",
    ),
    "a million names": (
        "of another scale or other classes",
        saved(names=["x"] * 1_000_000),
        "has no list of names for its 6 classes",
    ),
}


@pytest.mark.parametrize("entry", ["eval", pytest.param("student", marks=pytest.mark.long)])
def test_a_file_that_does_not_serve_is_called_what_it_is(
    entry: str, private: Finished, tmp_path: Path
) -> None:
    files = {name: tmp_path / f"{name}.pt" for name in OTHERS}
    for name, (_, write, _) in OTHERS.items():
        write(files[name], private.best)
    calls = {name: ENTRIES[entry](file, private) for name, file in files.items()}
    for name, attempt in attempts(calls, tmp_path / "CANARY", tmp_path / "out").items():
        row, _, message = OTHERS[name]
        assert_one_line(attempt, files[name], name)
        assert message in attempt.last, f"{name}: {attempt.last}"
        assert not attempt.traces, f"{name} left {attempt.traces}"
        survived(f"Weights: file {row}")
    assert not Path(f"{private.run}2").exists()


@pytest.mark.parametrize("scale", ["s", "m"])
def test_a_file_of_another_scale_is_refused_even_where_it_lies(
    scale: str, private: Finished, tmp_path: Path
) -> None:
    saved(card=SCALE | {"scale": "s"})(
        tmp_path / "f.pt", private.best
    )  # the tensors are those of neither
    work = script(
        *(
            eval_script,
            "--config",
            private.config,
            "--weights",
            tmp_path / "f.pt",
            f"student.scale={scale}",
        )
    )
    done = run(work, tmp_path / "out")
    assert_one_line(done, tmp_path / "f.pt", scale)
    if scale == "s":
        assert "other shapes in 'model." in done.last
    else:
        assert f"is YOLO11s, the config says YOLO11{scale}" in done.last


# --- config

MISTAKES = {  # what is changed in the file, or an override -> message
    "typo": (
        "train: {epochs",
        "train: {epoch",
        "train: epoch: unknown key; did you mean `epochs`?",
    ),
    "typo of a section": ("distill:", "distil:", "distil: unknown key; did you mean `distill`?"),
    "typo, nested": (
        "imgsz: 64",
        "imgsz: 64\n  augment: {mosiac: 1.0}",
        "data.augment: mosiac: unknown key; did you mean `mosaic`?",
    ),
    "int gets text": ("{epochs: 1,", "{epochs: ten,", "train: epochs: expected int, got 'ten'"),
    "int gets 3.7": ("{epochs: 1,", "{epochs: 3.7,", "train: epochs: expected int, got 3.7"),
    "int gets true": ("{epochs: 1,", "{epochs: true,", "train: epochs: expected int, got True"),
    "int gets null": ("{epochs: 1,", "{epochs: null,", "train: epochs: expected int, got None"),
    "bool gets text": (
        "{epochs: 1,",
        "{epochs: 1, amp: half,",
        "train: amp: expected bool | Literal['bf16', 'fp16'], got 'half'",
    ),
    "bool gets 2": (
        "{epochs: 1,",
        "{epochs: 1, amp: 2,",
        "train: amp: expected bool | Literal['bf16', 'fp16'], got 2",
    ),
    "text gets no": ("device: cpu", "device: no", "device: expected str, got False; put quotes"),
    "key twice": ("seed: 3", "seed: 3\nseed: 4", "config.yaml:4: the key `seed` is given twice"),
    "override of a typo": (
        "",
        "trian.epochs=2",
        "override `trian.epochs=2`: there is no `trian`; did you mean `train`?",
    ),
    "override of a wrong type": ("", "train.epochs=ten", "train: epochs: expected int, got 'ten'"),
    "NaN": ("{epochs: 1,", "{epochs: 1, lr0: .nan,", "NaN is not a setting"),
    "a list": (None, "[1, 2]", "config.yaml: expected sections (`name: value`), got [1, 2]"),
    "empty": (None, "", "needs `run`, `data`, `student`, `metric`, `train`; add it"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_in_the_config_is_one_line_with_the_key(
    case: str, private: Finished, tmp_path: Path
) -> None:
    old, new, message = MISTAKES[case]
    text = private.config.read_text().replace(str(private.run), str(tmp_path / "fresh"))
    path = tmp_path / "mistake" / "config.yaml"
    path.parent.mkdir()
    overrides = [new] if old == "" else []
    if old:
        assert text.count(old) == 1
        text = text.replace(old, new)
    path.write_text(new if old is None else text)
    done = run(script(train_script, "--config", path, *overrides), tmp_path / "out")
    assert done.code == 1 and "Traceback" not in done.text, done.text
    assert (
        done.text.strip().count("\n") == 0
        and done.last.startswith("error: ")
        and message in done.last
    ), done.text
    assert not (tmp_path / "fresh").exists()
    survived("Processes: mistake in the config")


# --- places


def test_a_run_in_a_folder_with_spaces_and_korean(
    finished: Finished, shapes: Path, tmp_path: Path
) -> None:
    place = tmp_path / "한글 폴더"
    folder, given = place / "실행 하나", place / "교사 가중치.pt"
    shutil.copytree(shapes, place / "사진 자료")
    shutil.copy(finished.best, given)
    text = CONFIG.format(run=folder, shapes=place / "사진 자료", tiny=TINY).replace(
        "epochs: 4", "epochs: 1"
    )
    (place / "설정 파일.yaml").write_text(text, encoding="utf-8")
    works = [
        script(
            train_script,
            "--config",
            place / "설정 파일.yaml",
            f"student.weights={given}",
            f"teacher.weights={given}",
        ),
        lambda: newest(folder).unlink(),  # so that there is something left to do
        script(train_script, "--resume", folder),
        script(
            *(eval_script, "--config", folder / "config.yaml", "--weights", folder / "best.pt"),
            *("--teacher", "--save", place / "저장 곳"),
        ),
    ]
    for number, work in enumerate(works):
        done = run(work, tmp_path / f"out{number}")
        assert done.code == 0, done.text
        survived("Processes: spaces and Korean in every path")
    assert f"resumed from {folder}" in (tmp_path / "out2").read_text()
    assert (place / "저장 곳" / "teacher.json").exists()


OUTSIDE = (
    "socket.connect",
    "socket.getaddrinfo",
    "socket.gethostby",
    "socket.sendto",
    *FORBIDDEN[:5],
)


def test_a_whole_run_neither_connects_nor_starts_a_program(
    private: Finished, tmp_path: Path
) -> None:
    """train.py and eval.py with two decoding processes, under a hook that refuses both."""

    def alone() -> None:
        def hook(event: str, args: tuple[Any, ...]) -> None:
            if event.startswith(OUTSIDE) and not (
                event == "socket.connect" and isinstance(args[1], str | bytes)
            ):
                raise AssertionError(
                    f"{event} {args}"
                )  # a Unix socket, which has a path, stays on this machine

        sys.addaudithook(hook)

    fresh = tmp_path / "fresh"
    works = {
        "train": script(train_script, "--config", private.config, f"run={fresh}", "data.workers=2"),
        "eval": script(
            eval_script,
            "--config",
            private.config,
            "--weights",
            fresh / "best.pt",
            "data.workers=2",
        ),
    }
    for name, work in works.items():
        done = run(lambda work=work: (alone(), work()), tmp_path / name)
        assert done.code == 0, done.text
        survived("Processes: run that may neither connect nor start a program")
    for act in (
        lambda: socket.create_connection(("127.0.0.1", 9)),
        lambda: socket.getaddrinfo("localhost", 9),
        lambda: subprocess.run(["true"]),
        lambda: os.system("true"),  # noqa: S605
        lambda: os.posix_spawn("/bin/true", ["true"], {}),
        lambda: os.execv("/bin/true", ["true"]),
    ):  # the hook does what it says
        done = run(lambda act=act: (alone(), act()), tmp_path / "control")
        assert done.code == 1 and "AssertionError: " in done.text, done.text
