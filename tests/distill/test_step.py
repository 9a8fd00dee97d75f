"""The distillation of one step: terms, distances, shapes of taps."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from kdmini.assemble import make_distillation
from kdmini.contracts import UserError
from kdmini.detection.yolo11.model import YOLO11
from kdmini.distill.align import same_size
from kdmini.distill.attention import AttentionTransfer, attention_map, map_distance
from kdmini.distill.step import Weighted, by_level, freeze, tap_shapes
from kdmini.distill.taps import feats_of
from tests.distill.small import NO_TARGETS, TAPS, Probe, Small, distil, images, pair

# --- terms


def test_terms_are_weighted_and_scheduled_each() -> None:
    student, teacher = pair()
    early = Probe(2.0)
    terms = {
        "early": Weighted(early, 0.75, [[0, 2.0, 4, 0.0]]),
        "late": Weighted(Probe(3.0), 10.0, [[2, 0.5, float("inf"), 0.5]]),
        "always": Weighted(Probe(5.0), 0.1),
    }
    distillation = distil(student, teacher, terms)
    rows = []
    for epoch in (0, 2, 4):
        losses = distillation(images(), student(images()), NO_TARGETS, epoch)
        rows.append({name: round(value.item(), 6) for name, value in losses.items()})
    assert rows == [
        {"early": 3.0, "always": 0.5},
        {"early": 1.5, "late": 15.0, "always": 0.5},
        {"late": 15.0, "always": 0.5},
    ]
    assert len(early.views) == 2  # a term of weight 0 is not run
    assert teacher.runs["features"] == 3  # once a step, however many terms


def test_lambdas_and_factors_are_told_by_epoch() -> None:
    student, teacher = pair()
    terms = {
        "early": Weighted(Probe(), 0.75, [[0, 2.0, 4, 0.0]]),
        "late": Weighted(Probe(), 10.0, [[2, 0.5, float("inf"), 0.5]]),
        "always": Weighted(Probe(), 0.1),
    }
    distillation = distil(student, teacher, terms)
    assert distillation.lambdas(2) == {"early": 1.0, "late": 0.5, "always": 1.0}
    assert distillation.factors(2) == {"early": 0.75, "late": 5.0, "always": 0.1}


def test_a_terms_parameters_learn_and_are_saved() -> None:
    student, teacher = pair()
    probe = Probe()
    distillation = distil(student, teacher, {"probe": Weighted(probe, 0.5, [[0, 3.0, 9, 3.0]])})
    distillation(images(), student(images()), NO_TARGETS, 0)["probe"].backward()
    assert probe.value.grad.item() == 1.5
    assert distillation.state_dict()["terms.probe.value"] == 1


def test_a_malformed_schedule_is_refused() -> None:
    student, teacher = pair()
    overlapping = [[0, 1.0, 9, 0.0], [5, 1.0, 20, 0.0]]
    with pytest.raises(UserError, match="schedule"):
        distil(student, teacher, {"probe": Weighted(Probe(), 1.0, overlapping)})


def test_the_terms_value_is_that_of_the_aligned_maps() -> None:
    student, teacher = pair()
    term = Weighted(AttentionTransfer("sample"), 0.75, [[0, 2.0, 1, 2.0]])
    distillation = distil(student, teacher, {"attention": term})
    student.eval()
    distillation.eval()
    loss = distillation(images(), student(images()), NO_TARGETS, 0)["attention"]

    align_stem, align_deep = distillation.align.layers
    with torch.no_grad():
        stem = student.stem(images())
        teacher_stem = teacher.stem(images())
        at_stem = map_distance(align_stem(stem), teacher_stem)
        at_deep = map_distance(align_deep(student.deep(stem)), teacher.deep(teacher_stem))
    expected = 0.75 * 2 * (at_stem.mean() + at_deep.mean())
    assert loss.item() == pytest.approx(expected.item())


@pytest.mark.parametrize("reduction", ["notes", "sample", "mean_square"])
def test_gradient_reaches_the_alignment_and_the_student_but_not_its_head(reduction: Any) -> None:
    student, teacher = pair()
    distillation = distil(student, teacher, {"attention": AttentionTransfer(reduction)})
    preds = student.train()(images(4))
    distillation(images(4), preds, NO_TARGETS, 0)["attention"].backward()
    for parameter in distillation.parameters():
        assert parameter.grad.any()
    assert student.deep[0].weight.grad.any()
    assert student.stem[0].weight.grad.any()
    assert student.head.weight.grad is None
    assert all(p.grad is None for p in teacher.parameters())


def test_a_frozen_alignment_stays_as_initialised() -> None:
    student, teacher = pair()
    distillation = distil(student, teacher, {"attention": AttentionTransfer()}, align="frozen")
    distillation(images(4), student(images(4)), NO_TARGETS, 0)["attention"].backward()
    assert all(p.grad is None for p in distillation.parameters())
    assert student.stem[0].weight.grad.any()


# --- distances


def test_distances_are_those_of_the_maps_with_and_without_alignment() -> None:
    student, teacher = pair()
    resting = Weighted(AttentionTransfer(), 0.75, [[5, 1.0, 9, 1.0]])
    distillation = distil(student, teacher, {"attention": resting})
    student.eval()
    distillation.eval()
    distances = distillation.distances(student, images(3))
    assert not any(value.requires_grad for value in distances.values())

    ours = student.stem(images(3))
    theirs = teacher.stem(images(3))
    raw = map_distance(ours, theirs).sum().item()
    aligned = map_distance(distillation.align.layers[0](ours), theirs).sum().item()
    assert distances["raw/stem"].item() == pytest.approx(raw)
    assert distances["aligned/stem"].item() == pytest.approx(aligned)


@pytest.mark.parametrize("factor", [1e-6, 1e-3, 1e3])
def test_logged_distances_do_not_see_how_strongly_a_student_fires(factor: float) -> None:
    """An untrained student's features are so weak that eps would outweigh them, and its
    distance be 1 whatever the teacher.
    """
    student, teacher = pair()
    distillation = distil(student.eval(), teacher, {}).eval()
    before = distillation.distances(student, images(3))
    norm = student.deep[1]
    with torch.no_grad():  # a ReLU follows
        norm.weight.mul_(factor)
        norm.bias.mul_(factor)
    after = distillation.distances(student, images(3))
    for name, value in before.items():
        assert after[name].item() == pytest.approx(value.item(), rel=1e-4), name


@pytest.mark.parametrize("kind", ["aligned", "raw"])
def test_distances_are_summed_over_the_taps(kind: str) -> None:
    student, teacher = pair()
    distances = distil(student.eval(), teacher, {}).eval().distances(student, images(3))
    assert list(distances) == [
        "aligned",
        "aligned/stem",
        "aligned/deep",
        "raw",
        "raw/stem",
        "raw/deep",
        "rolled",
        "constant",
    ]
    total = distances[f"{kind}/stem"] + distances[f"{kind}/deep"]
    assert distances[kind].item() == pytest.approx(total.item())


def test_distances_are_summed_over_the_images() -> None:
    student, teacher = pair()
    distillation = distil(student.eval(), teacher, {}).eval()
    first, second = (distillation.distances(student, half) for half in images(4).split(2))
    whole = distillation.distances(student, images(4))
    del whole["rolled"]  # an image's neighbour is another one
    for name, value in whole.items():
        assert value.item() == pytest.approx((first[name] + second[name]).item())


def test_the_distance_to_the_maps_of_another_image_and_of_an_even_map_to_the_teachers() -> None:
    student, teacher = pair()
    student.eval()
    distances = distil(student, teacher, {}).eval().distances(student, images(3))
    ours = feats_of(student, TAPS, images(3))
    theirs = feats_of(teacher, TAPS, images(3))
    rolled = torch.zeros(())
    constant = torch.zeros(())
    for tap in TAPS:
        goal = attention_map(theirs[tap])
        to_other = attention_map(ours[tap]) - goal[[2, 0, 1]]
        from_even = goal - goal[0].numel() ** -0.5
        rolled += to_other.flatten(1).norm(dim=1).sum()
        constant += from_even.flatten(1).norm(dim=1).sum()
    assert distances["rolled"].item() == pytest.approx(rolled.item())
    assert distances["constant"].item() == pytest.approx(constant.item())


def test_one_image_alone_has_no_other() -> None:
    student, teacher = pair()
    distances = distil(student.eval(), teacher, {}).eval().distances(student, images(1))
    assert "rolled" not in distances
    assert "constant" in distances


def test_the_raw_distance_of_a_network_from_itself_is_zero() -> None:
    student, _ = pair()
    student.eval()
    distances = distil(student, copy.deepcopy(student), {}).eval().distances(student, images())
    for tap in TAPS:
        assert distances[f"raw/{tap}"] == 0
        assert distances[f"aligned/{tap}"] > 0  # an alignment at random moves the maps


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
    shapes = tap_shapes(*pair(), TAPS, 32)
    assert shapes == {"stem": (4, 6, 16, 16), "deep": (8, 8, 8, 8)}


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("training", [True, False])
def test_asking_for_shapes_leaves_the_networks_as_they_were(who: int, training: bool) -> None:
    student, teacher = pair()
    network = (student, teacher)[who].train(training)
    before = copy.deepcopy(network.state_dict())
    tap_shapes(student, teacher, TAPS, 32)
    assert network.training == training
    assert network.stem.training == training
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key])
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize("taps", [{"stem": "deep"}, {"deep": "stem"}])
def test_the_larger_map_of_a_tap_is_averaged_to_the_smaller(taps, capsys) -> None:
    """Whichever it is, and at another image size alike."""
    student, teacher = pair()
    shapes = tap_shapes(student, teacher, taps, 32)
    ((tap, (_, _, *size)),) = shapes.items()
    whose = "student" if tap == "stem" else "teacher"
    assert size == [8, 8]
    assert f"the {whose}'s map of {tap} is averaged to 8x8" in capsys.readouterr().out

    seen = {}

    class Look(Probe):
        def forward(self, student, teacher, targets):
            seen[tap] = (student.feats[tap], teacher.feats[tap])
            return super().forward(student, teacher, targets)

    distillation = distil(student, teacher, {"look": Look()}, taps=taps, align="none")
    for side in (32, 64):
        batch = torch.rand(2, 3, side, side)
        maps = {"stem": student.stem(batch), "deep": student.deep(student.stem(batch))}
        distillation(batch, student(batch), NO_TARGETS, 0)
        ours, theirs = seen[tap]
        assert ours.shape[2:] == theirs.shape[2:] == (side // 4, side // 4)
        if tap == "stem":
            blocks = maps["stem"].unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
            assert torch.allclose(ours, blocks, atol=1e-6)
        else:
            assert torch.equal(ours, maps["deep"])


def test_maps_that_are_no_multiples_are_refused() -> None:
    maps = {"tap": torch.ones(1, 2, 6, 6)}
    with pytest.raises(UserError, match="tap is 6x6 in the student, 4x4 in the teacher; pair"):
        same_size(maps, {"tap": torch.ones(1, 2, 4, 4)})


@pytest.mark.parametrize("levels", [(3, 1), (1, 3)])
def test_a_teacher_of_other_levels_is_refused(levels: tuple[int, int]) -> None:
    ours, theirs = (by_level([torch.ones(1, 2, 4, 4)] * count) for count in levels)
    words = rf"student has {levels[0]} maps \(.*class map 0.*teacher {levels[1]} \(.*; name a"
    with pytest.raises(UserError, match=words):
        same_size(ours, theirs)


class Attentive(Small):
    """Its `graph` gives weights between the 64 positions of `deep`, two heads of them."""

    def __init__(self, width: int):
        super().__init__(width)
        self.graph = nn.Identity()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        deep = self.deep(self.stem(images))
        tokens = deep.flatten(2).unflatten(1, (2, 4))  # (N, 2, 4, 64)
        self.graph((tokens.mT @ tokens).softmax(3))
        return self.head(deep)

    features = forward  # type: ignore[assignment]


@pytest.mark.parametrize("name", ["deep", "graph"])
def test_a_graph_of_the_teachers_reaches_the_terms_as_it_is(name: str, capsys) -> None:
    """And what the student has there, neither aligned nor resized; the maps are as ever."""
    torch.manual_seed(0)
    student = Attentive(4)
    teacher = Attentive(6)
    taps = {"stem": "stem", name: "graph"}
    shapes = tap_shapes(student, teacher, taps, 32)
    graph_shape = (8, 2, 8, 8) if name == "deep" else (2, 2, 64, 64)
    assert shapes == {"stem": (4, 6, 16, 16), name: graph_shape}
    assert "averaged" not in capsys.readouterr().out

    probe = Probe()
    section = {"build": "tests.distill.test_step:Shapes", "weight": 1.0}
    pairs = [(ours, theirs) for ours, theirs in taps.items()]
    distillation = make_distillation(student, teacher, 32, pairs, term=section)
    term = distillation.terms["term"]
    assert term.shapes == {"stem": (4, 6, 16, 16)}
    assert term.graphs == {name: graph_shape}
    distillation.terms["term"] = probe
    preds = student(images())
    distillation(images(), preds, NO_TARGETS, 0)
    ours, theirs = probe.views[0]
    assert list(ours.feats) == list(theirs.feats) == ["stem"]
    assert ours.feats["stem"].shape == theirs.feats["stem"].shape == (2, 6, 16, 16)
    assert theirs.graphs[name].shape == (2, 2, 64, 64)
    expected = feats_of(student.train(), [name], images())[name].shape
    assert ours.graphs[name].shape == expected
    assert ours.graphs[name].requires_grad

    student.eval()
    distances = distillation.distances(student, images())
    named = {"aligned", "aligned/stem", "raw", "raw/stem", "rolled", "constant"}
    assert distances.keys() == named


class Shapes(nn.Module):
    """A term that notes what it is told of the taps."""

    uses = frozenset({"feats"})

    def __init__(self, shapes: Any, graphs: Any):
        super().__init__()
        self.shapes = shapes
        self.graphs = graphs


def test_taps_that_are_graphs_alone_have_no_distances() -> None:
    torch.manual_seed(0)
    student = Attentive(4)
    distillation = make_distillation(student, Attentive(6), 32, [("deep", "graph")])
    assert distillation.distances(student.eval(), images()) == {}


def test_a_map_does_not_teach_a_graph() -> None:
    words = r"distill\.taps: graph is a graph, and deep of the teacher is none"
    with pytest.raises(UserError, match=words):
        tap_shapes(Attentive(4), Attentive(6), {"graph": "deep"}, 32)


def test_a_tap_that_is_not_there_is_refused() -> None:
    student, teacher = pair()
    with pytest.raises(UserError, match="no submodule 'deeep'; did you mean deep"):
        tap_shapes(student, teacher, {"deep": "deeep"}, 32)


# --- maps of class logits


class Classes(Small):
    """Its class maps are those of its preds, cut in two levels."""

    def class_maps(self, preds):
        return [preds[:, :2], preds[:, 2:]]


def test_a_term_that_reads_class_maps_gets_those_of_both() -> None:
    torch.manual_seed(0)
    student, teacher = Classes(4), Classes(6)
    probe = Probe(uses=frozenset({"classes"}))
    distillation = distil(student, teacher, {"probe": probe}, taps={})
    batch = images()
    preds = student(batch)
    distillation(batch, preds, NO_TARGETS, 0)
    ours, theirs = probe.views[0]
    for level, expected in enumerate(student.class_maps(preds)):
        assert torch.equal(ours.classes[level], expected)
    assert len(theirs.classes) == 2
    assert not theirs.classes[0].requires_grad
    assert teacher.runs == {"forward": 1, "features": 0}
    assert not {student, teacher} & set(distillation.modules())


def test_class_maps_of_unequal_size_are_averaged() -> None:
    class Coarse(Classes):
        def class_maps(self, preds):
            return [nn.functional.avg_pool2d(level, 2) for level in super().class_maps(preds)]

    student, teacher = Classes(4), Coarse(6)
    probe = Probe(uses=frozenset({"classes"}))
    distillation = distil(student, teacher, {"probe": probe}, taps={})
    batch = images()
    preds = student(batch)
    distillation(batch, preds, NO_TARGETS, 0)
    ours, theirs = probe.views[0]
    averaged = nn.functional.avg_pool2d(student.class_maps(preds)[0], 2)
    assert torch.equal(ours.classes[0], averaged)
    assert ours.classes[0].shape == theirs.classes[0].shape


def test_a_network_without_class_maps_is_refused() -> None:
    student, teacher = pair()
    probe = Probe(uses=frozenset({"classes"}))
    with pytest.raises(UserError, match="Small has no class_maps"):
        distil(student, teacher, {"probe": probe}, taps={})


# --- the real pair, narrow

NOTES_TAPS = {f"model.{i}": f"model.{i}" for i in (6, 8, 13, 16, 19, 22)}


@pytest.fixture
def real_pair() -> tuple[YOLO11, YOLO11]:
    torch.manual_seed(0)
    names = ["cat", "dog"]
    return YOLO11(names, [0.5, 0.0625, 1024]), YOLO11(names, [0.5, 0.125, 1024])


def test_a_real_teacher_is_folded_and_frozen_to_the_last_module(real_pair) -> None:
    student, teacher = real_pair
    distil(student, teacher, {"attention": AttentionTransfer()}, NOTES_TAPS)
    modules = list(teacher.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in modules)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not any(module.training for module in modules)  # nor those that folding made


def test_one_step_of_the_real_pair_reaches_all_but_the_head(real_pair) -> None:
    student, teacher = real_pair
    term = Weighted(AttentionTransfer(), 0.75)
    distillation = distil(student, teacher, {"attention": term}, NOTES_TAPS)
    batch = torch.rand(2, 3, 64, 64)
    targets: Any = {
        "boxes_xyxy": torch.tensor([[[8.0, 8, 40, 48]]] * 2),
        "labels": torch.zeros(2, 1, dtype=torch.long),
    }
    preds = student(batch)
    assert set(student.loss(preds, targets)) == {"box", "cls", "dfl"}
    losses = distillation(batch, preds, targets, 0)
    assert set(losses) == {"attention"}
    assert 0 < losses["attention"] < 10

    losses["attention"].backward()
    moved = {n for n, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    layers = {int(name.split(".")[1]) for name in moved}
    without_parameters = {11, 12, 14, 15, 18, 21}
    assert layers == set(range(23)) - without_parameters


def test_folding_does_not_move_the_teacher(real_pair) -> None:
    _, teacher = real_pair
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2)
    twin = copy.deepcopy(teacher).eval()
    distillation = distil(twin, freeze(teacher), {}, NOTES_TAPS, align="none").eval()
    distances = distillation.distances(twin, torch.rand(2, 3, 64, 64))
    of_taps = [value for name, value in distances.items() if "/" in name]
    assert len(of_taps) == 2 * len(NOTES_TAPS)
    assert max(of_taps) < 1e-4
