"""SegFormer against transformers, its encoder as PVTv2 against timm, and Fast-SCNN against
the paper's table written out in functions.

All in float64, from files in float32 that the references saved.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import oracle
from torch import Tensor, nn
from witness import witness

from kdmini.contracts import UserError
from kdmini.distill.taps import feats_of
from kdmini.segmentation.fast_scnn import FastSCNN
from kdmini.segmentation.maps import Segmenter
from kdmini.segmentation.segformer import SegFormer

pytestmark = pytest.mark.parity

BOUND = 1e-11
THEIRS = "transformers 5.24.0"
NAMES = [f"class {number}" for number in range(21)]
STAGES = [f"stages.{number}" for number in range(4)]
GRAPHS = ["stages.0.blocks.1.attn.graph", "stages.3.blocks.0.attn.graph"]

# what the children share: no weight is 0 or 1, and BatchNorm has statistics of its own
LIVELY = """
import sys
import torch

def lively(network):
    torch.manual_seed(1)
    for name, tensor in network.state_dict().items():
        if tensor.dtype != torch.float32:
            continue
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.ndim == 1:
            tensor.add_(torch.randn_like(tensor) * 0.2)
        else:
            tensor.normal_(0, tensor[0].numel() ** -0.5)
    return network.eval()

folder = sys.argv[1]
size = sys.argv[2]
images = torch.load(f"{folder}/images.pt").double()
mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1).double()
std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1).double()
images = (images - mean) / std
"""

TRANSFORMERS = """
from transformers import SegformerConfig, SegformerForSemanticSegmentation

dims = {"b0": [32, 64, 160, 256], "b1": [64, 128, 320, 512]}[size]
config = SegformerConfig(hidden_sizes=dims, num_labels=21, attn_implementation="eager")
config.id2label = {number: f"class {number}" for number in range(21)}
network = lively(SegformerForSemanticSegmentation(config))
network.save_pretrained(folder)
torch.save(network.state_dict(), f"{folder}/state.pt")
torch.save(network.segformer.state_dict(prefix="segformer."), f"{folder}/encoder.pt")
network.double()

# transformers ignores the authors' eps of these
for name, module in network.named_modules():
    if name.endswith(("layernorm_before", "layernorm_after")) or (
        name.endswith("layer_norm") and name.count(".") == 3
    ):
        assert isinstance(module, torch.nn.LayerNorm), name
        module.eps = float(sys.argv[3])
with torch.no_grad():
    attentions = network(images, output_attentions=True).attentions
    network.set_attn_implementation("sdpa")  # the other way has its softmax in float32
    out = network(images, output_hidden_states=True)
found = [*out.hidden_states, attentions[1], attentions[6], out.logits]
torch.save([tensor.contiguous() for tensor in found], f"{folder}/found.pt")
"""

TIMM = """
import timm

network = lively(timm.create_model(f"pvt_v2_{size}", num_classes=10))
torch.save(network.state_dict(), f"{folder}/state.pt")
network.double()
found = []
if size != "b2_li":
    for stage in network.stages:
        stage.register_forward_hook(lambda module, args, output: found.append(output))
with torch.no_grad():
    network(images)
