"""What a program prints may go nowhere: it goes on, or ends as its user expects."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from tqdm import tqdm

from kdmini.output import Descriptor, Stream
from tests.house.source import MODULES, ROOT

# prints three thousand lines and a bar, keeps a log, and says in a file that it came to its end
PROGRAM = """
import os, sys
from pathlib import Path
from tqdm import tqdm
from kdmini import output

if "NOT_BLOCKING" in os.environ:
    os.set_blocking(1, False)
output.guard(needed={needed})
print("before the log")
output.log_to(Path("log"))
for number in tqdm(range(3000), disable=False):
    print("line", number, "." * 30)
print("\\ud55c\\uae00, and half of it: \\udced")
print("an error", file=sys.stderr)
print("without an end", end="")
os.write(1, b"not by Python\\n")
Path("file").write_text("own descriptor")
Path("end").touch()
sys.exit({code!r})
"""
NO_SPACE = "error: cannot write to the standard output (No space left on device)\n"


class Ended(NamedTuple):
    """How the program ended in a line of bash."""

    code: int
    stdout: str
    stderr: str
    is_done: bool  # it came to its end
    log: str


def ended(folder: Path, line: str, needed: bool = False, code: object = 0) -> Ended:
    (folder / "program.py").write_text(PROGRAM.format(needed=needed, code=code))
    script = f"""
        program() {{ PYTHONPATH={ROOT} {sys.executable} program.py; }}
        {line}
        exit ${{PIPESTATUS[0]}}
    """
    done = subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True)
    log = folder / "log"
    text = log.read_text() if log.exists() else ""
    return Ended(done.returncode, done.stdout, done.stderr, (folder / "end").exists(), text)


BROKEN = [
    "program | head -1",
    "program 2>&1 | head -1",
    "program 2>&1 | true",
    "program 1>&-",
    "program 2>&-",
    "program 0<&- 1>&- 2>&-",
    "program >/dev/full",
    "program 2>/dev/full",
    "program >/dev/full 2>&1",
    "PYTHONIOENCODING=ascii program",
    "PYTHONIOENCODING=ascii:strict program | head -1",
    "PYTHONUNBUFFERED=1 program | head -1",
    "LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 program",
    "NOT_BLOCKING=1 program | (sleep 0.5; cat)",
]


@pytest.mark.parametrize("line", BROKEN)
def test_the_program_goes_on_and_its_code_is_its_own(tmp_path: Path, line: str) -> None:
    done = ended(tmp_path, line, code=3)
    assert done.is_done
    assert done.code == 3
    for word in ("Traceback", "Exception ignored", "BrokenPipe", "rror:"):
        assert word not in done.stdout + done.stderr

    # and the log has every line, and no bar
    dots = "." * 30
    lines = [f"line {number} {dots}" for number in range(3000)]
    expected = ["before the log", *lines, "한글, and half of it: \\udced", "an error"]
    assert done.log.splitlines() == expected


@pytest.mark.parametrize(
    "line", ["program | head -1", "program 2>&1 | head -1", "program 2>/dev/full | head -1"]
)
def test_a_tool_ends_with_its_reader_and_says_nothing(tmp_path: Path, line: str) -> None:
    done = ended(tmp_path, line, needed=True)
    assert not done.is_done
    assert done.code == 141
    assert "before the log" in done.stdout
    assert "Traceback" not in done.stderr
    assert "ignored" not in done.stderr


def test_a_tool_whose_output_finds_no_room_says_so(tmp_path: Path) -> None:
    done = ended(tmp_path, "program >/dev/full", needed=True)
    assert done.code == 1
    assert done.stderr == NO_SPACE
    assert not done.is_done


def test_a_tool_does_not_need_its_bars(tmp_path: Path) -> None:
    done = ended(tmp_path, "program 2>&-", needed=True)
    assert done.is_done
    assert done.code == 0
    assert done.stdout.endswith("without an endnot by Python\n")


def test_a_file_never_gets_the_descriptor_of_the_output(tmp_path: Path) -> None:
    assert ended(tmp_path, "program 0<&- 1>&- 2>&-").is_done
    assert (tmp_path / "file").read_text() == "own descriptor"


def test_what_the_encoding_lacks_is_escaped(tmp_path: Path) -> None:
    done = ended(tmp_path, "PYTHONIOENCODING=ascii program")
    assert "\\ud55c\\uae00, and half of it: \\udced\n" in done.stdout


MAINS = [name for name, path in MODULES.items() if "\ndef main(" in path.read_text()]


@pytest.mark.parametrize("module", MAINS)
def test_every_program_begins_with_it(module: str) -> None:
    body = MODULES[module].read_text().split("\ndef main(")[1]
    first = body.split("-> None:\n")[1].lstrip().splitlines()[0]
    assert first in ("output.guard()", "output.guard(needed=True)")


def written(*texts: str) -> str:
    """What arrives at the other end of a pipe."""
    reader, writer = os.pipe()
    stream = Stream(None, Descriptor(writer, needed=False))
    for text in texts:
        print(text, file=stream, end="")
    os.close(writer)
    with open(reader, encoding="utf-8", newline="") as file:
        return file.read()


def test_no_text_out_of_a_file_reaches_the_terminal_as_a_command() -> None:
    evil = "\x1b[2J\x1b]0;title\x07\x9b31m\rover it\x08\x7f\u202etxt.exe\u2028"
    escaped = r"\x1b[2J\x1b]0;title\x07\x9b31m\rover it\x08\x7f\u202etxt.exe\u2028"
    assert written(f"name: {evil}\n", evil, f"\r{evil}") == f"name: {escaped}\n{escaped}\r{escaped}"
    plain = "한글\tund é, \u3000wide\n\n"
    assert written(plain) == plain


def test_progress_bars_move_the_cursor() -> None:
    reader, writer = os.pipe()
    stream = Stream(None, Descriptor(writer, needed=False))
    for _ in tqdm(range(3), "upper", file=stream, position=0):
        for _ in tqdm(range(2), "lower", file=stream, position=1, leave=False):
            pass
    os.close(writer)
    with open(reader, encoding="utf-8", newline="") as file:
        text = file.read()
    assert "\rupper: 100%" in text
    assert "\x1b[A" in text
    assert "\\" not in text
