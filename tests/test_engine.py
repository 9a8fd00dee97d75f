"""The loop itself: scales, accumulation, skipping, precision, evaluation."""

import math

import pytest
import torch
from torch import nn

from kdmini.contracts import UserError
from kdmini.device import precision
from kdmini.engine import attention_distances, evaluate, train_one_epoch
from kdmini.optim import EMA, Recipe, make_sgd
from kdmini.progress import Progress
from kdmini.signals import Stop

CPU = torch.device("cpu")


SCORES = torch.tensor([0.5])


class Line(nn.Module):
    """A detector with one weight: loss = weight * mean(images), so that every gradient is known."""

    names = ("thing",)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 1))

    def forward(self, images):
        return self.weight * images.mean()

    def loss(self, preds, targets):
        return {"line": preds.sum() * targets["factor"]}

    def decode(self, preds, score, iou, max_det):
        return [{"scores": SCORES}] * 4


class Extra(nn.Module):
    """Stands for a Distillation whose term has gradient 10."""

    def __init__(self, model: Line, kd_scale: float | str = 1.0):
        super().__init__()
        self.model = (model,)
        self.kd_scale = kd_scale

    def lambdas(self, epoch):
        return {"extra": 1.0}

    def forward(self, images, preds, targets, epoch):
        return {"extra": 10 * self.model[0].weight.sum()}


class Nothing(Extra):
    def forward(self, images, preds, targets, epoch):
        return {}


class Batches:
    """Batches of four images of value 1, and the factor of each batch's loss."""

    def __init__(self, *factors: float):
        self.factors = factors

    def __len__(self):
        return len(self.factors)

    def epoch(self, epoch, start=0):
        numbers = range(start, len(self.factors))
        return (
            (torch.ones(4, 3, 2, 2), {"factor": self.factors[i], "ids": [f"batch {i}"]})
            for i in numbers
        )


def train(
    batches: Batches,
    extra=Nothing,
    kd_scale: float | str = 1.0,
    amp: bool | str = False,
    **settings,
):
    """One epoch with learning rate 1 and no momentum, so that the weight moves by the gradient ->
    weight, progress.
    """
    model = Line()
    plain = {
        "lr0": 1.0,
        "momentum": 1e-12,
        "weight_decay": 0.0,
        "warmup_epochs": 0,
        "clip": 1e9,
        "nbs": 4,
    }
    recipe = Recipe(epochs=1, batch=4, amp=amp, **{**plain, **settings})
    autocast, scaler = precision(amp, CPU)
    ema, progress = EMA(model, 0.5, 1.0), Progress()
    optimizer = make_sgd([model], recipe)
    distillation = extra(model, kd_scale)
    train_one_epoch(
        model,
        model,
        distillation,
        batches,
        optimizer,
        scaler,
        ema,
        recipe,
        progress,
        autocast,
        Stop(),
    )
    return model.weight.item(), progress, ema


def test_the_loss_is_multiplied_by_the_batch_size_and_the_distillation_by_kd_scale() -> None:
    assert train(Batches(0.5))[0] == pytest.approx(1 - 4 * 0.5)
    assert train(Batches(0.5), loss_scale="none")[0] == pytest.approx(1 - 0.5)
    assert train(Batches(0.5), Extra)[0] == pytest.approx(1 - 4 * 0.5 - 10)
    assert train(Batches(0.5), Extra, kd_scale=3.0)[0] == pytest.approx(1 - 4 * 0.5 - 30)
    assert train(Batches(0.5), Extra, kd_scale="batch")[0] == pytest.approx(1 - 4 * 0.5 - 40)


def test_gradients_accumulate_to_the_nominal_batch_and_an_epoch_ends_with_an_update() -> None:
    weight, progress, ema = train(Batches(1.0, 2.0, 4.0), nbs=8)
    assert weight == pytest.approx(1 - 4 * (1 + 2) - 4 * 4)
    assert ema.updates == 2
    assert train(Batches(1.0, 2.0), nbs=8, loss_scale="none")[0] == pytest.approx(1 - (1 + 2) / 2)
    assert progress.means()["line"] == pytest.approx(
        (1 * 1 + 2 * 1 + 4 * (1 - 12)) / 3
    )  # the weight is 1 - 12 in the third


def test_the_gradient_is_clipped_by_its_norm() -> None:
    assert train(Batches(5.0), clip=0.25)[0] == pytest.approx(1 - 0.25, abs=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_update_that_is_not_finite_is_left_out_and_counted(bad: float) -> None:
    weight, progress, ema = train(Batches(1.0, bad, 1.0))
    assert weight == pytest.approx(1 - 4 - 4)
    assert progress.left_out == 1 and math.isfinite(progress.means()["line"])
    assert torch.isfinite(ema.average.weight).all()


def test_many_such_updates_in_a_row_stop_the_run_and_name_the_loss() -> None:
    with pytest.raises(UserError, match=r"20 updates in a row.*line not finite, last on batch 19"):
        train(Batches(*[math.nan] * 20))
    train(Batches(*[math.nan] * 19))


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_autocast_runs_in_half_precision_with_a_scaler_for_fp16_alone(amp: str) -> None:
    autocast, scaler = precision(amp, CPU)
    with autocast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    assert scaler.is_enabled() == (amp == "fp16")
    assert train(Batches(0.5, 0.25), amp=amp)[0] == pytest.approx(1 - 4 * 0.75, rel=1e-2)


def test_true_means_float32_on_the_cpu() -> None:
    autocast, scaler = precision(True, CPU)
    with autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    assert not scaler.is_enabled()


def test_evaluate_hands_every_batch_to_the_metric_in_native_pixels_without_gradients() -> None:
    seen = []

    class Metric:
        def update(self, detections, targets):
            seen.append((detections, targets, torch.is_grad_enabled()))

        def compute(self):
            return {"batches": len(seen)}

    def to_native(detections):
        return [{"scores": 2 * found["scores"]} for found in detections]

    model = Line().train()
    batches = [(torch.ones(4, 3, 2, 2), [number] * 4, to_native) for number in range(3)]
    assert evaluate(model, batches, Metric(), precision(False, CPU)[0]) == {"batches": 3}
    assert seen == [([{"scores": 2 * SCORES}] * 4, [number] * 4, False) for number in range(3)]
    assert not model.training


def test_attention_distances_are_means_over_images_of_the_first_batches() -> None:
    class Apart(Nothing):
        def distances(self, student, images):
            assert not self.training and not student.training
            return {"aligned/a": images.sum(), "raw/a": 2 * images.sum(), "raw/b": images.sum() * 0}

    model = Line()
    batches = [(torch.full((n, 1), value), [], None) for n, value in ((2, 1.0), (4, 4.0), (1, 1e9))]
    found = attention_distances(model, Apart(model), batches, precision(False, CPU)[0], batches=2)
    mean = (2 * 1 + 4 * 4) / 6
    assert found == pytest.approx(
        {"distance/aligned/a": mean, "distance/raw/a": 2 * mean, "distance/raw/b": 0}
    )