torch.save([feat.contiguous() for feat in found], f"{folder}/found.pt")
"""


def given(folder: Path, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    images = torch.rand(2, 3, 96, 160)
    torch.save(images, folder / "images.pt")
    return images.double()


def found(folder: Path) -> list[Tensor]:
    return torch.load(folder / "found.pt", weights_only=True)


def relative(mine: Tensor, other: Tensor) -> float:
    assert mine.shape == other.shape
    assert mine.dtype == other.dtype == torch.float64
    return ((mine - other).norm() / other.norm()).item()


def compare(what: str, against: str, mine: list[Tensor], others: list[Tensor]) -> None:
    for one, other in zip(mine, others, strict=True):
        witness(what, against, relative(one, other), BOUND)


# --- SegFormer


@pytest.mark.parametrize("size", ["b0", "b1"])
def test_transformers(tmp_path: Path, size: Any) -> None:
    images = given(tmp_path)
    oracle(LIVELY + TRANSFORMERS, tmp_path, size, 1e-6, version="transformers")
    theirs = found(tmp_path)

    for file in ("model.safetensors", "state.pt"):  # the published names, and the newer ones
        network = SegFormer(NAMES, size, weights=str(tmp_path / file)).double()
        mine = segformer_outputs(network, images)
        compare("SegFormer: four stages, relative", THEIRS, mine[:4], theirs[:4])
        for graph, attention in zip(mine[4:6], theirs[4:6], strict=True):
            difference = (graph - attention).abs().max()
            witness("SegFormer: attention", f"{THEIRS}, in float32", difference, 1e-6)
        compare("SegFormer: logits, relative", THEIRS, mine[6:], theirs[6:])

    encoder = SegFormer(["cat"], size, weights=str(tmp_path / "encoder.pt")).double()
    feats = list(feats_of(encoder, STAGES, images).values())
    compare("SegFormer: encoder alone, relative", THEIRS, feats, theirs[:4])


def segformer_outputs(network: SegFormer, images: Tensor) -> list[Tensor]:
    feats = feats_of(network, [*STAGES, *GRAPHS], images)
    with torch.no_grad():
        (logits,) = network.eval()(images)
    return [*(feats[name] for name in [*STAGES, *GRAPHS]), logits]


def test_the_eps_of_transformers_changes_little(tmp_path: Path) -> None:
    """With 1e-5 in all norms, as it has it, the logits are those of the authors' to 1e-4."""
    images = given(tmp_path)
    oracle(LIVELY + TRANSFORMERS, tmp_path, "b0", 1e-5, version="transformers")
    network = SegFormer(NAMES, "b0", weights=str(tmp_path / "model.safetensors")).double()
    (logits,) = segformer_outputs(network, images)[6:]
    difference = relative(logits, found(tmp_path)[6])
    assert difference > BOUND
    witness("SegFormer: logits, relative", f"{THEIRS}, its own eps", difference, 1e-4)


@pytest.mark.parametrize("size", ["b0", "b1"])
def test_timm(tmp_path: Path, size: Any) -> None:
    images = given(tmp_path)
    oracle(LIVELY + TIMM, tmp_path, size, version="timm")
    network = SegFormer(["cat"], size, (8, 8, 4, 4), weights=str(tmp_path / "state.pt")).double()
    feats = list(feats_of(network, STAGES, images).values())
    compare("SegFormer as PVTv2: four stages, relative", "timm 1.0.31", feats, found(tmp_path))


def test_the_linear_attention_of_pvt_v2_is_refused(tmp_path: Path) -> None:
    given(tmp_path)
    oracle(LIVELY + TIMM, tmp_path, "b2_li", version="timm")
    with pytest.raises(UserError, match=r"has unknown 'stages.3.blocks.0.attn.norm.bias'"):
        SegFormer(["cat"], "b2", (8, 8, 4, 4), weights=str(tmp_path / "state.pt"))


# --- Fast-SCNN, row by row of the paper's table


