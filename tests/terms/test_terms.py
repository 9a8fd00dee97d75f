"""The terms that are a line of algebra, each against its equation in loops, in float64."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdmini.contracts import UserError, View
from kdmini.distill.attention import AttentionTransfer
from kdmini.terms.centred import CentredAttention, centred
from kdmini.terms.channelwise import ChannelWise
from kdmini.terms.cosine import CosineDistance
from kdmini.terms.gradient_weighted import GradientWeighted
from kdmini.terms.localisation import LocalisationDistillation
from kdmini.terms.logits import LogitDistillation
from kdmini.terms.masked import MaskedGeneration
from kdmini.terms.pearson import PearsonDistillation
from kdmini.terms.pixels import PixelRelation
from kdmini.terms.score_weighted import ScoreWeighted
from kdmini.terms.spatial import SpatialImitation
from kdmini.terms.standardised import StandardisedAttention
from tests.terms.equations import (
    BINS,
    CLASSES,
    SHAPES,
    SIZES,
    plain_centred,
    plain_channelwise,
    plain_cosine,
    plain_gradient_weighted,
    plain_localisation,
    plain_logits,
    plain_masked,
    plain_pearson,
    plain_pixels,
    plain_score_weighted,
    plain_spatial,
    plain_standardised,
    random_scene,
)
from tests.terms.views import (
    Scene,
    altered,
    assert_compiled_is_the_same,
    assert_same_gradients,
    edge_case,
    gradients,
    has_no_gradient,
)

NO_TARGETS: Any = {}


def masked(**settings: Any) -> MaskedGeneration:
    torch.manual_seed(11)
    return MaskedGeneration(SHAPES, **settings).double()


class Looking(nn.Module):
    """A teacher of which the head is there, a row for each class at each tap."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(12)
        widths = [channels for _, channels, _, _ in SHAPES.values()]
        self.head = Rows(nn.Conv2d(width, CLASSES, 1, bias=False) for width in widths)

    def class_maps(self, preds: list[Tensor]) -> list[Tensor]:
        return preds


class Rows(nn.ModuleList):
    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return [conv(feat) for conv, feat in zip(self, maps, strict=True)]


MASKED = masked()
LOOKING = Looking().double()
ROWS = [weight.detach().flatten(1) for weight in LOOKING.head.parameters()]
TERMS: dict[str, Any] = {
    "logits": LogitDistillation(),
    "logits softmax": LogitDistillation("softmax", 2.0, 0.5),
    "localisation": LocalisationDistillation(reg_max=BINS),
    "gradient_weighted": GradientWeighted(LOOKING, head="head"),
    "centred": CentredAttention(),
    "channelwise": ChannelWise(),
    "channelwise warm": ChannelWise(3.0),
    "cosine": CosineDistance(),
    "pearson": PearsonDistillation(),
    "pixels": PixelRelation(),
    "spatial": SpatialImitation(),
    "standardised": StandardisedAttention(),
    "standardised p = 4": StandardisedAttention(p=4),
    "score_weighted": ScoreWeighted(),
    "masked": MASKED,
}
EQUATIONS: dict[str, Callable[[Scene], Any]] = {
    "logits": lambda scene: plain_logits(scene, 4, 1, "sigmoid"),
    "logits softmax": lambda scene: plain_logits(scene, 2, 0.5, "softmax"),
    "localisation": lambda scene: plain_localisation(scene, 10),
    "gradient_weighted": lambda scene: plain_gradient_weighted(scene, ROWS),
    "centred": lambda scene: plain_centred(scene, 1e-3),
    "channelwise": lambda scene: plain_channelwise(scene, 1),
    "channelwise warm": lambda scene: plain_channelwise(scene, 3),
    "cosine": plain_cosine,
    "pearson": plain_pearson,
    "pixels": lambda scene: plain_pixels(scene, 0.1),
    "spatial": plain_spatial,
    "standardised": lambda scene: plain_standardised(scene, 2),
    "standardised p = 4": lambda scene: plain_standardised(scene, 4),
    "score_weighted": plain_score_weighted,
    "masked": lambda scene: plain_masked(scene, MASKED),
}
EQUAL_IS_ZERO = [name for name in TERMS if name != "masked"]


def in_float32(name: str) -> Any:
    if name == "masked":
        return masked().float()
    if name == "gradient_weighted":
        return GradientWeighted(Looking(), head="head")
    return TERMS[name]


def value_of(term: Any, scene: Scene) -> Tensor:
    torch.manual_seed(5)  # of the masks
    return term(scene.student, scene.teacher, NO_TARGETS)


# --- values and gradients


@pytest.mark.parametrize("name", TERMS)
def test_value_and_gradient_are_those_of_the_equation(name: str) -> None:
    ours = random_scene()
    theirs = random_scene()
    value = value_of(TERMS[name], ours)
    torch.manual_seed(5)
    expected = EQUATIONS[name](theirs)
    value.backward()
    expected.backward()

    has_eps = name.startswith(("centred", "pearson", "pixels", "standardised"))
    bound = 1e-5 if has_eps else 1e-9
    assert value.ndim == 0
    assert value > 0
    assert value.item() == pytest.approx(expected.item(), rel=bound)
    assert_same_gradients(ours.student, theirs.student, rtol=bound, atol=bound * 0.1)
    reached = [gradient for gradient in gradients(ours.student) if gradient.any()]
    assert len(reached) == len(SIZES)


