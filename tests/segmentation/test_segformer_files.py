"""SegFormer's weight files: whose names they have, class rows, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kdmini.checkpoint import save_best
from kdmini.contracts import UserError
from kdmini.segmentation.fast_scnn import FastSCNN
from kdmini.segmentation.segformer import SegFormer
from kdmini.segmentation.segformer_names import (
    AUTHORS,
    NAMINGS,
    OURS,
    PVT_V2,
    TRANSFORMERS,
    TRANSFORMERS_5_24,
    Naming,
)
from kdmini.tools.export_safetensors import to_safetensors

NAMES = ["wall", "airplane", "cat"]
FOREIGN = [naming for naming in NAMINGS if naming is not OURS]
by_title = pytest.mark.parametrize("naming", FOREIGN, ids=lambda naming: naming.title)
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def network() -> SegFormer:
    torch.manual_seed(0)
    network = SegFormer(NAMES)
    for value in network.parameters():
        torch.nn.init.normal_(value)
    return network


def renamed(network: SegFormer, naming: Naming) -> State:
    """Its tensors under the names of others, in as many pieces."""
    state = {}
    for key, value in network.state_dict().items():
        if naming is PVT_V2 and not key.startswith("stages."):
            continue
        theirs = naming.keys_of(key)
        pieces = value.chunk(len(theirs)) if len(theirs) > 1 else [value]
        state |= {name: piece.clone() for name, piece in zip(theirs, pieces, strict=True)}
    return state


def saved(folder: Path, state: State, names: list[str] | None = None) -> str:
    """As a .pt file, with a config.json that names the classes."""
    path = folder / "f.pt"
    torch.save(state, path)
    if names:
        config = {"id2label": {str(row): name for row, name in enumerate(names)}}
        (folder / "config.json").write_text(json.dumps(config))
    return str(path)


def assert_same(network: SegFormer, other: SegFormer, prefix: str = "") -> None:
    theirs = other.state_dict()
    for key, value in network.state_dict().items():
        if key.startswith(prefix):
            assert torch.equal(value, theirs[key]), key


# --- names

KEYS = [
    (
        TRANSFORMERS,
        "stages.1.embed.norm.bias",
        "segformer.encoder.patch_embeddings.1.layer_norm.bias",
    ),
    (TRANSFORMERS, "stages.0.norm.weight", "segformer.encoder.layer_norm.0.weight"),
    (TRANSFORMERS, "decoder.linear.3.bias", "decode_head.linear_c.3.proj.bias"),
    (
        TRANSFORMERS,
        "stages.2.blocks.1.attn.kv.weight",
        "segformer.encoder.block.2.1.attention.self.key.weight "
        "segformer.encoder.block.2.1.attention.self.value.weight",
    ),
    (
        TRANSFORMERS_5_24,
        "stages.0.blocks.1.attn.sr.weight",
        "segformer.stages.0.blocks.1.attention.sequence_reduction.sequence_reduction.weight",
    ),
    (AUTHORS, "stages.0.embed.proj.weight", "patch_embed1.proj.weight"),
    (AUTHORS, "stages.1.blocks.0.attn.kv.weight", "block2.0.attn.kv.weight"),
    (AUTHORS, "stages.3.blocks.1.mlp.dwconv.bias", "block4.1.mlp.dwconv.dwconv.bias"),
    (AUTHORS, "stages.2.norm.bias", "norm3.bias"),
    (AUTHORS, "decoder.linear.0.weight", "decode_head.linear_c1.proj.weight"),
    (AUTHORS, "decoder.fuse.norm.running_var", "decode_head.linear_fuse.bn.running_var"),
    (PVT_V2, "stages.0.embed.proj.weight", "patch_embed.proj.weight"),
    (PVT_V2, "stages.2.embed.norm.weight", "stages.2.downsample.norm.weight"),
    (PVT_V2, "stages.0.blocks.1.attn.sr_norm.bias", "stages.0.blocks.1.attn.norm.bias"),
    (PVT_V2, "stages.0.blocks.1.mlp.dwconv.bias", "stages.0.blocks.1.mlp.dwconv.bias"),
]


@pytest.mark.parametrize("naming, ours, theirs", KEYS)
def test_what_the_others_call_it(naming: Naming, ours: str, theirs: str) -> None:
    assert naming.keys_of(ours) == theirs.split()


@by_title
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_files_of_all_kinds_are_read(
    tmp_path: Path, network: SegFormer, naming: Naming, suffix: str
) -> None:
    path = tmp_path / f"f.{suffix}"
    state = renamed(network, naming)
    if suffix == "pt":
        torch.save(state, path)
    else:
        path.write_bytes(to_safetensors(state, {}))
    read = SegFormer(NAMES, weights={"path": str(path), "names": NAMES})
    assert_same(network, read, "stages." if naming is PVT_V2 else "")
    assert read.unread == (NAMES if naming is PVT_V2 else [])


@by_title
def test_a_line_says_whose_it_is_and_on_what_terms(
    tmp_path: Path, network: SegFormer, naming: Naming, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(tmp_path, renamed(network, naming), NAMES)
    read = SegFormer(NAMES, weights=path)
    line = capsys.readouterr().out.splitlines()[0]
    terms = "Apache-2.0" if naming is PVT_V2 else "research or evaluation only, non-commercial"
    assert f"{path}: SegFormer b0, a {naming.title}" in line
    assert terms in line
    assert terms in read.card["license"]


def test_the_terms_go_with_what_was_trained_from_it(tmp_path: Path, network: SegFormer) -> None:
    read = SegFormer(NAMES, weights=saved(tmp_path, renamed(network, TRANSFORMERS), NAMES))
    best = tmp_path / "best.pt"
    save_best(best, read, imgsz=64, epoch=0, fitness=0.5)
    again = SegFormer(NAMES, weights=str(best))
    assert again.card == read.card
    assert "non-commercial" in again.card["license"]
    assert_same(network, again)
    assert again.unread == []


def test_the_whole_network_of_the_authors_with_what_their_framework_adds(
    tmp_path: Path, network: SegFormer
) -> None:
    state = {}
    for key, value in renamed(network, AUTHORS).items():
        state[key if key.startswith("decode_head.") else f"backbone.{key}"] = value
    state["decode_head.conv_seg.weight"] = torch.rand(3, 4, 1, 1)
    path = tmp_path / "f.pth"
    torch.save({"meta": {"iter": 160_000}, "state_dict": state}, path)
    assert_same(network, SegFormer(NAMES, weights={"path": str(path), "names": NAMES}))


@pytest.mark.parametrize("naming, head", [(TRANSFORMERS, "classifier"), (AUTHORS, "head")])
def test_an_encoder_leaves_the_head_as_initialised_and_says_so(
    tmp_path: Path,
    network: SegFormer,
    naming: Naming,
    head: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    state = renamed(network, naming)
    state = {key: value for key, value in state.items() if not key.startswith("decode_head")}
    state |= {f"{head}.weight": torch.rand(1000, 256), f"{head}.bias": torch.rand(1000)}
    read = SegFormer(["dog"], weights=saved(tmp_path, state))
    assert_same(network, read, "stages.")
    assert read.unread == ["dog"]
    assert "an encoder only, so decoder and classes begin as initialised" in capsys.readouterr().out


# --- classes


def test_rows_follow_their_names_and_their_synonyms(
    tmp_path: Path, network: SegFormer, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(tmp_path, renamed(network, TRANSFORMERS), NAMES)
    names = ["unicorn", "cat", "aeroplane"]
    read = SegFormer(names, weights={"path": path, "classes": "by_name"})
    for mine, theirs in [(1, 2), (2, 1)]:
        assert torch.equal(read.classifier.weight[mine], network.classifier.weight[theirs])
        assert read.classifier.bias[mine] == network.classifier.bias[theirs]
    assert read.classifier.weight[0].abs().max() < 0.1  # as initialised; the file's are about 1
    assert_same(read, network, "decoder.")
    assert read.unread == ["unicorn"]
    assert "2 of 3 classes carried over by name; new: 'unicorn'" in capsys.readouterr().out


def test_a_teacher_keeps_its_classes(tmp_path: Path, network: SegFormer) -> None:
    path = saved(tmp_path, renamed(network, TRANSFORMERS), NAMES)
    read = SegFormer(["dog"], weights={"path": path, "classes": "keep"})
    assert read.names == NAMES
    assert_same(network, read)


def test_without_names_a_fresh_head_has_to_be_asked_for(
    tmp_path: Path, network: SegFormer, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(tmp_path, renamed(network, TRANSFORMERS), ["LABEL_0", "LABEL_1", "LABEL_2"])
    for classes in (None, "keep"):
        with pytest.raises(UserError, match=r"names none of its 3 classes: put its config.json"):
            SegFormer(NAMES, weights={"path": path, "classes": classes})
    read = SegFormer(["dog"], weights={"path": path, "classes": "by_name"})
    assert read.unread == ["dog"]
    assert_same(read, network, "decoder.")
    assert "so all begin as initialised" in capsys.readouterr().out


def test_other_classes_need_a_decision(tmp_path: Path, network: SegFormer) -> None:
    path = saved(tmp_path, renamed(network, TRANSFORMERS), NAMES)
    with pytest.raises(
        UserError, match=r"only in the data: 'dog'.*classes: by_name.*classes: keep"
    ):
        SegFormer(["dog"], weights=path)


def test_a_config_json_of_something_else_is_passed_over(tmp_path: Path, network: SegFormer) -> None:
    path = saved(tmp_path, renamed(network, TRANSFORMERS), ["one", "two"])
    with pytest.raises(UserError, match="names none of its 3 classes"):
        SegFormer(NAMES, weights=path)


# --- what does not fit


def without(key: str) -> Callable[[State], Any]:
    return lambda state: state.pop(key)


def with_shape(key: str, *shape: int) -> Callable[[State], Any]:
    return lambda state: state.update({key: torch.rand(shape)})


BLOCK = "segformer.encoder.block.1.0"
FAULTS: dict[str, tuple[Callable[[State], Any], str]] = {
    "lacks": (
        without(f"{BLOCK}.attention.self.value.bias"),
        r"lacks 'segformer.encoder.block.1.0.attention.self.value.bias', so it is no SegFormer",
    ),
    "lacks a stage": (
        without("segformer.encoder.patch_embeddings.3.proj.weight"),
        r"lacks 'segformer.encoder.patch_embeddings.3.proj.weight'",
    ),
    "has more": (with_shape(f"{BLOCK}.gamma", 64), r"has unknown '\S+block.1.0.gamma'"),
    "has another shape": (
        with_shape(f"{BLOCK}.mlp.dense2.weight", 64, 255),
        r"has other shapes in '\S+block.1.0.mlp.dense2.weight'",
    ),
    "has uneven pieces": (
        with_shape(f"{BLOCK}.attention.self.key.weight", 60, 64),
        r"has other shapes in '\S+self.key.weight', '\S+self.value.weight'",
    ),
    "has no numbers": (
        lambda state: state[f"{BLOCK}.mlp.dense1.bias"].fill_(torch.nan),
        r"has NaN or infinity in '\S+mlp.dense1.bias'",
    ),
    "has a scalar": (
        with_shape("segformer.encoder.patch_embeddings.0.proj.weight"),
        "is damaged or no weight file",
    ),
    "has a head of another width": (
        with_shape("decode_head.classifier.weight", 3, 768, 1, 1),
        r"has other shapes in 'decode_head.classifier.weight'",
    ),
    "has more blocks": (
        with_shape("segformer.encoder.block.0.2.layer_norm_1.weight", 32),
        r"has \[3, 2, 2, 2\] blocks of \[32, 64, 160, 256\] channels, so it is no SegFormer b0 to",
    ),
    "is nothing of the kind": (
        lambda state: state.clear() or state.update(weight=torch.rand(1)),
        "is no SegFormer by its names: give a best.pt",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_refused_by_name(
    tmp_path: Path, network: SegFormer, fault: str
) -> None:
    spoil, message = FAULTS[fault]
    state = renamed(network, TRANSFORMERS)
    spoil(state)
    path = saved(tmp_path, state, NAMES)
    with pytest.raises(UserError, match=message) as caught:
        SegFormer(NAMES, weights=path)
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"size": "b1"}, "is a b0, the config says b1: change `size`"),
        (
            {"ratios": (8, 8, 4, 4)},
            r"of the ratios \[4, 4, 4, 4\], the config says \[8, 8, 4, 4\]: change `ratios`",
        ),
        ({"names": ["cat"]}, r"the file has 3 classes, the data 1"),
    ],
)
def test_a_file_of_another_network_is_refused(
    tmp_path: Path, network: SegFormer, settings: dict[str, Any], message: str
) -> None:
    path = tmp_path / "best.pt"
    save_best(path, network, imgsz=64, epoch=0, fitness=0.5)
    with pytest.raises(UserError, match=message):
        SegFormer(**({"names": NAMES, "weights": str(path)} | settings))


@pytest.mark.parametrize(
    "weights, message",
    [
        ({"classes": "keep"}, "weights: no `path`"),
        ({"path": "f.pt", "clases": "keep"}, "unknown key `clases`.*`classes`"),
        ({"path": "f.pt", "names": ["one"]}, "has 3 classes, `names` of weights has 1"),
    ],
)
def test_a_setting_that_is_none_is_refused_by_name(
    tmp_path: Path, network: SegFormer, weights: dict[str, Any], message: str
) -> None:
    if "path" in weights:
        weights = weights | {"path": saved(tmp_path, renamed(network, TRANSFORMERS))}
    with pytest.raises(UserError, match=message):
        SegFormer(NAMES, weights=weights)


def test_an_encoder_has_no_classes_to_keep(tmp_path: Path, network: SegFormer) -> None:
    path = saved(tmp_path, renamed(network, PVT_V2))
    with pytest.raises(UserError, match="is an encoder without classes to keep"):
        SegFormer(NAMES, weights={"path": path, "classes": "keep"})


def test_the_best_pt_of_another_network_is_called_that(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    save_best(path, FastSCNN(NAMES), imgsz=64, epoch=0, fitness=0.5)
    with pytest.raises(UserError, match=r"is the best\.pt of another network: give"):
        SegFormer(NAMES, weights=str(path))


def test_nothing_in_a_file_is_run(tmp_path: Path, network: SegFormer) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    state: dict[str, Any] = renamed(network, TRANSFORMERS)
    for content in (state | {"more": Payload()}, {"state_dict": Payload()}):
        path = tmp_path / "f.pt"
        torch.save(content, path)
        with pytest.raises(UserError, match="holds no tensors by name"):
            SegFormer(NAMES, weights=str(path))
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have
