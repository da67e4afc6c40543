"""Random numbers with keys instead of states, on the host: a sample's numbers depend on its place in the batch alone.

SplitMix64 (Steele et al. 2014) over arrays. ``native/crops.c`` has the same generator.
"""

import numpy as np

# The purpose of a random number of a step, a part of its key.
ERASE, MIX, OPERATION, MAGNITUDE, DROP_PATH, THREE, DENOISE, HELD_OUT = range(8)

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _scramble(words: np.ndarray) -> np.ndarray:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)  # uint64 arrays wrap, as intended
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _words(key: tuple[int, ...], places: np.ndarray) -> np.ndarray:
    """The generator's keys (n,) uint64 for non-negative ``places`` (n,)."""
    word = np.zeros(1, np.uint64)
    for part in key:
        word = _scramble((word ^ np.uint64(part)) + _GOLDEN)
    return _scramble((word ^ places.astype(np.uint64)) + _GOLDEN)


def uniform(key: tuple[int, ...], places: np.ndarray, columns: int) -> np.ndarray:
    """(len(places), columns) float64 in [0, 1): a row for each place, from ``key`` and the place.

    ``key`` holds non-negative integers, for example the seed, the step and a number for the purpose.
    """
    rows = _words(key, places)[:, None]  # (n, 1)
    counters = np.arange(1, columns + 1, dtype=np.uint64) * _GOLDEN
    return (_scramble(rows + counters) >> np.uint64(11)) * 2.0**-53


def normal(key: tuple[int, ...], places: np.ndarray, columns: int) -> np.ndarray:
    """(len(places), columns) float64, standard normal: a row for each place, as :func:`uniform` (Box and Muller)."""
    draws = uniform(key, places, 2 * -(-columns // 2))
    radius, angle = np.sqrt(-2 * np.log1p(-draws[:, ::2])), 2 * np.pi * draws[:, 1::2]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=2).reshape(draws.shape)[:, :columns]


def integers(key: tuple[int, ...], places: np.ndarray, number: int, end: int) -> np.ndarray:
    """(len(places),) int64 below ``end``. ``number`` < 2^31 selects one of several for each place."""
    return (_scramble(_words(key, places) + np.uint64((1 << 32) + number)) % np.uint64(end)).astype(np.int64)


def other_seed(seed: int, number: int) -> int:
    """``seed``, or one of other seeds that follow from it if ``number`` is not 0. Below 2^62."""
    return int(generator((seed, number, 0x4E3D)).integers(2**62)) if number else seed


def generator(key: tuple[int, ...]) -> np.random.Generator:
    """A generator for numbers that a whole batch shares."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
