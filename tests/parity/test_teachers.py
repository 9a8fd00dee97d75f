"""Teachers of timm and transformers: the maps that are tapped are the networks' own, to the bit.

Both sides run in one process, beside the package; the weights are random, and go through a file.
"""

import json
from pathlib import Path

import pytest
from oracle import oracle

from tests.conftest import ROOT
from tests.docs.pages import blocks

pytestmark = pytest.mark.parity

# argv: the repository, a folder, a name, size of images, prefix
BOTH = """
import json, sys
import torch

root, folder, name = sys.argv[1:4]
size, prefix = map(int, sys.argv[4:6])
sys.path[:0] = [root, folder]
from kdmini.distill.taps import feats_of
from kdmini.teachers import Frozen

torch.manual_seed(0)
images = torch.rand(2, 3, 64, 64)
mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
resized = images
if size != 64:
    resized = torch.nn.functional.interpolate(images, (size, size), mode="bilinear", antialias=True)
normalised = (resized - mean) / std

def report(teacher, theirs):
    # theirs: tap -> map
    feats = feats_of(teacher, [f"network.{tap}" for tap in theirs], images)
    rows = []
    for tap, feat in theirs.items():
        ours = feats[f"network.{tap}"]
        rows.append([tap, list(ours.shape), torch.equal(ours, feat), float(ours.std())])
    print(json.dumps(rows))
"""

TIMM = """
import timm
from safetensors.torch import save_file

settings = {"model_name": name, **({"dynamic_img_size": True} if "dinov2" in name else {})}
save_file(timm.create_model(**settings).state_dict(), f"{folder}/weights.safetensors")
torch.manual_seed(1)
network = {"build": "timm:create_model", **settings}
teacher = Frozen(network, f"{folder}/weights.safetensors", imgsz=size, prefix=prefix)
alone = timm.create_model(**settings, checkpoint_path=f"{folder}/weights.safetensors").eval()
with torch.no_grad():
    if "vit" in name:
        last, maps = alone.forward_intermediates(
            normalised, indices=[3, 11], norm=False, output_fmt="NCHW"
        )
        side = maps[0].shape[2]
        names = ["blocks.3", "blocks.11", "norm"]
        maps = [*maps, last[:, prefix:].transpose(1, 2).reshape(2, -1, side, side)]
    else:
        names = ["layer2", "layer4"]
        maps = alone.forward_intermediates(normalised, indices=[2, 4], intermediates_only=True)
report(teacher, dict(zip(names, maps)))
"""

TRANSFORMERS = """
import dino
from transformers import (
    AutoModel, Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel,
    DINOv3ViTConfig, DINOv3ViTModel,
)

small = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
networks = {
    "dinov2": (Dinov2Config(**small), Dinov2Model, "encoder.layer", "layernorm"),
    "dinov2 with registers": (
        Dinov2WithRegistersConfig(**small, patch_size=14),
        Dinov2WithRegistersModel, "encoder.layer", "layernorm",
    ),
    "dinov3": (
        DINOv3ViTConfig(**small, intermediate_size=64, num_register_tokens=4),
        DINOv3ViTModel, "model.layer", "norm",
    ),
}
config, kind, layers, norm = networks[name]
kind(config).save_pretrained(folder)  # as published: config.json and model.safetensors
dino.save(folder, f"{folder}/dino.pt")
torch.manual_seed(1)
network = {"build": "dino:make", "folder": folder}
teacher = Frozen(network, f"{folder}/dino.pt", imgsz=size, prefix=prefix)
alone = AutoModel.from_pretrained(folder, local_files_only=True).eval()
with torch.no_grad():
    out = alone(normalised, output_hidden_states=True)
side = size // config.patch_size
tokens = {f"{layers}.1": out.hidden_states[2], norm: out.last_hidden_state}
report(teacher, {
    tap: feat[:, prefix:].transpose(1, 2).reshape(2, -1, side, side)
    for tap, feat in tokens.items()
})
"""


def check(rows: list[list], channels: int, side: int) -> None:
    for tap, _, equal, deviation in rows:
        assert equal, tap
        assert deviation > 0
    assert rows[-1][1] == [2, channels, side, side]


@pytest.mark.parametrize(
    "name, size, prefix, channels, side",
    [
        ("resnet50", 64, 1, 2048, 2),
        ("vit_small_patch14_dinov2", 56, 1, 384, 4),
        ("vit_small_patch14_reg4_dinov2", 56, 5, 384, 4),
        ("vit_small_patch16_dinov3", 64, 5, 384, 4),
    ],
)
def test_timm(name: str, size: int, prefix: int, channels: int, side: int, tmp_path: Path) -> None:
    text = oracle(BOTH + TIMM, ROOT, tmp_path, name, size, prefix, version="timm")
    check(json.loads(text.splitlines()[-1]), channels, side)


@pytest.mark.parametrize(
    "name, size, prefix, side",
    [("dinov2", 56, 1, 4), ("dinov2 with registers", 56, 5, 4), ("dinov3", 64, 5, 4)],
)
def test_transformers_by_the_file_of_the_page(
    name: str, size: int, prefix: int, side: int, tmp_path: Path
) -> None:
    page = (ROOT / "docs/own.md").read_text()
    [dino] = [block for block in blocks(page, "python") if block.startswith("# dino.py")]
    (tmp_path / "dino.py").write_text(dino)
    text = oracle(BOTH + TRANSFORMERS, ROOT, tmp_path, name, size, prefix, version="transformers")
    check(json.loads(text.splitlines()[-1]), 32, side)
