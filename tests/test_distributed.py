"""Two ranks under torchrun against one process that does the work of both with plain torch."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from kdmini import distributed, engine
from kdmini.data.loader import Augment, TrainLoader, ValLoader
from kdmini.data.store import Store
from kdmini.detection.average_precision import DetectionMetric
from kdmini.detection.voc import VOC
from kdmini.detection.yolo11.model import YOLO11
from kdmini.device import precision
from kdmini.distill.attention import AttentionTransfer, attention_map
from kdmini.distill.step import Distillation, Weighted, tap_shapes
from kdmini.optim import EMA, Recipe, apply_setting, make_sgd
from kdmini.progress import Progress
from kdmini.signals import Stop

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["circle", "square", "triangle", "star", "ring", "cross"]
TAPS = ("model.6", "model.13", "model.22")
WEIGHT, STEPS, BATCH, EPOCHS = 75.0, 10, 4, 2  # an epoch of the 24 images has six steps
LR = 1e-3  # at ten times as much, every step multiplies a difference by fifty


class Case(NamedTuple):
    reduction: Any
    accumulate: int = 1
    kd_scale: Any = 1.0
    schedule: Any = ((0, 2.0, 2, 1.0),)


CASES = {
    "notes": Case("notes"),
    "notes, accumulated": Case("notes", accumulate=2),
    "sample": Case("sample", kd_scale="batch"),
    "mean_square, accumulated, lambda 0 in the second epoch": Case(
        "mean_square", accumulate=2, kd_scale=100.0, schedule=((0, 2.0, 1, 2.0),)
    ),
}


SINGLE = Tensor.float


def float_or_double(tensor: Tensor) -> Tensor:
    """In place of Tensor.float, which would take the detection loss back to float32."""
    return tensor if tensor.dtype == torch.float64 else SINGLE(tensor)


class Pieces:
    """Everything of one rank: all ranks, and the process that stands for them, build the same."""

    def __init__(self, case: Case):
        torch.manual_seed(5)
        self.student, teacher = (
            YOLO11(NAMES, [0.5, 0.0625, 1024]),
            YOLO11(NAMES, [0.5, 0.0625, 1024]),
        )
        taps = {tap: tap for tap in TAPS}
        shapes = tap_shapes(self.student, teacher, taps, 64)
        self.student.double(), teacher.double()
        self.recipe = Recipe(
            EPOCHS,
            BATCH,
            nbs=BATCH * case.accumulate,
            lr0=LR,
            warmup_bias_lr=2 * LR,
            warmup_epochs=0.5,
            warmup_steps=3,
            clip=5.0,
            save_every=1,
        )
        self.ema = EMA(self.student, 0.9, 5.0)
        term = Weighted(AttentionTransfer(case.reduction), WEIGHT, case.schedule)
        self.distillation = Distillation(
            self.student, teacher, {"attention": term}, taps, shapes, kd_scale=case.kd_scale
        )
        self.distillation.double()
        self.optimizer = make_sgd([self.student, self.distillation], self.recipe)
        self.student.train(), self.distillation.train()

    def parameters(self) -> list[nn.Parameter]:
        return [*self.student.parameters(), *(p for p in self.distillation.parameters())]

    def state(self) -> dict[str, Tensor]:
        found = {
            "student": self.student,
            "distillation": self.distillation,
            "ema": self.ema.average,
        }
        return {
            f"{k} {name}": v.clone()
            for k, part in found.items()
            for name, v in part.state_dict().items()
        }


def store(root: Path, split: str) -> Store:
    return Store(VOC(str(root), [split], NAMES), 64, "cpu", 0, "resident", name=split)


class Loader(TrainLoader):
    """In float64, as all else here: after ten steps, float32's rounding alone would be worth more
    than 1e-5.
    """

    def epoch(self, epoch: int, start: int = 0) -> Any:
        return ((images.double(), targets) for images, targets in super().epoch(epoch, start))


class Seen(DetectionMetric):
    """Keeps what it is shown."""

    def __init__(self) -> None:
        super().__init__(NAMES)
        self.shown: list[Any] = []

    def update(self, detections: Any, targets: Any) -> None:
        super().update(detections, targets)
        self.shown += [
            (target["id"], found) for found, target in zip(detections, targets, strict=True)
        ]


# --- what each rank does


def train(case: Case, data: Store) -> list[dict[str, Any]]:
    """-> after each update: steps done, sums of the losses, weights."""
    pieces, progress, states = Pieces(case), Progress(), []
    rank, world = distributed.rank(), distributed.world()
    loader = Loader(data, BATCH, EPOCHS, Augment(), 1, rank, world)
    autocast, scaler = precision(False, torch.device("cpu"))
    replica = distributed.replicate(pieces.student)
    while progress.epoch * len(loader) + progress.step < STEPS:
        engine.train_one_epoch(
            pieces.student, replica, pieces.distillation, loader, pieces.optimizer, scaler, pieces.ema,
            pieces.recipe, progress, autocast, Stop(),
        )  # fmt: skip
        done = progress.epoch * len(loader) + progress.step
        states.append({"done": done, "sums": dict(progress.sums), **pieces.state()})
        if progress.step == len(loader):
            progress.next_epoch()
    return states


def stopped(data: Store) -> list[int]:
    """A signal to rank 1 alone, in step 3 -> step at which this rank left, and the signal it knows
    of.
    """

    class Signalled(Loader):
        def epoch(self, epoch: int, start: int = 0) -> Any:
            for step, batch in enumerate(super().epoch(epoch, start)):
                stop.signum = 15 if step == 2 and distributed.rank() else stop.signum
                yield batch

    pieces, progress, stop = Pieces(Case("notes")), Progress(), Stop()
    loader = Signalled(data, 2, 1, Augment(), 0, distributed.rank(), distributed.world())
    autocast, scaler = precision(False, torch.device("cpu"))
    engine.train_one_epoch(
        pieces.student, distributed.replicate(pieces.student), pieces.distillation, loader, pieces.optimizer, scaler,
        pieces.ema, Recipe(1, 2, nbs=2), progress, autocast, stop,
    )  # fmt: skip
    return [progress.step, stop.agreed]


def evaluate(data: Store, batch: int) -> dict[str, Any]:
    metric = Seen()
    torch.manual_seed(2)
    model = YOLO11(NAMES, [0.5, 0.0625, 1024])
    loader = ValLoader(data, batch, distributed.rank(), distributed.world())
    scores = engine.evaluate(model, loader, metric, precision(False, torch.device("cpu"))[0])
    return {"scores": scores, "shown": metric.shown, "batches": len(loader)}


def uneven() -> dict[str, Any]:
    """Gradients of parameters that some ranks lack, and lists of unequal length."""
    rank = distributed.rank()
    both, one, none, fixed = (nn.Parameter(torch.zeros(2)) for _ in range(4))
    fixed.requires_grad_(False)
    both.grad = torch.tensor([1.0, 2.0]) * (rank + 1)
    one.grad = torch.tensor([3.0, 5.0]) if rank else None
    distributed.average_gradients_([both, one, none, fixed])
    broadcast = torch.tensor([rank + 7])
    distributed.broadcast_([broadcast])
    return {
        "gradients": [p.grad for p in (both, one, none, fixed)],
        "dealt": distributed.deal([[0, 2, 4], [1]][rank]),
        "largest": distributed.largest([3, 9][rank], torch.device("cpu")),
        "broadcast": broadcast,
    }


def work(root: Path, out: Path) -> None:
    torch.set_num_threads(1)
    distributed.start(torch.device("cpu"), 1.0)
    data, held_out = store(root, "train"), store(root, "val")
    found = {
        "evaluate": {batch: evaluate(held_out, batch) for batch in (6, 4, 16)},
        "uneven": uneven(),
    }
    Tensor.float = float_or_double  # type: ignore[method-assign]
    found |= {
        "train": {name: train(case, data) for name, case in CASES.items()},
        "stopped": stopped(data),
    }
    print(f"only rank {distributed.rank()} speaks")
    torch.save(found, out / f"{distributed.rank()}.pt")
    distributed.finish()


# --- what one process finds


@pytest.fixture(scope="module")
def ranks(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the two ranks saved, and at the end what they printed."""
    out = tmp_path_factory.mktemp("ranks")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        __file__,
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(shapes), str(out)], capture_output=True, text=True, env=env, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(2)] + [
        {"stdout": done.stdout}
    ]


