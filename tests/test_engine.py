"""The loop itself: scales, accumulation, skipping, precision, evaluation."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from kdmini.contracts import UserError
from kdmini.device import precision
from kdmini.engine import Training, attention_distances, evaluate, on_cpu, train_one_epoch
from kdmini.optim import EMA, Recipe, make_optimizer
from kdmini.progress import Progress
from kdmini.signals import Stop
from tests.pretended import card

CPU = torch.device("cpu")
SCORES = torch.tensor([0.5])


class Line(nn.Module):
    """A detector with one weight, and a loss whose gradient is known.

    loss = weight * mean(images) * the factor of the batch.
    """

    names = ("thing",)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.weight * images.mean()

    def loss(self, preds: Tensor, targets: Any) -> dict[str, Tensor]:
        return {"line": preds.sum() * targets["factor"]}

    def decode(self, preds: Tensor, score: float = 0.25) -> list[dict[str, Tensor]]:
        return [{"scores": SCORES}] * 4


class Extra(nn.Module):
    """Stands for a Distillation whose term has gradient 10."""

    def __init__(self, model: Line, kd_scale: float | str = 1.0):
        super().__init__()
        self.model = (model,)
        self.kd_scale = kd_scale

    def lambdas(self, epoch: int) -> dict[str, float]:
        return {"extra": 1.0}

    def forward(self, images: Tensor, preds: Any, targets: Any, epoch: int) -> dict[str, Tensor]:
        return {"extra": 10 * self.model[0].weight.sum()}


class Nothing(Extra):
    def forward(self, images: Tensor, preds: Any, targets: Any, epoch: int) -> dict[str, Tensor]:
        return {}


class Batches:
    """Batches of four images of value 1, and the factor of each batch's loss."""

    def __init__(self, *factors: float):
        self.factors = factors

    def __len__(self) -> int:
        return len(self.factors)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        for number in range(start, len(self.factors)):
            targets = {"factor": self.factors[number], "ids": [f"batch {number}"] * 4}
            yield torch.ones(4, 3, 2, 2), targets


class Trained(NamedTuple):
    """What an epoch leaves."""

    weight: float
    progress: Progress
    ema: EMA
    calls: int  # of train_one_epoch


# with these the weight moves by the gradient
PLAIN: dict[str, Any] = {
    "lr0": 1.0,
    "momentum": 1e-12,
    "weight_decay": 0.0,
    "warmup_epochs": 0,
    "clip": 1e9,
    "nbs": 4,
}


def train(
    batches: Batches,
    extra: type[Extra] = Nothing,
    kd_scale: float | str = 1.0,
    amp: bool | str = False,
    **settings: Any,
) -> Trained:
    """One epoch from a weight of 1, gone on with when it is left.

    settings: of the recipe, where it is not PLAIN.
    """
    model = Line()
    recipe = Recipe(epochs=1, batch=4, amp=amp, **{**PLAIN, **settings})
    autocast, scaler = precision(amp, CPU)
    training = Training(
        loader=batches,
        student=model,
        distillation=extra(model, kd_scale),
        optimizer=make_optimizer([model], recipe),
        scaler=scaler,
        ema=EMA(model, 0.5, 1.0),
        recipe=recipe,
        autocast=autocast,
        progress=Progress(),
    )
    calls = 0
    while training.progress.step < len(batches):
        train_one_epoch(training, Stop())
        calls += 1
    return Trained(model.weight.item(), training.progress, training.ema, calls)


# --- scales


@pytest.mark.parametrize(
    ("loss_scale", "gradient"),
    [
        ("batch", 4 * 0.5),
        ("none", 0.5),
    ],
)
def test_the_loss_is_multiplied_by_the_batch_size(loss_scale: str, gradient: float) -> None:
    trained = train(Batches(0.5), loss_scale=loss_scale)
    assert trained.weight == pytest.approx(1 - gradient)


@pytest.mark.parametrize(("kd_scale", "gradient"), [(1.0, 10), (3.0, 30), ("batch", 40)])
def test_the_distillation_is_multiplied_by_kd_scale(kd_scale: Any, gradient: float) -> None:
    trained = train(Batches(0.5), Extra, kd_scale)
    assert trained.weight == pytest.approx(1 - 4 * 0.5 - gradient)


# --- accumulation


