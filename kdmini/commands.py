"""How train.py and eval.py are called from where the user stands."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]  # or where packages are installed


def command(script: str) -> str:
    """`python train.py` in the folder of that file, and elsewhere `python -m
    kdmini.tools.train`, which is the same file. script: train or eval.
    """
    here = Path(f"{script}.py")
    ours = REPOSITORY / here
    if here.exists() and ours.exists() and here.samefile(ours):
        return f"python {here}"
    return f"python -m kdmini.tools.{script}"
