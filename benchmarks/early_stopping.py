"""How often the early stopping of an adaptive search stops a trial that would have ended well.

    python benchmarks/early_stopping.py

On recorded grids with training curves (SmolLM2-135M on GSM8K, three methods; demo:1m and demo:4m on
the demo task; cosine schedule throughout). A search knows the trials of its earlier rounds when it
stops others: here one trial of each batch size, drawn at random, many times over. Every other trial
of the grid is looked at half-way by the rule. A stop is false where the trial ended within so many
percent of the grid's best. Rates are over all (draw, trial) pairs; since few trials end so well,
the interval is Clopper and Pearson's over distinct trials ever stopped.

The whole of an adaptive search with and without stops is in `adaptive.py`. Results:
docs/adaptive-search.md.
"""

# print is what a benchmark is for.

import argparse
from csv import DictReader
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import binomtest

from adaptive import half_way_loss
from loratune.planning.bar import HALF_WAY
from loratune.recommendation.early_stopping import highest_allowed

FOLDER = Path(__file__).parents[1] / "tests" / "recorded"
RECORDED = ("fig1-smollm2", "curves-demo-1m", "curves-demo-4m")
NEAR = (0.005, 0.01, 0.02)


@dataclass(frozen=True)
class Grid:
    """One method's trials; arrays have one element a trial."""

    name: str
    batch_size: np.ndarray
    final: np.ndarray
    half_way: np.ndarray


@dataclass(frozen=True)
class Stops:
    """`false[share]` of pairs whose trial ended within `share` of the best; `saved` of all tokens.

    `num_near[share]` counts the distinct trials that ended there, `ever[share]` those of them that
    any draw stopped.
    """

    name: str
    num_trials: int
    false: dict[float, float]
    num_near: dict[float, int]
    ever: dict[float, int]
    saved: float


def grids() -> list[Grid]:
    """Every recorded grid that has training curves."""
    found = list[Grid]()
    for name in RECORDED:
        with (FOLDER / f"{name}.csv").open(newline="") as file:
            rows = list(DictReader(file))
        for method in dict.fromkeys(row["method"] for row in rows):
            own = [row for row in rows if row["method"] == method and row["validation_loss"]]
            found.append(
                Grid(
                    name=f"{name} {method}",
                    batch_size=np.array([int(row["batch_size"]) for row in own]),
                    final=np.array([float(row["validation_loss"]) for row in own]),
                    half_way=np.array([half_way_loss(row) for row in own]),
                )
            )
    return found


def stops(grid: Grid, *, num_draws: int, seed: int = 0) -> Stops:
    """The rule after `num_draws` first designs of one trial a batch size."""
    draw = np.random.default_rng(seed)
    everything = np.arange(len(grid.final))
    stopped = np.zeros((num_draws, len(everything)), dtype=bool)
    known = np.zeros_like(stopped)
    for number in range(num_draws):
        first = [draw.choice(everything[grid.batch_size == b]) for b in np.unique(grid.batch_size)]
        allowed = highest_allowed(
            list(zip(grid.final[first].tolist(), grid.half_way[first].tolist(), strict=True))
        )
        assert allowed is not None
        known[number, first] = True
        stopped[number] = (grid.half_way > allowed) & ~known[number]
    near = {share: grid.final <= grid.final.min() * (1 + share) for share in NEAR}
    return Stops(
        name=grid.name,
        num_trials=len(everything),
        false={s: float(stopped[:, n].sum() / (~known)[:, n].sum()) for s, n in near.items()},
        num_near={share: int(one.sum()) for share, one in near.items()},
        ever={share: int(stopped[:, one].any(axis=0).sum()) for share, one in near.items()},
        saved=float(stopped.mean() * (1 - HALF_WAY)),
    )


def main() -> None:
    """Print a line a grid, and one for all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=4000)
    chosen = parser.parse_args()
    found = [stops(grid, num_draws=chosen.draws) for grid in grids()]
    for one in found:
        rates = ", ".join(
            f"{100 * one.false[s]:.2f}% of {one.num_near[s]} within {100 * s:g}%" for s in NEAR
        )
        print(f"{one.name}: {one.num_trials} trials; falsely stopped {rates}; "
              f"saved {100 * one.saved:.0f}% of the tokens")  # fmt: skip
    for share in NEAR:
        ever, near = sum(o.ever[share] for o in found), sum(o.num_near[share] for o in found)
        high = binomtest(ever, near).proportion_ci(method="exact").high
        print(f"within {100 * share:g}%: {ever} of {near} trials were ever stopped "
              f"(95% interval up to {100 * high:.1f}%)")  # fmt: skip


if __name__ == "__main__":
    main()
