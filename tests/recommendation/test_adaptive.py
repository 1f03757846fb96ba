"""The adaptive search on surfaces whose best is known."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest

from loratune.planning.search_space import Space, design_size, initial_design, make_space
from loratune.recommendation.adaptive import (
    Observed,
    fit_surface,
    is_close,
    is_decided,
    next_points,
    propose,
    search_answer,
    untried_neighbours,
)

SIZES = (2, 4, 8, 16, 32, 64)
SPACE = make_space(SIZES, low=1e-5, high=1e-2, seeds=(0, 1, 2))
MARGIN = 0.005

Loss = Callable[[int, float, int], float | None]


def bowl(size: int, rate: float, seed: int) -> float:
    """Least at batch size 8 and 3e-4 times the root of size / 8; 0.1% of noise."""
    best_rate = 3e-4 * math.sqrt(size / 8)
    noise = np.random.default_rng([size, round(1e7 * rate), seed]).normal(0, 1e-3)
    walls = 0.01 * math.log2(size / 8) ** 2 + 0.02 * math.log(rate / best_rate) ** 2
    return 0.7 * (1 + walls + float(noise))


def with_cliff(size: int, rate: float, seed: int) -> float | None:
    """The bowl, but from 2e-4 times the root of size / 8 on every trial diverges."""
    return None if rate >= 2e-4 * math.sqrt(size / 8) else bowl(size, rate, seed)


def tried(loss: Loss, points: Sequence[tuple[int, float, int]]) -> list[Observed]:
    return [Observed(size, rate, seed, loss(size, rate, seed)) for size, rate, seed in points]


def searched(loss: Loss, *, space: Space = SPACE, max_trials: int = 40) -> list[Observed]:
    """All trials of a search."""
    first = initial_design(space, num_trials=design_size(len(space.batch_sizes)))
    trials, points = list[Observed](), first
    while points:
        trials += tried(loss, [(one.batch_size, one.learning_rate, one.seed) for one in points])
        points = next_points(
            trials, space, margin=MARGIN, max_trials=max_trials, trials_per_round=6
        )
    return trials


def true_excess(size: int, rate: float) -> float:
    """Of the bowl without its noise, over the least of the space."""

    def truth(size: int, rate: float) -> float:
        best_rate = 3e-4 * math.sqrt(size / 8)
        return 1 + 0.01 * math.log2(size / 8) ** 2 + 0.02 * math.log(rate / best_rate) ** 2

    return truth(size, rate) / min(truth(*point) for point in SPACE.points) - 1


def test_a_search_ends_near_the_best_with_two_seeds_there_and_says_so():
    trials = searched(bowl)
    surface = fit_surface(trials, SPACE)
    assert surface is not None
    answer = search_answer(surface, margin=MARGIN)
    assert answer is not None
    assert is_decided(surface, answer, margin=MARGIN)
    assert true_excess(answer.batch_size, answer.learning_rate) < MARGIN
    assert answer.num_seeds >= 2
    assert 8 in answer.acceptable_batch_sizes
    assert answer.loss_low < 0.7 * (1 + true_excess(answer.batch_size, answer.learning_rate))
    assert answer.loss_high > 0.7
    # 6 batch sizes x 31 learning rates x 3 seeds are 558.
    assert len(trials) < 40
    assert len({(one.batch_size, one.learning_rate, one.seed) for one in trials}) == len(trials)


def test_the_order_of_the_observations_changes_nothing():
    trials = tried(bowl, [(2, 1e-4, 0), (8, 2.5e-4, 0), (64, 1e-3, 0), (16, 1e-4, 1)])
    proposals = {
        next_points(order, SPACE, margin=MARGIN, max_trials=30, trials_per_round=4)
        for order in permutations(trials)
    }
    assert len(proposals) == 1


def test_a_search_that_has_spent_its_trials_proposes_nothing_and_a_round_no_more_than_is_left():
    trials = tried(bowl, [(2, 1e-4, 0), (8, 2.5e-4, 0), (64, 1e-3, 0)])
    assert next_points(trials, SPACE, margin=MARGIN, max_trials=3, trials_per_round=6) == ()
    two = next_points(trials, SPACE, margin=MARGIN, max_trials=5, trials_per_round=6)
    assert len(two) == 2


def test_nothing_that_was_tried_is_proposed_again_and_no_seed_beyond_the_spaces():
    trials = searched(bowl)[:20]
    surface = fit_surface(trials, SPACE)
    done = {(one.batch_size, one.learning_rate, one.seed) for one in trials}
    proposed = propose(surface, SPACE, trials, num_trials=12)
    assert len(set(proposed)) == 12
    assert not done & {(one.batch_size, one.learning_rate, one.seed) for one in proposed}
    assert {one.seed for one in proposed} <= {0, 1, 2}


def test_what_diverged_is_kept_away_from_and_never_the_answer():
    trials = searched(with_cliff)
    surface = fit_surface(trials, SPACE)
    assert surface is not None
    answer = search_answer(surface, margin=MARGIN)
    assert answer is not None
    assert with_cliff(answer.batch_size, answer.learning_rate, 0) is not None
    diverged = [one for one in trials if one.loss is None]
    assert diverged  # the design has some
    assert len(diverged) < len(trials) / 2
    for one in diverged:
        above = [
            index
            for index, (size, rate) in enumerate(SPACE.points)
            if size == one.batch_size and rate >= one.learning_rate
        ]
        assert (surface.diverges[above] == 1).all()
        assert not surface.safe[above].any()


def test_a_seed_that_diverged_takes_its_point_and_all_above_out_of_the_answers():
    points = [(8, 1e-4, 0), (8, 2e-4, 0), (8, 4e-4, 0), (16, 2e-4, 0), (4, 2e-4, 0)]
    space = make_space(SIZES, low=1e-4, high=8e-4, seeds=(0, 1))
    known = [one for one in points if (one[0], one[1]) in space.index]
    lived = tried(bowl, known)
    surface = fit_surface(lived, space)
    assert surface is not None
    answer = search_answer(surface, margin=MARGIN)
    assert answer is not None
    died = [*lived, Observed(answer.batch_size, answer.learning_rate, 1, None)]
    surface = fit_surface(died, space)
    assert surface is not None
    other = search_answer(surface, margin=MARGIN)
    assert other is not None
    assert (other.batch_size, other.learning_rate) != (answer.batch_size, answer.learning_rate)


def test_where_everything_diverged_there_is_no_number_and_lower_rates_come_next():
    trials = searched(lambda size, rate, seed: None, max_trials=12)
    assert len(trials) == 12
    assert fit_surface(trials, SPACE) is None
    later = trials[design_size(len(SIZES)) :]
    lowest = min(one.learning_rate for one in trials[: design_size(len(SIZES))])
    assert max(one.learning_rate for one in later) < lowest


def test_a_trial_without_an_answer_is_no_divergence_and_its_point_is_left_alone():
    good = tried(bowl, [(2, 1e-4, 0), (8, 2.5e-4, 0), (64, 1e-3, 0)])
    failed = Observed(16, 1e-4, 0, None, useless=True)
    surface = fit_surface([*good, failed], SPACE)
    assert surface is not None
    assert not surface.diverges.any()
    assert surface.left[SPACE.index[16, 1e-4]] == ()
    only = [replace(failed, batch_size=size) for size in SIZES]
    assert fit_surface(only, SPACE) is None


def test_one_lucky_seed_decides_nothing_where_more_are_allowed():
    def flat(size: int, rate: float, seed: int) -> float:
        return 0.7

    trials = tried(flat, [(size, rate, 0) for size, rate in SPACE.points[::7]])
    surface = fit_surface(trials, SPACE)
    assert surface is not None
    answer = search_answer(surface, margin=MARGIN)
    assert answer is not None
    assert answer.expected_regret < MARGIN
    assert not is_decided(surface, answer, margin=MARGIN)


def test_where_one_seed_is_allowed_the_search_ends_without_a_decided_answer():
    one_seed = Space(SPACE.points, ((0,),) * len(SPACE.points))
    trials = searched(bowl, space=one_seed)
    assert len(trials) < 40
    surface = fit_surface(trials, one_seed)
    assert surface is not None
    answer = search_answer(surface, margin=MARGIN)
    assert answer is not None
    assert is_close(answer, margin=MARGIN)
    assert not is_decided(surface, answer, margin=MARGIN)


def test_an_answer_with_untried_neighbours_is_not_believed_yet():
    trials = tried(bowl, [(size, 3.2e-4, seed) for size in SIZES for seed in (0, 1)])
    surface = fit_surface(trials, SPACE)
    assert surface is not None
    answer = search_answer(surface, margin=MARGIN)
    assert answer is not None
    wanted = untried_neighbours(surface, answer)
    beside = {one.learning_rate / answer.learning_rate for one in wanted}
    assert any(0.5 <= one < 1 for one in beside)
    assert any(1 < one <= 2 for one in beside)
    assert {one.batch_size for one in wanted} == {answer.batch_size}
    sure = replace(answer, expected_regret=0.0, chance_within_margin=1.0)
    assert not is_decided(surface, sure, margin=MARGIN)
    more = [(one.batch_size, one.learning_rate, one.seed) for one in wanted]
    surface = fit_surface([*trials, *tried(bowl, more)], SPACE)
    assert surface is not None
    assert untried_neighbours(surface, answer) == ()
    assert is_decided(surface, sure, margin=MARGIN)


def test_the_surface_is_the_loss_where_trials_are_many():
    points = [(size, rate, seed) for size, rate in SPACE.points[::3] for seed in (0, 1)]
    surface = fit_surface(tried(bowl, points), SPACE)
    assert surface is not None
    found = surface.reference * (1 + surface.excess(surface.mean))
    # Near the best, where z is the excess, and noise is 0.1%: within 0.5% of the truth.
    near = [index for index, point in enumerate(SPACE.points) if true_excess(*point) < 0.05]
    truth = [0.7 * (1 + true_excess(*SPACE.points[index])) for index in near]
    assert found[near] == pytest.approx(truth, rel=0.005)
