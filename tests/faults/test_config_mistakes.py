"""A mistake in a config or an override is answered by one line with the key."""

from pathlib import Path
from typing import NamedTuple

import pytest

import train as train_script
from tests.faults.children import run, script
from tests.faults.entries import one_epoch
from tests.faults.record import survived


class Mistake(NamedTuple):
    """`new` in the place of `old`, or an override; and what is said of it."""

    message: str
    old: str = ""
    new: str = ""
    override: str = ""


ALL = "all of the file"

MISTAKES = {
    "typo": Mistake(
        "train: epoch: unknown key; did you mean `epochs`?",
        old="train: {epochs",
        new="train: {epoch",
    ),
    "typo of a section": Mistake(
        "distil: unknown key; did you mean `distill`?",
        old="distill:",
        new="distil:",
    ),
    "typo, nested": Mistake(
        "data.augment: mosiac: unknown key; did you mean `mosaic`?",
        old="imgsz: 64",
        new="imgsz: 64\n  augment: {mosiac: 1.0}",
    ),
    "int gets text": Mistake(
        "train: epochs: expected int, got 'ten'",
        old="{epochs: 1,",
        new="{epochs: ten,",
    ),
    "int gets 3.7": Mistake(
        "train: epochs: expected int, got 3.7",
        old="{epochs: 1,",
        new="{epochs: 3.7,",
    ),
    "int gets true": Mistake(
        "train: epochs: expected int, got True",
        old="{epochs: 1,",
        new="{epochs: true,",
    ),
    "int gets null": Mistake(
        "train: epochs: expected int, got None",
        old="{epochs: 1,",
        new="{epochs: null,",
    ),
    "bool gets text": Mistake(
        "train: amp: expected bool | Literal['bf16', 'fp16'], got 'half'",
        old="{epochs: 1,",
        new="{epochs: 1, amp: half,",
    ),
    "bool gets 2": Mistake(
        "train: amp: expected bool | Literal['bf16', 'fp16'], got 2",
        old="{epochs: 1,",
        new="{epochs: 1, amp: 2,",
    ),
    "text gets no": Mistake(
        "device: expected str, got False; put quotes",
        old="device: cpu",
        new="device: no",
    ),
    "key twice": Mistake(
        "config.yaml:4: the key `seed` is given twice",
        old="seed: 3",
        new="seed: 3\nseed: 4",
    ),
    "override of a typo": Mistake(
        "override `trian.epochs=2`: there is no `trian`; did you mean `train`?",
        override="trian.epochs=2",
    ),
    "override of a wrong type": Mistake(
        "train: epochs: expected int, got 'ten'",
        override="train.epochs=ten",
    ),
    "NaN": Mistake(
        "NaN is not a setting",
        old="{epochs: 1,",
        new="{epochs: 1, lr0: .nan,",
    ),
    "a list": Mistake(
        "config.yaml: expected sections (`name: value`), got [1, 2]",
        old=ALL,
        new="[1, 2]",
    ),
    "empty": Mistake(
        "needs `run`, `data`, `student`, `metric`, `train`; add it",
        old=ALL,
        new="",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_config_is_one_line_with_the_key(
    name: str, shapes: Path, tmp_path: Path
) -> None:
    mistake = MISTAKES[name]
    path = tmp_path / "config.yaml"
    path.write_text(with_mistake(one_epoch(tmp_path / "run", shapes), mistake))
    overrides = [mistake.override] if mistake.override else []
    done = run(script(train_script, "--config", path, *overrides), tmp_path / "out")
    assert done.code == 1, done.text
    assert "Traceback" not in done.text, done.text
    assert len(done.text.strip().splitlines()) == 1, done.text
    assert done.last.startswith("error: "), done.text
    assert mistake.message in done.last, done.text
    assert not (tmp_path / "run").exists()
    survived("Processes: mistake in the config")


def with_mistake(text: str, mistake: Mistake) -> str:
    if mistake.old == ALL:
        return mistake.new
    if not mistake.old:
        return text
    assert text.count(mistake.old) == 1
    return text.replace(mistake.old, mistake.new)