def test_gradients_accumulate_to_the_nominal_batch_and_an_epoch_ends_with_an_update() -> None:
    trained = train(Batches(1.0, 2.0, 4.0), nbs=8)
    assert trained.weight == pytest.approx(1 - 4 * (1 + 2) - 4 * 4)
    assert trained.ema.updates == 2


def test_an_unscaled_loss_is_the_mean_over_what_is_accumulated() -> None:
    trained = train(Batches(1.0, 2.0), nbs=8, loss_scale="none")
    assert trained.weight == pytest.approx(1 - (1 + 2) / 2)


@pytest.mark.parametrize(
    ("loss_scale", "kd_scale", "gradient"),
    [
        ("batch", 0.5, (8 * 1.5 + 5) + (4 * 4 + 5)),  # n * mean(task) + kd_scale * mean(KD)
        ("batch", "batch", (8 * 1.5 + 80) + (4 * 4 + 40)),
        ("none", 0.5, (1.5 + 5) + (4 + 5)),
        ("none", "batch", (1.5 + 80) + (4 + 40)),
    ],
)
def test_a_shorter_update_at_the_end_of_an_epoch_has_the_scales_of_its_own_images(
    loss_scale: str, kd_scale: Any, gradient: float
) -> None:
    """Two batches of four images, then one."""
    batches = Batches(1.0, 2.0, 4.0)
    trained = train(batches, Extra, kd_scale, nbs=8, loss_scale=loss_scale)
    assert trained.weight == pytest.approx(1 - gradient)


def test_a_run_that_is_left_after_every_update_accumulates_as_one_that_is_not() -> None:
    factors = (1.0, 2.0, 4.0, 0.5, 0.25)
    whole = train(Batches(*factors), Extra, nbs=8, loss_scale="none")
    parts = train(Batches(*factors), Extra, nbs=8, loss_scale="none", save_every=1)
    assert parts.weight == whole.weight
    assert parts.calls == 3
    assert whole.calls == 1


def test_what_is_logged_is_the_mean_of_the_losses() -> None:
    trained = train(Batches(1.0, 2.0, 4.0), nbs=8)
    weight = 1 - 4 * (1 + 2)  # in the third batch
    assert trained.progress.means()["line"] == pytest.approx((1 + 2 + 4 * weight) / 3)


# --- gradients that are large, or not finite


