"""The distillation of one step: a teacher frozen by structure, alignment, terms with weight and
schedule, distances.
"""

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdmini.contracts import Targets, UserError, View
from kdmini.detection.yolo11.model import YOLO11
from kdmini.distill.align import Align
from kdmini.distill.attention import AttentionTransfer, map_distance
from kdmini.distill.step import Distillation, Weighted, freeze, tap_shapes

TAPS = {"stem": "stem", "deep": "deep"}
FOREVER = ((0.0, 1.0, float("inf"), 1.0),)
NO_TARGETS: Any = {}


class Small(nn.Module):
    """A detector that counts how often it is run. It has BatchNorm, and no `fold`."""

    def __init__(self, width: int, names: tuple[str, ...] = ("cat", "dog")):
        super().__init__()
        self.names = list(names)
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(width, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Conv2d(8, 4, 1)
        self.runs = {"forward": 0, "features": 0}

    def forward(self, images: Tensor) -> Tensor:
        self.runs["forward"] += 1
        return self.head(self.deep(self.stem(images)))

    def features(self, images: Tensor) -> None:
        self.runs["features"] += 1
        self.deep(self.stem(images))


class Probe(nn.Module):
    """A term that notes what it sees and returns its one parameter."""

    def __init__(self, value: float = 1.0, uses: frozenset[str] = frozenset({"feats"})):
        super().__init__()
        self.uses = uses
        self.value = nn.Parameter(torch.tensor(value))
        self.seen: list[tuple[View, View | None, Targets]] = []

    def forward(self, student: View, teacher: View | None, targets: Targets) -> Tensor:
        self.seen.append((student, teacher, targets))
        return self.value * 1


def pair(**changes: Any) -> tuple[Small, Small]:
    torch.manual_seed(0)
    student, teacher = Small(4), Small(6, **changes)
    teacher.train()(torch.rand(8, 3, 16, 16))  # moves the BatchNorm statistics
    teacher.runs["forward"] = 0
    return student, teacher


def distil(
    student: Any, teacher: Any, terms: Mapping[str, Any], taps: Any = TAPS, **settings: Any
) -> Distillation:
    shapes = tap_shapes(student, teacher, taps, 32) if teacher else {}
    if isinstance(teacher, Small):
        teacher.runs["forward"] = 0
    weighted = {
        name: term if isinstance(term, Weighted) else Weighted(term, 1.0)
        for name, term in terms.items()
    }
    return Distillation(student, teacher, weighted, taps, shapes, **settings)


def images(count: int = 2, seed: int = 1) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


# --- the teacher


def test_the_teacher_is_in_no_optimiser_and_no_checkpoint() -> None:
    student, teacher = pair()
    distillation = distil(student, teacher, {"attention": AttentionTransfer(), "probe": Probe()})
    ours = {id(p) for p in distillation.parameters()}
    assert ours == {
        id(p) for m in (distillation.align, *distillation.terms.values()) for p in m.parameters()
    }
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in student.parameters())
    assert teacher not in set(distillation.modules()) and student not in set(distillation.modules())
    assert {key.split(".")[0] for key in distillation.state_dict()} == {"align", "terms"}


def test_training_leaves_the_teacher_bit_identical() -> None:
    student, teacher = pair()
    before = copy.deepcopy(teacher.state_dict())
    distillation = distil(student, teacher, {"attention": AttentionTransfer("sample")})
    optimizer = torch.optim.SGD(
        [*student.parameters(), *distillation.parameters()], 0.1, weight_decay=0.1
    )
    student_before = copy.deepcopy(student.state_dict())
    for step in range(3):
        student.train()
        distillation.train()
        preds = student(images(seed=step))
        loss = sum(distillation(images(seed=step), preds, NO_TARGETS, 0).values())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        optimizer.step()
    assert not any(module.training for module in teacher.modules())
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert not torch.equal(student.stem[0].weight, student_before["stem.0.weight"])


def test_the_teacher_rests_where_lambda_is_zero() -> None:
    student, teacher = pair()
    term = Weighted(AttentionTransfer(), 1.0, [[0, 1.0, 2, 0.5], [4, 1.0, 6, 1.0]])
    distillation = distil(student, teacher, {"attention": term})
    names = []
    for epoch in range(7):
        found = distillation(images(), student(images()), NO_TARGETS, epoch)
        names.append(list(found))
        assert not distillation.student_taps._feats  # a resting step holds no maps either
    assert names == [["attention"], ["attention"], [], [], ["attention"], ["attention"], []]
    assert teacher.runs == {"forward": 0, "features": 4}


