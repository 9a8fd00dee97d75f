"""NaN and infinity in the middle of a run, wherever they come from."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import train as train_script
from kdmini import checkpoint, optim
from kdmini.contracts import UserError
from kdmini.detection.yolo11.model import YOLO11
from kdmini.device import precision
from kdmini.distill.attention import AttentionTransfer
from kdmini.progress import MAX_SKIPPED, READ_EVERY, Progress, Tally
from kdmini.signals import Stop
from tests.faults.children import one_line, run, script
from tests.faults.record import survived
from tests.faults.spoiling import BAD, CPU, PLACES, TERMS, Bench, Fault, broken, changed

NOT_FINITE = "Numbers: NaN or infinity in a loss, an activation or an image"


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- one update


@pytest.mark.parametrize("amp", [False, "bf16"])
def test_a_spoilt_update_changes_nothing_and_the_next_goes_on(
    shapes: Path, amp: bool | str
) -> None:
    bench = Bench(shapes, amp)
    bench.update()
    for place in PLACES:
        for value in BAD:
            before = bench.state()
            hits = bench.hits
            bench.update(place, value)
            assert bench.hits > hits, (place, value)
            assert bench.progress.skipped_in_a_row == 1, (place, value)
            after = bench.state()
            lost = changed(before, after) + broken(after) + broken(bench.statistics())
            survived(NOT_FINITE, len(lost), of="tensors")

            bench.update()
            assert bench.progress.skipped_in_a_row == 0, (place, value)
            assert not broken(bench.state()), (place, value)
            # the update was a real one: everything that learns has moved
            assert len(changed(before, bench.state())) > 0.9 * len(before), (place, value)


def test_statistics_of_the_align_modules_forget_a_nan(shapes: Path) -> None:
    """They are used in evaluation alone, where one NaN would else stay in the distances to
    the end of the run.
    """
    bench = Bench(shapes)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    def distances() -> dict[str, Tensor]:
        bench.distillation.eval()
        return bench.distillation.distances(bench.student.eval(), images)

    bench.update()
    assert not broken(distances())
    bench.update("activation")
    assert not broken(distances())
    for _ in range(3):
        bench.update()
    assert not broken(distances())


@pytest.mark.parametrize(("nbs", "batches"), [(8, 2), (64, 6)])  # an epoch has six
@pytest.mark.parametrize("place", ["dfl", "activation"])
def test_one_bad_batch_among_those_of_an_update_skips_all_of_it(
    shapes: Path, nbs: int, batches: int, place: str
) -> None:
    """And nothing of it is left in the gradients."""
    bench = Bench(shapes, nbs=nbs)
    bench.update()
    before = bench.state()
    begun = bench.steps()
    whole_epoch = bench.epoch

    def first_is_bad(epoch: int, start: int = 0) -> Iterator:
        bench.fault = Fault(place, math.nan)
        for batch in whole_epoch(epoch, start):
            yield batch
            bench.fault = None

    bench.epoch = first_is_bad
    bench.update()
    assert bench.hits == 1
    assert bench.progress.skipped_in_a_row == 1
    assert bench.steps() - begun == batches
    assert not changed(before, bench.state())
    assert not broken(bench.statistics())
    for group in bench.optimizer.param_groups:
        assert all(parameter.grad is None for parameter in group["params"])

    bench.epoch = whole_epoch
    bench.update()
    assert bench.progress.skipped_in_a_row == 0
    assert changed(before, bench.state())
    assert not broken(bench.state())


@pytest.mark.parametrize(
    "settings", [{}, {"nbs": 8}, {"nbs": 64, "weight_decay": 0.1}, {"warmup_epochs": 1.0}]
)
def test_the_very_first_update_may_be_the_bad_one(shapes: Path, settings: dict) -> None:
    bench = Bench(shapes, **settings)
    before = bench.state()
    momenta = [value for name, value in before.items() if name.startswith("momentum")]
    assert not any(momentum.any() for momentum in momenta)
    bench.update("box")
    assert bench.progress.skipped_in_a_row == 1
    assert not changed(before, bench.state())

    for _ in range(2):
        bench.update()
    assert changed(before, bench.state())
    assert not broken(bench.state())


def test_control_statistics_stay_broken_where_the_average_does_not_mend_them(
    shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(shapes)
    bench.update()
    monkeypatch.setattr(optim, "mend", lambda *args: None)
    bench.update("activation")
    lost = broken(bench.state())
    assert any(name.startswith("ema") and "running" in name for name in lost)
    assert not any(name.startswith(("student", "align", "momentum")) for name in lost)


def test_control_an_optimiser_that_is_not_told_to_skip_breaks_the_weights(shapes: Path) -> None:
    bench = Bench(shapes)
    bench.update()
    step = bench.optimizer.step

    def unguarded() -> None:
        del bench.optimizer.found_inf
        step()

    bench.optimizer.step = unguarded
    bench.update("cls")
    lost = broken(bench.state())
    assert any(name.startswith("student") for name in lost)
    assert any(name.startswith("momentum") for name in lost)


# --- many updates


def test_skipped_updates_are_counted_in_the_log_epoch_by_epoch(
    config_file: Path, tmp_path: Path
) -> None:
    # step, from 1 on and six of them an epoch -> the loss that is NaN in it
    plan = {2: "box", 3: "cls", 9: "dfl", 10: "box", 11: "cls", 14: "cls"}

    def work() -> None:
        whole = YOLO11.loss
        calls = 0

        def spoilt(self, preds, targets):
            nonlocal calls
            calls += 1
            losses = dict(whole(self, preds, targets))
            if calls in plan:
                losses[plan[calls]] = losses[plan[calls]] * math.nan
            return losses

        YOLO11.loss = spoilt
        changes = ("train.epochs=3", "train.batch=4", "train.nbs=4")
        script(train_script, "--config", config_file, *changes)()

    done = run(work, tmp_path / "out")
    assert done.code == 0, done.text
    log = log_of(tmp_path / "run")
    assert [record["skipped"] for record in log if record["epoch"] >= 0] == [2, 3, 1]
    epochs = " ".join(done.text.split()).split("epoch ")[1:]  # whatever lines it is told in
    assert [re.findall(r"\| skipped (\d)", epoch) for epoch in epochs[:3]] == [["2"], ["3"], ["1"]]
    for record in log:
        assert all(math.isfinite(value) for value in record.values()), record
    last = checkpoint.load(checkpoint.existing(tmp_path / "run/ckpt")[-1])
    assert not broken(last["student"])
    assert not broken(last["ema"]["average"])
    assert not broken(last["distillation"])
    survived(NOT_FINITE, tried=len(plan))


@pytest.mark.parametrize("place", PLACES)
def test_twenty_bad_updates_in_a_row_stop_the_run_with_the_names(shapes: Path, place: str) -> None:
    bench = Bench(shapes)
    bench.update()
    bench.progress.skipped_in_a_row = MAX_SKIPPED - 2  # some of them before
    bench.update(place)
    with pytest.raises(UserError) as error:
        bench.update(place)
    message = str(error.value)
    assert message.startswith("20 updates in a row had no finite gradient")
    assert "\n" not in message

    guilty = [place] if place in TERMS else TERMS
    for name in TERMS:
        named = f"{name} not finite, last on " in message
        assert named == (name in guilty), message
    _, targets = next(bench.loader.epoch(bench.progress.epoch, bench.progress.step - 1))
    assert len(targets["ids"]) == 4
    assert ", ".join(targets["ids"]) in message


def test_a_run_that_is_all_nan_ends_with_one_line_and_keeps_its_checkpoints(
    config_file: Path, tmp_path: Path
) -> None:
    changes = ("train.epochs=9", "train.batch=4", "train.nbs=4", "train.val_every=9")
    constant = "distill.attention.schedule=[[0, 1, 9, 1]]"

    def work() -> None:
        whole = AttentionTransfer.forward
        calls = 0

        def spoilt(self, *views):
            nonlocal calls
            calls += 1
            value = whole(self, *views)
            return value * math.nan if calls > 7 else value  # from step 2 of epoch 2 on

        AttentionTransfer.forward = spoilt
        script(train_script, "--config", config_file, *changes, constant)()

    done = run(work, tmp_path / "out")
    one_line(
        done,
        "23 updates in a row had no finite gradient",
        "(attention not finite, last on shapes/",
        "lr0",
    )
    assert [record["skipped"] for record in log_of(tmp_path / "run")[1:4]] == [0, 5, 6]
    last = checkpoint.load(checkpoint.existing(tmp_path / "run/ckpt")[-1])
    assert not broken(last["student"])
    assert not broken(last["ema"]["average"])
    survived("Numbers: a loss that stays NaN, stopped by name")


# --- the tally of the losses


def test_the_term_is_named_though_it_failed_long_before_its_update_was_due() -> None:
    """The numbers are read every ten steps, an update may take sixteen."""
    _, scaler = precision(False, CPU)
    tally = Tally(Progress(skipped_in_a_row=MAX_SKIPPED - 1))
    one = torch.tensor(1.0)
    bad = torch.tensor(math.nan)
    tally.add({"box": bad, "cls": one}, None, ["early"])
    for step in range(READ_EVERY):
        tally.add({"box": one, "cls": one}, None, [f"image {step}"])
    tally.read(scaler, Stop())
    tally.add({"box": one, "cls": one}, one, ["late"])
    with pytest.raises(UserError, match="box not finite, last on early"):
        tally.read(scaler, Stop())


def test_a_term_is_not_named_for_an_update_that_was_made_before() -> None:
    _, scaler = precision(False, CPU)
    tally = Tally(Progress(skipped_in_a_row=MAX_SKIPPED - 1))
    one = torch.tensor(1.0)
    bad = torch.tensor(math.nan)
    tally.add({"box": bad}, torch.tensor(0.0), ["of an update that was made"])
    tally.read(scaler, Stop())
    assert tally.progress.skipped_in_a_row == 0
    tally.progress.skipped_in_a_row = MAX_SKIPPED - 1
    tally.add({"box": one}, one, ["late"])
    with pytest.raises(UserError, match=r"\(all losses finite\)"):
        tally.read(scaler, Stop())
