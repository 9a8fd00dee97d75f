"""VMamba: its sizes, its mixer against the equations, its taps, layouts, groups of weights."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdmini.checkpoint import save_best
from kdmini.contracts import UserError
from kdmini.distill.taps import Taps
from kdmini.optim import Recipe, make_optimizer
from kdmini.segmentation import mamba
from kdmini.segmentation.mamba import SIZES, SS2D, Size, VMamba
from tests.segmentation.sequential import ss2d

NAMES = [str(number) for number in range(21)]

# of the released networks, with a LayerNorm and 1000 classes after the encoder
PUBLISHED = {
    "t_s1l8": 30_249_064,
    "t_s2l5": 30_705_832,
    "s_s1l20": 49_012_840,
    "s_s2l15": 50_147_752,
    "b_s2l15": 88_557_800,
}


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def tiny(monkeypatch: pytest.MonkeyPatch) -> VMamba:
    monkeypatch.setitem(SIZES, "pico", Size((1, 1, 1, 2), 8, 2))
    torch.manual_seed(0)
    return VMamba(NAMES[:3], width=8).eval()


def mixer(channels: int = 20) -> SS2D:
    """Of a rank of 2, with every parameter drawn, in float64."""
    torch.manual_seed(0)
    module = SS2D(channels, channels + 4, has_graph=True).double()
    for name, parameter in module.named_parameters():
        if name != "dt_bias":
            torch.nn.init.normal_(parameter, std=0.5)
    return module


# --- the network


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_size_is_that_of_the_released_network(size: str) -> None:
    with torch.device("meta"):
        model = VMamba(NAMES, size)
    head = [model.norms, model.decoder, model.classifier]
    encoder = count(model) - sum(map(count, head))
    last = 8 * SIZES[size].channels
    assert encoder + 2 * last + 1000 * last + 1000 == PUBLISHED[size]


@pytest.mark.parametrize(
    "size, total",
    [
        (SIZES["pico"], 2_391_253),
        (Size((1, 1, 2, 1), 32, 1), 1_635_285),
        (Size((2, 2, 4, 2), 32, 1), 2_745_557),
        (Size((2, 2, 4, 2), 48, 1), 6_006_517),
    ],
    ids=["pico", "1121", "2242", "48"],
)
def test_the_size_of_pico_and_its_kin(
    size: Size, total: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SIZES, "pico", size)
    with torch.device("meta"):
        assert count(VMamba(NAMES)) == total


def test_preds_are_logits_at_a_quarter_of_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(monkeypatch)
    preds = model(torch.rand(2, 3, 64, 96))
    assert [tuple(pred.shape) for pred in preds] == [(2, 3, 16, 24)]
    assert model.class_maps(preds) == preds
    assert [tuple(p["logits"].shape) for p in model.decode(preds)] == [(3, 16, 24)] * 2


def test_every_weight_is_learnt_and_twice_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    images = torch.rand(2, 3, 64, 64)
    mask = torch.randint(0, 3, (2, 64, 64), dtype=torch.uint8)
    runs = []
    for _ in range(2):
        model = tiny(monkeypatch).train()
        losses = model.loss(model(images), {"mask": mask})
        torch.stack(list(losses.values())).sum().backward()
        runs.append({name: value.grad for name, value in model.named_parameters()})
    for name, grad in runs[0].items():
        assert grad.any() and torch.equal(grad, runs[1][name]), name


def test_channels_last_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(2, 3, 64, 64)
    plain = tiny(monkeypatch)(images)[0]
    model = tiny(monkeypatch).to(memory_format=torch.channels_last)
    for layout in (torch.channels_last, torch.contiguous_format):
        other = model(images.contiguous(memory_format=layout))[0]
        assert torch.allclose(other, plain, atol=1e-6)


def test_a_folded_copy_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(monkeypatch)
    torch.nn.init.uniform_(model.decoder.fuse.norm.running_var)
    images = torch.rand(1, 3, 64, 64)
    before = model(images)[0]
    assert torch.allclose(model.fold()(images)[0], before, atol=1e-6)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())


def test_a_best_pt_is_read_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = tiny(monkeypatch)
    path = tmp_path / "best.pt"
    save_best(path, model, 64, 0, 0.5)
    torch.manual_seed(7)
    again = VMamba(NAMES[:3], width=8, weights=str(path)).eval()
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(model(images)[0], again(images)[0])
    with pytest.raises(UserError, match="change one of them"):
        VMamba(NAMES[:3], width=16, weights=str(path))


# --- the selective scan of a map


def test_dt_begins_between_a_thousandth_and_a_tenth() -> None:
    dt = F.softplus(SS2D(16, 512, has_graph=False).dt_bias.detach())
    assert 0.000999 < dt.min() < 0.0011 and 0.09 < dt.max() < 0.1001
    assert dt.log10().mean() == pytest.approx(-2, abs=0.1)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 3)], ids=str)
def test_the_mixer_is_its_equations(size: tuple[int, int]) -> None:
    module = mixer()
    x = torch.randn(2, 20, *size, dtype=torch.float64)
    assert torch.allclose(module(x), ss2d(module, x), rtol=0, atol=1e-12)


def test_dt_and_the_scan_are_of_float32_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest dt have a bias of -7, which bfloat16 rounds by 0.016."""
    seen = []

    def watched(a: Tensor, b: Tensor) -> Tensor:
        seen.append((a, torch.is_autocast_enabled("cpu")))
        return b

    monkeypatch.setattr(mamba, "scan", watched)
    module = mixer().float()
    module.dt.weight.data.zero_()
    x = torch.randn(1, 20, 4, 4)
    module(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
    (outside, _), (inside, lowered) = seen
    assert inside.dtype == torch.float32 and not lowered
    assert torch.allclose(inside.log(), outside.log(), rtol=1e-3)


def test_decays_skips_biases_and_norms_are_free_of_weight_decay() -> None:
    module = SS2D(16, 16, has_graph=False)
    optimizer = make_optimizer([module], Recipe(epochs=1, batch=1, weight_decay=0.1))
    decayed = {
        id(parameter)
        for group in optimizer.param_groups
        for parameter in group["params"]
        if group["weight_decay"]
    }
    free = {name for name, value in module.named_parameters() if id(value) not in decayed}
    assert free == {"a_log", "d", "dt_bias", "norm.weight", "norm.bias"}


# --- taps


def test_the_taps_are_the_stages_before_they_are_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(monkeypatch)
    taps = Taps(model, [*(f"stages.{stage}" for stage in range(4)), "decoder"])
    read = []
    for downsample in model.downsamples:
        downsample.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    with torch.no_grad():
        model.features(torch.rand(2, 3, 64, 96))
    feats = list(taps.take().values())
    shapes = [tuple(feat.shape) for feat in feats]
    assert shapes[:4] == [(2, 8, 16, 24), (2, 16, 8, 12), (2, 32, 4, 6), (2, 64, 2, 3)]
    assert shapes[4] == (2, 8, 16, 24)
    assert all(feat is x for feat, x in zip(feats[:3], read, strict=True))


def test_a_tap_on_the_graph_is_the_affinity_of_the_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one input for all channels, the mean over them of y is the mean of M times that."""
    model = tiny(monkeypatch)
    taps = Taps(model, ["stages.3.1.mixer.graph"])
    with torch.no_grad():
        model(torch.rand(2, 3, 64, 96))
    assert taps.take()["stages.3.1.mixer.graph"].shape == (2, 4, 6, 6)

    module = mixer()
    taps = Taps(module, ["graph"])
    u = torch.randn(1, 1, 2, 3, dtype=torch.float64).expand(1, 24, 2, 3)  # in all channels
    dt = torch.randn(1, 96, 2, 3, dtype=torch.float64)
    b, c = torch.randn(2, 1, 4, 2, 3, dtype=torch.float64)
    y = module.scanned(u, dt, b, c)
    graph = taps.take()["graph"].sum(1)  # of all orders
    skip = module.d.sum() / 24  # mean over channels, of all orders
    expected = graph @ u[0, 0].flatten() + skip * u[0, 0].flatten()
    assert torch.allclose(y.mean(1).flatten(1), expected, rtol=0, atol=1e-12)


def test_the_graph_is_not_computed_without_a_tap(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Tensor) -> Tensor:
        raise AssertionError

    model = tiny(monkeypatch)
    monkeypatch.setattr(mamba, "state_affinity", fail)
    model(torch.rand(1, 3, 64, 64))
    with pytest.raises(UserError, match="no submodule"):
        Taps(model, ["stages.2.0.mixer.graph"])
    Taps(model, ["stages.3.0.mixer.graph"])
    with pytest.raises(AssertionError):
        model(torch.rand(1, 3, 64, 64))
