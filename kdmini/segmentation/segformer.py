"""SegFormer, b0 to b5: a pyramid of transformers without position codes, and a head of MLPs.

Source: Xie et al., "SegFormer: Simple and Efficient Design for Semantic Segmentation with
Transformers", NeurIPS 2021. With other `ratios` the encoder is PVTv2's (Wang et al., "PVT
v2: Improved Baselines with Pyramid Vision Transformer", CVMJ 2022).

Legend: N images, H W cells, L = H * W tokens, P positions of the keys, C channels, K classes.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from kdmini.bounds import Range, ShareBelowOne
from kdmini.segmentation import segformer_files
from kdmini.segmentation.decoder import Decoder
from kdmini.segmentation.maps import Segmenter
from kdmini.segmentation.segformer_files import SIZES

HEADS = (1, 2, 5, 8)
REDUCTIONS = (8, 4, 2, 1)  # sides of a cell of keys, so that those of every stage are 1/32
EPS = 1e-6  # of LayerNorm in a block and after a stage; elsewhere it is torch's

Size = Sequence[int]  # H, W
Ratio = Annotated[int, Range(1, 16)]


class SegFormer(Segmenter):
    """The network; its taps are stages.0 to stages.3 (strides 4 to 32) and decoder, the map
    before the classes (stride 4).

    A stage ends in LayerNorm, after which all cells are about as strong: the attention map of
    stages.I is even, and teaches nothing. That of stages.I.before_norm is not.
    stages.I.blocks.J.attn.graph gives the attention (N, heads, L, P) of a block; what it
    costs is paid only where it is tapped.
    `preds`: [logits (N, K, H / 4, W / 4)].
    size: of the network, b0 to b5.
    ratios: width of the MLPs over that of the tokens, in each of the four stages;
        [8, 8, 4, 4] for the weights of PVTv2 b0 to b4.
    weights: a file: a best.pt, or one of transformers, of the authors or of timm's PVTv2, or
        {path: ..., classes: by_name | keep} where the classes differ: `by_name` carries
        rows over by class name, `keep` builds the file's own. Class names are those of the
        file or of a config.json beside it; else give them as `names: [...]`. An encoder by
        itself leaves the head as initialised.
    drop_path: share of the images that skip a branch of the last block in training; it grows
        from 0 at the first.
    """

    def __init__(
        self,
        names: list[str],
        size: Literal["b0", "b1", "b2", "b3", "b4", "b5"] = "b0",
        ratios: tuple[Ratio, Ratio, Ratio, Ratio] = (4, 4, 4, 4),
        weights: str | dict[str, Any] | None = None,
        drop_path: ShareBelowOne = 0.1,
    ):
        file = None
        if weights:
            file = segformer_files.read(weights, size, ratios)
            if file.classes == "keep":
                names = segformer_files.kept_names(file)

        super().__init__(names)
        self.card: dict[str, Any] = {
            "network": "SegFormer",
            "size": size,
            "ratios": list(ratios),
            "license": file.license if file else "",
        }
        depths, dims, width = SIZES[size]
        # linear over all blocks
        rates = [drop_path * block / (sum(depths) - 1) for block in range(sum(depths))]
        self.stages = nn.ModuleList()
        for i, depth in enumerate(depths):
            channels = dims[i - 1] if i else 3
            stage_rates = [rates.pop(0) for _ in range(depth)]
            self.stages.append(Stage(i, channels, dims[i], ratios[i], stage_rates))
        self.decoder = Decoder(dims, width)
        self.dropout = nn.Dropout2d(0.1)  # of whole channels
        self.classifier = nn.Conv2d(width, len(self.names), 1)
        self.apply(initialise)
        nn.init.normal_(self.classifier.weight, std=0.01)  # as every class is as likely

        self.unread: list[str] = []  # classes of which the file has no row
        if file:
            state, self.unread = segformer_files.fit(file, self.state_dict(), self.names)
            self.load_state_dict(state)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N, 3, H, W) RGB 0..1 -> preds."""
        return [self.classifier(self.dropout(self._fused(images)))]

    def features(self, images: Tensor) -> None:
        """Runs all but the classifier, for the hooks."""
        self._fused(images)

    def _fused(self, images: Tensor) -> Tensor:
        x = self.normalised(images)
        feats = []
        for stage in self.stages:
            x = stage(x)
            feats.append(x)
        return self.decoder(feats)


