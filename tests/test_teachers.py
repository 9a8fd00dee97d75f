"""A frozen network from elsewhere: its maps are its own, its weights a file's, and nothing of it
is kept.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train as train_script
from kdmini import checkpoint
from kdmini.contracts import UserError
from kdmini.distill.taps import feats_of
from kdmini.teachers import Frozen
from kdmini.terms.cosine import CosineDistance
from tests.commands import assert_equal, newest, records, run
from tests.conftest import ROOT
from tests.distill.small import NO_TARGETS, Small, distil
from tests.terms.teaching import SMALL, build

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
RESNET = {"build": "torchvision.models:resnet50"}
SMALL_NETWORK = {"build": "torchvision.models:shufflenet_v2_x0_5"}
LEVELS = [f"backbone.fpn.layer_blocks.{level}" for level in range(3)]


def images(size: int = 64, seed: int = 0) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(seed))


def normalised(pixels: Tensor) -> Tensor:
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def tapped(teacher: Frozen, names: list[str], pixels: Tensor) -> list[Tensor]:
    feats = feats_of(teacher, [f"network.{name}" for name in names], pixels)
    return [feats[f"network.{name}"] for name in names]


# --- its maps, to the bit


@torch.no_grad()
def test_the_maps_of_a_classifier_are_its_own() -> None:
    teacher = Frozen(RESNET)
    stages = ["layer1", "layer2", "layer3", "layer4"]
    maps = tapped(teacher, stages, images())
    network: Any = teacher.network
    x = network.maxpool(network.relu(network.bn1(network.conv1(normalised(images())))))
    for stage, feat in zip(stages, maps, strict=True):
        x = network.get_submodule(stage)(x)
        assert torch.equal(feat, x)
    assert maps[3].shape == (2, 2048, 2, 2)


@torch.no_grad()
@pytest.mark.parametrize("detector", ["retinanet_resnet50_fpn", "fasterrcnn_resnet50_fpn"])
def test_the_maps_of_a_detector_are_those_of_its_fpn_and_its_head_rests(detector: str) -> None:
    teacher = Frozen({"build": f"torchvision.models.detection:{detector}"}, part="backbone")
    network: Any = teacher.network
    for head in (getattr(network, "head", None), getattr(network, "rpn", None)):
        if head is not None:
            head.register_forward_hook(lambda *_: pytest.fail("the head has run"))
    maps = tapped(teacher, [*LEVELS, "backbone.body.layer3"], images())
    levels = network.backbone(normalised(images()))
    for level, feat in zip("012", maps[:3], strict=True):
        assert torch.equal(feat, levels[level])
    assert torch.equal(maps[3], list(network.backbone.body(normalised(images())).values())[-2])


VIT = {
    "build": "torchvision.models.vision_transformer:VisionTransformer",
    **{"image_size": 56, "patch_size": 14, "num_layers": 2, "num_heads": 2},
    **{"hidden_dim": 12, "mlp_dim": 16},
}


@torch.no_grad()
def test_tokens_become_a_map_without_those_before_the_patches() -> None:
    teacher = Frozen(VIT)
    block: Any = teacher.network.get_submodule("encoder.layers.encoder_layer_1")
    kept = []
    block.register_forward_hook(lambda module, args, output: kept.append(output))
    (feat,) = tapped(teacher, ["encoder.layers.encoder_layer_1"], images(56))
    assert feat.shape == (2, 12, 4, 4)
    for y in range(4):
        for x in range(4):
            assert torch.equal(feat[:, :, y, x], kept[0][:, 1 + 4 * y + x])


@torch.no_grad()
def test_each_patch_is_where_it_is_in_the_image() -> None:
    """Of patches that are not mixed: where one pixel changes, so does its cell alone."""
    teacher = Frozen({"build": "tests.test_teachers:Patches"}, prefix=2)
    changed = images(32)
    changed[0, :, 9, 26] += 1
    (before,) = tapped(teacher, ["norm"], images(32))
    (after,) = tapped(teacher, ["norm"], changed)
    assert (before != after).any(1).nonzero().tolist() == [[0, 1, 3]]


class Patches(nn.Module):
    """Two tokens, then those of the patches of 8 pixels; in a tuple, as some give them."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 5, 8, 8)
        self.norm = InTuple()

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).mT
        return self.norm(torch.cat([tokens[:, :2], tokens], 1))[0]


class InTuple(nn.Module):
    def forward(self, tokens: Tensor) -> tuple[Tensor, None]:
        return tokens, None


