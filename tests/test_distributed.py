"""Two ranks under torchrun, against one process that does the work of both."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kdmini import distributed
from kdmini.data.store import Store
from kdmini.distill.attention import attention_map
from kdmini.engine import Training
from kdmini.optim import apply_setting
from tests import precise, splits
from tests import ranks as ranks_script
from tests.conftest import ROOT
from tests.ranks import (
    BATCH,
    CASES,
    CLIP,
    EPOCHS,
    SEGMENTATION,
    STEPS,
    WEIGHT,
    Case,
    DoubleLoader,
    evaluate,
    evaluate_masks,
    make_training,
    parameters,
    store_of,
    weights,
)

LIMIT_S = 120


class Ranks(NamedTuple):
    """What the two have saved, and what was printed."""

    results: list[dict[str, Any]]
    stdout: str


@pytest.fixture(scope="module")
def ranks(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    out = tmp_path_factory.mktemp("ranks")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *torchrun, str(ranks_script.__file__), str(shapes), str(out)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=LIMIT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    results = [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(2)]
    return Ranks(results, done.stdout)


# --- the same training in one process


class Halves:
    """Each half of a batch goes through a replica; gradients are added by hand."""

    def __init__(self, case: Case, data: Store):
        self.case = case
        self.loader = DoubleLoader(data, BATCH, EPOCHS, case.task.augment, seed=1)
        self.replicas = [make_training(case, self.loader) for _ in range(2)]
        self.lead: Training = self.replicas[0]
        self.sums: dict[str, float] = {}  # of the epoch
        self.states: list[dict[str, Any]] = []  # after each update

    def train(self) -> list[dict[str, Any]]:
        steps = len(self.loader)
        step = 0
        micro_batches = 0
        for epoch in range(EPOCHS):
            self.sums = {}
            for images, targets in self.loader.epoch(epoch):
                setting = self.lead.recipe.at(step, steps)
                # the first two steps of the warm-up are updates by themselves
                whole = self.case.accumulate if step >= 2 else 1
                self.backward(images, targets, epoch, whole)
                step += 1
                micro_batches += 1
                if micro_batches == setting.accumulate or step % steps == 0:
                    apply_setting(self.lead.optimizer, setting)
                    self.update()
                    self.keep_state(step)
                    micro_batches = 0
                if step == STEPS:
                    return self.states
        raise AssertionError("the epochs are over too early")

    def backward(
        self, images: Tensor, targets: dict[str, Any], epoch: int, micro_batches: int
    ) -> None:
        """micro_batches: of the update that these images are part of."""
        losses: list[dict[str, Tensor]] = []
        feats = []
        halves = (slice(0, 2), slice(2, 4))
        for half, replica in zip(halves, self.replicas, strict=True):
            cut = {key: value[half] for key, value in targets.items()}
            losses.append(replica.student.loss(replica.student(images[half]), cut))
            feats.append(replica.distillation.student_taps.take())
        means = {name: (losses[0][name] + losses[1][name]) / 2 for name in losses[0]}
        total: Any = BATCH * sum(means.values())

        factor = WEIGHT * self.lead.distillation.lambdas(epoch)["attention"]
        if factor > 0:
            term = factor * self.term([images[half] for half in halves], feats)
            n = BATCH * micro_batches
            kd_scale = n if self.case.kd_scale == "batch" else self.case.kd_scale
            total = total + kd_scale * term / micro_batches
            means["attention"] = term
        total.backward()  # the gradient of the loss is the sum of those of the replicas
        for name, value in means.items():
            self.sums[name] = self.sums.get(name, 0) + value.item()

    def term(self, images: list[Tensor], feats: list[dict[str, Tensor]]) -> Tensor:
        """Of the global batch, over all taps."""
        taps = self.case.task.taps
        differences: dict[str, list[Tensor]] = {tap: [] for tap in taps}
        for half, ours, replica in zip(images, feats, self.replicas, strict=True):
            aligned = replica.distillation.align(ours)
            teacher = replica.distillation.teacher_view(half).feats
            for tap in taps:
                apart = attention_map(aligned[tap]) - attention_map(teacher[tap])
                differences[tap].append(apart)
        joined = [torch.cat(halves) for halves in differences.values()]  # (N, H, W)
        return torch.stack([reduced(apart, self.case.reduction) for apart in joined]).sum()

    def update(self) -> None:
        """The lead takes the gradients of both; the other copies its weights."""
        pairs = list(zip(*map(parameters, self.replicas), strict=True))
        for mine, other in pairs:
            if mine.grad is not None:
                mine.grad = mine.grad + other.grad
            other.grad = None
        clip([mine for mine, _ in pairs if mine.grad is not None])
        self.lead.optimizer.step()
        self.lead.optimizer.zero_grad()
        self.lead.ema.update(self.lead.student)
        with torch.no_grad():
            for mine, other in pairs:
                other.copy_(mine)

    def keep_state(self, done: int) -> None:
        """With the statistics of the other replica: BatchNorm's are a rank's own."""
        student = self.replicas[1].student
        learned = dict(student.named_parameters())
        statistics = {
            f"student {name}": value.clone()
            for name, value in student.state_dict().items()
            if name not in learned
        }
        state = {
            "done": done,
            "sums": dict(self.sums),
            "weights": weights(self.lead),
            "other": statistics,
        }
        self.states.append(state)


def reduced(apart: Tensor, reduction: str) -> Tensor:
    """(N, H, W) -> scalar."""
    if reduction == "notes":
        return apart.square().sum().sqrt() / BATCH
    if reduction == "sample":
        return apart.square().sum((1, 2)).sqrt().mean()
    return apart.square().mean()


def clip(learning: list[torch.nn.Parameter]) -> None:
    squares = [parameter.grad.square().sum() for parameter in learning]
    norm = torch.stack(squares).sum().sqrt().item()
    for parameter in learning:
        parameter.grad *= min(1.0, CLIP / (norm + 1e-6))


@pytest.fixture(scope="module", params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    """Of the case."""
    return request.param


@pytest.fixture(scope="module")
def expected(name: str, shapes: Path) -> list[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Tensor, "float", precise.float_or_double)
        case = CASES[name]
        return Halves(case, store_of(shapes, "train", case.task)).train()


# --- training


def test_two_ranks_update_at_the_same_steps(ranks: Ranks, name: str, expected) -> None:
    steps = [state["done"] for state in expected]
    assert steps[-1] == STEPS
    assert len(steps) == (10 if CASES[name].accumulate == 1 else 6)
    for result in ranks.results:
        assert [state["done"] for state in result["train"][name]] == steps


def test_two_ranks_train_as_one_process_that_does_both_halves(
    ranks: Ranks, name: str, expected
) -> None:
    for update, state in enumerate(expected):
        limit = 1e-6 if update else 1e-9  # absolute, on weights of about 0.1
        mine = ranks.results[0]["train"][name][update]["weights"]
        for key, value in mine.items():
            message = f"{key} at step {state['done']}"
            torch.testing.assert_close(
                value, state["weights"][key], atol=limit, rtol=limit, msg=message
            )


def test_losses_are_logged_as_the_mean_over_the_ranks(ranks: Ranks, name: str, expected) -> None:
    """For `notes` that is the value on the global batch."""
    one, other = (result["train"][name] for result in ranks.results)
    for mine, theirs, state in zip(one, other, expected, strict=True):
        assert mine["sums"] == pytest.approx(state["sums"], rel=1e-5)
        assert mine["sums"] == theirs["sums"]


def test_the_statistics_of_rank_1_are_those_of_its_own_half(
    ranks: Ranks, name: str, expected
) -> None:
    for state, theirs in zip(expected, ranks.results[1]["train"][name], strict=True):
        for key, value in state["other"].items():
            torch.testing.assert_close(theirs["weights"][key], value, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_ranks_end_with_the_same_bits_but_for_the_statistics(ranks: Ranks, name: str) -> None:
    one, other = (result["train"][name][-1]["weights"] for result in ranks.results)
    differ = [key for key in one if not torch.equal(one[key], other[key])]
    assert differ
    assert all(key.endswith(("running_mean", "running_var")) for key in differ)


def test_distillation_moves_the_student_and_the_align_modules(ranks: Ranks) -> None:
    """So that the comparison compares something."""
    for name, layer in {"notes": "model.6.cv1.conv", "masks": "steps.0.0"}.items():
        states = ranks.results[0]["train"][name]
        first = states[0]["weights"]
        last = states[-1]["weights"]
        for key in ("distillation align.layers.0.0.weight", f"student {layer}.weight"):
            assert (first[key] - last[key]).abs().max() > 1e-5


def test_ranks_ignore_regions(ranks: Ranks) -> None:
    """So that the comparison compares something."""
    for result in ranks.results:
        names = ("ignored regions, accumulated", "notes, accumulated")
        ignoring, plain = (result["train"][name][0]["sums"] for name in names)
        assert ignoring["cls"] < plain["cls"]
        assert ignoring["box"] == plain["box"]


def test_a_signal_to_one_rank_stops_all_at_the_same_step(ranks: Ranks) -> None:
    assert [result["stopped"] for result in ranks.results] == [[10, 15], [10, 15]]


# --- evaluation


@pytest.mark.parametrize(("batch", "batches"), [(6, [2, 1]), (4, [2, 2]), (16, [1, 0])])
def test_scores_of_two_ranks_are_those_of_one_and_no_image_counts_twice(
    ranks: Ranks, shapes: Path, batch: int, batches: list[int]
) -> None:
    """8 images in an odd number of batches, an even one, and in fewer than ranks."""
    alone = evaluate(store_of(shapes, "val"), batch // 2)  # as many images at a time
    assert [image for image, _ in alone["updates"]] == [f"shapes/{i:06}" for i in range(24, 32)]
    assert sum(len(detected["scores"]) for _, detected in alone["updates"]) > 20
    for rank, result in enumerate(ranks.results):
        together = result["evaluate"][batch]
        assert together["batches"] == batches[rank]
        assert together["scores"] == alone["scores"]
        pairs = zip(together["updates"], alone["updates"], strict=True)
        for (image, detected), (same_image, expected) in pairs:
            assert image == same_image
            for key, value in expected.items():
                assert torch.equal(detected[key], value)


@pytest.mark.parametrize(("batch", "batches"), [(6, [2, 1]), (4, [2, 2]), (16, [1, 0])])
def test_pixels_of_two_ranks_are_counted_as_those_of_one(
    ranks: Ranks, shapes: Path, batch: int, batches: list[int]
) -> None:
    alone = evaluate_masks(store_of(shapes, "val", SEGMENTATION), batch // 2)
    assert alone["counted"][:, :-1].sum() > 8 * 50 * 50  # of 8 images of about 64 x 64
    for rank, result in enumerate(ranks.results):
        together = result["evaluate masks"][batch]
        assert together["batches"] == batches[rank]
        assert together["scores"] == alone["scores"]
        assert torch.equal(together["counted"], alone["counted"])


# --- scales


@pytest.fixture(scope="module")
def whole(ranks: Ranks) -> dict[str, Tensor]:
    """The gradients of the same updates in one process, in one batch."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "rand_like", splits.same_mask)
        patched.setattr(Tensor, "float", precise.float_or_double)
        return splits.among_ranks(whole=True)


