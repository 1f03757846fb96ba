"""The adaptive search against full grids, in short: recorded ones, and simulated problems."""

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

MARGIN = 0.005
MOST_COST = 0.35


@pytest.fixture
def adaptive(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The file of the benchmarks folder, which is no package."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return import_module("adaptive")


@pytest.mark.parametrize("method", ["lora", "pissa", "milora"])
def test_on_recorded_grids_the_answer_is_the_grids_within_its_noise(adaptive: Any, method: str):
    replay = adaptive.on_recorded(method, (0, 1, 2))
    # The interval of the difference holds zero, or the difference is within the margin.
    assert replay.difference_low <= 0 or replay.difference <= MARGIN
    assert replay.difference <= 2 * MARGIN
    assert replay.cost <= MOST_COST
    assert replay.decided


def summary(adaptive: Any, problems: Sequence[tuple[str, int]]) -> dict[str, float]:
    """Of the problems; what the search is said to cost holds in each of them."""
    rows = [adaptive.on_simulator(family, seed) for family, seed in problems]
    table = adaptive.summary(rows)
    assert table["cost_max"] <= MOST_COST
    assert table["share_as_good_as_grid"] >= 0.9
    return table


def families(adaptive: Any, take: Callable[[Any], bool]) -> list[str]:
    return [one.name for one in adaptive.FAMILIES if take(one)]


def test_on_simulated_problems_it_is_as_good_as_a_grid_at_a_third_of_its_tokens(adaptive: Any):
    names = families(adaptive, lambda one: not one.held_out)
    table = summary(adaptive, [(name, 7) for name in names])
    assert table["regret"] <= MARGIN
    # What it expects of its own answer is a little too good; not by more than the margin.
    assert table["regret"] - table["expected_regret"] <= MARGIN


@pytest.mark.slow
def test_on_families_that_nothing_was_made_for_it_is_no_worse_than_the_grid(adaptive: Any):
    names = families(adaptive, lambda one: one.held_out)
    assert len(names) >= 4
    table = summary(adaptive, [(name, seed) for name in names for seed in range(5)])
    assert table["regret"] <= table["grid_regret"]