SWIN = {
    "build": "torchvision.models.swin_transformer:SwinTransformer",
    **{"patch_size": [4, 4], "embed_dim": 12, "depths": [2, 2], "num_heads": [2, 2]},
    "window_size": [4, 4],
}


@torch.no_grad()
def test_channels_that_stand_last_are_brought_to_the_front() -> None:
    teacher = Frozen(SWIN, channels_last=True)
    (feat,) = tapped(teacher, ["features.3"], images())
    network: Any = teacher.network
    assert torch.equal(feat, network.features[:4](normalised(images())).permute(0, 3, 1, 2))


@torch.no_grad()
def test_it_sees_the_images_at_its_own_size_and_normalised_its_own_way() -> None:
    settings = {"mean": (0.5, 0.4, 0.3), "std": (0.5, 0.6, 0.7)}
    teacher = Frozen(SMALL_NETWORK, imgsz=96, **settings)
    (feat,) = tapped(teacher, ["stage2"], images())
    large = F.interpolate(images(), (96, 96), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(settings[name]).view(3, 1, 1) for name in ("mean", "std"))
    network: Any = teacher.network
    expected = network.stage2(network.maxpool(network.conv1((large - mean) / std)))
    assert torch.equal(feat, expected)
    assert feat.shape[2:] == (12, 12)


def test_compiled_in_one_graph_it_gives_the_same() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    student, teacher = Small(4), Frozen(SMALL_NETWORK, imgsz=64)
    taps = {"stem": "network.maxpool"}
    distillation = distil(student, teacher, {"cosine": CosineDistance()}, taps=taps)
    losses = []
    for compiled in (False, True):
        if compiled:
            distillation.compile(backend="eager", fullgraph=True)
        student(images(32))
        losses.append(distillation(images(32), None, NO_TARGETS, 0)["cosine"])
    assert losses[0] > 0
    assert torch.equal(*losses)


# --- what is refused


