"""The random numbers of the loader, one by one and in a crowd."""

import numpy as np
import pytest

from kdmini.data.loader import uniforms

MASK = 2**64 - 1
GAMMA = 0x9E3779B97F4A7C15


def finalise(z):
    """The output function of SplitMix64, in Python's integers."""
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return z ^ z >> 31


def splitmix64(state, count):
    """The first outputs of the generator from this state."""
    return [finalise(state + (k + 1) * GAMMA & MASK) for k in range(count)]


def test_the_reference_gives_the_published_numbers():
    assert splitmix64(1234567, 5) == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def first(state):
    """The first output of a fresh generator."""
    return splitmix64(state & MASK, 1)[0]


@pytest.mark.parametrize("seed", [0, 1234567, 2**64 - 1, -1])
def test_uniforms_are_nested_first_outputs_of_splitmix64(seed):
    """Seed, epoch, index and column in turn are added to the state of a generator."""
    indices = [0, 3, 10**6]
    rows = uniforms(seed, 17, np.array(indices), 4)
    for row, index in zip(rows, indices, strict=True):
        key = first(first(first(seed) + 17) + index)
        assert row.tolist() == [(first(key + column) >> 11) / 2**53 for column in range(4)]


def test_uniforms_do_not_depend_on_order_or_count():
    indices = np.random.default_rng(0).permutation(1000)
    whole = uniforms(5, 2, np.arange(1000), 14)
    assert whole.shape == (1000, 14)
    assert whole.dtype == np.float64
    assert np.array_equal(uniforms(5, 2, indices, 14), whole[indices])
    assert np.array_equal(uniforms(5, 2, indices, 3), whole[indices, :3])


# --- in a crowd. Bounds are five standard deviations of what chance would do.

COUNT = 20_000


@pytest.fixture(scope="module")
def crowd():
    """(COUNT, 18): six columns, and the same of the next epoch and of the next seed."""
    blocks = [
        uniforms(seed, epoch, np.arange(COUNT), 6) for seed, epoch in [(0, 0), (0, 1), (1, 0)]
    ]
    return np.stack(blocks, -1).reshape(COUNT, -1)


def test_uniforms_fill_the_range(crowd):
    assert crowd.min() >= 0
    assert 0.999 < crowd.max() < 1
    assert len(np.unique(crowd)) == crowd.size


def test_uniforms_have_the_moments_of_a_uniform_distribution(crowd):
    root = np.sqrt(COUNT)
    assert abs(crowd.mean(0) - 1 / 2).max() < 5 * np.sqrt(1 / 12) / root
    assert abs(crowd.var(0) - 1 / 12).max() < 5 * np.sqrt(1 / 180) / root
    assert abs((crowd**3).mean(0) - 1 / 4).max() < 5 * np.sqrt(1 / 7 - 1 / 16) / root


def test_columns_epochs_and_seeds_are_independent(crowd):
    correlation = np.corrcoef(crowd.T) - np.eye(crowd.shape[1])
    assert abs(correlation).max() < 5 / np.sqrt(COUNT)


def test_neighbouring_images_are_independent(crowd):
    for column in crowd.T:
        correlation = np.corrcoef(column[:-1], column[1:])[0, 1]
        assert abs(correlation) < 5 / np.sqrt(COUNT)


def test_pairs_of_columns_fill_the_square_evenly(crowd):
    counts, _, _ = np.histogram2d(crowd[:, 0], crowd[:, 1], bins=10, range=[[0, 1], [0, 1]])
    expected = COUNT / 100
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 99 + 5 * np.sqrt(2 * 99)