def test_without_weights_the_softmax_form_is_the_code_of_the_notes() -> None:
    def rows(view: View) -> Tensor:
        """-> (all cells, K)"""
        levels = []
        for pred in view.preds:
            classes = pred[:, 4 * BINS :].permute(0, 2, 3, 1)
            levels.append(classes.reshape(-1, CLASSES))
        return torch.cat(levels)

    scene = random_scene()
    temperature = 4
    teacher_probs = F.softmax(rows(scene.teacher) / temperature, dim=-1)
    student_probs = F.log_softmax(rows(scene.student) / temperature, dim=-1)
    kl = F.kl_div(student_probs, teacher_probs, reduction="batchmean")
    expected = (kl * temperature**2).item()
    term = LogitDistillation("softmax", gamma=0)
    assert value_of(term, scene).item() == pytest.approx(expected)


def test_pearson_is_one_minus_the_correlation_and_does_not_see_scale_or_offset() -> None:
    scene = random_scene()
    expected = 0.0
    for tap, (_, channels, _, _) in SHAPES.items():
        for c in range(channels):
            s = scene.student.feats[tap][:, c].detach().flatten()
            t = scene.teacher.feats[tap][:, c].detach().flatten()
            correlation = np.corrcoef(s, t)[0, 1]
            expected += float(1 - correlation) / channels

    moved = altered(scene.student, lambda x: 40 * x - 7)
    for student in (scene.student, moved):
        value = value_of(PearsonDistillation(), Scene(student, scene.teacher))
        assert value.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("p", [2.0, 4.0])
def test_standardised_attention_sees_neither_scale_nor_offset_of_a_channel(p: float) -> None:
    """Of three channels one is a hundred times as large as another and flat beside it: the plain
    map is its, the standardised one is not.
    """
    generator = torch.Generator().manual_seed(0)
    feat = torch.randn(4, 3, 6, 6, generator=generator, dtype=torch.float64)
    scale = torch.tensor([1.0, -7.0, 100.0]).view(1, 3, 1, 1)
    same = View({"tap": feat}, None, torch.empty(0))
    moved = View({"tap": feat * scale + 50 * scale}, None, torch.empty(0))
    assert value_of(StandardisedAttention(p), Scene(moved, same)) < 1e-4
    assert value_of(AttentionTransfer("sample", p), Scene(moved, same)) > 0.1


@pytest.mark.parametrize("name", EQUAL_IS_ZERO)
def test_zero_at_equality_and_so_is_the_gradient(name: str) -> None:
    teacher = random_scene().teacher
    same = altered(teacher, torch.clone)
    value = value_of(TERMS[name], Scene(same, teacher))
    value.backward()
    assert abs(value.item()) < 1e-13
    for gradient in gradients(same):
        assert gradient.abs().max() < 1e-13


def test_centred_maps_do_not_see_what_all_images_share() -> None:
    """A map of their own, added to that of every image, changes nothing; and the teacher's maps
    of other images are far away, where plain maps would be near.
    """
    generator = torch.Generator().manual_seed(0)
    own = torch.rand(4, 6, 6, generator=generator)
    shared = 100 * torch.rand(6, 6, generator=generator)
    assert torch.allclose(centred(own + shared), centred(own), atol=1e-3)
    flat = 10 + own.unsqueeze(1)  # (N, 1, H, W): energy that is nearly flat
    same = View({"tap": flat}, None, torch.empty(0))
    other = View({"tap": flat.roll(1, 0)}, None, torch.empty(0))
    assert value_of(CentredAttention(), Scene(same, same)) == 0
    assert value_of(CentredAttention(), Scene(same, other)) > 1
    assert value_of(AttentionTransfer("sample"), Scene(same, other)) < 0.1


def test_the_only_image_of_a_batch_has_nothing_of_its_own() -> None:
    feat = torch.rand(1, 2, 4, 4, requires_grad=True)
    view = View({"tap": feat}, None, torch.empty(0))
    value = value_of(CentredAttention(), Scene(view, view))
    value.backward()
    assert value == 0
    assert not feat.grad.any()  # type: ignore[union-attr]


def test_pixels_are_related_after_blocks_of_them_are_averaged() -> None:
    def averaged(x: Tensor) -> Tensor:
        """By 2; the last rows and columns of an odd side by themselves."""
        rows = torch.stack([part.mean(2) for part in x.split(2, 2)], 2)
        return torch.stack([part.mean(3) for part in rows.split(2, 3)], 3)

    scene = random_scene()
    expected = value_of(PixelRelation(0.5), scene.map(averaged)).item()
    assert expected > 0
    assert value_of(PixelRelation(0.5, pool=2), scene).item() == pytest.approx(expected)


