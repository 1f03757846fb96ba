"""What an adaptive search may try, and what it begins with."""

import itertools
import math
from collections import Counter
from pathlib import Path

import pytest

from loratune.planning.search_space import (
    design_size,
    first_points,
    initial_design,
    make_space,
    most_trials,
)
from loratune.study.loading import parse_study
from loratune.study.schema import Study

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
STUDY = """
study: searching
model: demo:1m
precision: float32
data:
  train: demo:task
  prompt: question
  response: answer
  template: plain
  max_tokens: 64
  validation: {{rows: 64}}
protocol: {{kind: fixed_samples, epochs: 1}}
methods: [lora]
rank: 8
alpha: rank
targets: all-linear
batch_size: {batch_size}
learning_rate: {learning_rate}
schedule: {{kind: cosine, warmup_ratio: 0.0}}
seeds: 2
"""


def study(*, batch_size: str = "[4, 16, 64]", learning_rate: str) -> Study:
    text = STUDY.format(batch_size=batch_size, learning_rate=learning_rate)
    return parse_study(text, name="searching.yaml", folder=Path.cwd()).study


def test_a_space_has_about_ten_learning_rates_a_decade_with_both_ends():
    space = make_space((8, 2), low=1e-4, high=1e-2, seeds=(0, 1))
    rates = [rate for size, rate in space.points if size == 2]
    assert (rates[0], rates[-1], len(rates)) == (1e-4, 1e-2, 21)
    steps = [math.log10(high / low) for low, high in itertools.pairwise(rates)]
    # Two digits move a rate by up to 5%, a step by twice that.
    assert max(abs(step - 0.1) for step in steps) < 2 * math.log10(1.05)
    assert list(space.points) == sorted(space.points)
    assert space.seeds == ((0, 1),) * len(space.points)


@pytest.mark.parametrize("sizes", [(8,), (4, 16), SIZES])
def test_the_first_design_has_every_batch_size_no_point_twice_and_no_end(sizes: tuple[int, ...]):
    space = make_space(sizes, low=1e-5, high=1e-2, seeds=(3, 4))
    design = initial_design(space, num_trials=design_size(len(sizes)))
    assert len(design) == max(len(sizes) + 1, 6)
    points = {(one.batch_size, one.learning_rate) for one in design}
    assert len(points) == len(design)
    counts = Counter(one.batch_size for one in design)
    assert set(counts) == set(sizes)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert {one.seed for one in design} == {3}
    # A tenth of three decades from either end, and a step's rounding.
    assert all(1.5e-5 < one.learning_rate < 6.7e-3 for one in design)


def test_the_first_design_spreads_over_the_learning_rates():
    space = make_space(SIZES, low=1e-5, high=1e-2, seeds=(0,))
    logs = sorted(math.log10(one.learning_rate) for one in initial_design(space, num_trials=10))
    # Ten points over the middle 2.4 decades: no hole of more than a quarter of it.
    assert max(high - low for low, high in itertools.pairwise(logs)) < 0.6


def test_a_grid_begins_with_all_of_its_trials_and_a_search_with_its_design():
    grid = first_points(study(learning_rate="[1e-3, 1e-2]"))
    assert grid == dict.fromkeys((4, 16, 64), ((1e-3, 0), (1e-2, 0), (1e-3, 1), (1e-2, 1)))
    searched = study(learning_rate="{search: adaptive, low: 1e-4, high: 1e-2}")
    first = first_points(searched)
    assert set(first) == {4, 16, 64}
    assert sum(map(len, first.values())) == 6


def test_a_search_may_train_what_its_study_says_but_never_less_than_its_design():
    assert most_trials(study(learning_rate="{search: adaptive, low: 1e-4, high: 1e-2}")) == 14
    more = "{{search: adaptive, low: 1e-4, high: 1e-2, max_trials: {}}}"
    assert most_trials(study(learning_rate=more.format(40))) == 40
    assert most_trials(study(learning_rate=more.format(2))) == 6
