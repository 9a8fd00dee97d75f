"""The teacher: frozen by structure, run no more than it has to, seen by the terms."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from kdmini.assemble import make_distillation
from kdmini.contracts import UserError
from kdmini.distill.attention import AttentionTransfer
from kdmini.distill.step import Weighted
from tests.distill.small import NO_TARGETS, Probe, distil, images, pair

# --- frozen


def test_the_teacher_is_in_no_optimiser_and_no_checkpoint() -> None:
    student, teacher = pair()
    distillation = distil(student, teacher, {"attention": AttentionTransfer(), "probe": Probe()})
    ours = {id(p) for p in distillation.parameters()}
    modules = [distillation.align, *distillation.terms.values()]
    assert ours == {id(p) for module in modules for p in module.parameters()}
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in student.parameters())
    assert not {student, teacher} & set(distillation.modules())
    assert {key.split(".")[0] for key in distillation.state_dict()} == {"align", "terms"}


def test_training_leaves_the_teacher_bit_identical() -> None:
    student, teacher = pair()
    before = copy.deepcopy(teacher.state_dict())
    first = student.stem[0].weight.detach().clone()
    distillation = distil(student, teacher, {"attention": AttentionTransfer("sample")})
    learning = [*student.parameters(), *distillation.parameters()]
    optimizer = torch.optim.SGD(learning, 0.1, weight_decay=0.1)
    for step in range(3):
        student.train()
        distillation.train()
        batch = images(seed=step)
        losses = distillation(batch, student(batch), NO_TARGETS, 0)
        optimizer.zero_grad()
        losses["attention"].backward()
        optimizer.step()
    assert not any(module.training for module in teacher.modules())
    for key, value in teacher.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert not torch.equal(student.stem[0].weight, first)


# --- run no more than it has to be


def test_the_teacher_rests_where_lambda_is_zero() -> None:
    student, teacher = pair()
    term = Weighted(AttentionTransfer(), 1.0, [[0, 1.0, 2, 0.5], [4, 1.0, 6, 1.0]])
    distillation = distil(student, teacher, {"attention": term})
    names = []
    for epoch in range(7):
        losses = distillation(images(), student(images()), NO_TARGETS, epoch)
        names.append(list(losses))
        assert not distillation.student_taps._feats  # a resting step holds no maps either
    active = ["attention"]
    assert names == [active, active, [], [], active, active, []]
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
    probe = Probe(uses=frozenset(uses))
    distillation = distil(student, teacher, {"other": Probe(), "probe": probe})
    preds = student(images())
    distillation(images(), preds, NO_TARGETS, 0)
    assert teacher.runs == {"forward": int(head), "features": int(not head)}
    ((ours, theirs),) = probe.views
    assert ours.preds is preds
    if head:
        assert torch.equal(theirs.preds, teacher(images()))
    else:
        assert theirs.preds is None


def test_a_teacher_without_features_is_run_whole() -> None:
    student, teacher = pair()
    plain = nn.Sequential(teacher.stem, teacher.deep)
    probe = Probe()
    distillation = distil(student, plain, {"probe": probe}, taps={"stem": "0", "deep": "1"})
    distillation(images(), student(images()), NO_TARGETS, 0)
    ((_, theirs),) = probe.views
    assert set(theirs.feats) == {"stem", "deep"}


def test_without_a_teacher_a_term_sees_the_student_alone() -> None:
    student, _ = pair()
    probe = Probe(3.0)
    distillation = distil(student, None, {"probe": Weighted(probe, 2.0)})
    losses = distillation(images(), student(images()), NO_TARGETS, 0)
    assert losses["probe"].item() == 6
    ((ours, theirs),) = probe.views
    assert theirs is None
    assert ours.feats["stem"].shape[1] == 4
    assert distillation.distances(student, images()) == {}


def test_nothing_to_distil_is_nothing() -> None:
    student, _ = pair()
    distillation = distil(student, None, {}, taps={})
    assert distillation(images(), student(images()), NO_TARGETS, 0) == {}
    assert not list(distillation.parameters())


# --- what a term sees


def test_both_networks_see_the_same() -> None:
    student, teacher = pair()
    probe = Probe()
    distillation = distil(student, teacher, {"probe": probe}, align="none")
    batch = images()
    targets: Any = {"labels": torch.zeros(2, 1)}
    student(images(seed=5))  # a pass that nobody asked about
    distillation(batch, student(batch), targets, 0)
    ((ours, theirs),) = probe.views
    assert ours.images is batch
    assert theirs.images is batch
    assert probe.targets[0] is targets
    assert torch.equal(ours.feats["stem"], student.stem(batch))
    assert torch.equal(theirs.feats["deep"], teacher.deep(teacher.stem(batch)))


def test_the_teachers_maps_carry_no_gradient() -> None:
    student, teacher = pair()
    probe = Probe()
    distillation = distil(student, teacher, {"probe": probe}, align="none")
    for batch in (images(), images().requires_grad_()):
        distillation(batch, student(batch), NO_TARGETS, 0)
    for ours, theirs in probe.views:
        assert ours.feats["stem"].requires_grad
        assert not theirs.feats["stem"].requires_grad
        assert not theirs.feats["deep"].requires_grad


def test_taps_may_be_named_otherwise_in_the_teacher() -> None:
    student, teacher = pair()
    probe = Probe()
    taps = {"stem": "stem.0", "deep.1": "deep"}
    distillation = distil(student, teacher, {"probe": probe}, taps=taps)
    distillation(images(), student(images()), NO_TARGETS, 0)
    ((ours, theirs),) = probe.views
    assert list(ours.feats) == ["stem", "deep.1"]
    assert list(theirs.feats) == ["stem", "deep.1"]
    assert torch.equal(theirs.feats["stem"], teacher.stem[0](images()))


@pytest.mark.parametrize("uses", [["feats"], ["preds"], ["feats", "classes"]])
def test_other_classes_serve_feature_terms_alone(uses: list[str]) -> None:
    student, teacher = pair(names=("dog", "cat"))
    probe = {"build": "tests.distill.small:Probe", "uses": uses, "weight": 1.0}
    if uses == ["feats"]:
        distillation = make_distillation(student, teacher, 32, ["stem"], probe=probe)
        assert distillation(images(), student(images()), NO_TARGETS, 0)
        return
    with pytest.raises(UserError, match=r"distill\.probe: needs a teacher with the student's cl"):
        make_distillation(student, teacher, 32, ["stem"], probe=probe)