def test_weight_zero_rests_too() -> None:
    student, teacher = pair()
    distillation = distil(student, teacher, {"attention": Weighted(AttentionTransfer(), 0.0)})
    assert distillation(images(), student(images()), NO_TARGETS, 0) == {}
    assert teacher.runs == {"forward": 0, "features": 0}


@pytest.mark.parametrize(
    "uses, head", [({"feats"}, False), ({"preds"}, True), ({"feats", "preds"}, True)]
)
def test_the_teachers_head_runs_only_for_a_term_that_reads_preds(
    uses: set[str], head: bool
) -> None:
    student, teacher = pair()
    other, probe = Probe(), Probe(uses=frozenset(uses))
    distillation = distil(student, teacher, {"other": other, "probe": probe})
    preds = student(images())
    distillation(images(), preds, NO_TARGETS, 0)
    assert teacher.runs == {"forward": int(head), "features": int(not head)}
    ((ours, theirs, _),) = probe.seen
    assert theirs is not None and ours.preds is preds
    assert torch.equal(theirs.preds, teacher(images())) if head else theirs.preds is None


def test_a_teacher_without_features_is_run_whole() -> None:
    student, teacher = pair()
    plain = nn.Sequential(teacher.stem, teacher.deep)
    probe = Probe()
    distillation = distil(student, plain, {"probe": probe}, taps={"stem": "0", "deep": "1"})
    distillation(images(), student(images()), NO_TARGETS, 0)
    assert set(probe.seen[0][1].feats) == {"stem", "deep"}  # type: ignore[union-attr]


def test_other_classes_serve_feature_terms_alone() -> None:
    student, teacher = pair(names=("dog", "cat"))
    distillation = distil(student, teacher, {"probe": Probe()})
    assert distillation(images(), student(images()), NO_TARGETS, 0)
    with pytest.raises(UserError, match="needs a teacher with the student's classes"):
        distil(student, teacher, {"probe": Probe(uses=frozenset({"preds"}))})


def test_both_networks_see_the_same_and_the_teachers_maps_carry_no_gradient() -> None:
    student, teacher = pair()
    probe = Probe()
    distillation = distil(student, teacher, {"probe": probe}, align="none")
    batch, targets = images(), {"labels": torch.zeros(2, 1)}
    student(images(seed=5))  # a pass that nobody asked about
    preds = student(batch)
    distillation(batch, preds, targets, 0)
    ((ours, theirs, given),) = probe.seen
    assert theirs is not None
    assert ours.images is batch and theirs.images is batch and given is targets
    assert torch.equal(ours.feats["stem"], student.stem(batch)) and ours.feats["stem"].requires_grad
    assert torch.equal(theirs.feats["deep"], teacher.deep(teacher.stem(batch)))
    assert not theirs.feats["stem"].requires_grad and not theirs.feats["deep"].requires_grad
    differentiable = images().requires_grad_()
    distillation(differentiable, student(differentiable), targets, 0)
    assert not probe.seen[1][1].feats["stem"].requires_grad  # type: ignore[union-attr]


def test_taps_may_be_named_otherwise_in_the_teacher() -> None:
    student, teacher = pair()
    probe = Probe()
    distillation = distil(
        student, teacher, {"probe": probe}, taps={"stem": "stem.0", "deep.1": "deep"}
    )
    distillation(images(), student(images()), NO_TARGETS, 0)
    ((ours, theirs, _),) = probe.seen
    assert theirs is not None
    assert list(ours.feats) == list(theirs.feats) == ["stem", "deep.1"]
    assert torch.equal(theirs.feats["stem"], teacher.stem[0](images()))


def test_without_a_teacher_a_term_sees_the_student_alone() -> None:
    student, _ = pair()
    probe = Probe(3.0)
    distillation = distil(student, None, {"probe": Weighted(probe, 2.0)})
    assert distillation(images(), student(images()), NO_TARGETS, 0)["probe"].item() == 6
    ((ours, theirs, _),) = probe.seen
    assert theirs is None and ours.feats["stem"].shape[1] == 4
    assert distillation.distances(student, images()) == {}


