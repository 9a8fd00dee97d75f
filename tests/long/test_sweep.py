"""Real sweeps: of two processes that are killed and begun again, and on PostgreSQL."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("optuna", reason="needs optuna: pip install -e '.[sweep]'")

import train as train_script
from tests.commands import newest, records, run
from tests.conftest import ROOT

SWEEP = """
config: {base}
overrides:
  - teacher=null
  - distill=null
  - train.epochs=6
  - "metric={{build: tests.long.confidence:Confidence}}"
out: {out}
space:
  train.lr0: {{low: 1e-3, high: 1e-1, scale: log}}
  train.weight_decay: {{low: 1e-5, high: 1e-2, scale: log}}
count: 12
sampler: random
stop: {{rule: hyperband, min: 2, eta: 2}}
silence: 6
"""
LIMIT_S = 600
SERVERS = sorted(Path("/usr/lib/postgresql").glob("*/bin"))


class Sweeping:
    """Processes of one sweep. folders: of each, which see one another's or not."""

    def __init__(self, config: Path, folders: list[Path], *overrides: str) -> None:
        self.processes = []
        for number, folder in enumerate(folders):
            command = [sys.executable, "-m", "kdmini.tools.sweep", str(config), f"out={folder}"]
            with config.with_name(f"out{number}").open("a") as output:
                process = subprocess.Popen(
                    [*command, *overrides], cwd=ROOT, stdout=output, stderr=output
                )
            self.processes.append(process)

    def send(self, signum: int) -> None:
        for process in self.processes:
            process.send_signal(signum)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def wait(self) -> None:
        for process in self.processes:
            assert process.wait(LIMIT_S) == 0


def until_between(sweeping: Sweeping, folders: list[Path], evaluations: int) -> None:
    """So many, of all trials together, and one of them not at its end; all are paused then."""
    end = time.monotonic() + LIMIT_S
    while True:
        assert time.monotonic() < end
        assert all(process.poll() is None for process in sweeping.processes)
        sweeping.send(signal.SIGSTOP)
        files = [file for folder in folders for file in folder.glob("trial_*/metrics.jsonl")]
        counts = [len(file.read_text().splitlines()) for file in files]
        # a trial ends after an even number
        if sum(counts) >= evaluations and any(count % 2 for count in counts):
            return
        sweeping.send(signal.SIGCONT)
        time.sleep(0.2)


def table_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "trials.csv").open() as file:
        return list(csv.DictReader(file))


def assert_whole(table: list[dict[str, str]]) -> None:
    """Twelve trials with settings of their own, some of which were stopped, one continued."""
    assert [int(row["trial"]) for row in table] == list(range(12))
    assert len({row["train.lr0"] for row in table}) == 12
    ends = [(row["ended"], int(row["evaluations"])) for row in table]
    assert set(ends) <= {("finished", 6), ("stopped", 2), ("stopped", 4)}
    assert {ended for ended, _ in ends} == {"finished", "stopped"}
    assert any(int(row["attempts"]) > 1 for row in table)


@pytest.fixture
def config(tmp_path: Path, config_file: Path) -> Path:
    path = tmp_path / "sweep.yaml"
    path.write_text(SWEEP.format(base=config_file, out=tmp_path / "sweep"))
    return path


@pytest.mark.long
def test_two_processes_that_are_killed_lose_no_trial(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    first = Sweeping(config, [folder, folder])
    until_between(first, [folder], 10)
    first.kill()
    Sweeping(config, [folder, folder]).wait()
    table = table_of(folder)
    print(*table, sep="\n")
    assert_whole(table)
    for row in table:
        epochs = [record["epoch"] for record in records(folder / f"trial_{int(row['trial']):03d}")]
        assert epochs == list(range(int(row["evaluations"])))

    # what was killed and continued is the run that nothing happened to
    again = next(row for row in table if int(row["attempts"]) > 1)
    trial = folder / f"trial_{int(again['trial']):03d}"
    alone = tmp_path / "alone"
    run(train_script, "--config", trial / "config.yaml", f"run={alone}")
    scores = [record["score/confidence"] for record in records(alone)]
    scores_of_trial = [record["score/confidence"] for record in records(trial)]
    assert scores_of_trial == scores[: int(again["evaluations"])]

    best = max(table, key=lambda row: float(row["confidence"]))
    run(train_script, "--config", folder / "best.yaml")
    weights = newest(folder / "best")["student"]
    if best["ended"] == "finished":
        for name, tensor in newest(folder / f"trial_{int(best['trial']):03d}")["student"].items():
            assert torch.equal(tensor, weights[name]), name


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """URL of a database on a PostgreSQL server of this test's own."""
    pytest.importorskip("psycopg2", reason="needs its driver: pip install psycopg2-binary")
    if not SERVERS:
        pytest.skip("needs a PostgreSQL server: /usr/lib/postgresql is not there")
    # the server refuses to run as root
    user = "postgres" if os.getuid() == 0 else None
    folder = Path(subprocess.check_output(["mktemp", "-d"], text=True, user=user).strip())
    control = [str(SERVERS[-1] / "pg_ctl"), "-D", str(folder / "data"), "-w"]
    options = f"-p 54329 -k {folder} -c listen_addresses=127.0.0.1"
    subprocess.run([*control, "initdb", "-o", "-A trust -U sweep"], check=True, user=user)
    begin = [*control, "-l", str(folder / "log"), "-o", options, "start"]
    subprocess.run(begin, check=True, user=user)
    try:
        yield "postgresql+psycopg2://sweep@127.0.0.1:54329/postgres"
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], check=True, user=user)
        shutil.rmtree(folder)


@pytest.mark.long
def test_two_machines_share_a_server(config: Path, tmp_path: Path, server: str) -> None:
    """Neither sees the other's folder: what one was killed at the other begins again."""
    folders = [tmp_path / "one", tmp_path / "other"]
    both = Sweeping(config, folders, f"storage={server}")
    until_between(both, folders[:1], 4)
    both.processes.pop(0).send_signal(signal.SIGKILL)
    both.send(signal.SIGCONT)
    both.wait()
    table = table_of(folders[1])
    print(*table, sep="\n")
    assert_whole(table)
