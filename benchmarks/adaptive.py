"""The adaptive search against the full grid: on recorded grids and on the simulator.

    python benchmarks/adaptive.py --problems 20 --json adaptive.json

On a recorded grid the search may only look up what was recorded: its LRs, its seeds. The answer of
both is scored by the recorded mean over seeds. On the simulator both are scored by the truth: the
regret of `simulator.Problem`, the expected loss with divergence counted in, over the best there is
between the bounds. Intervals are over problems (bootstrap, 2,000 draws) or, on recorded grids, over
the three seeds (t). Results: docs/decisions.md.
"""

# print is what a benchmark is for.

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from csv import DictReader
from dataclasses import asdict, dataclass
from itertools import permutations
from pathlib import Path

import numpy as np

from loratune.analyse.intervals import mean_with_interval
from loratune.planning.bar import HALF_WAY
from loratune.planning.search_space import Space, design_size, initial_design, make_space
from loratune.recommendation.adaptive import (
    DEFAULT_MARGIN,
    TRIALS_PER_ROUND,
    Observed,
    SearchAnswer,
    fit_surface,
    is_decided,
    next_points,
    search_answer,
)
from loratune.recommendation.early_stopping import (
    Finished,
    highest_allowed,
    scaled_from_the_best,
)
from simulator import FAMILIES, Problem, full_grid, grid_choice, make_problem

RECORDED = Path(__file__).parents[1] / "tests" / "recorded" / "fig1-smollm2.csv"
SEEDS = (0, 1, 2)

# (loss or None where it diverged, tokens) of a trial.
Train = Callable[[int, float, int], tuple[float | None, float]]
# The training loss that it has half-way.
HalfWay = Callable[[int, float, int], float]


@dataclass(frozen=True)
class Found:
    """How a search ended."""

    answer: SearchAnswer | None
    decided: bool
    num_trials: int
    tokens: float
    num_stopped: int


def search(
    train: Train,
    space: Space,
    *,
    margin: float = DEFAULT_MARGIN,
    half_way: HalfWay | None = None,
) -> Found:
    """A whole search with the defaults of a study; with `half_way`, hopeless trials stop there."""
    trials = list[Observed]()
    finished = list[Finished]()
    tokens, num_stopped = 0.0, 0
    num_sizes = len(space.batch_sizes)
    points = initial_design(space, num_trials=design_size(num_sizes))
    while points:
        known = tuple(finished)
        allowed = highest_allowed(known)
        for one in points:
            point = one.batch_size, one.learning_rate, one.seed
            loss, spent = train(*point)
            reached = None if half_way is None or loss is None else half_way(*point)
            is_stopped = reached is not None and allowed is not None and reached > allowed
            if is_stopped:
                assert reached is not None
                loss, spent = scaled_from_the_best(reached, known), HALF_WAY * spent
                num_stopped += 1
            elif reached is not None and loss is not None:
                finished.append((loss, reached))
            trials.append(Observed(*point, loss, stopped=is_stopped))
            tokens += spent
        points = next_points(
            trials,
            space,
            margin=margin,
            max_trials=max(design_size(num_sizes), 3 * num_sizes + 5),
            trials_per_round=TRIALS_PER_ROUND,
        )
    surface = fit_surface(trials, space)
    answer = None if surface is None else search_answer(surface, margin=margin)
    decided = (
        surface is not None and answer is not None and is_decided(surface, answer, margin=margin)
    )
    return Found(answer, decided, len(trials), tokens, num_stopped)


@dataclass(frozen=True)
class Row:
    """One problem: regrets (fractions of the loss) of the search's and of the grid's answer.

    `cost` is the search's tokens over the grid's. An answer that is not there has regret 1.
    """

    family: str
    held_out: bool
    regret: float
    expected_regret: float
    grid_regret: float
    cost: float
    num_trials: int
    decided: bool


def on_simulator(family: str, seed: int) -> Row:
    """The search and the full grid (7 LRs, 3 seeds) on one problem."""
    problem = make_problem(family, seed)

    def train(size: int, rate: float, of: int) -> tuple[float | None, float]:
        trial = problem.trial(size, rate, of)
        return trial.loss, trial.tokens

    space = make_space(problem.batch_sizes, low=problem.low, high=problem.high, seeds=SEEDS)
    found = search(train, space)
    grid = full_grid(problem, SEEDS)
    return Row(
        family=family,
        held_out=problem.held_out,
        regret=_regret(problem, found.answer),
        expected_regret=1.0 if found.answer is None else found.answer.expected_regret,
        grid_regret=1.0 if (best := grid_choice(grid)) is None else problem.regret(*best),
        cost=found.tokens / sum(one.tokens for one in grid),
        num_trials=found.num_trials,
        decided=found.decided,
    )


def _regret(problem: Problem, answer: SearchAnswer | None) -> float:
    return 1.0 if answer is None else problem.regret(answer.batch_size, answer.learning_rate)


@dataclass(frozen=True)
class Replay:
    """A search on a recorded grid. `difference` is its loss over the grid's best, relative."""

    method: str
    order: tuple[int, ...]
    answer: tuple[int, float]
    grid_best: tuple[int, float]
    difference: float
    difference_low: float
    difference_high: float
    cost: float
    num_trials: int
    num_stopped: int
    decided: bool


def recorded() -> dict[str, dict[tuple[int, float], dict[int, float]]]:
    """By method and (batch size, LR): the validation loss of each seed."""
    losses = defaultdict[str, dict[tuple[int, float], dict[int, float]]](dict)
    with RECORDED.open(newline="") as file:
        for row in DictReader(file):
            point = int(row["batch_size"]), float(row["learning_rate"])
            at = losses[row["method"]].setdefault(point, {})
            at[int(row["seed"])] = float(row["validation_loss"])
    return dict(losses)


