"""Entries in JSON: whole at the end, or not there."""

import io
import json
from pathlib import Path

import pytest

from kdmini.contracts import UserError
from kdmini.tools.entries import in_lines, in_list, on_stream

FULL = Path("/dev/full")
ENTRIES = [{"file": "한글.png", "n": 1}, {"file": "caf\udce9\x85.png", "found": [1.5]}]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_list_is_json_of_any_length(tmp_path: Path, count: int) -> None:
    with in_list(tmp_path / "a.json") as add:
        for entry in ENTRIES[:count]:
            add(entry)
    text = (tmp_path / "a.json").read_text("utf-8")
    assert json.loads(text) == ENTRIES[:count]
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_lines_grow_at_once_and_have_their_name_at_the_end(tmp_path: Path) -> None:
    with in_lines(tmp_path / "a.jsonl") as add:
        for number, entry in enumerate(ENTRIES, 1):
            add(entry)
            (part,) = tmp_path.iterdir()
            assert part.name == "a.jsonl.part"
            assert len(part.read_bytes().splitlines()) == number
    text = (tmp_path / "a.jsonl").read_text("utf-8")
    assert [json.loads(line) for line in text.split("\n")[:-1]] == ENTRIES
    assert "한글.png" in text


def test_a_stream_gets_what_a_terminal_does_not_act_upon() -> None:
    stream = io.StringIO()
    with on_stream(stream) as add:
        for entry in ENTRIES:
            add(entry)
    assert stream.getvalue().isascii()
    assert [json.loads(line) for line in stream.getvalue().splitlines()] == ENTRIES


@pytest.mark.parametrize("kind", [in_list, in_lines])
def test_nothing_half_written_is_left(tmp_path: Path, kind) -> None:
    with pytest.raises(RuntimeError), kind(tmp_path / "a") as add:
        add(ENTRIES[0])
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="none/a"), kind(tmp_path / "none" / "a"):
        pass


@pytest.mark.skipif(not FULL.exists(), reason="no device that is always full")
def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.part").symlink_to(FULL)
    with pytest.raises(UserError, match=r"cannot write .*/a \(No space left"):  # noqa: SIM117
        with in_list(tmp_path / "a") as add:
            add(ENTRIES[0])