@pytest.mark.parametrize(
    "settings, tap, message",
    [
        (
            {"network": VIT, "prefix": 5},
            "encoder.layers.encoder_layer_1",
            r"gives 17 tokens, and without teacher\.prefix=5 .*; perhaps it is 1$",
        ),
        ({"network": SWIN}, "features.3", r"no square map .*; set teacher\.channels_last=true"),
        (
            {"network": SMALL_NETWORK, "channels_last": True},
            "stage2",
            r"no square map .*; set teacher\.channels_last=false",
        ),
        ({"network": SMALL_NETWORK}, "fc", r"'network\.fc' gives no map of features"),
        ({"network": SMALL_NETWORK}, "stage5", r"'network\.stage5'; did you mean network\.stage"),
        ({"network": SMALL_NETWORK, "part": "stag2"}, "", r"teacher\.part: .*`stage2`"),
        ({"network": VIT, "imgsz": 70}, "encoder", r"on images of 70 px .*; set teacher\.imgsz$"),
        ({"network": {"build": "torchvision.models:list_models"}}, "", "makes no network but a"),
    ],
)
def test_what_is_no_map_is_refused_by_name(
    settings: dict[str, Any], tap: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        tapped(Frozen(**settings), [tap], images(56))


@pytest.mark.parametrize("key", ["weights", "weights_backbone", "pretrained"])
def test_a_setting_that_downloads_is_refused(key: str) -> None:
    with pytest.raises(UserError, match=rf"teacher\.network\.{key}: nothing is downloaded"):
        Frozen({**RESNET, key: "DEFAULT"})


def test_the_backbone_that_detectors_download_by_themselves_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fetch(*args: object, **settings: object) -> None:
        pytest.fail("a download")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    Frozen({"build": "torchvision.models.detection:ssdlite320_mobilenet_v3_large"})


# --- its weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of SMALL_NETWORK, with statistics of images in its BatchNorms."""
    torch.manual_seed(5)
    network = Frozen(SMALL_NETWORK).network
    for seed in range(30):
        network(normalised(images(seed=seed)))
    path = tmp_path_factory.mktemp("weights") / "teacher.pth"
    torch.save(network.state_dict(), path)
    return path


def test_weights_are_those_of_the_file(weights: Path) -> None:
    state = torch.load(weights, weights_only=True)
    assert_equal(dict(Frozen(SMALL_NETWORK, str(weights)).network.state_dict()), dict(state))


def test_weights_of_another_network_are_refused(weights: Path) -> None:
    with pytest.raises(UserError, match=rf"{weights} does not fit \(lacks 'conv1.weight'\)"):
        Frozen(RESNET, str(weights))


# --- a run


def with_teacher(weights: Path | None) -> list[str]:
    """Overrides of the usual config."""
    file = f", weights: {weights}" if weights else ""
    network = f"{{build: {SMALL_NETWORK['build']}}}"
    return [
        f"teacher={{build: kdmini.teachers:Frozen, network: {network}{file}}}",
        "distill.taps=[[model.6, network.stage3], [model.16, network.stage2]]",
        "distill.attention={build: kdmini.terms.cosine:CosineDistance, weight: 1.0}",
        "train.epochs=2",
        "train.batch=4",
        "data.limit=4",
    ]


def test_it_teaches_and_a_resumed_run_is_the_same_and_keeps_nothing_of_it(
    config_file: Path, weights: Path, tmp_path: Path
) -> None:
    run(train_script, "--config", config_file, *with_teacher(weights), "allow_void=false")
    folder = tmp_path / "run"
    last = records(folder)[-1]
    assert last["loss/attention"] > 0
    assert last["distance/aligned"] > 0
    whole = newest(folder)
    files = sorted((folder / "ckpt").glob("*.pt"))
    files[-1].unlink()
    run(train_script, "--resume", folder)
    again = newest(folder)
    for part in ("student", "distillation", "ema", "optimizer"):
        assert_equal(whole[part], again[part])

    shape = torch.load(weights, weights_only=True)["conv5.0.weight"].shape
    for content in (again, checkpoint.load(folder / "best.pt")):
        assert not any("network" in key or value.shape == shape for key, value in leaves(content))


def leaves(content: Any, path: str = "") -> list[tuple[str, Tensor]]:
    """Every tensor in it, and where."""
    if isinstance(content, Tensor):
        return [(path, content)]
    if not isinstance(content, dict | list):
        return []
    items = content.items() if isinstance(content, dict) else enumerate(content)
    return [leaf for key, item in items for leaf in leaves(item, f"{path}/{key}")]


def test_check_is_green(
    config_file: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(train_script, "--config", config_file, "--check", *with_teacher(weights))
    text = capsys.readouterr().out
    assert text.endswith("--check: distillation is on\n")
    assert "ok   teacher, weights                   read" in text
    assert "held-out" not in text  # for it says nothing of the images


@pytest.mark.parametrize(
    "override, message",
    [
        (
            "distill.attention={build: kdmini.terms.logits:LogitDistillation, weight: 1}",
            "distill.attention: needs a teacher with the student's classes, .* such as pearson",
        ),
        ("teacher.weights=null", "teacher: has no weights"),
        ("teacher.network.weights=DEFAULT", r"teacher\.network\.weights: nothing is downloaded"),
        ("teacher.network.widht=2", r"teacher\.network: .* fails \(TypeError: .*'widht'"),
        ("teacher.prefix=-1", r"teacher: prefix: -1 is out of range"),
        ("teacher.std=[1, 1, 0]", r"teacher: std\.2: 0 is out of range"),
        ("teacher.imgsz=70", r"model\.6 is 4x4 in the student, 5x5 in the teacher"),
    ],
)
def test_what_it_cannot_do_is_one_line(
    config_file: Path, weights: Path, override: str, message: str
) -> None:
    with pytest.raises(SystemExit, match=message) as left:
        overrides = [*with_teacher(weights), "allow_void=false", override]
        run(train_script, "--config", config_file, *overrides)
    assert "\n" not in str(left.value)


def test_the_config_pairs_levels_of_one_size() -> None:
    """On images of 128 pixels; nothing is averaged."""
    names = ["circle", "square"]
    path = ROOT / "configs/voc_retinanet.yaml"
    overrides = [SMALL[0], "student.weights=null", "teacher.weights=null"]
    student, _, distillation, pixels = build(path, overrides, 128, names)
    losses = distillation(pixels, student(pixels), {}, 0)
    assert losses["pearson"] > 0
    teacher = distillation.teacher_view(pixels)
    sizes = [tuple(feat.shape[1:]) for feat in teacher.feats.values()]
    assert sizes == [(256, 16, 16), (256, 8, 8), (256, 4, 4)]
    student(pixels)
    ours = distillation.student_taps.take().values()
    assert [tuple(feat.shape[2:]) for feat in ours] == [size[1:] for size in sizes]