def half_way_loss(row: Mapping[str, str]) -> float:
    """A recorded trial's training loss shortly before half-way.

    Losses stand in twenty parts; with fewer than twenty updates some are empty.
    """
    parts = [row[f"train_{number}"] for number in range(1, 11)]
    last = [part for part in parts[-2:] if part] or [part for part in parts if part][-1:]
    return sum(map(float, last)) / len(last)


def half_way_losses(method: str) -> dict[tuple[int, float, int], float]:
    """That of each trial of a method, by batch size, LR and seed."""
    with RECORDED.open(newline="") as file:
        return {
            (int(row["batch_size"]), float(row["learning_rate"]), int(row["seed"])): (
                half_way_loss(row)
            )
            for row in DictReader(file)
            if row["method"] == method
        }


def on_recorded(method: str, order: Sequence[int], *, early_stopping: bool = True) -> Replay:
    """A search on one method's grid, seeds taken in this order where there are three."""
    losses = recorded()[method]
    reached = half_way_losses(method)
    points = tuple(sorted(losses))
    seeds = tuple(tuple(seed for seed in order if seed in losses[point]) for point in points)
    found = search(
        lambda size, rate, seed: (losses[size, rate][seed], 1.0),
        Space(points, seeds),
        half_way=(lambda *point: reached[point]) if early_stopping else None,
    )
    full = {point: by_seed for point, by_seed in losses.items() if len(by_seed) == len(SEEDS)}
    best = min(full, key=lambda point: np.mean(list(full[point].values())))
    assert found.answer is not None
    answer = found.answer.batch_size, found.answer.learning_rate
    shared = sorted(losses[answer])
    scale = float(np.mean(list(full[best].values())))
    gap = mean_with_interval([(losses[answer][s] - losses[best][s]) / scale for s in shared])
    return Replay(
        method=method,
        order=tuple(order),
        answer=answer,
        grid_best=best,
        difference=gap.value,
        difference_low=gap.value if gap.low is None else gap.low,
        difference_high=gap.value if gap.high is None else gap.high,
        cost=found.tokens / sum(map(len, losses.values())),
        num_trials=found.num_trials,
        num_stopped=found.num_stopped,
        decided=found.decided,
    )


def summary(rows: Sequence[Row]) -> dict[str, float]:
    """Means with bootstrap intervals over problems, and shares."""
    regret = np.array([one.regret for one in rows])
    against = regret - np.array([one.grid_regret for one in rows])
    cost = np.array([one.cost for one in rows])
    decided = np.array([one.decided for one in rows])
    draws = np.random.default_rng(0).integers(0, len(rows), (2000, len(rows)))
    within = regret <= np.array([one.grid_regret for one in rows]) + DEFAULT_MARGIN
    return {
        "problems": len(rows),
        "regret": float(regret.mean()),
        "regret_low": float(np.quantile(regret[draws].mean(1), 0.025)),
        "regret_high": float(np.quantile(regret[draws].mean(1), 0.975)),
        "regret_median": float(np.median(regret)),
        "grid_regret": float(np.mean([one.grid_regret for one in rows])),
        "against_grid_low": float(np.quantile(against[draws].mean(1), 0.025)),
        "against_grid_high": float(np.quantile(against[draws].mean(1), 0.975)),
        "share_within_margin": float((regret <= DEFAULT_MARGIN).mean()),
        "grid_share_within_margin": float(
            np.mean([one.grid_regret <= DEFAULT_MARGIN for one in rows])
        ),
        "share_as_good_as_grid": float(within.mean()),
        "cost": float(cost.mean()),
        "cost_max": float(cost.max()),
        "num_trials": float(np.mean([one.num_trials for one in rows])),
        "share_decided": float(decided.mean()),
        "share_within_margin_if_decided": float(
            (regret[decided] <= DEFAULT_MARGIN).mean() if decided.any() else np.nan
        ),
        "expected_regret": float(np.mean([one.expected_regret for one in rows])),
    }


def on_problems(num: int, *, held_out: bool | None, first_seed: int, processes: int) -> list[Row]:
    """So many problems of each family."""
    families = [one.name for one in FAMILIES if held_out is None or one.held_out == held_out]
    tasks = [(name, first_seed + index) for name in families for index in range(num)]
    names, seeds = [name for name, _ in tasks], [seed for _, seed in tasks]
    if processes == 1:
        return [on_simulator(*task) for task in tasks]
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(on_simulator, names, seeds))


def main() -> None:
    """Print both tables; write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=20, help="of each family")
    parser.add_argument("--first-seed", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    replays = [
        on_recorded(method, order, early_stopping=early_stopping)
        for early_stopping in (True, False)
        for method in recorded()
        for order in permutations(SEEDS)
    ]
    for one in replays:
        print(one)
    rows = on_problems(
        chosen.problems,
        held_out=None,
        first_seed=chosen.first_seed,
        processes=chosen.processes,
    )
    groups = {one.name: [row for row in rows if row.family == one.name] for one in FAMILIES}
    groups["not held out"] = [row for row in rows if not row.held_out]
    groups["held out"] = [row for row in rows if row.held_out]
    groups["all"] = rows
    tables = {name: summary(group) for name, group in groups.items()}
    for name, table in tables.items():
        print(name, json.dumps({key: round(value, 4) for key, value in table.items()}))
    if chosen.json is not None:
        document = {
            "recorded": [asdict(one) for one in replays],
            "simulator": tables,
            "rows": [asdict(row) for row in rows],
        }
        chosen.json.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