def initialise(module: nn.Module) -> None:
    """As the authors' encoder: by the outputs of a convolution, alike for all linear layers."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def to_map(tokens: Tensor, size: Size) -> Tensor:
    """(N, L, C) -> (N, C, H, W)."""
    return tokens.mT.unflatten(2, size)


def to_tokens(feat: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, L, C)."""
    return feat.flatten(2).mT


class Stage(nn.Module):
    """A patch embedding and blocks: (N, C, H, W) of the stage before, or images -> a map at
    half the size, of images at a quarter.

    rates: share of the images that skip a branch, of each block.
    """

    def __init__(self, number: int, channels: int, dim: int, ratio: int, rates: Sequence[float]):
        super().__init__()
        self.embed = PatchEmbedding(channels, dim, *((3, 2) if number else (7, 4)))
        self.blocks = nn.ModuleList(
            Block(dim, HEADS[number], REDUCTIONS[number], ratio, rate) for rate in rates
        )
        self.before_norm = nn.Identity()  # a place for a tap
        self.norm = nn.LayerNorm(dim, EPS)

    def forward(self, x: Tensor) -> Tensor:
        tokens, size = self.embed(x)
        for block in self.blocks:
            tokens = block(tokens, size)
        self.before_norm(to_map(tokens, size))
        return to_map(self.norm(tokens), size)


class PatchEmbedding(nn.Module):
    """Overlapping patches: (N, channels, H, W) -> tokens (N, L, dim), and their H and W."""

    def __init__(self, channels: int, dim: int, kernel: int, stride: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel, stride, kernel // 2)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Size]:
        patches = self.proj(x)
        return self.norm(to_tokens(patches)), patches.shape[2:]


class Block(nn.Module):
    """Attention and MLP, each added to what it reads, in training not for `rate` of the images."""

    def __init__(self, dim: int, heads: int, reduction: int, ratio: int, rate: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, EPS)
        self.attn = Attention(dim, heads, reduction)
        self.norm2 = nn.LayerNorm(dim, EPS)
        self.mlp = MixMLP(dim, ratio * dim)
        self.drop_path = StochasticDepth(rate, "row")

    def forward(self, tokens: Tensor, size: Size) -> Tensor:
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens), size))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens), size))


class Attention(nn.Module):
    """Of all tokens to keys and values on a grid `reduction` times coarser."""

    def __init__(self, dim: int, heads: int, reduction: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.graph = nn.Identity()  # a place for a tap
        self.sr = None
        if reduction > 1:
            self.sr = nn.Conv2d(dim, dim, reduction, reduction)
            self.sr_norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor, size: Size) -> Tensor:
        coarse = tokens
        if self.sr is not None:
            coarse = self.sr_norm(to_tokens(self.sr(to_map(tokens, size))))  # (N, P, C)

        q = self._by_head(self.q(tokens))
        k, v = map(self._by_head, self.kv(coarse).chunk(2, dim=2))
        if self.graph._forward_hooks:  # scaled_dot_product_attention keeps no weights
            scores = q @ k.mT / math.sqrt(q.shape[3])
            self.graph(scores.softmax(dim=3))
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))

    def _by_head(self, x: Tensor) -> Tensor:
        """(N, L, C) -> (N, heads, L, C / heads)."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class MixMLP(nn.Module):
    """An MLP whose hidden tokens see their neighbours, and the border, as a position code."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, tokens: Tensor, size: Size) -> Tensor:
        hidden = to_map(self.fc1(tokens), size)
        hidden = to_tokens(self.dwconv(hidden))
        return self.fc2(F.gelu(hidden))
