"""NaN, infinity, overflow and exhausted memory in the middle of a run; and numbers that come out
the same twice.

Most of it in this process, with all that train.py puts together: real batches, detectors, taps and
optimiser."""

import functools
import json
import math
import re
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import train as train_script
from kdmini import checkpoint, distributed
from kdmini.contracts import UserError
from kdmini.data.loader import Augment, TrainLoader
from kdmini.data.store import Store
from kdmini.detection.voc import VOC
from kdmini.detection.yolo11.model import YOLO11
from kdmini.device import precision
from kdmini.distill.attention import AttentionTransfer, attention_map
from kdmini.distill.step import Distillation, Weighted, tap_shapes
from kdmini.engine import train_one_epoch
from kdmini.optim import EMA, Recipe, make_sgd
from kdmini.progress import MAX_SKIPPED, READ_EVERY, Progress, Tally
from kdmini.signals import Stop
from tests.conftest import CONFIG, TINY
from tests.faults.children import Done, run, script
from tests.faults.record import survived

NAMES = ["circle", "square", "triangle", "star", "ring", "cross"]
TAPS = ["model.6", "model.8", "model.13", "model.16", "model.19", "model.22"]
CPU = torch.device("cpu")
BAD = [math.nan, math.inf]
TERMS = ["box", "cls", "dfl", "attention"]
PLACES = [*TERMS, "activation", "image"]


class Bench:
    """What train.py builds, with a place for a fault: the next forward pass, or every one, is
    spoilt in it.
    """

    def __init__(
        self, shapes: Path, amp: bool | str = False, batch: int = 4, fold: bool = True, **settings
    ):
        torch.manual_seed(0)
        self.recipe = Recipe(
            epochs=1000, batch=batch, amp=amp, **{"nbs": batch, "warmup_epochs": 0, **settings}
        )
        dataset = VOC(str(shapes), ["train"], names=NAMES)
        self.loader = TrainLoader(
            Store(dataset, 64, workers=1, storage="resident"), batch, 1000, Augment()
        )
        self.student, teacher = (YOLO11(NAMES, [0.5, 0.0625, 1024]) for _ in range(2))
        if not fold:
            teacher.fold = None  # its BatchNorm statistics stay
        self.teacher = teacher
        self.ema = EMA(self.student, 0.99, 10.0)
        taps = {tap: tap for tap in TAPS}
        terms = {"attention": Weighted(AttentionTransfer(), 0.75)}
        sizes = tap_shapes(self.student, teacher, taps, 64)
        self.distillation = Distillation(self.student, teacher, terms, taps, sizes)
        self.optimizer = make_sgd([self.student, self.distillation], self.recipe)
        self.autocast, self.scaler = precision(amp, CPU)
        self.progress = Progress()

        self.fault: tuple[str, float] | None = None
        self.hit = 0  # spoilt so far
        loss, term = self.student.loss, self.distillation.terms["attention"]
        attention = term.forward
        self.student.loss = lambda preds, targets: {
            name: self.spoil(name, value) for name, value in loss(preds, targets).items()
        }
        term.forward = lambda *views: self.spoil("attention", attention(*views))
        self.student.model[3].register_forward_hook(
            lambda module, args, output: self.spoil("activation", output)
        )

    def spoil(self, place: str, value: Tensor) -> Tensor:
        if not self.fault or self.fault[0] != place:
            return value
        self.hit += 1
        spoilt = value.clone()
        spoilt.view(-1)[0] *= self.fault[1]
        return spoilt

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, epoch: int, start: int = 0) -> Iterator:
        for images, targets in self.loader.epoch(epoch, start):
            yield self.spoil("image", images), targets

    def train(self, stop: Stop) -> None:
        train_one_epoch(
            *(
                self.student,
                self.student,
                self.distillation,
                self,
                self.optimizer,
                self.scaler,
                self.ema,
            ),
            *(self.recipe, self.progress, self.autocast, stop),
        )
        if self.progress.step == len(self):
            self.progress.next_epoch()

    def update(self, place: str = "", value: float = math.nan) -> None:
        """One update, spoilt where a place is given, as a run makes it that was asked to stop."""
        self.fault = (place, value) if place else None
        stop = Stop()
        stop.signum = 15
        self.train(stop)
        self.fault = None

    def state(self) -> dict[str, Tensor]:
        """Copies of all that a skipped update must not change; counters are left out."""
        parts = {
            "student": self.student.named_parameters(),
            "align": self.distillation.named_parameters(),
        }
        found = {
            f"{part} {name}": p
            for part, named in parts.items()
            for name, p in named
            if p.requires_grad
        }
        found |= {
            f"momentum {name}": self.optimizer.state[p]["momentum_buffer"]
            for name, p in found.items()
        }
        found |= {
            f"ema {n}": v for n, v in self.ema.average.state_dict().items() if v.is_floating_point()
        }
        return {name: value.detach().clone() for name, value in found.items()}

    def statistics(self) -> dict[str, Tensor]:
        """Of the BatchNorm of the student."""
        return dict(self.student.named_buffers())


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    return [name for name in before if not torch.equal(before[name], after[name])]


