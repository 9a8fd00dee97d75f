"""What the classifiers share: the loss written out, scores, folding, weight files."""

from pathlib import Path

import pytest
import torch

from kdmini.checkpoint import save_best
from kdmini.classification.classifier import Classifier
from kdmini.classification.resnet import CATEGORIES, ResNet
from kdmini.classification.wide_resnet import WideResNet
from kdmini.contracts import UserError

NAMES = ["cat", "dog", "fish"]


def small(**settings) -> WideResNet:
    torch.manual_seed(0)
    return WideResNet(NAMES, depth=10, **settings)


# --- loss and scores


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_sum_over_the_parts_written_out(smoothing: float) -> None:
    torch.manual_seed(1)
    logits = torch.randn(4, 3, dtype=torch.float64)
    labels = torch.tensor([[0, 1, 1, 2], [2, 2, 2, 2], [1, 0, 0, 0], [0, 1, 2, 0]])
    share = torch.rand(4, 4, dtype=torch.float64)
    share = share / share.sum(1, keepdim=True)
    expected = 0.0
    for n in range(4):
        total = sum(logits[n, k].exp().item() for k in range(3))
        logs = [logits[n, k].item() - torch.tensor(total).log().item() for k in range(3)]
        for j in range(4):
            own = -logs[labels[n, j]]
            alike = -sum(logs) / 3
            part = (1 - smoothing) * own + smoothing * alike
            expected += share[n, j].item() * part / 4
    network = small(label_smoothing=smoothing)
    loss = network.loss(logits, {"labels": labels, "share": share})
    assert loss.keys() == {"ce"}
    assert loss["ce"].item() == pytest.approx(expected, rel=1e-6)


def test_scores_sum_to_one_and_maps_have_one_cell() -> None:
    network = small().eval()
    preds = network(torch.rand(2, 3, 32, 32))
    scores = torch.stack([one["scores"] for one in network.decode(preds)])
    torch.testing.assert_close(scores, preds.softmax(1))
    (maps,) = network.class_maps(preds)
    assert maps.shape == (2, 3, 1, 1)
    assert torch.equal(maps[:, :, 0, 0], preds)


def test_a_fresh_head_reads_the_last_of_its_maps() -> None:
    network = small()
    head = network.make_head([4, 8])
    feats = [torch.rand(2, 4, 8, 8), torch.rand(2, 8, 4, 4)]
    preds = head(feats)
    targets = {"labels": torch.tensor([[0], [2]]), "share": torch.ones(2, 1)}
    assert network.loss(preds, targets)["ce"].isfinite()
    torch.testing.assert_close(head([0 * feats[0], feats[1]]), preds)


def test_red_green_and_blue_are_brought_to_those_of_imagenet() -> None:
    network = small().eval()
    grey = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    zeros = network.fc(network.body(torch.zeros(1, 3, 32, 32)).mean((2, 3)))
    torch.testing.assert_close(network(grey), zeros)


# --- folding


@pytest.mark.parametrize("make", [small, lambda: ResNet(NAMES), lambda: ResNet(NAMES, 50, "cifar")])
def test_a_folded_copy_says_the_same(make) -> None:
    network = make()
    images = torch.rand(2, 3, 32, 32)
    for _ in range(5):
        network(images)  # statistics that are not those of the start
    network.eval()
    before = network(images)
    norms = sum(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())
    network.fold()
    left = sum(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())
    assert left <= norms / 2 + 1
    torch.testing.assert_close(network(images), before, rtol=1e-4, atol=1e-4)


# --- weight files


@pytest.fixture
def best(tmp_path: Path) -> Path:
    path = tmp_path / "best.pt"
    save_best(path, small(), imgsz=32, epoch=0, fitness=0.5)
    return path


def assert_same_body(one: Classifier, other: Classifier) -> None:
    for key, value in one.state_dict().items():
        if not key.startswith("fc."):
            assert torch.equal(other.state_dict()[key], value), key


def test_a_best_pt_comes_back(best: Path, capsys) -> None:
    again = WideResNet(NAMES, depth=10, weights=str(best))
    network = small()
    assert_same_body(network, again)
    assert torch.equal(again.fc.weight, network.fc.weight)
    assert again.unread == []
    assert capsys.readouterr().out == ""


def test_other_classes_are_taken_by_name_and_the_rest_is_said(best: Path, capsys) -> None:
    again = WideResNet(["bird", "fish", "cat"], depth=10, weights=str(best))
    network = small()
    assert_same_body(network, again)
    assert torch.equal(again.fc.weight[1:], network.fc.weight[[2, 0]])
    assert torch.equal(again.fc.bias[1:], network.fc.bias[[2, 0]])
    assert again.unread == ["bird"]
    said = "best.pt: the head has 2 of 3 classes by name; new: 'bird'\n"
    assert capsys.readouterr().out == said


def test_the_best_pt_of_another_network_is_refused(best: Path) -> None:
    with pytest.raises(UserError, match=r"best\.pt is of .*'width': 1.* the config says .*2"):
        WideResNet(NAMES, depth=10, width=2, weights=str(best))


@pytest.mark.parametrize("names", [None, "cat", [1, 2, 3], ["cat"], ["a", "b", "c", "d"]])
def test_names_that_are_none_are_refused(best: Path, names) -> None:
    content = torch.load(best, weights_only=True)
    torch.save({**content, "names": names}, best)
    with pytest.raises(UserError, match="does not name the classes of its head"):
        WideResNet(NAMES, depth=10, weights=str(best))


def test_a_file_of_torchvision_is_read_and_its_head_cut_by_name(tmp_path: Path, capsys) -> None:
    from torchvision.models import resnet18

    torch.manual_seed(2)
    theirs = resnet18()
    path = tmp_path / "resnet18.pth"
    torch.save(theirs.state_dict(), path)
    names = ["lemon", "oat milk", "banana"]
    network = ResNet(names, weights=str(path)).eval()
    rows = [CATEGORIES.index("lemon"), CATEGORIES.index("banana")]
    assert len(CATEGORIES) == 1000
    assert "resnet18.pth: the head has 2 of 3 classes by name; new: 'oat milk'" in (
        capsys.readouterr().out
    )
    images = torch.rand(2, 3, 64, 64)
    expected = theirs.eval()((images - network.mean) / network.std)[:, rows]
    torch.testing.assert_close(network(images)[:, [0, 2]], expected)


def test_a_file_without_names_leaves_the_head_fresh(tmp_path: Path, capsys) -> None:
    other = ResNet([f"class {row}" for row in range(7)])
    tensors = other.state_dict()
    for content in (tensors, {k: v for k, v in tensors.items() if not k.startswith("fc.")}):
        path = tmp_path / "resnet18.pth"
        torch.save(content, path)
        network = ResNet(NAMES, weights=str(path))
        assert_same_body(other, network)
        assert network.unread == NAMES
        assert "the head has 0 of 3 classes by name" in capsys.readouterr().out


def test_a_file_of_another_depth_or_stem_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "resnet18.pth"
    torch.save(ResNet(NAMES).state_dict(), path)
    with pytest.raises(UserError, match=r"resnet18\.pth does not fit .*conv1\.weight"):
        ResNet(NAMES, stem="cifar", weights=str(path))
    with pytest.raises(UserError, match=r"resnet18\.pth does not fit .*lacks"):
        ResNet(NAMES, depth=34, weights=str(path))
    with pytest.raises(UserError, match=r"resnet18\.pth has another width in fc\.weight"):
        ResNet(NAMES, depth=50, weights=str(path))
