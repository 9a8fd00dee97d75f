"""The disk is full, or the run folder is not ours to write."""

import os
import re
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kdmini import checkpoint
from tests.faults.children import Done
from tests.faults.record import survived
from tests.faults.runs import STEPS, Runs, Wholes, Work, assert_as_never_stopped, few, readable

DISK_IS_FULL = "Saving: the disk is full"

# --- full


def error_in_save(error: Exception) -> Work:
    """-> what makes torch.save write half of a checkpoint after the first epoch, and raise."""

    def first() -> None:
        whole = torch.save

        def save(content: Any, file: Any) -> None:
            if "progress" in content and content["progress"]["epoch"] == 1:
                file.write(b"half")
                raise error
            whole(content, file)

        torch.save = save

    return first


def file_size_limit() -> None:
    """As a quota: no file can grow beyond 1 MB once the first epoch is done."""
    whole = checkpoint.save

    def save(folder: Path, step: int, *args: Any) -> None:
        whole(folder, step, *args)
        if step == STEPS:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))

    checkpoint.save = save


NO_SPACE = OSError(28, "No space left on device")
UNEXPECTED = RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
FULL = {
    "OSError": error_in_save(NO_SPACE),
    "RuntimeError": error_in_save(UNEXPECTED),
    "a limit of the system": file_size_limit,
}


@pytest.mark.parametrize("case", few(FULL, "a limit of the system"))
def test_a_full_disk_stops_the_run_with_what_it_needs_and_keeps_the_old(
    runs: Runs, whole: Wholes, case: str
) -> None:
    done = runs.tried(runs.watched(runs.begin(), first=FULL[case]))
    assert_names_a_full_disk(done)
    assert all(map(readable, runs.saved()))
    assert runs.newest() == STEPS
    assert not runs.temporary()

    done = runs.tried(runs.watched(runs.resume()))
    assert done.code == 0, done.text
    assert_as_never_stopped(runs, whole(), journal=False)
    survived(DISK_IS_FULL, of="checkpoints")


def assert_names_a_full_disk(done: Done) -> None:
    assert done.code == 1, done.text
    assert "Traceback" not in done.text, done.text
    needs = r"needs \d+\.\d MB, \d+\.\d MB are free; make room and resume"
    assert re.search(rf"cannot save .*\.pt .*{needs}", done.last), done.last


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder runs/run on a disk of 10 MB."""
    folder = tmp_path / "runs/run"
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=10m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_really_is_full(config: Path, small_disk: Path) -> None:
    runs = Runs(config, small_disk.parent)
    done = runs.tried(runs.begin("train.save_every=1"))
    assert_names_a_full_disk(done)
    assert runs.saved()
    assert all(map(readable, runs.saved()))
    assert not runs.temporary()

    enlarge = ["mount", "-t", "tmpfs", "-o", "remount,size=100m", "tmpfs", str(small_disk)]
    subprocess.run(enlarge, check=True, capture_output=True)
    done = runs.tried(runs.resume())
    assert done.code == 0, done.text
    survived(DISK_IS_FULL, of="checkpoints")


# --- not ours


@pytest.fixture
def public(config: Path) -> Iterator[Runs]:
    """Runs in a folder that other users may enter, as they may not those of pytest."""
    with tempfile.TemporaryDirectory() as name:
        runs = Runs(Path(shutil.copy(config, name)), Path(name))
        runs.run.mkdir()
        runs.config.chmod(0o644)
        runs.folder.chmod(0o755)
        yield runs


def assert_not_writable(runs: Runs, work: Work) -> None:
    """The work, done by a user who is not root, stops before anything is built."""

    def somebody() -> None:
        if os.getuid() == 0:
            os.setuid(65534)
        work()

    done = runs.tried(somebody)
    assert done.code == 1, done.text
    assert "cannot write the run folder" in done.last
    assert str(runs.run) in done.last
    assert "decode" not in done.text
    assert "Traceback" not in done.text
    survived("Saving: the run folder is read-only", of="runs begun")


def test_a_folder_that_cannot_be_written_is_found_before_anything_is_built(public: Runs) -> None:
    public.run.chmod(0o555)
    assert_not_writable(public, public.begin())


def test_a_lock_that_cannot_be_written_is_found_before_anything_is_built(public: Runs) -> None:
    shutil.copy(public.config, public.run)
    (public.run / "config.yaml").chmod(0o644)
    (public.run / "lock").touch(mode=0o444)
    public.run.chmod(0o777)
    assert_not_writable(public, public.resume())
