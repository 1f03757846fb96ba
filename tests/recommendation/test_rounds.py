"""What to train next: a simulated trainer answers until nothing more is asked for."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from loratune.analyse.cells import Cell, make_cells
from loratune.recommendation.rounds import Point, confirmation, refinement
from loratune.records import TrialResult
from loratune.study.schema import LearningRate, Seeds
from simulated import result

GRID = (1e-4, 3e-4, 1e-3, 3e-3)


def sweep(
    loss: Callable[[float, int], float | None],
    *,
    values: Sequence[float] = GRID,
    extend: int = 0,
    grid: int = 1,
    around_best: int = 0,
) -> tuple[Cell, list[tuple[Point, ...]]]:
    """The cell when nothing more is asked for, and the rounds; a loss of None diverges."""
    rates = LearningRate(values=tuple(values), extend=extend)
    seeds = Seeds(grid=tuple(range(grid)), around_best=around_best)

    def train(rate: float, seed: int) -> TrialResult:
        value = loss(rate, seed)
        status = "done" if value is not None else "diverged"
        return result(value, learning_rate=rate, seed=seed, status=status)

    results = [train(rate, seed) for rate in values for seed in seeds.grid]
    rounds = list[tuple[Point, ...]]()
    while True:
        (cell,) = make_cells(results)
        points = refinement(cell, rates=rates, seeds=seeds)
        if not points:
            return cell, rounds
        known = {(one.trial.learning_rate, one.trial.seed) for one in results}
        assert not known & set(points), "asked for twice"
        rounds.append(points)
        results += [train(*point) for point in points]


def bowl(best: float) -> Callable[[float, int], float]:
    return lambda rate, seed: 1 + (math.log(rate / best)) ** 2 + 1e-3 * seed


def test_a_plain_grid_asks_for_nothing_more():
    assert sweep(bowl(1e-2))[1] == []


def test_a_best_rate_at_the_upper_end_adds_rates_in_the_grids_step_until_it_is_inside():
    cell, rounds = sweep(bowl(2e-2), extend=3, grid=2)
    assert [sorted({rate for rate, _ in points}) for points in rounds] == [[9e-3], [0.027], [0.081]]
    assert all(len(points) == 2 for points in rounds)
    assert cell.best is not None
    assert cell.best.learning_rate == 0.027
    assert not cell.lr_at_edge


def test_a_grid_grows_no_further_than_it_may_and_then_says_that_it_ends_there():
    cell, rounds = sweep(bowl(1.0), extend=2)
    assert len(rounds) == 2
    assert cell.lr_at_edge


def test_a_rate_that_diverged_bounds_the_grid():
    bowled = bowl(3e-3)
    cell, rounds = sweep(lambda rate, seed: bowled(rate, seed) if rate < 5e-3 else None, extend=3)
    assert rounds == [((9e-3, 0),)]
    assert cell.best is not None
    assert cell.best.learning_rate == 3e-3


def test_where_every_rate_diverges_lower_ones_are_tried():
    bowled = bowl(1e-5)
    cell, rounds = sweep(lambda rate, seed: bowled(rate, seed) if rate < 5e-5 else None, extend=4)
    assert cell.best is not None
    assert cell.best.learning_rate == 1.1e-5
    assert len(rounds) == 3  # 3.3e-5, 1.1e-5, and 3.7e-6 to see that 1.1e-5 is inside


def test_the_best_rate_and_its_neighbours_get_further_seeds_and_no_other_does():
    cell, rounds = sweep(bowl(3e-4), around_best=2)
    assert rounds == [tuple((rate, seed) for rate in (1e-4, 3e-4, 1e-3) for seed in (1, 2))]
    assert [rate.verdict for rate in cell.rates] == ["eligible"] * 3 + ["screened"]
    assert cell.incomplete_rates == ()
    assert cell.score is not None
    assert cell.score.num_values == 3


def test_where_further_seeds_move_the_best_rate_its_new_neighbours_get_them_too():
    def loss(rate: float, seed: int) -> float:
        # Seed 0 is lucky at 1e-4; on the whole 1e-3 is best.
        return bowl(1e-3)(rate, 0) - (10 if (rate, seed) == (1e-4, 0) else 0)

    cell, _ = sweep(loss, around_best=9)
    assert cell.best is not None
    assert cell.best.learning_rate == 1e-3
    index = [rate.learning_rate for rate in cell.rates].index(cell.best.learning_rate)
    assert all(len(rate.trials) == 10 for rate in cell.rates[max(0, index - 1) : index + 2])


@settings(max_examples=60, deadline=None)
@given(
    best=st.floats(1e-7, 1.0),
    noise=st.floats(0.0, 0.5),
    cliff=st.floats(1e-4, 10.0),
    extend=st.integers(0, 4),
    around_best=st.integers(0, 3),
    chance=st.integers(0, 1000),
)
def test_it_ends_with_the_best_inside_and_with_all_seeds_unless_a_limit_or_a_cliff_is_there(
    best, noise, cliff, extend, around_best, chance
):
    def loss(rate: float, seed: int) -> float | None:
        luck = random.Random(f"{chance}{rate}{seed}").gauss(0.0, noise)
        return bowl(best)(rate, 0) + luck if rate < cliff else None

    cell, _ = sweep(loss, extend=extend, around_best=around_best)
    added = [rate.learning_rate for rate in cell.rates if rate.learning_rate not in GRID]
    assert sum(rate < GRID[0] for rate in added) <= extend
    assert sum(rate > GRID[-1] for rate in added) <= extend
    if cell.best is None:
        return
    index = [rate.learning_rate for rate in cell.rates].index(cell.best.learning_rate)
    for rate in cell.rates[max(0, index - 1) : index + 2]:
        assert len(rate.trials) == 1 + around_best or rate.verdict == "diverged"
    if index == 0:
        assert sum(rate < GRID[0] for rate in added) == extend
    if index == len(cell.rates) - 1:
        assert sum(rate > GRID[-1] for rate in added) == extend


def test_fresh_seeds_go_to_the_best_cell_of_a_curve_and_are_in_no_mean():
    results = [
        result(loss, batch_size=size, learning_rate=1e-3, seed=0)
        for size, loss in ((8, 1.0), (16, 0.9), (32, 1.1))
    ]
    seeds = Seeds(grid=(0,), confirm=2)
    chosen = confirmation(make_cells(results), seeds=seeds)
    assert chosen is not None
    best, points = chosen
    assert best.trial.batch_size == 16
    assert points == ((1e-3, 1), (1e-3, 2))
    fresh = [
        replace(result(0.5, batch_size=16, learning_rate=1e-3, seed=seed), purpose="confirm")
        for _, seed in points
    ]
    after = make_cells([*results, *fresh])[1]
    assert after.score is not None
    assert after.score.value == 0.9
    assert len(after.confirmations) == 2
    assert confirmation(make_cells(results), seeds=Seeds(grid=(0,))) is None