def broken(tensors: dict[str, Tensor]) -> list[str]:
    return [name for name, value in tensors.items() if not value.isfinite().all()]


# --- NaN and infinity in one place


@pytest.mark.parametrize("amp", [False, "bf16"])
def test_a_spoilt_update_changes_nothing_and_the_next_goes_on(
    shapes: Path, amp: bool | str
) -> None:
    bench = Bench(shapes, amp)
    bench.update()
    for place in PLACES:
        for value in BAD:
            before, hits = bench.state(), bench.hit
            bench.update(place, value)
            assert bench.hit > hits and bench.progress.skipped == 1, (place, value)
            after = bench.state()
            lost = changed(before, after) + broken(after) + broken(bench.statistics())
            survived(
                "Numbers: NaN or infinity in a loss, an activation or an image",
                len(lost),
                of="tensors",
            )
            bench.update()
            assert bench.progress.skipped == 0 and not broken(bench.state()), (place, value)
            # the update was a real one: everything that learns has moved
            assert len(changed(before, bench.state())) > 0.9 * len(before), (place, value)


def test_statistics_of_the_align_modules_forget_a_nan(shapes: Path) -> None:
    """They are used in evaluation alone, where one NaN would else stay in the distances to the end
    of the run.
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


@pytest.mark.parametrize("nbs", [8, 64])
@pytest.mark.parametrize("place", ["dfl", "activation"])
def test_one_bad_batch_among_those_of_an_update_skips_all_of_it(
    shapes: Path, nbs: int, place: str
) -> None:
    """And nothing of it is left in the gradients. With nbs=64 an update has the whole epoch of six
    batches.
    """
    bench = Bench(shapes, nbs=nbs)
    bench.update()
    before, first, step, epoch = (
        bench.state(),
        bench.epoch,
        bench.progress.step,
        bench.progress.epoch,
    )

    def only_first(epoch: int, start: int = 0) -> Iterator:
        bench.fault = (place, math.nan)
        for batch in first(epoch, start):
            yield batch
            bench.fault = None

    bench.epoch = only_first
    bench.update()
    assert bench.hit == 1 and bench.progress.skipped == 1
    assert (bench.progress.epoch - epoch) * len(bench) + bench.progress.step - step == min(
        nbs // 4, 6
    )
    assert not changed(before, bench.state()) and not broken(bench.statistics())
    assert all(p.grad is None for group in bench.optimizer.param_groups for p in group["params"])
    bench.epoch = first
    bench.update()
    assert (
        bench.progress.skipped == 0 and changed(before, bench.state()) and not broken(bench.state())
    )


@pytest.mark.parametrize(
    "settings", [{}, {"nbs": 8}, {"nbs": 64, "weight_decay": 0.1}, {"warmup_epochs": 1.0}]
)
def test_the_very_first_update_may_be_the_bad_one(shapes: Path, settings: dict) -> None:
    bench = Bench(shapes, **settings)
    before = bench.state()
    assert not any(value.any() for name, value in before.items() if name.startswith("momentum"))
    bench.update("box")
    assert bench.progress.skipped == 1 and not changed(before, bench.state())
    for _ in range(2):
        bench.update()
    assert changed(before, bench.state()) and not broken(bench.state())


def test_the_faults_are_fatal_where_nothing_guards_against_them(shapes: Path, monkeypatch) -> None:
    """Control: an EMA that does not mend BatchNorm, an optimiser that is not told to skip."""
    bench = Bench(shapes)
    bench.update()
    with monkeypatch.context() as patch:
        patch.setattr(EMA, "_mend", lambda *args: None)
        bench.update("activation")
    assert any(name.startswith("ema") and "running" in name for name in broken(bench.state()))
    assert not any(
        name.startswith(("student", "align", "momentum")) for name in broken(bench.state())
    )

    bench = Bench(shapes)
    bench.update()
    step = bench.optimizer.step
    bench.optimizer.step = lambda: (delattr(bench.optimizer, "found_inf"), step())
    bench.update("cls")
    assert any(name.startswith("student") for name in broken(bench.state()))
    assert any(name.startswith("momentum") for name in broken(bench.state()))


def test_skipped_updates_are_counted_in_the_log_epoch_by_epoch(
    config_file: Path, tmp_path: Path
) -> None:
    plan = {
        2: "box",
        3: "cls",
        9: "dfl",
        10: "box",
        11: "cls",
        14: "cls",
    }  # step from 1 on, six of them an epoch

    def work() -> None:
        real, calls = YOLO11.loss, 0

        def loss(self, preds, targets):
            nonlocal calls
            calls += 1
            return {
                k: v * (math.nan if plan.get(calls) == k else 1)
                for k, v in real(self, preds, targets).items()
            }

        YOLO11.loss = loss
        script(
            train_script, "--config", config_file, "train.epochs=3", "train.batch=4", "train.nbs=4"
        )()

    done = run(work, tmp_path / "out")
    assert done.code == 0, done.text
    log = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [record["skipped"] for record in log if record["epoch"] >= 0] == [2, 3, 1]
    lines = [line for line in done.text.splitlines() if line.startswith("epoch ")]
    assert [re.findall(r" skipped (\d)", line) for line in lines] == [["2"], ["3"], ["1"]]
    for record in log:
        assert all(math.isfinite(value) for value in record.values()), record
    last = checkpoint.load(checkpoint.existing(tmp_path / "run/ckpt")[-1])
    assert (
        not broken(last["student"])
        and not broken(last["ema"]["average"])
        and not broken(last["distillation"])
    )
    survived("Numbers: NaN or infinity in a loss, an activation or an image", tried=len(plan))


@pytest.mark.parametrize("place", PLACES)
def test_twenty_bad_updates_in_a_row_stop_the_run_with_the_names(shapes: Path, place: str) -> None:
    bench = Bench(shapes)
    bench.update()
    bench.progress.skipped = MAX_SKIPPED - 2  # some of them before
    bench.update(place)
    with pytest.raises(UserError) as stopped:
        bench.update(place)
    text = str(stopped.value)
    assert text.startswith("20 updates in a row had no finite gradient") and "\n" not in text
    guilty = [place] if place in TERMS else TERMS
    assert all((f"{name} not finite, last on " in text) == (name in guilty) for name in TERMS), text
    last = next(iter(bench.loader.epoch(bench.progress.epoch, bench.progress.step - 1)))[1]["ids"]
    assert ", ".join(last) in text and len(last) == 4, text


def test_a_run_that_is_all_nan_ends_with_one_line_and_keeps_its_checkpoints(
    config_file: Path, tmp_path: Path
) -> None:
    def work() -> None:
        real, calls = AttentionTransfer.forward, 0

        def forward(self, *views):
            nonlocal calls
            calls += 1
            return real(self, *views) * (
                math.nan if calls > 7 else 1
            )  # all of the second epoch and on

        AttentionTransfer.forward = forward
        command = (
            "--config",
            config_file,
            "train.epochs=9",
            "train.batch=4",
            "train.nbs=4",
            "train.val_every=9",
        )
        script(train_script, *command, "distill.attention.schedule=[[0, 1, 9, 1]]")()

    done = run(work, tmp_path / "out")
    assert_one_line(
        done,
        "23 updates in a row had no finite gradient",
        "(attention not finite, last on shapes/",
        "lr0",
    )
    log = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [record["skipped"] for record in log[1:4]] == [0, 5, 6]
    last = checkpoint.load(checkpoint.existing(tmp_path / "run/ckpt")[-1])
    assert not broken(last["student"]) and not broken(last["ema"]["average"])
    survived("Numbers: a loss that stays NaN, stopped by name")


def assert_one_line(done: Done, *words: str) -> None:
    assert done.code == 1 and "Traceback" not in done.text, done.text
    assert done.last.startswith("error: ") and all(word in done.last for word in words), done.last


def test_the_term_is_named_though_it_failed_long_before_its_update_was_due() -> None:
    """The numbers are read every ten steps, an update may take sixteen."""
    progress, scaler = Progress(skipped=MAX_SKIPPED - 1), precision(False, CPU)[1]
    tally = Tally(progress)
    one, bad = torch.tensor(1.0), torch.tensor(math.nan)
    tally.add({"box": bad, "cls": one}, None, ["early"])
    for step in range(READ_EVERY):
        tally.add({"box": one, "cls": one}, None, [f"image {step}"])
    tally.read(scaler, Stop())
    tally.add({"box": one, "cls": one}, one, ["late"])
    with pytest.raises(UserError, match="box not finite, last on early"):
        tally.read(scaler, Stop())
    tally = Tally(Progress(skipped=MAX_SKIPPED - 1))
    tally.add({"box": bad}, torch.tensor(0.0), ["of an update that was made"])
    tally.read(scaler, Stop())
    assert tally.progress.skipped == 0
    tally.progress.skipped = MAX_SKIPPED - 1
    tally.add({"box": one}, one, ["late"])
    with pytest.raises(UserError, match=r"\(all losses finite\)"):
        tally.read(scaler, Stop())


# --- nothing waits for the device

WAITING = (
    "_local_scalar_dense",
    "nonzero",
    "_unique2",
    "is_nonzero",
    "item",
    "equal",
    "masked_select",
)


class Waits(TorchDispatchMode):
    """Keeps what makes the host wait on a GPU: operators whose result the host needs; with the
    place in our code.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        name = func.overloadpacket.__name__
        if name in WAITING or (name.startswith("index") and any(is_mask(arg) for arg in args[1:])):
            ours = [frame for frame in traceback.extract_stack() if "/kdmini/" in frame.filename]
            self.found.append(f"{name}: {ours[-1].line}" if ours else name)
        return func(*args, **(kwargs or {}))