def test_nothing_to_distil_is_nothing() -> None:
    student, _ = pair()
    distillation = distil(student, None, {}, taps={})
    assert distillation(images(), student(images()), NO_TARGETS, 0) == {}
    assert not list(distillation.parameters())


# --- terms


def test_terms_are_weighted_and_scheduled_each() -> None:
    student, teacher = pair()
    terms = {
        "early": Weighted(Probe(2.0), 0.75, [[0, 2.0, 4, 0.0]]),
        "late": Weighted(Probe(3.0), 10.0, [[2, 0.5, float("inf"), 0.5]]),
        "always": Weighted(Probe(5.0), 0.1),
    }
    distillation = distil(student, teacher, terms)
    found = []
    for epoch in (0, 2, 4):
        losses = distillation(images(), student(images()), NO_TARGETS, epoch)
        found.append({name: round(value.item(), 6) for name, value in losses.items()})
    assert found == [
        {"early": 3.0, "always": 0.5},
        {"early": 1.5, "late": 15.0, "always": 0.5},
        {"late": 15.0, "always": 0.5},
    ]
    assert distillation.lambdas(2) == {"early": 1.0, "late": 0.5, "always": 1.0}
    assert len(terms["early"].term.seen) == 2  # type: ignore[attr-defined]  # a term of weight 0 is not run
    assert teacher.runs["features"] == 3  # once a step, however many terms


def test_a_terms_parameters_learn_and_are_saved() -> None:
    student, teacher = pair()
    probe = Probe()
    distillation = distil(student, teacher, {"probe": Weighted(probe, 0.5, [[0, 3.0, 9, 3.0]])})
    distillation(images(), student(images()), NO_TARGETS, 0)["probe"].backward()
    assert probe.value.grad is not None and probe.value.grad.item() == 1.5
    assert distillation.state_dict()["terms.probe.value"] == 1


def test_a_malformed_schedule_is_refused() -> None:
    student, teacher = pair()
    with pytest.raises(UserError, match="schedule"):
        distil(
            student,
            teacher,
            {"probe": Weighted(Probe(), 1.0, [[0, 1.0, 9, 0.0], [5, 1.0, 20, 0.0]])},
        )


def test_the_terms_value_is_that_of_the_aligned_maps() -> None:
    student, teacher = pair()
    distillation = distil(
        student,
        teacher,
        {"attention": Weighted(AttentionTransfer("sample"), 0.75, [[0, 2.0, 1, 2.0]])},
    )
    student.eval()
    distillation.eval()
    found = distillation(images(), student(images()), NO_TARGETS, 0)["attention"]
    with torch.no_grad():
        expected: Any = 0
        ours, theirs = student.stem(images()), teacher.stem(images())
        for layer, deep in zip(distillation.align.layers, (False, True), strict=True):
            if deep:
                ours, theirs = student.deep(ours), teacher.deep(theirs)
            expected += 0.75 * 2 * map_distance(layer(ours), theirs).mean()
    assert found.item() == pytest.approx(expected.item())


# --- alignment

SHAPES = {"a": (4, 6, 5, 5), "b.0": (8, 8, 3, 3)}


def feats(count: int = 4) -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {tap: torch.randn(count, cs, h, w) for tap, (cs, _, h, w) in SHAPES.items()}


