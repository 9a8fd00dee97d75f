"""What `train.amp: true` means on a card."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from kdmini import device

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
