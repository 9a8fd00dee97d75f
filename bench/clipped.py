"""How many updates of a run are clipped, and by how much: what a term's gradient takes from the
task's, where the norm of both together is bounded.

python -m bench.clipped bench/evidence/head.yaml alone localisation --root data/voc320
python -m bench.clipped bench/evidence/head.yaml alone --epochs 2 --runs runs/evidence/head

Each row, seed 1, is trained once more from its beginning, for its first epochs, in a folder that
is deleted afterwards. A line an epoch: updates, the share of them that was clipped, and the
median of the gradient's norm before. A clipped step is as long whatever the terms add to it: at a
norm of 20 and a bound of 10, it is half as long in the task's direction.
"""

import argparse
import contextlib
import io
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import train
from bench.rows import protocol_at, settings_of
from kdmini import engine, signals
from kdmini.bounds import Count
from kdmini.contracts import UserError
from kdmini.typed import argument

SEED = 1


def norms_of(settings: dict[str, Any]) -> tuple[Tensor, float]:
    """Trains -> the norm of the gradient before each update, (updates,), and its bound."""
    norms: list[Tensor] = []
    bound = 0.0
    clip = engine.clip_gradients

    def watched(optimizer: torch.optim.Optimizer, largest: float) -> Tensor:
        nonlocal bound
        bound = largest
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(gradients))
        return clip(optimizer, largest)

    engine.clip_gradients = watched
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            train.train(settings, "", resume=False)
    finally:
        engine.clip_gradients = clip
    return torch.stack(norms).cpu(), bound


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("protocol", type=Path, metavar="PROTOCOL.yaml")
    parser.add_argument("rows", nargs="+", metavar="ROW")
    parser.add_argument("--epochs", type=argument(Count), default=3, help="default: 3")
    parser.add_argument("--runs", type=Path, help="where teachers are (as of bench.rows)")
    parser.add_argument("--root", help="folder of the data (default: that of the config)")
    args = parser.parse_intermixed_args(argv)
    signals.exit_on_signals()
    runs = args.runs or Path("runs/evidence") / args.protocol.stem
    try:
        protocol = protocol_at(args.protocol)
        for name in args.rows:
            if name not in protocol.rows:
                parser.error(f"no row `{name}`: there are {', '.join(protocol.rows)}")
        for name in args.rows:
            settings = settings_of(protocol, name, SEED, runs, args.root)
            with tempfile.TemporaryDirectory() as scratch:
                settings["run"] = str(Path(scratch) / "run")
                settings["train"]["epochs"] = args.epochs
                settings["train"]["val_every"] = args.epochs
                norms, bound = norms_of(settings)
            for number, part in enumerate(norms.chunk(args.epochs), 1):
                share = (part > bound).float().mean().item()
                print(
                    f"{name}, epoch {number}: {len(part)} updates, {share:.0%} clipped, "
                    f"norm {part.median().item():.1f}",
                    flush=True,
                )
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