def is_mask(argument: object) -> bool:
    return isinstance(argument, list | tuple) and any(
        isinstance(t, Tensor) and t.dtype == torch.bool for t in argument
    )


@pytest.mark.parametrize("amp", [False, "bf16", "fp16"])
@pytest.mark.parametrize("place", ["", "cls"])
def test_between_two_reads_nothing_waits_for_the_device(
    shapes: Path, monkeypatch, amp: bool | str, place: str
) -> None:
    bench = Bench(shapes, amp)
    bench.update()
    bench.update()
    bench.progress.next_epoch()
    waits, read = Waits(), []

    def no_read(tally: Tally, *args: object) -> str:
        tally.waiting.clear()
        tally.progress.seconds = 1.0
        read.append(args)
        return ""

    monkeypatch.setattr(Tally, "read", no_read)
    if place:
        bench.fault = (place, math.nan)
    stop = Stop()
    with waits:
        bench.train(stop)  # six steps; the only read is at the end, and taken away
    assert len(read) == 1 and waits.count > 6 * 1000
    assert set(waits.found) == set()
    with waits:
        torch.tensor(1.0).item()
    assert waits.found[-1] == "_local_scalar_dense"  # it does see what waits


# --- float16


def overflow(bench: Bench) -> Callable[[], None]:
    """From now on one gradient is infinite -> what ends that."""
    return (
        bench.student.model[8]
        .cv1.conv.weight.register_hook(lambda gradient: gradient * math.inf)
        .remove
    )


