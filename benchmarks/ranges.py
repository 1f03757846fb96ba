"""How often `recommend`'s range and its acceptable batch sizes are wrong, where the truth is known.

Losses are 1 + excess + the noise of a seed, by batch size. An answer is wrong where the best batch
size is not in the range, or one that is worse than it by more than the margin is acceptable. Only
`recommendation.best` is asked: no learning rates, no missing trials.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loratune.recommendation.adaptive import DEFAULT_MARGIN
from loratune.recommendation.best import against_best

Array = NDArray[np.float64]
MOST_SIZES = 16
# Relative excess of the mean loss over the best's, as on a curve with one close rival.
EXCESS = np.array(
    [0.006, 0, 0.003, 0.012, 0.03, 0.06, 0.1, 0.2, 0.5, 0.05, 0.08, 0.15, 0.3, 0.4, 0.6, 0.8]
)
LEVEL = np.zeros(MOST_SIZES)
EQUAL = np.full(MOST_SIZES, 0.002)
# Noise of each batch size that made most answers wrong, of 150 drawn at random (3 seeds).
UNEVEN = 1e-4 * np.array(
    [60.7, 11.9, 22.5, 3.9, 5.9, 12.1, 11.9, 20.7, 10.5, 7.3, 15.8, 25.1, 11.0, 17.3, 9.8, 4.8]
)


@dataclass(frozen=True, slots=True)
class Case:
    """The excess and the standard deviation of a seed at each of up to 16 batch sizes."""

    excess: Array
    noise: Array


def _best_first(rivals: float) -> Array:
    return np.where(np.arange(MOST_SIZES) == 0, 0.0, rivals)


def _noisy(times: float, *which: int) -> Array:
    return np.where(np.isin(np.arange(MOST_SIZES), which), 0.001 * times, 0.001)


CASES = {
    "equal, with a best one": Case(EXCESS, EQUAL),
    "equal, all equally good": Case(LEVEL, EQUAL),
    "growing with the loss": Case(EXCESS, 0.001 + 0.15 * EXCESS),
    "growing fast with the loss": Case(EXCESS, 0.001 + 0.5 * EXCESS),
    "growing five times with the size, all equally good": Case(
        LEVEL, np.geomspace(0.001, 0.005, MOST_SIZES)
    ),
    "falling from 0.5% to 0.03%, a flat curve": Case(
        np.array([0, 0.0005, 0.001, 0.002, 0.003, 0.0055, 0.0055, *[0.006] * 9]),
        0.005 * 2.0 ** (-np.minimum(np.arange(MOST_SIZES), 8) / 2),
    ),
    "ten times at the best, one close rival": Case(EXCESS, _noisy(10, 1)),
    "five times at the best, rivals 0.55% worse": Case(_best_first(0.0055), _noisy(5, 0)),
    "five times at the best, rivals 0.05% worse": Case(_best_first(0.0005), _noisy(5, 0)),
    "ten times at the best, rivals 0.05% worse": Case(_best_first(0.0005), _noisy(10, 0)),
    "twenty times at the best, rivals 0.05% worse": Case(_best_first(0.0005), _noisy(20, 0)),
    "ten times at one rival, rivals 0.05% worse": Case(_best_first(0.0005), _noisy(10, 1)),
    "ten times at the best and one rival, rivals 0.05% worse": Case(
        _best_first(0.0005), _noisy(10, 0, 1)
    ),
    "uneven, most at the best, rivals 0.01% worse": Case(_best_first(0.0001), UNEVEN),
}


@dataclass(frozen=True, slots=True)
class Told:
    """Shares: of answers that are wrong, of batch sizes in the range, of close ones acceptable."""

    wrong: float
    in_range: float
    acceptable: float


def told(case: Case, *, num_sizes: int, num_seeds: int, num_simulations: int, seed: int) -> Told:
    """What is told of the first `num_sizes` batch sizes of a case."""
    excess, noise = case.excess[:num_sizes], case.noise[:num_sizes]
    draw = np.random.default_rng([num_sizes, num_seeds, seed])
    best, is_far = int(excess.argmin()), excess > DEFAULT_MARGIN
    wrong = num_in_range = num_acceptable = 0
    for _ in range(num_simulations):
        normal = draw.normal(size=(num_sizes, num_seeds))
        scores = -(1 + excess[:, None] + noise[:, None] * normal)
        tolerated = DEFAULT_MARGIN * float(abs(scores.mean(axis=1).max()))
        bounds = against_best(scores.tolist(), tolerated=tolerated)
        in_range = np.array(bounds.upper) > 0.0
        acceptable = -np.array(bounds.lower) <= tolerated
        wrong += not in_range[best] or bool((acceptable & is_far).any())
        num_in_range += int(in_range.sum())
        num_acceptable += int((acceptable & ~is_far).sum())
    return Told(
        wrong / num_simulations,
        num_in_range / (num_simulations * num_sizes),
        num_acceptable / (num_simulations * int((~is_far).sum())),
    )