class Written:
    """The network in functions; takes the tensors of a state_dict in order."""

    def __init__(self, network: FastSCNN):
        self.state = network.state_dict()

    def conv(self, key: str, x: Tensor, stride: int = 1, groups: int = 1) -> Tensor:
        weight = self.state[f"{key}.weight"]
        bias = self.state.get(f"{key}.bias")
        return F.conv2d(x, weight, bias, stride, weight.shape[2] // 2, groups=groups)

    def norm(self, key: str, x: Tensor) -> Tensor:
        mean, var, weight, bias = (
            self.state[f"{key}.{name}"].view(1, -1, 1, 1)
            for name in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def conv_bn(self, key: str, x: Tensor, stride: int = 1, groups: int = 1) -> Tensor:
        return self.norm(f"{key}.1", self.conv(f"{key}.0", x, stride, groups))

    def dsconv(self, first: str, second: str, x: Tensor, stride: int = 1) -> Tensor:
        x = self.conv_bn(first, x, stride, x.shape[1]).relu()
        return self.conv_bn(second, x).relu()

    def bottleneck(self, key: str, x: Tensor, stride: int) -> Tensor:
        y = self.conv_bn(f"{key}.layers.0", x).relu()
        assert y.shape[1] == 6 * x.shape[1]
        y = self.conv_bn(f"{key}.layers.1", y, stride, y.shape[1]).relu()
        y = self.conv_bn(f"{key}.layers.2", y)
        return x + y if y.shape == x.shape else y

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1).double()
        std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1).double()
        x = self.conv_bn("higher.0", (images - mean) / std, 2).relu()
        x = self.dsconv("higher.1", "higher.2", x, 2)
        higher = self.dsconv("higher.3", "higher.4", x, 2)
        outputs = {"higher": higher}

        x = higher
        for stage, stride in enumerate([2, 2, 1]):
            for block in range(3):
                key = f"stages.{stage}.{block}"
                x = self.bottleneck(key, x, 1 if block else stride)
            outputs[f"stages.{stage}"] = x

        levels = [x]
        for part, bins in enumerate([1, 2, 3, 6]):
            y = self.conv_bn(f"pooled.parts.{part}", F.adaptive_avg_pool2d(x, bins)).relu()
            levels.append(bilinear(y, x))
        outputs["pooled"] = self.conv_bn("pooled.out", torch.cat(levels, 1)).relu()

        low = bilinear(outputs["pooled"], higher)
        low = self.conv_bn("fusion.depthwise", low, groups=128).relu()
        outputs["fusion"] = (
            self.conv_bn("fusion.low", low) + self.conv_bn("fusion.high", higher)
        ).relu()

        x = self.dsconv("head.0", "head.1", outputs["fusion"])
        x = self.dsconv("head.2", "head.3", x)
        outputs["logits"] = self.conv("head.5", x)
        for aux in ("higher", "pooled"):
            y = self.conv_bn(f"aux_{aux}.0", outputs[aux]).relu()
            outputs[f"aux_{aux}"] = self.conv(f"aux_{aux}.2", y)
        return outputs


def bilinear(x: Tensor, like: Tensor) -> Tensor:
    """Pixel by pixel: centres on centres, what lies outside is the border's."""
    for dim in (2, 3):
        size = x.shape[dim]
        target = like.shape[dim]
        place = ((torch.arange(target).double() + 0.5) * size / target - 0.5).clamp(0, size - 1)
        low = place.floor().long()
        high = (low + 1).clamp(max=size - 1)
        shape = (-1, 1) if dim == 2 else (-1,)
        share = (place - low).view(shape)
        x = x.index_select(dim, low) * (1 - share) + x.index_select(dim, high) * share
    return x


@pytest.mark.parametrize("size", [(96, 160), (256, 192), (75, 101)])
def test_fast_scnn_as_written_out(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    network = lively(FastSCNN(NAMES)).double().eval()
    images = torch.rand(2, 3, *size).double()
    theirs = Written(network)(images)
    taps = ["higher", "stages.0", "stages.1", "stages.2", "pooled", "fusion"]
    mine = feats_of(network, taps, images)
    with torch.no_grad():
        preds = dict(zip(["logits", "aux_higher", "aux_pooled"], network(images), strict=True))
    assert theirs.keys() == {*mine, *preds}
    for name, tensor in {**mine, **preds}.items():
        what = "Fast-SCNN: taps and logits, relative"
        witness(what, "written out in functions", relative(tensor, theirs[name]), BOUND)


def lively(network: Segmenter) -> nn.Module:
    """With statistics and offsets of its own in every BatchNorm."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
    return network