def test_an_overflow_in_float16_halves_the_scale_and_the_schedule_goes_on(shapes: Path) -> None:
    bench = Bench(shapes, "fp16", warmup_epochs=2.0, warmup_steps=1)
    bench.update()
    bench.scaler.update(64.0)  # it begins so high that it overflows by itself
    bench.update()
    for _ in range(2):
        before, scale = bench.state(), bench.scaler.get_scale()
        step = bench.progress.epoch * len(bench) + bench.progress.step
        end = overflow(bench)
        bench.update()
        end()
        after = bench.state()
        assert bench.scaler.get_scale() == scale / 2 and bench.progress.skipped == 1
        lost = changed(before, after) + broken(after) + broken(bench.statistics())
        survived("Numbers: overflow in float16", len(lost), of="tensors")
        assert bench.optimizer.param_groups[0]["lr"] == bench.recipe.at(step, len(bench)).lr
        bench.update()  # in the scale that was halved
        assert bench.optimizer.param_groups[0]["lr"] == bench.recipe.at(step + 1, len(bench)).lr
        assert bench.recipe.at(step + 1, len(bench)).lr > bench.recipe.at(step, len(bench)).lr
        assert bench.progress.skipped == 0 and bench.scaler.get_scale() == scale / 2
        assert changed(before, bench.state()) and not broken(bench.state())


