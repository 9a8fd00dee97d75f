"""train.py, with a line in a file for every step that it has finished.

python -m tests.faults.journalled JOURNAL [argument of train.py ...]
"""

import sys
import time
from pathlib import Path
from typing import Any

import torch

import train
from kdmini.progress import Tally

STEP_S = 0.02  # longer than a step of the small detector takes, so that a signal finds it


def main() -> None:
    path = Path(sys.argv[1])
    add = Tally.add

    def adding(tally: Any, *args: Any) -> None:
        time.sleep(STEP_S)
        add(tally, *args)
        with path.open("a") as journal:
            print("step", file=journal)
        torch.rand(1)  # as in a run that is watched, with which this one is compared

    Tally.add = adding  # type: ignore
    sys.argv = ["train.py", *sys.argv[2:]]
    train.main()


if __name__ == "__main__":
    main()
