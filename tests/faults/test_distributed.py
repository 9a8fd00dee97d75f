"""Two processes under torchrun: what becomes of all when something happens to one."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from torch import Tensor

from kdmini.checkpoint import existing, load
from tests.conftest import CLASSIFICATION, ROOT, SEGMENTATION
from tests.faults.record import survived

# a term that at some call does something to rank 1 alone; every rank leaves its pid, and how
# often it was called
TERM = """
import os, sys, time
from pathlib import Path
from kdmini.distill.attention import AttentionTransfer

class Upset(AttentionTransfer):
    def __init__(self, folder: str, how: str = "", at: int = 4, pause: float = 0.0):
        super().__init__()
        self.folder = Path(folder)
        self.how = how
        self.at = at
        self.pause = pause
        self.calls = 0
        self.rank = os.environ.get("RANK", "0")
        (self.folder / f"pid{self.rank}").write_text(str(os.getpid()))

    def forward(self, student, teacher, targets):
        self.calls += 1
        (self.folder / f"calls{self.rank}").write_text(str(self.calls))
        time.sleep(self.pause)
        value = super().forward(student, teacher, targets)
        if self.rank == "1" and self.calls == self.at:
            if self.how == "raise":
                raise ValueError("broken on purpose")
            if self.how == "killed":
                os.kill(os.getpid(), 9)
            if self.how == "left":
                sys.exit(0)
            if self.how == "vanished":
                os._exit(0)
            if self.how == "hung":
                time.sleep(300)
            if self.how == "nan":
                return value * float("nan")
        return value
"""
METRIC = """
import os, time
from pathlib import Path
from kdmini.detection.average_precision import DetectionMetric

class Slow(DetectionMetric):
    def __init__(self, names: list, folder: str):
        super().__init__(names)
        self.folder = folder

    def compute(self):
        (Path(self.folder) / "evaluating").touch()
        time.sleep(20)
        return super().compute()
"""


# each rank takes itself for a machine of its own: those of one read the same pixels
DATA = """
import os
from kdmini.contracts import UserError
from kdmini.detection.voc import VOC

os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")

class Torn(VOC):
    def __getitem__(self, index):
        if os.environ.get("RANK") == "1" and index == 5:
            raise UserError("an image that this machine lacks")
        return super().__getitem__(index)
