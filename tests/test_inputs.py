"""The record of what a run reads: the same in every process, and what tells two apart."""

import hashlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from kdmini.data.digest import digest
from kdmini.detection.yolo11.model import YOLO11
from kdmini.distill.align import Align
from kdmini.distill.attention import AttentionTransfer
from kdmini.inputs import Inputs, differences, in_few_words


def of_set(*ids: str) -> Inputs:
    inputs = Inputs()
    targets = [{"id": name} for name in ids]
    digests = [f"size {i}x1" for i in range(len(ids))]
    inputs.add_set("data.train", SimpleNamespace(names=["a"], targets=targets, digests=digests))
    return inputs


def test_the_folder_of_all_images_may_be_moved_but_not_one_of_two() -> None:
    assert of_set("here/1", "here/2") == of_set("there/1", "there/2")
    assert of_set("VOC2007/1", "VOC2012/1") != of_set("VOC2007/1", "there/1")
    assert len(of_set("VOC2007/1", "VOC2012/1")) == 3


def test_the_code_of_terms_comes_in_one_order_whatever_theirs() -> None:
    terms = [Align({}), YOLO11(["a"], [0.5, 0.0625, 1024]), AttentionTransfer()]
    one = Inputs()
    other = Inputs()
    one.add_code(terms)
    other.add_code(reversed(terms))
    assert list(one.items()) == list(other.items())
    source = Path(__file__).parents[1] / "kdmini" / "distill" / "align.py"
    expected = hashlib.sha256(source.read_bytes()).hexdigest()[:12]
    assert one["code of kdmini.distill.align"] == expected


def test_code_without_a_file_is_passed_over() -> None:
    inputs = Inputs()
    inputs.add_code([object(), type("Typed", (nn.Module,), {"__module__": "nowhere"})()])
    assert inputs == {}


def test_one_number_of_the_weights_is_another() -> None:
    network = YOLO11(["a"], [0.5, 0.0625, 1024])
    one = Inputs()
    one.add_weights("teacher", network)
    with torch.no_grad():
        network.get_parameter("model.0.conv.weight")[0, 0, 0, 0] += 1e-3
    other = Inputs()
    other.add_weights("teacher", network)
    assert "teacher, weights was" in differences(one, other)[0]


@pytest.mark.parametrize(
    ("target", "same"),
    [
        ({"boxes": np.zeros((2, 4), np.float32), "id": "other"}, True),
        ({"boxes": np.zeros((4, 2), np.float32), "id": "x"}, False),
        ({"boxes": np.zeros((2, 4), np.float64), "id": "x"}, False),
        ({"boxes": np.zeros((2, 4), np.float32), "id": "x", "label": 3}, False),
        ({"boxes": np.zeros((2, 4), np.float32), "id": "x", "memo": [1, {"a": object()}]}, False),
    ],
)
def test_ground_truth_of_any_form(target: dict, same: bool) -> None:
    pixels = np.arange(6, dtype=np.int32)
    usual = {"id": "x", "boxes": np.zeros((2, 4), np.float32)}
    assert (digest(pixels, (2, 3), usual) == digest(pixels, (2, 3), target)) == same
    assert digest(pixels, (2, 3), target) == digest(pixels.copy(), (2, 3), dict(target))


def test_a_message_is_short_and_names_what_differs_alone() -> None:
    was = {"a": "size 2x3, pixels 1, truth 2", "b": "x", "c": "y", "d": "z", "e": "\x1b[31m" * 99}
    now = {"a": "size 2x4, pixels 1, truth 3", "b": "x"}
    lines = differences(was, now)
    assert lines[0] == "a was size 2x3, truth 2, is size 2x4, truth 3"
    assert lines[1] == "c was there, is not there"
    assert in_few_words(lines).endswith("; and 1 more")
    assert "\x1b" not in "".join(differences({"e": was["e"]}, {"e": "x"}))
    swapped = dict(reversed(was.items()))
    assert differences(was, swapped) == ["a was at another place in the order"]