@pytest.mark.parametrize("good_between", [0, 1])
def test_a_scale_that_collapses_stops_the_run(shapes: Path, good_between: int) -> None:
    """Below 1 it helps no more; with good updates between the bad ones these would never be twenty
    in a row.
    """
    bench = Bench(shapes, "fp16")
    bench.update()
    bench.scaler.update(4.0)
    for _ in range(2):
        end = overflow(bench)
        bench.update()
        end()
        for _ in range(good_between):
            bench.update()
    assert bench.scaler.get_scale() == 1.0  # and that may be
    overflow(bench)
    with pytest.raises(
        UserError, match=r"^the scale of the fp16 gradients fell below 1.*train.amp=bf16 or false$"
    ):
        bench.update()
    survived("Numbers: overflow in float16")


def test_a_run_whose_gradients_all_overflow_ends_with_one_line(
    config_file: Path, tmp_path: Path
) -> None:
    def work() -> None:
        real = YOLO11.loss
        YOLO11.loss = lambda *args: {name: value * 1e30 for name, value in real(*args).items()}
        command = (
            "--config",
            config_file,
            "train.epochs=9",
            "train.batch=4",
            "train.nbs=4",
            "train.val_every=9",
        )
        script(train_script, *command, "train.amp=fp16", "distill=null", "teacher=null")()

    done = run(work, tmp_path / "out")
    assert_one_line(
        done, "the scale of the fp16 gradients fell below 1", "use train.amp=bf16 or false"
    )
    last = checkpoint.load(checkpoint.existing(tmp_path / "run/ckpt")[-1])
    assert last["scaler"]["scale"] == 65536 / 2**12
    assert (last["progress"]["epoch"], last["progress"]["step"]) == (
        1,
        6,
    )  # the end of the second epoch
    assert not broken(last["student"]) and not broken(last["ema"]["average"])
    survived("Numbers: overflow in float16")


# --- attention maps


def test_maps_of_large_float16_activations_are_those_of_float32() -> None:
    feats = 300 * torch.rand(2, 512, 4, 4, generator=torch.Generator().manual_seed(0))
    half = feats.half()
    assert half.square().sum(1).isinf().all()  # control: what float16 makes of it
    assert (
        torch.equal(attention_map(half), attention_map(half.float()))
        and attention_map(half).isfinite().all()
    )
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(attention_map(half), attention_map(half.float()))
    survived("Numbers: attention maps at the limits")


