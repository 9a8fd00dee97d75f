"""ResNet-18, -34 and -50 of torchvision, by its keys.

Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016. For images of 32
to 64 pixels the stem of its CIFAR networks is usual: one convolution of stride 1.
Legend: N images, S image size.
"""

from typing import Literal

from torch import Tensor, nn
from torchvision.models import ResNet18_Weights, resnet

from kdmini.bounds import ShareBelowOne
from kdmini.classification.classifier import Classifier

CHILDREN = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "fc")
CATEGORIES = ResNet18_Weights.DEFAULT.meta["categories"]  # of ImageNet, the same for all depths


class ResNet(Classifier):
    """The network; its taps are layer1 to layer4, of strides 4 to 32, with `stem: cifar` 1 to 8.

    `preds`: logits (N, K).
    depth: layers with weights.
    stem: `imagenet`, a convolution 7x7 of stride 2 and a pooling of stride 2; or `cifar`, a
        convolution 3x3 of stride 1, for small images.
    weights: a best.pt of this network, or a file of torchvision's for this depth, whose head is
        cut to the classes by name.
    label_smoothing: share of each target that goes to all classes alike.
    """

    def __init__(
        self,
        names: list[str],
        depth: Literal[18, 34, 50] = 18,
        stem: Literal["imagenet", "cifar"] = "imagenet",
        weights: str | None = None,
        label_smoothing: ShareBelowOne = 0.0,
    ):
        super().__init__(names, label_smoothing)
        self.card = {"network": "ResNet", "depth": depth, "stem": stem}
        network = getattr(resnet, f"resnet{depth}")(num_classes=len(self.names))
        if stem == "cifar":
            network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
            network.maxpool = nn.Identity()
        for name in CHILDREN:
            self.add_module(name, network.get_submodule(name))
        if weights:
            self.read(weights, CATEGORIES)

    def body(self, images: Tensor) -> Tensor:
        """(N, 3, S, S), normalised -> (N, C, H, W) of layer4."""
        x = images
        for name in CHILDREN[:-1]:
            x = self.get_submodule(name)(x)
        return x
