"""Numbers at their limits: float16, attention maps, the teacher's weights; and the device
that is not there.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

import train as train_script
from kdmini import checkpoint, distributed
from kdmini.contracts import UserError
from kdmini.detection.yolo11.model import YOLO11
from kdmini.distill.attention import AttentionTransfer, attention_map
from tests.faults.children import one_line, run, script
from tests.faults.record import survived
from tests.faults.spoiling import NAMES, SCALE, Bench, broken, changed

OVERFLOW = "Numbers: overflow in float16"
LIMITS = "Numbers: attention maps at the limits"

# --- float16


@contextmanager
def overflow(bench: Bench) -> Iterator[None]:
    """One gradient is infinite."""
    weight = bench.student.model[8].cv1.conv.weight
    hook = weight.register_hook(lambda gradient: gradient * math.inf)
    yield
    hook.remove()


def test_an_overflow_in_float16_halves_the_scale_and_the_schedule_goes_on(shapes: Path) -> None:
    bench = Bench(shapes, "fp16", warmup_epochs=2.0, warmup_steps=1)
    bench.update()
    bench.scaler.update(64.0)  # it begins so high that it overflows by itself
    bench.update()
    for _ in range(2):
        before = bench.state()
        scale = bench.scaler.get_scale()
        step = bench.steps()
        lr = bench.recipe.at(step, len(bench)).lr
        next_lr = bench.recipe.at(step + 1, len(bench)).lr
        assert next_lr > lr

        with overflow(bench):
            bench.update()
        assert bench.scaler.get_scale() == scale / 2
        assert bench.progress.skipped_in_a_row == 1
        assert bench.optimizer.param_groups[0]["lr"] == lr
        after = bench.state()
        lost = changed(before, after) + broken(after) + broken(bench.statistics())
        survived(OVERFLOW, len(lost), of="tensors")

        bench.update()  # in the scale that was halved
        assert bench.scaler.get_scale() == scale / 2
        assert bench.progress.skipped_in_a_row == 0
        assert bench.optimizer.param_groups[0]["lr"] == next_lr
        assert changed(before, bench.state())
        assert not broken(bench.state())


@pytest.mark.parametrize("good_between", [0, 1])
def test_a_scale_that_collapses_stops_the_run(shapes: Path, good_between: int) -> None:
    """Below 1 it helps no more; with good updates between the bad ones these would never be
    twenty in a row.
    """
    bench = Bench(shapes, "fp16")
    bench.update()
    bench.scaler.update(4.0)
    for _ in range(2):
        with overflow(bench):
            bench.update()
        for _ in range(good_between):
            bench.update()
    assert bench.scaler.get_scale() == 1.0  # and that may be

    collapsed = r"^the scale of the fp16 gradients fell below 1.*train.amp=bf16 or false$"
    with overflow(bench), pytest.raises(UserError, match=collapsed):
        bench.update()
    survived(OVERFLOW)


def test_a_run_whose_gradients_all_overflow_ends_with_one_line(
    config_file: Path, tmp_path: Path
) -> None:
    changes = ("train.epochs=9", "train.batch=4", "train.nbs=4", "train.val_every=9")
    fp16 = ("train.amp=fp16", "distill=null", "teacher=null")

    def work() -> None:
        loss = YOLO11.loss

        def enormous(*args):
            return {name: value * 1e30 for name, value in loss(*args).items()}

        YOLO11.loss = enormous
        script(train_script, "--config", config_file, *changes, *fp16)()

    done = run(work, tmp_path / "out")
    one_line(done, "the scale of the fp16 gradients fell below 1", "use train.amp=bf16 or false")
    last = checkpoint.load(checkpoint.existing(tmp_path / "run/ckpt")[-1])
    assert last["scaler"]["scale"] == 65536 / 2**12
    assert last["progress"]["epoch"] == 1  # the end of the second epoch
    assert last["progress"]["step"] == 6
    assert not broken(last["student"])
    assert not broken(last["ema"]["average"])
    survived(OVERFLOW)


# --- attention maps


def test_maps_of_large_float16_activations_are_those_of_float32() -> None:
    feats = 300 * torch.rand(2, 512, 4, 4, generator=torch.Generator().manual_seed(0))
    half = feats.half()
    assert half.square().sum(1).isinf().all()  # control: what float16 makes of it
    expected = attention_map(half.float())
    assert attention_map(half).isfinite().all()
    assert torch.equal(attention_map(half), expected)
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(attention_map(half), attention_map(half.float()))
    survived(LIMITS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("reduction", ["notes", "sample", "mean_square"])
def test_maps_of_zeros_and_equal_maps(
    monkeypatch: pytest.MonkeyPatch, reduction, p: float, ranks: int, dtype: torch.dtype
) -> None:
    # of several ranks that all have the same
    monkeypatch.setattr(distributed, "world", lambda: ranks)
    monkeypatch.setattr(distributed, "total", lambda value: value)
    some = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    other = torch.rand(2, 8, 4, 4)
    zero = torch.zeros(2, 8, 4, 4)
    half = torch.cat([some[:1], zero[:1]])  # one image of zeros
    cases = [  # student, teacher
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
        assert loss.isfinite()
        assert feat.grad.isfinite().all()
        assert (loss < 1e-7) == (student is teacher)
    survived(LIMITS, tried=len(cases))


def bare_root(difference: Tensor) -> Tensor:
    """The notes' distance as one would write it down."""
    return difference.square().sum().sqrt() / len(difference)


def test_control_a_bare_root_has_no_gradient_at_equal_maps() -> None:
    feat = torch.rand(2, 8, 4, 4, requires_grad=True)
    bare_root(attention_map(feat) - attention_map(feat.detach())).backward()
    assert feat.grad.isnan().all()


# --- the teacher


@pytest.mark.parametrize("fold", [True, False])
def test_the_teacher_is_as_it_was_whatever_it_was_shown(shapes: Path, fold: bool) -> None:
    bench = Bench(shapes, fold=fold)
    before = {name: value.clone() for name, value in bench.teacher.state_dict().items()}
    has_statistics = any("running_var" in name for name in before)
    assert has_statistics != fold
    for place in ("", "image", "activation", "attention", ""):
        bench.update(place)
    after = bench.teacher.state_dict()
    lost = changed(before, after) + [name for name in after if name not in before]
    survived("Numbers: a teacher that changes", len(lost), of="tensors")


@pytest.mark.parametrize(
    ("key", "value"),
    [("model.4.cv1.conv.weight", math.nan), ("model.22.cv2.bn.running_var", math.inf)],
)
def test_a_teacher_with_one_nan_is_refused_by_name(
    config_file: Path, tmp_path: Path, key: str, value: float
) -> None:
    teacher = YOLO11(NAMES, SCALE)
    teacher.state_dict()[key].view(-1)[-1] = value
    checkpoint.save_best(tmp_path / "teacher.pt", teacher, 64, 1, 0.5)
    command = ("--config", config_file, f"teacher.weights={tmp_path / 'teacher.pt'}")
    done = run(script(train_script, *command), tmp_path / "out")
    one_line(done, "teacher.pt", f"has NaN or infinity in '{key}'", "give a file")
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
        torch.cuda.is_available = lambda: count > 0
        torch.cuda.device_count = lambda: count
        script(train_script, "--config", config_file, f"device={device}")()

    first, *rest = words
    one_line(run(work, tmp_path / "out"), f"device: {first}", *rest)
    assert not (tmp_path / "run").exists()
    survived("Numbers: a device that is not there, memory that runs out")
