"""Segmentation on a pretended card: SegFormer into Fast-SCNN and into VMamba."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.cuda.scenario import MASKED
from tests.cuda.test_card import in_steps

Found = dict[str, Any]


@pytest.fixture(scope="module")
def played(play: Callable[..., list[Found]]) -> dict[str, Found]:
    return dict(zip(MASKED, play(*({"student": name} for name in MASKED)), strict=True))


@pytest.mark.parametrize("name", MASKED)
def test_a_run_of_masks_ends_and_its_steps_make_nobody_wait(
    played: dict[str, Found], name: str
) -> None:
    found = played[name]
    assert found["error"] == ""
    assert found["kernels"]["step"] > 100
    assert found["mixed"] == {}
    assert found["unlike"] == []
    assert in_steps(found["waits"]) == {}
    assert sum(found["waits"]["look"].values()) == 1


@pytest.mark.parametrize("name", MASKED)
def test_a_step_of_masks_copies_nothing_from_pageable_memory(
    played: dict[str, Found], name: str
) -> None:
    found = played[name]
    assert in_steps(found["pageable"]) == {}
    assert "evaluation" not in found["pageable"]
    assert found["pageable"]["build"]  # it would be seen


@pytest.mark.parametrize("name", MASKED)
def test_an_evaluation_of_masks_waits_once_a_batch(played: dict[str, Found], name: str) -> None:
    """For the logits of all its images: two images, then one."""
    assert sum(played[name]["waits"]["evaluation"].values()) == 2


@pytest.mark.parametrize("name", MASKED)
def test_convolutions_and_linear_layers_of_masks_are_computed_in_bfloat16(
    played: dict[str, Found], name: str
) -> None:
    types = in_steps(played[name]["types"])
    operators = {operator for counts in types.values() for operator in counts}
    assert {"convolution bfloat16", "convolution_backward bfloat16"} <= operators
    assert {operator for operator in operators if "convolution" in operator} == {
        "convolution bfloat16",
        "convolution_backward bfloat16",
    }