def test_updates_of_two_ranks_see_what_one_batch_does(ranks: Ranks, whole) -> None:
    for result in ranks.results:
        assert result["splits"].keys() == whole.keys()
        for name, gradient in result["splits"].items():
            apart = (gradient - whole[name]).norm() / whole[name].norm()
            assert apart < 1e-6, name


# --- messages between ranks


@pytest.mark.parametrize("rank", [0, 1])
def test_gradients_that_only_one_rank_has_are_averaged_with_0(ranks: Ranks, rank: int) -> None:
    both, one, none, fixed = ranks.results[rank]["uneven"]["gradients"]
    assert both.tolist() == [1.5, 3.0]
    assert one.tolist() == [1.5, 2.5]
    assert none.tolist() == [0, 0]
    assert fixed is None


@pytest.mark.parametrize("rank", [0, 1])
def test_what_only_one_rank_has_is_shared(ranks: Ranks, rank: int) -> None:
    uneven = ranks.results[rank]["uneven"]
    assert uneven["dealt"] == [0, 1, 2, 4]
    assert uneven["largest"] == 9
    assert uneven["broadcast"].tolist() == [7]


def test_rank_0_speaks_for_all(ranks: Ranks) -> None:
    assert ranks.stdout.strip().splitlines()[-1] == "only rank 0 speaks"
    assert "only rank 1" not in ranks.stdout


# --- what each has read


def test_ranks_that_have_read_other_data_all_stop_with_its_number(ranks: Ranks) -> None:
    for result in ranks.results:
        assert result["read"][24] == ""
        one = "data.train, image '000023' on rank 0 there, on rank 1 not there"
        assert f"have not read the same: {one}; give all" in result["read"][23]
        assert (
            "image '000022' on rank 0 there, on rank 1 not there; and 1 more"
            in (result["read"][20])
        )


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("cuda", ("nccl", torch.device("cuda", 1))),
        ("cpu", ("gloo", None)),
    ],
)
def test_nccl_is_told_the_card_of_its_rank(
    monkeypatch: pytest.MonkeyPatch, kind: str, expected
) -> None:
    """Without it a barrier would guess one."""
    met = []
    current = []

    def meet(backend: str, timeout: Any, device_id: Any = None) -> None:
        met.append((backend, device_id))

    monkeypatch.setattr(distributed, "launched", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", meet)
    monkeypatch.setattr(torch.distributed, "new_group", lambda **_: None)
    card = distributed.start(torch.device(kind), timeout=1)
    assert met == [expected]
    assert card == (expected[1] or torch.device("cpu"))
    assert current == ([card] if kind == "cuda" else [])
