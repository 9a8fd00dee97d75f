"""Which card is meant, what `train.amp: true` means there, and whether a run is compiled."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

import train as train_script
from kdmini import device
from kdmini.contracts import UserError
from kdmini.data import store
from tests.commands import run

CPU = torch.device("cpu")
CARD = torch.device("cuda", 1)


@pytest.mark.parametrize(("native", "half"), [(True, "bf16"), (False, "fp16")])
def test_half_precision_is_what_that_card_computes_in(
    monkeypatch: pytest.MonkeyPatch, native: bool, half: str
) -> None:
    """An emulated bf16, as of a T4 or an RTX 20xx, counts as none."""
    asked = []

    def of_card(card: Any) -> Any:
        asked.append(card)
        return nullcontext()

    def is_supported(including_emulation: bool = True) -> bool:
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "device", of_card)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert device.best_half(CARD) == half
    assert asked == [CARD]


# --- which card


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The cards that were made the current one, of two that are there."""
    chosen: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


def test_a_card_with_a_number_becomes_the_current_one(current: list[Any]) -> None:
    assert device.pick_device("cuda:1") == CARD
    assert current == [CARD]


@pytest.mark.parametrize("name", ["auto", "cuda", "cpu"])
def test_without_a_number_the_current_card_stays(current: list[Any], name: str) -> None:
    """Each rank of torchrun begins so, and would else keep some memory of card 0."""
    device.pick_device(name)
    assert current == []


def test_a_card_that_is_not_there_is_refused(current: list[Any]) -> None:
    with pytest.raises(UserError, match="cuda:2 was asked for, but torch finds 2 CUDA devices"):
        device.pick_device("cuda:2")
    assert current == []


# --- compiled


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What was compiled, by a compiler that raises."""
    compiled: list[Any] = []

    def failing(function: Any, **settings: Any) -> Callable:
        compiled.append(function)
        raise RuntimeError(f"Failed to find C compiler. {'x' * 500}\nSet CC.\n  File ...")

    monkeypatch.setattr(torch, "compile", failing)
    device.compiler_fault.cache_clear()
    yield compiled
    device.compiler_fault.cache_clear()


@pytest.mark.parametrize(("wanted", "card"), [(False, CARD), (False, CPU), ("auto", CPU)])
def test_a_run_that_is_not_to_be_compiled_tries_no_compiler(
    probes: list[Any], wanted: Any, card: torch.device
) -> None:
    assert not device.is_compiled(wanted, card)
    assert probes == []


def test_where_auto_cannot_compile_it_says_so_in_a_line_and_goes_on(
    probes: list[Any], capsys: pytest.CaptureFixture
) -> None:
    assert not device.is_compiled("auto", CARD)
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert "does not work on cuda here (Failed to find C compiler." in line
    assert "runs uncompiled" in line and "triton" in line
    assert len(line) < 400


@pytest.mark.parametrize("card", [CPU, CARD])
def test_what_cannot_be_compiled_and_is_to_be_is_refused_after_one_try(
    probes: list[Any], card: torch.device
) -> None:
    for _ in range(2):
        with pytest.raises(UserError, match=r"Failed to find C compiler.*or set compile=false"):
            device.is_compiled(True, card)
    assert len(probes) == 1


@pytest.mark.parametrize(("wanted", "card"), [(True, CPU), (True, CARD), ("auto", CARD)])
def test_where_the_compiler_works_a_run_is_compiled(
    monkeypatch: pytest.MonkeyPatch, probes: list[Any], wanted: Any, card: torch.device
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)
    monkeypatch.setattr(torch, "ones", lambda *size, device: torch.zeros(size))
    assert device.is_compiled(wanted, card)


def test_a_run_finds_out_before_it_decodes(
    monkeypatch: pytest.MonkeyPatch, probes: list[Any], config_file: Any
) -> None:
    def decoding(*_: Any) -> Any:
        raise AssertionError("too late")

    monkeypatch.setattr(store, "decode_all", decoding)
    with pytest.raises(SystemExit, match=r"error: compile: torch\.compile does not work on cpu"):
        run(train_script, "--config", config_file, "compile=true")