def test_the_gradient_is_clipped_by_its_norm() -> None:
    assert train(Batches(5.0), clip=0.25).weight == pytest.approx(1 - 0.25, abs=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_update_that_is_not_finite_is_left_out_and_counted(bad: float) -> None:
    trained = train(Batches(1.0, bad, 1.0))
    assert trained.weight == pytest.approx(1 - 4 - 4)
    assert trained.progress.skipped == 1
    assert math.isfinite(trained.progress.means()["line"])
    assert torch.isfinite(trained.ema.average.weight).all()


def test_many_such_updates_in_a_row_stop_the_run_and_name_the_loss() -> None:
    train(Batches(*[math.nan] * 19))
    with pytest.raises(UserError, match=r"20 updates in a row.*line not finite, last on batch 19"):
        train(Batches(*[math.nan] * 20))


# --- precision


def product() -> Tensor:
    return torch.ones(2, 2) @ torch.ones(2, 2)


@pytest.mark.parametrize(
    ("amp", "dtype", "scaled"),
    [
        ("bf16", torch.bfloat16, False),
        ("fp16", torch.float16, True),
        (True, torch.float32, False),  # the better of the two is for CUDA
    ],
)
def test_autocast_runs_in_half_precision_with_a_scaler_for_fp16_alone(
    amp: bool | str, dtype: torch.dtype, scaled: bool
) -> None:
    autocast, scaler = precision(amp, CPU)
    with autocast():
        assert product().dtype == dtype
    assert scaler.is_enabled() == scaled


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_an_epoch_in_half_precision_comes_near(amp: str) -> None:
    trained = train(Batches(0.5, 0.25), amp=amp)
    assert trained.weight == pytest.approx(1 - 4 * 0.75, rel=1e-2)


# --- evaluation


def test_evaluate_hands_every_batch_to_the_metric_in_native_pixels_without_gradients() -> None:
    updates = []

    class Metric:
        records = ()

        def update(self, predictions: Any, targets: Any) -> None:
            updates.append((predictions, targets, torch.is_grad_enabled()))

        def compute(self) -> dict[str, float]:
            return {"batches": len(updates)}

    def to_file(predictions: Any) -> Any:
        return [{"scores": 2 * prediction["scores"]} for prediction in predictions]

    model = Line().train()
    batches: Any = [(torch.ones(4, 3, 2, 2), [number] * 4, to_file) for number in range(3)]
    autocast, _ = precision(False, CPU)
    assert evaluate(model, batches, Metric(), autocast) == {"batches": 3}
    assert updates == [([{"scores": 2 * SCORES}] * 4, [number] * 4, False) for number in range(3)]
    assert not model.training


class Elsewhere(Tensor):
    """Says that it is not on the CPU."""

    is_cpu = False


def test_predictions_come_to_the_cpu_as_they_are_each_in_memory_of_its_own() -> None:
    predictions = []
    for count in (3, 0, 2):
        values = {
            "boxes": torch.rand(count, 4),
            "labels": torch.arange(count),
            "scores": torch.rand(count),
            "one": torch.tensor(count / 2),
        }
        predictions.append(values)
    elsewhere = [
        {name: value.as_subclass(Elsewhere) for name, value in prediction.items()}
        for prediction in predictions
    ]
    moved = on_cpu(elsewhere)
    assert [list(prediction) for prediction in moved] == [list(predictions[0])] * 3
    for ours, theirs in zip(moved, predictions, strict=True):
        for name, value in ours.items():
            assert value.dtype == theirs[name].dtype
            assert torch.equal(value.as_subclass(Tensor), theirs[name])
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size()


def test_what_is_on_the_cpu_already_is_not_copied() -> None:
    prediction = {"scores": torch.rand(3)}
    (moved,) = on_cpu([prediction])
    assert moved["scores"] is prediction["scores"]


def test_the_predictions_of_a_batch_come_in_one_copy_a_type() -> None:
    with card() as operations:
        prediction = {
            "boxes": torch.empty(5, 4, device="cuda"),
            "scores": torch.empty(5, device="cuda"),
            "labels": torch.empty(5, dtype=torch.int64, device="cuda"),
        }
        moved = on_cpu([prediction] * 8)
    assert all(value.is_cpu for prediction in moved for value in prediction.values())
    assert operations.counts["_to_copy"] == 2


def test_evaluate_brings_a_batch_back_before_it_turns_it_into_pixels_of_the_files() -> None:
    """Or what it takes there, image by image, would wait for the device."""
    came = []

    class Metric:
        records = ()

        def update(self, predictions: Any, targets: Any) -> None:
            pass

        def compute(self) -> dict[str, float]:
            return {}

    class Distant(Line):
        def decode(self, preds: Any, score: float = 0.25) -> list[dict[str, Tensor]]:
            return [{"scores": torch.empty(3, device="cuda")}] * 4

    def to_file(predictions: Any) -> Any:
        came.extend(prediction["scores"].is_cpu for prediction in predictions)
        return predictions

    autocast, _ = precision(False, CPU)
    batches: Any = [(torch.ones(4, 3, 2, 2), [0] * 4, to_file)] * 2
    with card() as operations:
        evaluate(Distant(), batches, Metric(), autocast)
    assert came == [True] * 8
    assert operations.counts["_to_copy"] == 2


class Apart(Nothing):
    """Whose distances are sums over the images."""

    def distances(self, student: nn.Module, images: Tensor) -> dict[str, Tensor]:
        assert not self.training
        assert not student.training
        total = images.sum()
        return {"aligned/a": total, "raw/a": 2 * total, "raw/b": 0 * total}


def test_attention_distances_are_means_over_images_of_the_first_batches() -> None:
    model = Line()
    batches: Any = [  # two images of 1, four of 4, and one that does not count
        (torch.full((2, 1), 1.0), [], None),
        (torch.full((4, 1), 4.0), [], None),
        (torch.full((1, 1), 1e9), [], None),
    ]
    autocast, _ = precision(False, CPU)
    distances = attention_distances(model, Apart(model), batches, autocast, batches=2)
    mean = (2 * 1 + 4 * 4) / 6
    assert distances == pytest.approx(
        {"distance/aligned/a": mean, "distance/raw/a": 2 * mean, "distance/raw/b": 0}
    )