def reference(case: Case, data: Store) -> list[dict[str, Any]]:
    """The same training: each half of a batch through a replica of its own, gradients added by
    hand.
    """
    replicas = [Pieces(case), Pieces(case)]
    lead, states, total = replicas[0], [], {}
    loader, since = Loader(data, BATCH, EPOCHS, Augment(), 1), 0
    for step in range(STEPS):
        epoch = step // len(loader)
        if step % len(loader) == 0:
            batches, total = loader.epoch(epoch), {}
        images, targets = next(batches)
        setting = lead.recipe.at(step, len(loader))
        losses, differences = [], {tap: [] for tap in TAPS}
        for half, replica in zip((slice(0, 2), slice(2, 4)), replicas, strict=True):
            cut = {key: value[half] for key, value in targets.items()}
            losses.append(replica.student.loss(replica.student(images[half]), cut))
            feats, kd = replica.distillation.student_taps.take(), replica.distillation
            if (factor := WEIGHT * kd.lambdas(epoch)["attention"]) > 0:
                aligned, teacher = kd.align(feats), kd.look(images[half]).feats
                for tap in TAPS:
                    differences[tap].append(
                        attention_map(aligned[tap]) - attention_map(teacher[tap])
                    )
        means = {name: (losses[0][name] + losses[1][name]) / 2 for name in losses[0]}
        loss = BATCH * sum(means.values())
        if factor > 0:
            joined = [
                torch.cat(halves) for halves in differences.values()
            ]  # (N, H, W) of the global batch
            terms = {
                "notes": lambda d: d.square().sum().sqrt() / BATCH,
                "sample": lambda d: d.square().sum((1, 2)).sqrt().mean(),
                "mean_square": lambda d: d.square().mean(),
            }
            means["attention"] = factor * sum(map(terms[case.reduction], joined))
            loss = (
                loss + (BATCH if case.kd_scale == "batch" else case.kd_scale) * means["attention"]
            )
        loss.backward()  # the replicas' gradients; that of the loss is their sum
        total = {name: total.get(name, 0) + value.item() for name, value in means.items()}
        since += 1
        if since < setting.accumulate and (step + 1) % len(loader):
            continue
        since = 0
        for p, q in zip(*(replica.parameters() for replica in replicas), strict=True):
            if p.grad is not None:
                p.grad = p.grad + q.grad
            q.grad = None
        norm = sum(p.grad.square().sum() for p in lead.parameters() if p.grad is not None).sqrt()
        for p in lead.parameters():
            if p.grad is not None:
                p.grad *= min(1.0, 5.0 / (norm.item() + 1e-6))
        apply_setting(lead.optimizer, setting)
        lead.optimizer.step()
        lead.optimizer.zero_grad()
        lead.ema.update(lead.student)
        with torch.no_grad():
            for p, q in zip(*(replica.parameters() for replica in replicas), strict=True):
                q.copy_(p)
        buffers = {
            f"other {name}": value.clone() for name, value in replicas[1].student.named_buffers()
        }
        states.append({"done": step + 1, "sums": total, **lead.state(), **buffers})
    return states


