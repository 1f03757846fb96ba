"""What an adaptive search may try, and the trials that it begins with. Pure; fixed for a study.

The search itself, which looks at outcomes, is `recommendation.adaptive`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from loratune.study.schema import Study

RATES_PER_DECADE = 10
# Of the trials that a search may train, how many it did: docs/decisions.md, Adaptive search.
USUAL_SHARE = 0.75
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, slots=True)
class SearchPoint:
    """A trial to train: a batch size, an LR and a seed."""

    batch_size: int
    learning_rate: float
    seed: int


@dataclass(frozen=True)
class Space:
    """What may be tried: points (batch size, LR), each with the seeds that it may have, in order.

    Points stand by batch size, then LR.
    """

    points: tuple[tuple[int, float], ...]
    seeds: tuple[tuple[int, ...], ...]

    @cached_property
    def coordinates(self) -> NDArray[np.float64]:
        """[points, 2]: log2 of the batch size, ln of the LR."""
        return np.array([[math.log2(size), math.log(rate)] for size, rate in self.points])

    @cached_property
    def index(self) -> dict[tuple[int, float], int]:
        """Where a point stands."""
        return {point: index for index, point in enumerate(self.points)}

    @cached_property
    def batch_sizes(self) -> tuple[int, ...]:
        """Those that may be tried, ascending."""
        return tuple(sorted({size for size, _ in self.points}))

    def at(self, index: int, seed: int) -> SearchPoint:
        """The point there, with a seed."""
        size, rate = self.points[index]
        return SearchPoint(size, rate, seed)


def make_space(
    batch_sizes: Sequence[int], *, low: float, high: float, seeds: Sequence[int]
) -> Space:
    """Every batch size with LRs from low to high in equal steps, about 10 a decade, in 2 digits."""
    steps = max(2, round(RATES_PER_DECADE * math.log10(high / low)))
    inside = [float(f"{low * (high / low) ** (step / steps):.2g}") for step in range(1, steps)]
    rates = sorted({low, high, *(rate for rate in inside if low < rate < high)})
    points = tuple((size, rate) for size in sorted(batch_sizes) for rate in rates)
    return Space(points, (tuple(seeds),) * len(points))


def space_of(study: Study) -> Space:
    """What a study with `learning_rate: {search: adaptive}` may try on each of its curves."""
    rates = study.learning_rate
    assert rates.low is not None
    assert rates.high is not None
    return make_space(study.batch_size, low=rates.low, high=rates.high, seeds=study.seeds.grid)


def initial_design(space: Space, *, num_trials: int) -> tuple[SearchPoint, ...]:
    """The first trials: batch sizes in turn, LRs by the golden ratio, each point's first seed.

    That is a Fibonacci lattice: no two points near each other, none of the ends (a tenth of the
    range of ln LR on either side), and every batch size has one.
    """
    logs = space.coordinates[:, 1]
    low, high = float(logs.min()), float(logs.max())
    chosen = dict[int, None]()
    for step in range(len(space.points)):
        size = space.batch_sizes[step % len(space.batch_sizes)]
        target = low + (0.1 + 0.8 * ((0.5 + step * GOLDEN_RATIO) % 1)) * (high - low)
        free = [
            index
            for index, point in enumerate(space.points)
            if point[0] == size and index not in chosen
        ]
        if free:
            chosen[min(free, key=lambda index: abs(float(logs[index]) - target))] = None
        if len(chosen) == num_trials:
            break
    return tuple(space.at(index, space.seeds[index][0]) for index in sorted(chosen))


def design_size(num_batch_sizes: int) -> int:
    """How many trials a search begins with: one at each batch size, and at least 6."""
    return max(num_batch_sizes + 1, 6)


def first_points(study: Study) -> dict[int, tuple[tuple[float, int], ...]]:
    """By batch size, the (LR, seed) of every trial that is planned before any outcome is known."""
    if study.learning_rate.search is None:
        # The plan's order: by seed, then by LR.
        grid = tuple((rate, seed) for seed in study.seeds.grid for rate in study.learning_rates())
        return dict.fromkeys(study.batch_size, grid)
    design = initial_design(space_of(study), num_trials=design_size(len(study.batch_size)))
    return {
        size: tuple((one.learning_rate, one.seed) for one in design if one.batch_size == size)
        for size in study.batch_size
    }


def most_trials(study: Study) -> int:
    """How many trials a search may train on one curve: the study's number, or 3 a batch size and 5.

    With 9 batch sizes that is 32, a third of a grid of 3 to 4 LRs with 3 seeds.
    """
    first = design_size(len(study.batch_size))
    return max(first, study.learning_rate.max_trials or 3 * len(study.batch_size) + 5)
