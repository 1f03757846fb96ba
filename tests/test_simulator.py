"""The simulator that search and proxy rules are measured on: repeatable, and like what it fits."""

from collections import defaultdict
from csv import DictReader
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

RECORDED = Path(__file__).parent / "recorded" / "fig1-smollm2.csv"


@pytest.fixture
def simulator(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The file of the benchmarks folder, which is no package."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return import_module("simulator")


def test_the_fitted_surfaces_are_near_the_recorded_losses(simulator: Any):
    """Within 3% root mean square, over losses that differ by up to 120%; blown-up trials apart."""
    losses = defaultdict[tuple[str, int, float], list[float]](list)
    with RECORDED.open(newline="") as file:
        for row in DictReader(file):
            point = row["method"], int(row["batch_size"]), float(row["learning_rate"])
            losses[point].append(float(row["validation_loss"]))
    for method, surface in simulator.FITTED.items():
        problem = simulator.Problem("fitted", 0, (2,), 1e-4, 1e-2, (1e-3,), surface)
        errors = [
            np.log(problem.expected(size, rate) / np.mean(values))
            for (of, size, rate), values in losses.items()
            if of == method and np.mean(values) < 1.6
        ]
        assert len(errors) >= 35
        assert np.sqrt(np.mean(np.square(errors))) < 0.03


def test_every_family_is_repeatable_and_has_its_best_inside_the_bounds(simulator: Any):
    assert {one.held_out for one in simulator.FAMILIES} == {True, False}
    for family in simulator.FAMILIES:
        problem = simulator.make_problem(family.name, 5)
        assert problem == simulator.make_problem(family.name, 5)
        value, size, rate = problem.best()
        assert problem.low < rate < problem.high
        assert problem.regret(size, rate) == 0.0
        assert problem.trial(size, rate, 1) == problem.trial(size, rate, 1)
        assert problem.trial(size, rate, 1) != problem.trial(size, rate, 2)
        assert 0.3 < value < 1.5
        for one in simulator.full_grid(problem, [0]):
            assert len(one.curve) == 20 or one.diverged
            assert one.tokens == problem.tokens * len(one.curve) / 20
            assert problem.regret(one.batch_size, one.learning_rate) > -1e-4


def test_the_mean_of_many_trials_is_the_expected_loss_and_seeds_are_shared(simulator: Any):
    problem = simulator.make_problem("fitted", 3)
    _, size, rate = problem.best()
    trials = [problem.trial(size, rate, seed) for seed in range(400)]
    losses = np.array([one.loss for one in trials])
    spread = losses.std() / losses.mean()
    assert abs(losses.mean() / problem.expected(size, rate) - 1) < 4 * spread / 20
    beside = np.array([problem.trial(2 * size, rate, seed).loss for seed in range(400)])
    shared = problem.seed_noise**2 / (problem.seed_noise**2 + problem.noise**2)
    # The standard error of a correlation over 400 seeds is 0.05; trial noise varies with the LR.
    assert abs(np.corrcoef(losses, beside)[0, 1] - shared) < 0.25


def test_in_late_bloomers_a_trial_at_the_best_rate_trails_a_low_one_until_late(simulator: Any):
    trailing = 0
    for seed in range(10):
        problem = simulator.make_problem("late_bloomer", seed)
        _, size, rate = problem.best()
        low, best = problem.trial(size, rate / 3, 0), problem.trial(size, rate, 0)
        assert best.loss < low.loss
        trailing += np.mean(best.curve[2:8]) > np.mean(low.curve[2:8])
    assert trailing >= 7


def test_divergence_is_certain_far_above_the_cliff_and_counted_in_the_value(simulator: Any):
    problem = simulator.make_problem("cliff", 0)
    rate = float(np.exp(problem.optimum(32) + problem.cliff + 3))
    assert problem.trial(32, rate, 0).diverged
    assert problem.value(32, rate) >= problem.initial_loss
    assert problem.expected(32, rate / np.exp(3)) < problem.initial_loss


def test_a_target_is_its_proxy_shifted_and_a_far_pair_more_so(simulator: Any):
    pairs = [simulator.make_pair("quadratic", seed) for seed in range(20)]
    shifts = [one.shift_batch for one in pairs]
    far = [simulator.make_pair("quadratic", seed, far=True).shift_batch for seed in range(20)]
    assert np.std(far) > 2 * np.std(shifts)
    for one in pairs[:5]:
        size = 32
        moved = one.target.optimum(size) - one.proxy.optimum(size)
        assert moved == pytest.approx(one.shift_lr)
        # The depth of the valley is the proxy's at a batch size shifted by as much.
        depth = [
            np.log(problem.expected(batch, np.exp(problem.optimum(batch))) - problem.floor)
            - np.log(problem.scale)
            for problem, batch in ((one.target, size * 2**one.shift_batch), (one.proxy, size))
        ]
        assert depth[0] == pytest.approx(depth[1])


def test_an_unknown_family_is_refused(simulator: Any):
    with pytest.raises(ValueError, match="there are fitted"):
        simulator.make_problem("smooth", 0)
