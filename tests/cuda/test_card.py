"""A run of train.py on a pretended card: nothing on the wrong device, in the wrong type or
layout, and nothing that makes the host wait.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cuda.conftest import ROOT, run

TERMS = sorted(path.stem for path in Path(ROOT / "configs/terms").glob("*.yaml"))
SELF = "self_teacher"
IN_HEAD = "cross_head"
PRECISIONS: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "float16": {"amp": "fp16"},
    "float32": {"amp": False},
}
RUNS: dict[str, dict[str, Any]] = {
    **PRECISIONS,
    "an older card": {"major": 7},
    "accumulated": {"accumulate": 2},
    "mapped": {"storage": "mapped"},
    "resumed": {"resume": True},
    "resumed in float16": {"resume": True, "amp": "fp16"},
    "two ranks": {"ranks": 2, "steps": 1},  # at the second step DDP would look at contents
    "every term": {
        "terms": [name for name in TERMS if name not in (SELF, IN_HEAD)],
        "taps": 3,
        "imgsz": 128,
    },
    "a term in the head": {"terms": [IN_HEAD], "taps": 0},
    "self-teacher": {"terms": [SELF], "taps": 3, "teacher": None},
    "without a teacher": {"teacher": None},
}
# an eigendecomposition asks cuSOLVER how it went
WAITING = ("kdmini/terms/affinity.py",)
LAYOUTS = 3  # convolutions of attention, whose input is made of a matrix product

Found = dict[str, Any]
Played = dict[str, Found]


@pytest.fixture(scope="module")
def played(play: Callable[..., list[Found]]) -> Played:
    return dict(zip(RUNS, play(*RUNS.values()), strict=True))


def in_steps(counts: dict[str, Any]) -> dict[str, Any]:
    """Those of the phases of a step and of its batch."""
    ours = ("step", "batch")
    return {phase: value for phase, value in counts.items() if phase.startswith(ours)}


@pytest.mark.parametrize("name", RUNS)
def test_it_runs_to_its_end(played: Played, name: str) -> None:
    """An operator that meets tensors of two devices would end it."""
    found = played[name]
    assert found["error"] == ""
    assert found["kernels"]["step"] > 100
    assert found["saves"] >= 3
    assert found["mixed"] == {}


@pytest.mark.parametrize("name", RUNS)
def test_a_step_makes_nobody_wait(played: Played, name: str) -> None:
    waits = in_steps(played[name]["waits"])
    places = {place for counts in waits.values() for place in counts}
    assert not [place for place in places if not any(term in place for term in WAITING)]


@pytest.mark.parametrize("name", RUNS)
def test_a_look_at_the_losses_waits_once(played: Played, name: str) -> None:
    found = played[name]
    looks = 2 if "resumed" in name else 1
    of_scale = looks if found["scaled"] else 0  # of the gradients in float16
    of_signal = 1 if name == "two ranks" else 0  # that one of them may have got
    assert sum(found["waits"]["look"].values()) == looks + of_scale + of_signal


@pytest.mark.parametrize("name", RUNS)
def test_an_evaluation_waits_twice_an_image_and_twice_a_batch(played: Played, name: str) -> None:
    """For the candidates, for those that stay, and for all boxes and all labels of a batch."""
    found = played[name]
    # batches of two make three images; of two ranks this one has one image of each
    of_one = 2 * 2 + 2 * 2 if name == "two ranks" else 2 * 3 + 2 * 2
    passes = 3 if "resumed" in name else 1  # one is cut off and made again
    assert sum(found["waits"]["evaluation"].values()) == passes * of_one
    if "distances" in found["waits"]:
        assert sum(found["waits"]["distances"].values()) == passes + 1  # before training


@pytest.mark.parametrize("name", RUNS)
def test_a_step_copies_nothing_from_pageable_memory(played: Played, name: str) -> None:
    found = played[name]
    assert not in_steps(found["pageable"])
    assert "evaluation" not in found["pageable"]
    assert found["pageable"]["build"]  # weights and decoded pictures: it would be seen


@pytest.mark.parametrize("name", RUNS)
def test_what_costs_time_is_computed_in_the_type_of_autocast(played: Played, name: str) -> None:
    kinds = {"float16": "float16", "resumed in float16": "float16", "float32": "float32"}
    kind = {**kinds, "an older card": "float16"}.get(name, "bfloat16")
    types = in_steps(played[name]["types"])
    operators = {operator for counts in types.values() for operator in counts}
    assert {f"convolution {kind}", f"convolution_backward {kind}"} <= operators
    assert {f"cat {kind}", f"upsample_nearest2d {kind}", f"bmm {kind}"} <= operators
    others = {operator for operator in operators if not operator.endswith(f" {kind}")}
    # terms of matrices and their spectra compute those in float32
    assert others <= ({"mm float32", "bmm float32"} if name == "every term" else set())


@pytest.mark.parametrize("name", RUNS)
def test_gradients_momentum_and_averages_lie_as_their_weights(played: Played, name: str) -> None:
    assert played[name]["unlike"] == []


def test_nearly_every_convolution_reads_channels_last(played: Played) -> None:
    layouts = played["bfloat16"]["layouts"]
    for phase in ("step", "step, teacher"):
        counts = layouts[phase]
        planes = sum(count for layout, count in counts.items() if layout != "channels last")
        assert planes <= 2 * LAYOUTS  # in two steps
        assert counts["channels last"] > 100


def test_the_frozen_teacher_has_its_weights_cast_once(played: Played) -> None:
    """In a step, autocast makes a copy of the images alone."""
    steps = 2
    assert played["bfloat16"]["operators"]["step, teacher"]["_to_copy"] <= 3 * steps


def test_only_a_card_that_computes_in_bfloat16_does(played: Played) -> None:
    assert played["float16"]["scaled"]
    assert played["an older card"]["scaled"]
    assert not played["bfloat16"]["scaled"]


def test_check_runs_on_a_card(play: Callable[..., list[Found]]) -> None:
    """The teacher of these scenarios has learned nothing, and that row alone says so."""
    (found,) = play({"check": True})
    assert found["error"] == "UserError: --check: teacher, weights failed, see above"


PLANTS = {
    "tensor on the CPU": lambda found: "two devices" in found["error"],
    "item": lambda found: "item, " in str(found["waits"]["step, loss"]),
    "pageable": lambda found: bool(found["pageable"]["step, loss"]),
    "float32": lambda found: "bmm float32" in found["types"]["step, loss"],
}


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_fault_is_caught(play: Callable[..., list[Found]], plant: str) -> None:
    found = dict(zip(PLANTS, play(*({"plant": name} for name in PLANTS)), strict=True))
    assert PLANTS[plant](found[plant])


def test_compiled_rendering_counts_pixels_in_64_bits() -> None:
    """Beyond 2^31 of them, as VOC has."""
    count = 2**31 + 2**20
    wide = run("triton_source", str(count))
    narrow = run("triton_source", str(2**20))
    in_64_bits = "xoffset = tl.program_id(0).to(tl.int64) * XBLOCK"
    assert in_64_bits in wide
    assert in_64_bits not in narrow  # so that it would be seen
    assert f"< {count})" in wide
