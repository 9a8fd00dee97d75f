"""What only a real card can answer, in order of worth: one command of at most ten minutes.

python -m bench.first_gpu [--minutes 10] [--record FILE] [--only NAME ...] [--data FOLDER]
python -m bench.first_gpu --device cpu --imgsz 64 --batch 2 --steps 1 --rounds 1

The second form asks a CPU the same in a minute, without what takes minutes to compile
there. It prints a table, one row a question. A question that fails says FAILED in its row,
and the next is asked; one for which no time is left says that. With
`PYTHONPATH=.oracle/newest`, where `make parity` installs it, ultralytics' own distillation
takes its turns in the step. With `--data`, the folder of VOC's photographs, the time that
is left goes to the rows of bench.evidence, whose runs go on where they were stopped.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench import measure
from bench.card import Card
from bench.programs import Programs
from kdmini.bounds import Count, ImageSize
from kdmini.device import choose_algorithms, pick_device
from kdmini.typed import argument

LONGEST = 300  # characters of an error in a row
FAILED = "FAILED"

Questions = dict[str, Callable[[], str]]


def questions_of(card: Card, programs: Programs, data: Path | None, runs: Path) -> Questions:
    """By name, in order of worth.

    data: of the photographs. runs: folder of the runs of the evidence.
    """
    half_batch = max(card.batch // 2, 1)
    questions: Questions = {
        "pictures": card.pictures,
        "losses": card.losses,
        "`amp: true` is": card.precision_of_true,
        "epoch, bf16": lambda: card.epoch("bf16"),
        "evaluation": card.evaluation,
        "epoch, bf16, compiled": lambda: card.epoch("bf16", compiled=card.cuda),
        "memory": card.memory,
        "teacher of the demo": programs.teacher,
        "check": programs.check,
        "deterministic, twice": programs.repeats,
        "torchrun, one rank": programs.ranks,
        "out of memory": programs.out_of_memory,
        "eval.py": programs.evaluated,
        "step": lambda: programs.step(card.imgsz, half_batch, card.rounds),
        "parts of a step": card.parts_of_a_step,
        "storage": card.storages,
        "epoch, fp16": lambda: card.epoch("fp16"),
        "epoch, fp32": lambda: card.epoch(False),
    }
    if data is not None:
        questions["evidence"] = lambda: programs.evidence(data, runs)
    return questions


def answer(question: Callable[[], str], ends: float) -> str:
    """In a line. ends: no question is begun later, by time.monotonic()."""
    started = time.monotonic()
    if started > ends:
        return "no time was left"
    try:
        said = question()
    except subprocess.TimeoutExpired:
        said = "stopped, for no time was left"
    except Exception as error:  # whatever it is, the next question is asked
        reason = " ".join(str(error).split())
        said = f"{FAILED}, {type(error).__name__}: {reason[:LONGEST]}"
    return f"{said} [{time.monotonic() - started:.0f} s]"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--imgsz", type=argument(ImageSize), default=640)
    parser.add_argument("--batch", type=argument(Count), default=64)
    parser.add_argument("--steps", type=argument(Count), default=12, help="of a measured epoch")
    parser.add_argument("--rounds", type=argument(Count), default=3)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument(
        "--record", type=Path, metavar="FILE", help="the table is written there too"
    )
    parser.add_argument("--only", nargs="+", help="names of questions, or how they begin")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="VOC's photographs")
    parser.add_argument(
        "--runs",
        type=Path,
        metavar="FOLDER",
        default=Path("runs/evidence/gpu"),
        help="of the evidence (default: runs/evidence/gpu)",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    ends = time.monotonic() + 60 * args.minutes
    device = pick_device(args.device)
    choose_algorithms(deterministic=False)
    text = ""

    def tell(line: str) -> None:
        nonlocal text
        text += line + "\n"
        print(line, flush=True)
        if args.record:
            args.record.write_text(text)

    tell(
        f"{measure.machine(device.type)}, imgsz {args.imgsz}, batch {args.batch}, "
        f"{args.steps} steps an epoch\n\n| | |\n|---|---|"
    )
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.setdefault("KDMINI_CACHE", scratch)  # of mapped storage
        card = Card(device, args.imgsz, args.batch, args.steps, args.rounds)
        programs = Programs(device, Path(scratch), ends)
        questions = questions_of(card, programs, args.data, args.runs.absolute())
        for name, question in questions.items():
            if not args.only or name.startswith(tuple(args.only)):
                tell(f"| {name} | {answer(question, ends)} |")
    if FAILED in text:
        sys.exit(f"{FAILED}: see above")


if __name__ == "__main__":
    main()
