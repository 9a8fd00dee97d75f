"""Spectra before and after a filter: what each band has of the energy, and where."""

from pathlib import Path

import numpy as np
import pytest
import torch

import train
from kdmini.terms import frequency
from kdmini.terms.frequency import FrequencyAttention
from tests.commands import run
from tests.conftest import SEGMENTED

pytest.importorskip("matplotlib")
from kdmini.tools import visualize
from kdmini.tools.spectra import spectra


class Filtering(FrequencyAttention):
    def bands(self, tap: str, feat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = frequency.bands(feat, self.radius[tap])
        return low, high


def test_a_band_has_the_energy_and_the_place_of_its_frequencies() -> None:
    """A coarse wave of amplitude 3 and a fine one of 1: 90 and 10 % of the energy."""
    x = torch.arange(16) * 2 * torch.pi / 16
    wave = 5 + 3 * torch.cos(x) + torch.cos(7 * x)  # the mean does not count
    feat = wave.expand(2, 3, 16, 16)
    term = Filtering({"a": (3, 3, 16, 16)})
    figure = spectra(term, "frequency", {"teacher": {"a": feat}, "student": {"a": feat}})
    assert [axis.get_ylabel() for axis in figure.axes[::3]] == ["a\nteacher", "a\nstudent"]
    shares = [axis.get_xlabel().split("%")[0] for axis in figure.axes[:3]]
    assert shares == ["100.0", "90.0", "10.0"]
    bright = [np.argwhere(axis.images[0].get_array() > -2).tolist() for axis in figure.axes[:3]]
    assert bright[1] == [[8, 7], [8, 8], [8, 9]]  # the middle is frequency 0
    assert bright[2] == [[8, 1], [8, 15]]
    assert bright[0] == sorted(bright[1] + bright[2])


def test_a_run_with_a_filter_has_its_spectra(tmp_path: Path, shapes: Path) -> None:
    settings = [
        f"run={tmp_path / 'run'}",
        f"data.root={shapes}",
        "data.imgsz=64",
        "data.limit=3",
        "teacher.weights=null",
        "allow_void=true",
        "device=cpu",
        "distill.frequency.radius=1",  # the deepest map is 2x2
        f"data.train.names={SEGMENTED}",
        f"data.val.names={SEGMENTED}",
        "train.batch=3",
        "train.epochs=1",
    ]
    run(train, "--config", "configs/segmentation/demo.yaml", *settings)
    figures = dict(visualize.figures_of(tmp_path / "run", []))
    labels = [axis.get_ylabel() for axis in figures["spectra_frequency"].axes[::3]]
    taps = ("higher", "stages.0", "pooled", "fusion")
    assert labels == [f"{tap}\n{who}" for tap in taps for who in ("teacher", "student")]