def hand_written(difference: Tensor) -> Tensor:
    return difference.square().sum().sqrt() / len(difference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("reduction", ["notes", "sample", "mean_square"])
def test_maps_of_zeros_and_equal_maps(
    monkeypatch, reduction, p: float, ranks: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(
        distributed, "world", lambda: ranks
    )  # of several ranks that all have the same
    monkeypatch.setattr(distributed, "total", lambda value: value)
    generator = torch.Generator().manual_seed(0)
    some, other, zero = (
        torch.randn(2, 8, 4, 4, generator=generator),
        torch.rand(2, 8, 4, 4),
        torch.zeros(2, 8, 4, 4),
    )
    half = torch.cat([some[:1], zero[:1]])  # one image of zeros
    cases = [
        (zero, zero),
        (some, some),
        (zero, some),
        (some, zero),
        (half, half),
        (half, other),
        (some, half),
    ]
    for student, teacher in cases:
        feat = student.to(dtype).requires_grad_()
        loss = AttentionTransfer(reduction, p).distance(feat, teacher.to(dtype))
        loss.backward()
        assert loss.isfinite() and feat.grad.isfinite().all()
        assert (loss < 1e-7) == (student is teacher)
    survived("Numbers: attention maps at the limits", tried=len(cases))


def test_a_bare_root_would_have_no_gradient_at_equal_maps() -> None:
    feat = torch.rand(2, 8, 4, 4, requires_grad=True)
    hand_written(attention_map(feat) - attention_map(feat.detach())).backward()
    assert feat.grad.isnan().all()


# --- the teacher


@pytest.mark.parametrize("fold", [True, False])
def test_the_teacher_is_as_it_was_whatever_it_was_shown(shapes: Path, fold: bool) -> None:
    bench = Bench(shapes, fold=fold)
    before = {name: value.clone() for name, value in bench.teacher.state_dict().items()}
    assert any("running_var" in name for name in before) != fold
    for place in ("", "image", "activation", "attention", ""):
        bench.update(place)
    after = bench.teacher.state_dict()
    lost = changed(before, after) + [name for name in after if name not in before]
    survived("Numbers: a teacher that changes", len(lost), of="tensors")


def test_a_teacher_with_one_nan_is_refused_by_name(config_file: Path, tmp_path: Path) -> None:
    teacher = YOLO11(NAMES, [0.5, 0.0625, 1024])
    for key, value in (
        ("model.4.cv1.conv.weight", math.nan),
        ("model.22.cv2.bn.running_var", math.inf),
    ):
        state = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
        state[key].view(-1)[-1] = value
        spoilt = YOLO11(NAMES, [0.5, 0.0625, 1024])
        spoilt.load_state_dict(state)
        train_script.save_best(tmp_path / "teacher.pt", spoilt, NAMES, 64, 1, 0.5)
        command = ("--config", config_file, f"teacher.weights={tmp_path / 'teacher.pt'}")
        done = run(script(train_script, *command), tmp_path / "out")
        assert_one_line(done, "teacher.pt", f"has NaN or infinity in '{key}'", "give a file")
        assert not (tmp_path / "run").exists()
        survived("Numbers: a teacher with one NaN or infinity")


# --- the device


@pytest.mark.parametrize(
    ("device", "count", "words"),
    [
        ("cuda", 0, ["cuda was asked for", "finds 0 CUDA devices", "use auto or cpu"]),
        ("cuda:1", 0, ["cuda:1 was asked for", "finds 0 CUDA devices"]),
        ("cuda:1", 1, ["cuda:1 was asked for", "finds 1 CUDA devices"]),
        ("nonsense", 0, ["'nonsense'", "use auto, cpu, cuda"]),
        ("meta", 0, ["'meta'", "use auto, cpu, cuda"]),
        ("mps", 0, ["'mps'", "use auto, cpu, cuda"]),
        ("cuda:01", 1, ["'cuda:01'", "use auto, cpu, cuda"]),
        ("cuda:x", 1, ["'cuda:x'", "use auto, cpu, cuda"]),
    ],
)
def test_a_device_that_is_not_there(
    config_file: Path, tmp_path: Path, device: str, count: int, words: list
) -> None:
    def work() -> None:
        torch.cuda.is_available, torch.cuda.device_count = lambda: count > 0, lambda: count
        script(train_script, "--config", config_file, f"device={device}")()

    assert_one_line(run(work, tmp_path / "out"), f"device: {words[0]}", *words[1:])
    assert not (tmp_path / "run").exists()
    survived("Numbers: a device that is not there, memory that runs out")


# --- the same twice


class Reference:
    """Whole runs of two epochs, each made once."""

    def __init__(self, folder: Path, shapes: Path):
        self.folder = folder
        self.text = CONFIG.format(run=folder / "RUN", shapes=shapes, tiny=TINY).replace(
            "epochs: 4", "epochs: 2"
        )
        self.config = folder / "config.yaml"
        self.config.write_text(self.text)

    def command(self, name: str, *overrides: str) -> Callable[[], object]:
        return script(
            train_script, "--config", self.config, f"run={self.folder / name}", *overrides
        )

    @functools.cache  # noqa: B019 - as long as the module's tests
    def made(self, name: str, seed: int) -> dict:
        command = self.command(name, f"seed={seed}", "device=auto")
        done = run(
            lambda: (torch.seed(), command()), self.folder / f"{name}.txt"
        )  # a child begins like its parent
        assert done.code == 0, done.text
        assert torch.cuda.is_available() or "no CUDA device, so this runs on the CPU" in done.text
        return self.newest(name)

    def newest(self, name: str) -> dict:
        content = checkpoint.load(checkpoint.existing(self.folder / name / "ckpt")[-1])
        progress = {**content["progress"], "seconds": 0}
        return dict(leaves({**content, "config": {}, "progress": progress}))


def leaves(content: object, where: str = "") -> Iterator[tuple[str, Tensor]]:
    """Everything in it, as tensors with the place of each."""
    if isinstance(content, dict | list | tuple):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from leaves(value, f"{where}/{key}")
    elif isinstance(content, Tensor):
        yield where, content
    elif isinstance(content, int | float):
        yield where, torch.tensor(content, dtype=torch.float64)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Reference:
    return Reference(tmp_path_factory.mktemp("reference"), shapes)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(reference: Reference) -> None:
    one, two, other = reference.made("one", 3), reference.made("two", 3), reference.made("other", 4)
    assert one.keys() == two.keys() == other.keys() and len(one) > 1000
    survived("Numbers: the same seed twice", len(changed(one, two)), of="tensors that differ")
    weights = [
        name for name in one if name.startswith("/student") and name.endswith(".conv.weight")
    ]
    apart = [
        (one[name] - other[name]).norm() / one[name].norm() for name in weights if "dfl" not in name
    ]
    assert min(apart) > 1  # begun elsewhere, not only trained on other images


# --- memory


def test_memory_that_runs_out_is_one_line_and_the_run_goes_on_from_its_checkpoint(
    reference: Reference, tmp_path: Path
) -> None:
    whole = reference.made("one", 3)

    def work() -> None:
        real, calls = YOLO11.loss, 0

        def loss(self, preds, targets):
            nonlocal calls
            calls += 1
            if calls == 3 + 3:  # step 3 of the second epoch
                raise torch.OutOfMemoryError(
                    "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ..."
                )
            return real(self, preds, targets)

        YOLO11.loss = loss
        reference.command("full", "train.save_every=1")()

    done = run(work, tmp_path / "out")
    assert_one_line(
        done,
        "out of memory",
        "train.batch=8",
        "data.imgsz=64",
        "lower one",
        "checkpoints written so far",
    )
    last = checkpoint.existing(reference.folder / "full" / "ckpt")[-1]
    assert checkpoint.load(last)["progress"]["epoch"] == 1
    done = run(script(train_script, "--resume", reference.folder / "full"), tmp_path / "out")
    assert done.code == 0 and f"resumed from {last}" in done.text, done.text
    resumed = reference.newest("full")
    lost = changed(whole, resumed)
    survived("Numbers: a device that is not there, memory that runs out", len(lost), of="tensors")