def test_masked_is_zero_where_nothing_is_hidden_and_the_generator_changes_nothing() -> None:
    term = masked(masked=0.0)
    for layer in term.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.dirac_(layer.weight)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    positive = altered(random_scene().teacher, torch.abs)  # so that the ReLU changes nothing
    assert value_of(term, Scene(positive, positive)) == 0


def test_masked_hides_that_share_of_the_cells_anew_each_time() -> None:
    """With a generator that changes nothing, ones against zeros give the share that is kept."""
    term = MaskedGeneration({"tap": (2, 2, 100, 100)}, masked=0.8)
    term.generators[0] = nn.Identity()
    ones = torch.ones(1, 2, 100, 100)
    student = View({"tap": ones}, None, torch.empty(0))
    teacher = View({"tap": 0 * ones}, None, torch.empty(0))

    torch.manual_seed(0)
    first = term(student, teacher, NO_TARGETS)
    second = term(student, teacher, NO_TARGETS)
    torch.manual_seed(0)
    again = term(student, teacher, NO_TARGETS)
    assert first == again
    assert first != second
    assert first.item() == pytest.approx(0.2, abs=0.02)


# --- who gets a gradient


@pytest.mark.parametrize("name", TERMS)
def test_no_gradient_reaches_the_teacher(name: str) -> None:
    scene = random_scene()
    value_of(TERMS[name], scene).backward()
    assert has_no_gradient(scene.teacher)


# --- numbers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", TERMS)
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    """Features of 300, whose squares float16 cannot hold."""
    term = in_float32(name)
    half = random_scene(dtype, size=300)
    full = half.map(torch.Tensor.float)
    with torch.autocast("cpu", dtype):
        value = value_of(term, half)
    value.backward()

    expected = value_of(term, full).item()
    # their convolutions run in half precision
    bound = 0.02 if name in ("masked", "gradient_weighted") else 1e-5
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert value.item() == pytest.approx(expected, rel=bound)
    assert gradients(half.student)
    for gradient in gradients(half.student):
        assert gradient.isfinite().all()


# far: where exp() overflows, and scores are 0 and 1
CASES = ["zeros", "student zero", "teacher zero", "equal", "constant channel", "far"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", TERMS)
def test_value_and_gradient_are_finite_at_the_edges(name: str, case: str) -> None:
    scene = edge_case(random_scene(torch.float32), case, far=1e3)
    term = in_float32(name)
    value = value_of(term, scene)
    value.backward()
    assert value.isfinite()
    assert value != 0 or case in ("zeros", "equal")
    assert len(gradients(scene.student)) == len(SIZES)
    for gradient in gradients(scene.student):
        assert gradient.isfinite().all()
        assert case == "far" or gradient.abs().max() < 1e3


def test_a_teacher_that_sees_nothing_gives_zero_and_not_nan() -> None:
    student, teacher = random_scene(torch.float32)
    blind = Scene(student, altered(teacher, lambda x: x - 1e4))
    for name in ("logits", "localisation", "score_weighted"):
        assert value_of(TERMS[name], blind) == 0


@pytest.mark.parametrize("name", TERMS)
def test_compiled_in_one_graph_it_gives_the_same(name: str) -> None:
    assert_compiled_is_the_same(TERMS[name], value_of, random_scene)


# --- settings


def without_feats(term: nn.Module, preds: Any = None) -> None:
    """The term of a student and a teacher with these preds and no maps."""
    view = View({}, preds, torch.empty(0))
    term(view, view, NO_TARGETS)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (
            lambda: value_of(LocalisationDistillation(), random_scene()),
            "reg_max=16 .* 23 channels",
        ),
        (
            lambda: without_feats(LocalisationDistillation(), [torch.ones(1, 64, 2, 2)]),
            "reg_max=16",
        ),
        (lambda: without_feats(LocalisationDistillation(), {"boxes": 0}), "this is a dict"),
        (lambda: without_feats(LogitDistillation()), "class maps has none"),
        (lambda: without_feats(SpatialImitation()), r"distill\.taps"),
        (lambda: without_feats(CentredAttention()), r"distill\.taps"),
        (lambda: without_feats(GradientWeighted(Looking(), head="head")), r"distill\.taps"),
        (lambda: GradientWeighted(Looking()), "Looking has no 'model.23'"),
        (
            lambda: GradientWeighted(Looking(), {"tap1": SHAPES["tap1"]}, "head"),
            "head does not read the maps of tap1",
        ),
        (lambda: GradientWeighted(nn.Sequential(nn.Identity()), head="0"), "no class_maps"),
        (lambda: without_feats(PixelRelation()), r"distill\.taps"),
    ],
)
def test_wrong_settings_are_refused_by_name(wrong: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        wrong()


def test_feats_that_do_not_fit_are_refused_by_name() -> None:
    student, teacher = random_scene()
    narrow = altered(student, lambda x: x[:, :2])
    with pytest.raises(UserError, match="tap0 has 2 channels, the teacher 5"):
        SpatialImitation()(narrow, teacher, NO_TARGETS)
    small = teacher._replace(feats={"tap0": teacher.feats["tap0"][:, :, :2]})
    with pytest.raises(UserError, match="tap0 is 2x4"):
        ScoreWeighted()(small, small, NO_TARGETS)