"""


class Ended(NamedTuple):
    code: int
    text: str
    seconds: float


class Launch:
    """torchrun with two ranks of train.py, in a process group of its own."""

    def __init__(self, folder: Path, *arguments: object):
        self.folder = folder
        self.output = folder / "output"
        (folder / "upset.py").write_text(TERM)
        (folder / "slow.py").write_text(METRIC)
        (folder / "torn.py").write_text(DATA)
        path = os.pathsep.join([str(folder), str(ROOT)])
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*torchrun, "--nproc-per-node", "2", "train.py", *map(str, arguments)]
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=file, stderr=file, start_new_session=True
            )

    def until(self, ready: Callable[[], object], limit: float = 60) -> None:
        end = time.monotonic() + limit
        while not ready():
            assert self.process.poll() is None, self.output.read_text()
            assert time.monotonic() < end, self.output.read_text()
            time.sleep(0.01)

    def calls(self, rank: int) -> int:
        """Steps that a rank has begun."""
        path = self.folder / f"calls{rank}"
        return int(path.read_text() or 0) if path.exists() else 0

    def pids(self) -> list[int]:
        return [int((self.folder / f"pid{rank}").read_text()) for rank in range(2)]

    def wait(self, limit: float = 90) -> Ended:
        """Until torchrun and both ranks are gone."""
        begun = time.monotonic()
        try:
            code = self.process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            for pid in self.pids():
                os.kill(pid, signal.SIGKILL)
            raise
        seconds = time.monotonic() - begun
        if (self.folder / "pid1").exists():
            assert not any(Path(f"/proc/{pid}").exists() for pid in self.pids())
        return Ended(code, self.output.read_text(errors="replace"), seconds)


def upset(folder: Path, how: str = "nothing", **settings: object) -> list[str]:
    """Overrides that put the term in place of the attention."""
    term = {
        "build": "upset:Upset",
        "folder": folder,
        "how": how,
        "schedule": "[[0, 1.0, 100, 1.0]]",
        **settings,
    }
    return [f"distill.attention.{key}={value}" for key, value in term.items()]


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


def checkpoints(folder: Path) -> list[str]:
    return [path.name for path in existing(folder / "run/ckpt")]


def finite(tensors: dict[str, Tensor]) -> bool:
    return all(value.isfinite().all() for value in tensors.values())


def check_folder(folder: Path, epochs: int) -> None:
    """One set of files, all whole, every line once."""
    names = sorted(path.name for path in (folder / "run").iterdir())
    files = ["best.pt", "ckpt", "config.yaml", "lock", "log.txt", "metrics.jsonl", "results.csv"]
    assert names == files
    assert [record["epoch"] for record in records(folder)] == list(range(-1, epochs))
    assert len(list((folder / "run/ckpt").iterdir())) == 2
    for path in existing(folder / "run/ckpt"):
        load(path)


@pytest.mark.parametrize(
    ("student", "task"),
    [("YOLO11", ()), ("FastSCNN", SEGMENTATION), ("WideResNet", CLASSIFICATION)],
)
def test_a_run_of_two_ranks_leaves_one_set_of_files_and_goes_on(
    config_file: Path, student: str, task: tuple[str, ...]
) -> None:
    """Stopped after two epochs by SIGTERM to rank 1, resumed; a NaN on rank 1 on the way
    costs one update.
    """
    folder = config_file.parent
    term = upset(folder, "nan", at=2, pause=0.1)
    launch = Launch(folder, "--config", config_file, *task, *term, "train.nbs=8")
    launch.until(lambda: launch.calls(1) >= 4)
    os.kill(launch.pids()[1], signal.SIGTERM)
    ended = launch.wait()
    assert ended.code
    assert ended.seconds < 30
    assert "stopped after step 3 of epoch 2; to go on: python train.py --resume" in ended.text
    assert ended.text.count("device: torch finds no CUDA") <= 1
    assert ended.text.count(f"student: {student}") == 1
    assert "FutureWarning" not in ended.text
    assert "[rank" not in ended.text  # as torch marks tracebacks
    assert checkpoints(folder) == ["step_00000003.pt", "step_00000006.pt"]
    assert records(folder)[1]["skipped"] == 1

    resumed = Launch(folder, "--resume", folder / "run").wait()
    assert resumed.code == 0, resumed.text
    assert "1 of 4 epochs and 3 steps done" in resumed.text
    check_folder(folder, 4)
    assert finite(load(existing(folder / "run/ckpt")[-1])["student"])
    survived("Processes: stop signal to one of two ranks, NaN on one, resumed", tried=2)


def test_ranks_that_see_other_images_stop_before_the_first_step(config_file: Path) -> None:
    folder = config_file.parent
    term = upset(folder)
    torn = ["data.train.build=torn:Torn", "data.on_bad=skip"]
    ended = Launch(folder, "--config", config_file, *term, *torn).wait()
    assert ended.code == 1
    fault = "data.train, image '000005' on rank 0 there, on rank 1 not there"
    for rank in range(2):
        assert f"error: rank {rank}: the ranks have not read the same: {fault}" in ended.text
    assert "SIGABRT" not in ended.text
    assert not list(folder.glob("calls*"))
    assert not (folder / "run").exists()
    survived("Processes: two ranks that read other images", of="runs without a word")


ENDS = {
    "raise": r"\[rank1\]: ValueError: broken on purpose",
    "killed": r"rank +: 1 .*\n.*exitcode +: -9",
    "left": r"error: rank 1: left before the end of the run",
    "vanished": r"error: rank 0: lost another rank, which .*left.*\((Connection closed|Read error)",
    "hung": (
        r"error: rank 0: lost another rank, which .*silent for `timeout` minutes "
        r"\(Timed out waiting 6000ms"
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("how", ENDS)
def test_when_one_rank_ends_all_end_with_the_reason_within_seconds(
    config_file: Path, how: str
) -> None:
    folder = config_file.parent
    launch = Launch(folder, "--config", config_file, *upset(folder, how, at=5), "timeout=0.1")
    launch.until(lambda: launch.calls(1) >= 5)
    ended = launch.wait()
    assert ended.code == 1
    # torchrun gives the rank that hangs half a minute between SIGTERM and SIGKILL
    assert ended.seconds < (6 + 30 + 10 if how == "hung" else 30)
    assert re.search(ENDS[how], ended.text), ended.text
    assert checkpoints(folder)[-1] == "step_00000003.pt"
    load(folder / "run/ckpt/step_00000003.pt")
    survived("Processes: one of two ranks raises, is killed, leaves, hangs")


@pytest.mark.long
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_to_torchrun_makes_all_save_at_the_same_step(config_file: Path, name: str) -> None:
    folder = config_file.parent
    launch = Launch(folder, "--config", config_file, *upset(folder, pause=0.1))
    # both train: a rank that evaluates would leave at once
    launch.until(lambda: min(launch.calls(0), launch.calls(1)) >= 4)
    os.killpg(launch.process.pid, getattr(signal, name))
    ended = launch.wait()
    assert ended.code
    assert ended.seconds < 30
    assert "stopped after step 3 of epoch 2" in ended.text, ended.text
    assert checkpoints(folder) == ["step_00000003.pt", "step_00000006.pt"]

    resumed = Launch(folder, "--resume", folder / "run").wait()
    assert resumed.code == 0, resumed.text
    check_folder(folder, 4)
    survived("Processes: SIGTERM or SIGINT to torchrun, in training or evaluation, resumed")


@pytest.mark.long
@pytest.mark.parametrize("one", [False, True])
def test_a_signal_in_an_evaluation_ends_all_and_costs_the_evaluation_alone(
    config_file: Path, one: bool
) -> None:
    folder = config_file.parent
    slow = ["metric.build=slow:Slow", f"metric.folder={folder}"]
    launch = Launch(folder, "--config", config_file, *upset(folder), *slow)
    launch.until((folder / "evaluating").exists)
    if one:
        os.kill(launch.pids()[1], signal.SIGTERM)
    else:
        os.killpg(launch.process.pid, signal.SIGTERM)
    ended = launch.wait()
    assert ended.code
    assert ended.seconds < 15
    last = existing(folder / "run/ckpt")[-1]
    assert load(last)["progress"]["step"] == 3
    assert not list(folder.rglob("*.tmp"))
    survived("Processes: SIGTERM or SIGINT to torchrun, in training or evaluation, resumed")


@pytest.mark.long
def test_resuming_with_another_number_of_processes_warns(config_file: Path) -> None:
    folder = config_file.parent
    command = [sys.executable, "train.py", "--config", str(config_file), "train.patience=1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    plain = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert plain.returncode == 0, plain.stderr
    resumed = Launch(folder, "--resume", folder / "run", "train.patience=100").wait()
    assert resumed.code == 0, resumed.text
    assert resumed.text.count("warning: processes was 1, is 2; not bit for bit") == 1
    check_folder(folder, 4)


@pytest.mark.long
def test_a_batch_that_does_not_share_out_is_one_line(config_file: Path) -> None:
    folder = config_file.parent
    ended = Launch(folder, "--config", config_file, "train.batch=9").wait()
    assert ended.code == 1
    assert not (folder / "run").exists()
    # those of both ranks may stand in one line
    found = re.findall(r"error: rank \d: [^:]*: [^;]*; give a multiple", ended.text)
    refusal = "train.batch: 9 images do not share out among 2 processes; give a multiple"
    assert found
    assert set(found) <= {f"error: rank 0: {refusal}", f"error: rank 1: {refusal}"}
    assert "[rank" not in ended.text
    survived("Processes: batch that the ranks cannot share")


@pytest.mark.long
def test_weights_stay_equal_after_a_nan_on_one_rank(config_file: Path) -> None:
    """What NaN on rank 1 costs: the update. Run to the end on two ranks, the weights are
    finite.
    """
    folder = config_file.parent
    ended = Launch(folder, "--config", config_file, *upset(folder, "nan", at=5)).wait()
    assert ended.code == 0, ended.text
    assert [record["skipped"] for record in records(folder)[1:]] == [0, 1, 0, 0]
    assert finite(load(existing(folder / "run/ckpt")[-1])["ema"]["average"])
    check_folder(folder, 4)
    survived("Processes: NaN on one of two ranks")