@pytest.fixture(scope="module")
def data(shapes: Path) -> Store:
    return store(shapes, "train")


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_as_one_process_that_does_both_halves(
    ranks, data: Store, name: str, monkeypatch
) -> None:
    monkeypatch.setattr(Tensor, "float", float_or_double)
    expected = reference(CASES[name], data)
    one, other = (ranks[rank]["train"][name] for rank in range(2))
    assert (
        [state["done"] for state in expected]
        == [state["done"] for state in one]
        == [s["done"] for s in other]
    )
    assert expected[-1]["done"] == STEPS and len(expected) == (
        10 if CASES[name].accumulate == 1 else 6
    )
    for state, mine, theirs in zip(expected, one, other, strict=True):
        limit = 1e-9 if state is expected[0] else 1e-6  # absolute, on weights of about 0.1
        for key, value in mine.items():
            if key not in ("done", "sums"):
                torch.testing.assert_close(
                    value, state[key], atol=limit, rtol=limit, msg=f"{key} at {state['done']}"
                )
        # as logged: the mean over the ranks, which for `notes` is the value on the global batch
        assert (
            mine["sums"] == pytest.approx(state["sums"], rel=1e-5)
            and mine["sums"] == theirs["sums"]
        )
        for key, value in state.items():  # BatchNorm's statistics are a rank's own
            if key.startswith("other "):
                torch.testing.assert_close(
                    theirs[key.replace("other", "student")], value, atol=1e-6, rtol=1e-6
                )