@pytest.mark.parametrize(
    "mode, weights, learn",
    [
        ("all", [24, 64], True),
        ("unequal", [24], True),
        ("none", [], False),
        ("frozen", [24, 64], False),
    ],
)
def test_which_parameters_an_alignment_has(mode: Any, weights: list[int], learn: bool) -> None:
    align = Align(SHAPES, mode)
    assert [p.numel() for p in align.parameters()] == weights
    assert all(p.requires_grad == learn for p in align.parameters())
    norms = [m for m in align.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == len(weights) and not any(m.affine for m in norms)
    assert all(m.bias is None for m in align.modules() if isinstance(m, nn.Conv2d))
    found = align(feats())
    assert {tap: f.shape[1] for tap, f in found.items()} == {
        "a": 4 if mode == "none" else 6,
        "b.0": 8,
    }
    if mode in ("none", "unequal"):
        assert torch.equal(found["b.0"], feats()["b.0"])


def test_alignment_of_all_is_the_default() -> None:
    student, teacher = pair()
    assert (
        len(list(Align(SHAPES).parameters()))
        == len(list(distil(student, teacher, {}).align.parameters()))
        == 2
    )


def test_alignment_is_a_1x1_convolution_and_batchnorm() -> None:
    align, given = Align(SHAPES), feats()
    found = align(given)
    for (tap, f), layer in zip(found.items(), align.layers, strict=True):
        mixed = torch.einsum("nchw,oc->nohw", given[tap], layer[0].weight[:, :, 0, 0])
        mean, var = (
            mixed.mean((0, 2, 3), keepdim=True),
            mixed.var((0, 2, 3), keepdim=True, unbiased=False),
        )
        assert torch.allclose(f, (mixed - mean) / (var + 1e-5).sqrt(), atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_a_bias_would_be_inert(training: bool) -> None:
    align, given = Align(SHAPES), feats()
    with_bias = copy.deepcopy(align)
    for layer, (cs, ct, _, _) in zip(with_bias.layers, SHAPES.values(), strict=True):
        conv = nn.Conv2d(cs, ct, 1, bias=True)
        conv.weight = layer[0].weight
        layer[0] = conv
    for m in (align, with_bias):
        for norm in (layer[1] for layer in m.layers):
            norm.momentum = 1.0  # so that one step is all that the running mean knows
        m.train()(given)
        m.train(training)
    found, biased = align(given), with_bias(given)
    assert all(torch.allclose(found[tap], biased[tap], atol=1e-5) for tap in SHAPES)


@pytest.mark.parametrize("reduction", ["notes", "sample", "mean_square"])
def test_gradient_reaches_the_alignment_and_the_student_but_not_its_head(reduction: Any) -> None:
    student, teacher = pair()
    distillation = distil(student, teacher, {"attention": AttentionTransfer(reduction)})
    distillation(images(4), student.train()(images(4)), NO_TARGETS, 0)["attention"].backward()
    assert all(p.grad is not None and p.grad.any() for p in distillation.parameters())
    assert student.deep[0].weight.grad.any() and student.stem[0].weight.grad.any()
    assert student.head.weight.grad is None
    assert all(p.grad is None for p in teacher.parameters())


def test_a_frozen_alignment_stays_as_initialised() -> None:
    student, teacher = pair()
    distillation = distil(student, teacher, {"attention": AttentionTransfer()}, align="frozen")
    distillation(images(4), student(images(4)), NO_TARGETS, 0)["attention"].backward()
    assert all(p.grad is None for p in distillation.parameters())
    assert student.stem[0].weight.grad.any()


def test_taps_that_cannot_be_aligned_are_refused() -> None:
    with pytest.raises(KeyError):
        Align(SHAPES)({"a": feats()["a"]})


# --- distances


def test_distances_are_sums_of_map_distances_with_and_without_alignment() -> None:
    student, teacher = pair()
    distillation = distil(
        student, teacher, {"attention": Weighted(AttentionTransfer(), 0.75, [[5, 1.0, 9, 1.0]])}
    )
    student.eval()
    distillation.eval()
    found = distillation.distances(student, images(3))
    assert list(found) == ["aligned", "aligned/stem", "aligned/deep", "raw", "raw/stem", "raw/deep"]
    for kind in ("aligned", "raw"):
        assert found[kind].item() == pytest.approx(
            (found[f"{kind}/stem"] + found[f"{kind}/deep"]).item()
        )
    ours, theirs = student.stem(images(3)), teacher.stem(images(3))
    assert found["raw/stem"].item() == pytest.approx(map_distance(ours, theirs).sum().item())
    aligned = distillation.align.layers[0](ours)
    assert found["aligned/stem"].item() == pytest.approx(map_distance(aligned, theirs).sum().item())
    assert not any(value.requires_grad for value in found.values())
    halves = [distillation.distances(student, part) for part in images(4).split(2)]
    whole = distillation.distances(student, images(4))
    assert all(
        whole[name].item() == pytest.approx(sum(h[name].item() for h in halves)) for name in whole
    )


def test_the_raw_distance_of_a_network_from_itself_is_zero() -> None:
    student, _ = pair()
    student.eval()
    distillation = distil(student, copy.deepcopy(student), {}).eval()
    found = distillation.distances(student, images())
    assert found["raw/stem"] == 0 and found["raw/deep"] == 0
    assert (
        found["aligned/stem"] > 0 and found["aligned/deep"] > 0
    )  # an alignment at random moves the maps


def test_a_trained_alignment_takes_up_the_loss_in_the_students_place() -> None:
    """Why both distances are logged."""
    student, teacher = pair()
    student.eval().requires_grad_(False)
    distillation = distil(student, teacher, {"attention": AttentionTransfer("sample")})
    start = distillation.distances(student, images(8))
    optimizer = torch.optim.SGD(distillation.parameters(), 1.0)
    for _ in range(30):
        loss = distillation(images(8), student(images(8)), NO_TARGETS, 0)["attention"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    end = distillation.distances(student, images(8))
    assert end["aligned/deep"] < 0.95 * start["aligned/deep"]
    assert end["raw/deep"] == start["raw/deep"]


# --- shapes of taps


def test_tap_shapes_are_both_channels_and_the_common_size() -> None:
    student, teacher = pair()
    before = copy.deepcopy((student.state_dict(), teacher.state_dict()))
    student.train()
    teacher.eval()
    assert tap_shapes(student, teacher, TAPS, 32) == {"stem": (4, 6, 16, 16), "deep": (8, 8, 8, 8)}
    assert student.training and student.stem.training and not teacher.training
    for model, state in zip((student, teacher), before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert not any(module._forward_hooks for module in model.modules())


def test_taps_of_other_sizes_are_refused() -> None:
    student, teacher = pair()
    with pytest.raises(UserError, match="stem is 16x16 in the student, deep is 8x8 in the teacher"):
        tap_shapes(student, teacher, {"deep": "deep", "stem": "deep"}, 32)


def test_a_tap_that_is_not_there_is_refused() -> None:
    student, teacher = pair()
    with pytest.raises(UserError, match="no submodule 'deeep'; did you mean deep"):
        tap_shapes(student, teacher, {"deep": "deeep"}, 32)


# --- the real pair, narrow

NOTES_TAPS = {f"model.{i}": f"model.{i}" for i in (6, 8, 13, 16, 19, 22)}


def real_pair() -> tuple[YOLO11, YOLO11]:
    torch.manual_seed(0)
    return YOLO11(["cat", "dog"], [0.5, 0.0625, 1024]), YOLO11(["cat", "dog"], [0.5, 0.125, 1024])


def test_one_step_of_the_real_pair() -> None:
    student, teacher = real_pair()
    distillation = distil(
        student, teacher, {"attention": Weighted(AttentionTransfer(), 0.75)}, NOTES_TAPS
    )
    assert not any(isinstance(m, nn.BatchNorm2d) for m in teacher.modules())  # folded
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not any(module.training for module in teacher.modules())  # nor those that folding made
    batch = torch.rand(2, 3, 64, 64)
    targets: Any = {
        "boxes_xyxy": torch.tensor([[[8.0, 8, 40, 48]]] * 2),
        "labels": torch.zeros(2, 1, dtype=torch.long),
    }
    preds = student(batch)
    task, kd = student.loss(preds, targets), distillation(batch, preds, targets, 0)
    assert (
        set(task) == {"box", "cls", "dfl"} and set(kd) == {"attention"} and 0 < kd["attention"] < 10
    )
    kd["attention"].backward()
    reached = {
        name.split(".")[1]
        for name, p in student.named_parameters()
        if p.grad is not None and p.grad.any()
    }
    assert reached == {str(i) for i in range(23)} - {
        "11",
        "12",
        "14",
        "15",
        "18",
        "21",
    }  # all but the head


def test_folding_does_not_move_the_teacher() -> None:
    _, teacher = real_pair()
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    twin = copy.deepcopy(teacher).eval()
    distillation = distil(twin, freeze(teacher), {}, NOTES_TAPS, align="none").eval()
    found = distillation.distances(twin, torch.rand(2, 3, 64, 64))
    apart = [value for name, value in found.items() if "/" in name]  # of one tap
    assert len(apart) == 12 and all(value < 1e-4 for value in apart)
