"""FRSKD: the pyramid and its losses against the equations written out, who gets a gradient, and
whole runs.
"""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import eval as eval_script
import train as train_script
from kdmini import config
from kdmini.contracts import Targets, UserError, View
from kdmini.detection.yolo11.model import YOLO11
from kdmini.optim import Recipe, make_sgd
from kdmini.terms.self_teacher import Fuse, SelfTeacher
from tests.conftest import ROOT, TINY
from tests.test_train import assert_equal, newest, run

NAMES = ["circle", "square", "triangle"]
CHANNELS, SIZES = [6, 5, 7], [8, 4, 2]
TAPS = ["fine", "middle", "coarse"]
SHAPES = {tap: (c, 2 * c, size, size) for tap, c, size in zip(TAPS, CHANNELS, SIZES, strict=True)}


def term(shares: tuple[float, ...] = (0.5, 1.5, 0.7), **settings: Any) -> SelfTeacher:
    torch.manual_seed(3)
    made = SelfTeacher(SHAPES, NAMES, **{"width": 4, **settings})
    with torch.no_grad():
        for parameter in (m.weight for m in made.modules() if isinstance(m, Fuse)):
            parameter.copy_(torch.tensor(shares[: len(parameter)]))
    return made


def view(seed: int, dtype: torch.dtype = torch.float64) -> View:
    """Feats and preds of two images of 64 pixels, all leaves."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(channels: int, size: int) -> Tensor:
        values = torch.randn(2, channels, size, size, generator=generator, dtype=torch.float64)
        return values.to(dtype).requires_grad_()

    feats = {tap: leaf(c, size) for tap, (c, _, size, _) in SHAPES.items()}
    return View(feats, [leaf(64 + len(NAMES), size) for size in SIZES], torch.zeros(2, 3, 64, 64))


def leaves(of: View) -> list[Tensor]:
    return [*of.feats.values(), *of.preds]


def targets(objects: int = 2) -> Targets:
    left_top = torch.tensor([[4.0, 4.0], [20.0, 30.0], [2.0, 40.0]])[:objects].expand(2, -1, -1)
    labels = torch.tensor([[0, 2, 1], [1, 0, -1]])[:, :objects]
    return {
        "boxes_xyxy": torch.cat([left_top, left_top + 24], 2),
        "labels": labels,
        "ids": ["a", "b"],
    }


# --- the equations


def plain_conv(x: Tensor, block: Any) -> Tensor:
    """Convolution, BatchNorm over the batch, SiLU."""
    x = F.conv2d(
        x, block.conv.weight, None, 1, block.conv.weight.shape[-1] // 2, 1, block.conv.groups
    )
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    x = (x - mean) / (variance + 1e-3).sqrt() * block.bn.weight.view(
        1, -1, 1, 1
    ) + block.bn.bias.view(1, -1, 1, 1)
    return x / (1 + (-x).exp())


def plain_fuse(block: Any, *maps: Tensor) -> Tensor:
    shares = [max(w.item(), 0.0) for w in block.weight]
    mixed: Any = sum(w / (sum(shares) + 1e-4) * x for w, x in zip(shares, maps, strict=True))
    assert block.conv[0].conv.groups == mixed.shape[1]  # depthwise
    return plain_conv(plain_conv(mixed, block.conv[0]), block.conv[1])


def plain_up(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def plain_down(x: Tensor) -> Tensor:
    """The largest of the 3x3 cells around every second one."""
    _, _, h, w = x.shape
    rows = [
        torch.stack(
            [
                x[:, :, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].amax((2, 3))
                for j in range(0, w, 2)
            ],
            2,
        )
        for i in range(0, h, 2)
    ]
    return torch.stack(rows, 2)


def plain_refine(net: Any, f: list[Tensor]) -> list[Tensor]:
    l1, l2, l3 = (plain_conv(x, block) for x, block in zip(f, net.lateral, strict=True))
    p2 = plain_fuse(net.p2, l2, plain_up(l3))
    t1 = plain_fuse(net.t1, l1, plain_up(p2))
    t2 = plain_fuse(net.t2, l2, p2, plain_down(t1))
    return [t1, t2, plain_fuse(net.t3, l3, plain_down(t2))]


def plain_attention(f: Tensor, t: Tensor) -> Any:
    total: Any = 0
    for n in range(len(f)):
        a, b = ((x[n] ** 2).sum(0) for x in (f, t))
        total += ((a / (a**2).sum().sqrt() - b / (b**2).sum().sqrt()) ** 2).sum().sqrt() / len(f)
    return total


def plain_soft(s: list[Tensor], t: list[Tensor], temperature: float) -> Any:
    above: Any = 0
    below: Any = 0
    for mine, own in zip(s, t, strict=True):
        p, q = (1 / (1 + (-x[:, 64:] / temperature).exp()) for x in (own, mine))
        kl = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(1)
        weight = (1 / (1 + (-own[:, 64:]).exp())).amax(1)
        above, below = above + (weight * kl).sum(), below + weight.sum()
    return temperature**2 * above / below


@pytest.mark.parametrize("shares", [(0.5, 1.5, 0.7), (-0.3, 1.5, 0.7)])
def test_value_is_that_of_the_equations_and_the_task_loss_that_of_the_detector(
    shares: tuple[float, ...],
) -> None:
    made = term(
        shares, attention=3.0, soft=0.7, temperature=2.0, box=7.0, cls=0.6, dfl=1.1
    ).double()
    student = view(0)
    found = made(student, None, targets())
    refined = plain_refine(made.refine, [*student.feats.values()])
    preds = made.head(refined)
    detector = YOLO11(NAMES, json.loads(TINY), box=7.0, cls=0.6, dfl=1.1)
    task = sum(detector.loss(preds, targets()).values())
    attention = sum(
        plain_attention(f, t) for f, t in zip(student.feats.values(), refined, strict=True)
    )
    expected: Any = task + 3 * attention + 0.7 * plain_soft(student.preds, preds, 2.0)
    assert found.ndim == 0 and found.item() == pytest.approx(expected.item(), rel=1e-6)
    for own, plain in zip(made.refine([*student.feats.values()]), refined, strict=True):
        assert torch.allclose(own, plain, rtol=1e-9)


def test_the_imitation_is_zero_at_equality_and_so_is_its_gradient() -> None:
    own = view(1)
    same = View(
        {tap: f.detach().clone().requires_grad_() for tap, f in own.feats.items()},
        [p.detach().clone().requires_grad_() for p in own.preds],
        own.images,
    )
    found = term().imitation(same, own, targets())
    found.backward()
    assert abs(found.item()) < 1e-12
    assert all(leaf.grad is None or leaf.grad.abs().max() < 1e-12 for leaf in leaves(same))


# --- who gets a gradient


def test_the_student_imitates_and_the_self_teacher_does_not() -> None:
    student, own = view(0), view(1)
    term().imitation(student, own, targets()).backward()
    assert all(leaf.grad is None for leaf in leaves(own))
    assert all(f.grad is not None and f.grad.abs().sum() > 0 for f in student.feats.values())
    for pred in student.preds:
        assert (
            pred.grad is not None
            and pred.grad[:, :64].abs().sum() == 0 < pred.grad[:, 64:].abs().sum()
        )


def test_the_self_teacher_learns_from_its_task_alone_and_all_of_it_does() -> None:
    learnt = []
    for weights in ({"attention": 0.0, "soft": 0.0}, {"attention": 5.0, "soft": 5.0}):
        made = term(**weights).double()
        made(view(0), None, targets()).backward()
        learnt.append({name: p.grad for name, p in made.named_parameters() if p.requires_grad})
    assert_equal(*learnt)
    for name, gradient in learnt[0].items():
        assert gradient is not None and gradient.abs().sum() > 0, name


def test_the_task_of_the_self_teacher_reaches_the_features_of_the_student_and_not_its_head() -> (
    None
):
    student = view(0)
    term(attention=0.0, soft=0.0).double()(student, None, targets()).backward()
    assert all(f.grad is not None and f.grad.abs().sum() > 0 for f in student.feats.values())
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in student.preds)


# --- numbers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_and_near(dtype: torch.dtype) -> None:
    made, student = term(), view(0, dtype)
    expected = made(
        View({k: f.float() for k, f in student.feats.items()}, student.preds, student.images),
        None,
        targets(),
    )
    with torch.autocast("cpu", dtype):
        found = made(student, None, targets())
    found.backward()
    assert found.dtype == torch.float32 and found.item() == pytest.approx(expected.item(), rel=0.03)
    assert all(
        p.grad is not None and p.grad.isfinite().all()
        for p in [*leaves(student), *made.refine.parameters()]
    )


def test_without_objects_it_is_finite_and_the_boxes_are_not_taught() -> None:
    made, student = term(attention=0.0, soft=0.0), view(0, torch.float32)
    made(student, None, targets(0)).backward()
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in made.head.cv2.parameters())
    assert all(f.grad is not None and f.grad.isfinite().all() for f in student.feats.values())


def test_compiled_in_one_graph_it_gives_the_same_and_other_images_are_not_compiled_anew() -> None:
    torch._dynamo.reset()
    made, graphs = term(), []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(made, backend=backend, fullgraph=True, dynamic=False)
    for ids in (["a", "b"], ["c", "d"]):
        one, other = view(0, torch.float32), view(0, torch.float32)
        objects: Targets = {**targets(), "ids": ids}
        plain, found = made(one, None, objects), compiled(other, None, objects)
        plain.backward()
        found.backward()
        assert torch.equal(plain, found)
        assert_equal([leaf.grad for leaf in leaves(one)], [leaf.grad for leaf in leaves(other)])
    assert len(graphs) == 1


# --- settings


@pytest.mark.parametrize(
    "wrong, named",
    [
        (lambda: term(width=7), "width is 7; use 1 to 6"),
        (lambda: term(width=0), "width is 0"),
        (lambda: term(attention=-1.0), "attention is -1"),
        (lambda: term(soft=-0.1), "soft -0.1"),
        (lambda: term(temperature=0.0), "temperature is 0"),
        (lambda: SelfTeacher({}, NAMES), "needs three, .* these are 0"),
        (lambda: SelfTeacher({**SHAPES, "more": (4, 4, 1, 1)}, NAMES), "these are 4"),
    ],
)
def test_wrong_settings_are_refused_by_name(wrong: Callable[[], Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        wrong()


def test_maps_that_are_not_the_students_own_or_of_other_strides_are_refused_by_name() -> None:
    made, student = term().double(), view(0)
    aligned = View(
        {tap: f.repeat(1, 2, 1, 1) for tap, f in student.feats.items()},
        student.preds,
        student.images,
    )
    with pytest.raises(
        UserError, match=r"distill\.align: fine comes with 12 channels and has 6; use `none`"
    ):
        made(aligned, None, targets())
    small = View(
        {tap: f[:, :, ::2, ::2] for tap, f in student.feats.items()}, student.preds, student.images
    )
    with pytest.raises(UserError, match=r"distill\.taps: fine is 4x4 and the level of preds 8x8"):
        made(small, None, targets())


# --- in a run

OVERRIDES = [
    f"student.scale={TINY}",
    "distill.self_teacher.width=8",
    "data.imgsz=64",
    "device=cpu",
    "data.workers=2",
]
CONFIG = ROOT / "configs/terms/self_teacher.yaml"


def distilled(*overrides: str) -> tuple[Any, Any]:
    torch.manual_seed(0)
    settings = config.load(CONFIG, [*OVERRIDES, *overrides])
    student = config.build(settings["student"], "student", names=NAMES)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    made = config.call(
        train_script.make_distillation,
        settings["distill"],
        "distill",
        student=student,
        teacher=None,
        imgsz=64,
    )
    assert_equal(before, dict(student.state_dict()))  # for it was run, to see the shapes
    return student, made


def test_without_a_teacher_the_channels_are_the_students_and_nothing_is_aligned() -> None:
    student, made = distilled()
    assert made.terms["self_teacher"].channels == {"model.16": 16, "model.19": 32, "model.22": 64}
    assert not list(made.align.parameters())
    count = [sum(p.numel() for p in module.parameters()) for module in (made, student)]
    assert 0 < count[0] < count[1] / 2


def test_the_student_comes_to_look_as_the_self_teacher_does() -> None:
    """The imitation alone, of a self-teacher that stays as it is."""
    student, made = distilled()
    images, own = torch.rand(2, 3, 64, 64), view(1, torch.float32)
    own = View(dict(zip(made.taps, own.feats.values(), strict=True)), own.preds, images)
    optimizer = make_sgd([student], Recipe(1, 2, nbs=2, lr0=0.02, weight_decay=0))
    losses = []
    for _ in range(15):
        preds = student(images)
        loss = made.terms["self_teacher"].imitation(
            View(made.student_taps.take(), preds, images), own, targets()
        )
        loss.backward()
        losses.append(loss.item())
        nn.utils.clip_grad_norm_(student.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Path:
    folder = tmp_path_factory.mktemp("self_teacher") / "run"
    run(train_script, "--config", CONFIG, *OVERRIDES, f"run={folder}", f"data.root={shapes}", "train.epochs=2",
        "train.val_every=1", "train.batch=8")  # fmt: skip
    return folder


def test_its_config_trains_and_best_pt_is_the_student_alone(
    finished: Path, capsys: pytest.CaptureFixture
) -> None:
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 2
    assert all(
        record["skipped"] == 0 and 0 < record["self_teacher"] < math.inf for record in records
    )
    best = torch.load(finished / "best.pt", weights_only=True)
    assert best["model"].keys() == YOLO11(["a"] * 6, json.loads(TINY)).state_dict().keys()
    run(eval_script, "--config", finished / "config.yaml", "--weights", finished / "best.pt")
    assert "all classes" in capsys.readouterr().out


def test_its_parameters_are_saved_moved_and_come_back_bit_for_bit(
    finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (whole := newest(finished)).pop("config")
    last, first = (
        torch.load(path, weights_only=True) for path in sorted((folder / "ckpt").glob("*.pt"))[::-1]
    )
    own = [name for name in last["distillation"] if name.endswith("weight")]
    assert len(own) > 50 and all(name.startswith("terms.self_teacher.") for name in own)
    still = [n for n in own if torch.equal(first["distillation"][n], last["distillation"][n])]
    assert "terms.self_teacher.head.dfl.conv.weight" in still and not any(
        ".refine." in name for name in still
    )
    sorted((folder / "ckpt").glob("*.pt"))[-1].unlink()
    run(train_script, "--resume", folder)
    (resumed := newest(folder)).pop("config")
    assert_equal(whole, resumed)


def test_check_finds_distillation_on(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run(
        train_script,
        "--check",
        "--config",
        CONFIG,
        *OVERRIDES,
        f"data.root={shapes}",
        f"run={tmp_path / 'run'}",
    )
    assert "--check: distillation is on" in capsys.readouterr().out