@pytest.mark.parametrize("name", CASES)
def test_ranks_end_with_the_same_bits_and_statistics_of_their_own(ranks, name: str) -> None:
    one, other = (ranks[rank]["train"][name][-1] for rank in range(2))
    differ = {
        key for key in one if key not in ("done", "sums") and not torch.equal(one[key], other[key])
    }
    assert differ and all(key.endswith(("running_mean", "running_var")) for key in differ)


def test_distillation_moves_the_student_and_the_align_modules(ranks) -> None:
    """So that the comparison compares something."""
    first, last = (ranks[0]["train"]["notes"][i] for i in (0, -1))
    for key in ("distillation align.layers.0.0.weight", "student model.6.cv1.conv.weight"):
        assert (first[key] - last[key]).abs().max() > 1e-5


@pytest.mark.parametrize(("batch", "batches"), [(6, [2, 1]), (4, [2, 2]), (16, [1, 0])])
def test_scores_of_two_ranks_are_those_of_one_and_no_image_counts_twice(
    ranks, shapes, batch, batches
) -> None:
    """8 images in an odd number of batches, an even one, and in fewer batches than ranks."""
    expected = evaluate(store(shapes, "val"), batch // 2)  # as many images at a time
    assert [image for image, _ in expected["shown"]] == [f"shapes/{i:06}" for i in range(24, 32)]
    assert sum(len(found["scores"]) for _, found in expected["shown"]) > 20
    for rank in range(2):
        found = ranks[rank]["evaluate"][batch]
        assert found["batches"] == batches[rank] and found["scores"] == expected["scores"]
        for (image, mine), (same, one) in zip(found["shown"], expected["shown"], strict=True):
            assert image == same and all(torch.equal(mine[key], one[key]) for key in one)


def test_a_signal_to_one_rank_stops_all_at_the_same_step(ranks) -> None:
    assert [ranks[rank]["stopped"] for rank in range(2)] == [[10, 15], [10, 15]]


def test_what_only_one_rank_has_is_shared(ranks) -> None:
    for rank in range(2):
        found = ranks[rank]["uneven"]
        both, one, none, fixed = found["gradients"]
        assert (
            both.tolist() == [1.5, 3.0]
            and one.tolist() == [1.5, 2.5]
            and none.tolist() == [0, 0]
            and fixed is None
        )
        assert (
            found["dealt"] == [0, 1, 2, 4]
            and found["largest"] == 9
            and found["broadcast"].tolist() == [7]
        )


def test_rank_0_speaks_for_all(ranks) -> None:
    assert ranks[2]["stdout"].strip().splitlines()[-1] == "only rank 0 speaks"
    assert "only rank 1" not in ranks[2]["stdout"]


if __name__ == "__main__":
    work(*map(Path, sys.argv[1:]))
