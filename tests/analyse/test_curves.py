import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from loratune.analyse.cells import make_cells
from loratune.analyse.curves import (
    crossovers,
    make_curves,
    normalised,
    selection_gaps,
    varied_axes,
)
from simulated import result, score, sweep


def by_hand(values, **fields):
    """A curve through {batch size: [loss of each seed]}."""
    return [
        result(loss, batch_size=size, seed=seed, **fields)
        for size, losses in values.items()
        for seed, loss in enumerate(losses)
    ]


def two(first, second):
    curves = make_curves(make_cells(by_hand(first) + by_hand(second, method="pissa")))
    assert [curve.label for curve in curves] == ["lora", "pissa"]
    return curves


def test_lines_cross_where_geometry_says_and_one_seed_has_no_interval():
    # lora 1 -> 2 and pissa 1.5 -> 1.5 over log2 4..16: they meet half-way, at 2^3
    (crossing,) = crossovers(*two({4: [1.0], 16: [2.0]}, {4: [1.5], 16: [1.5]}))
    assert crossing.batch_size == pytest.approx(8.0)
    assert (crossing.better_below, crossing.better_above) == ("lora", "pissa")
    assert (crossing.low, crossing.high, crossing.num_seeds) == (None, None, 1)


def test_touching_is_no_crossing_and_equality_in_between_is_one():
    touch = two({4: [1.0], 16: [1.0], 64: [1.0]}, {4: [2.0], 16: [1.0], 64: [2.0]})
    assert crossovers(*touch) == ()
    (through,) = crossovers(
        *two({4: [1.0], 16: [1.0], 64: [1.0]}, {4: [2.0], 16: [1.0], 64: [0.5]})
    )
    assert through.batch_size == pytest.approx(16.0)


def test_the_crossing_interval_is_the_set_of_sizes_a_paired_t_test_does_not_reject():
    first, second = {4: [1.0, 1.1, 1.0], 16: [1.9, 2.0, 2.2], 64: [3.0, 3.0, 3.1]}, {
        4: [1.5, 1.52, 1.53], 16: [1.5, 1.51, 1.5], 64: [1.5, 1.5, 1.5],
    }  # fmt: skip
    (crossing,) = crossovers(*two(first, second))
    assert crossing.low is not None
    assert crossing.high is not None

    def p(size):
        x = math.log2(size)
        index = 0 if x <= 4 else 1
        left, right = (4, 16) if index == 0 else (16, 64)
        weight = (x - math.log2(left)) / 2
        gap = [
            (1 - weight) * (first[left][s] - second[left][s])
            + weight * (first[right][s] - second[right][s])
            for s in range(3)
        ]
        return stats.ttest_1samp(gap, 0.0)[1]

    assert p(crossing.low) == pytest.approx(0.05, abs=1e-6)
    assert p(crossing.high) == pytest.approx(0.05, abs=1e-6)


def test_the_crossing_interval_covers_the_true_crossing_95_times_in_100():
    draw = np.random.default_rng(4)
    covered = 0
    for _ in range(400):
        noise = draw.normal(size=(2, 3, 3)) * 0.15
        curves = two(
            {size: list(1.0 + index + noise[0, index]) for index, size in enumerate((2, 8, 32))},
            {size: list(1.7 + noise[1, index]) for index, size in enumerate((2, 8, 32))},
        )
        true = 2 ** (1 + 2 * 0.7)
        found = crossovers(*curves)
        covered += any(
            (one.low is None or one.low <= true) and (one.high is None or true <= one.high)
            for one in found
        )
    assert abs(covered / 400 - 0.95) < 0.035  # three standard errors


def test_a_crossing_is_shown_where_both_sides_are_and_seeds_that_change_nothing_show_none():
    draw = np.random.default_rng(6)
    sizes = (4, 16, 64)
    noise = 0.02 * draw.normal(size=(2, 3, 3))
    first = {size: list(1.0 + noise[0, i]) for i, size in enumerate(sizes)}
    second = {size: list(1.0 + 0.3 * (i - 1) + noise[1, i]) for i, size in enumerate(sizes)}
    (crossing,) = crossovers(*two(first, second))
    assert crossing.shown
    assert (crossing.better_below, crossing.better_above) == ("pissa", "lora")
    # Below alone it is shown, above it is not.
    (half,) = crossovers(*two(first, {**second, 64: [1.1, 0.99, 1.01]}))
    assert not half.shown
    flat = [{size: [1.0 + add * i] * 3 for i, size in enumerate(sizes)} for add in (0.0, 0.3)]
    flat[1][4] = [0.7] * 3
    assert [one.shown for one in crossovers(*two(*flat))] == [False]


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_equal_curves_name_no_better_method_on_any_side(num_seeds):
    # Nearly every pair of equal curves changes sign somewhere; two seeds alone give an interval to
    # half of them. The bound is 5 in 100.
    draw = np.random.default_rng(num_seeds)
    shown = changed = 0
    for noise in 0.02 * draw.normal(size=(100, 2, 5, num_seeds)):
        curves = two(
            *({2**i: list(1.0 + 0.05 * (i - 2) ** 2 + one[i]) for i in range(5)} for one in noise)
        )
        found = crossovers(*curves)
        changed += bool(found)
        shown += any(one.shown for one in found)
    assert changed >= 80
    assert shown <= 5


def test_a_curve_that_is_better_at_one_end_and_equal_elsewhere_is_shown_to_cross_5_times_in_100():
    draw = np.random.default_rng(7)
    shown = 0
    for noise in 0.02 * draw.normal(size=(400, 2, 6, 4)):
        first, second = (
            {2**i: list(1.0 + one[i]) for i in range(6)} for one in noise
        )  # fmt: skip
        first[1] = [loss - 1.0 for loss in first[1]]
        shown += any(one.shown for one in crossovers(*two(first, second)))
    # 5 equal sizes under Holm's adjustment over 6 (5 once the first is rejected).
    assert shown / 400 < 0.05 + 0.033  # three standard errors


def test_shifted_curves_share_their_best_score_and_keep_their_shape():
    results = by_hand({4: [1.0], 16: [0.5]}, rank=8) + by_hand({4: [0.9], 16: [0.2]}, rank=32)
    raw = make_curves(make_cells(results))
    shifted = normalised(raw, default=raw[0])
    assert [curve.best.score for curve in shifted if curve.best] == [0.5, pytest.approx(0.5)]
    assert shifted[1].points[0].score == pytest.approx(1.2)
    assert shifted[1].shift == pytest.approx(0.3)
    assert [curve.shift for curve in raw] == [0.0, 0.0]


def test_labels_name_only_what_varies():
    def labels(*groups):
        return [curve.label for curve in make_curves(make_cells([r for g in groups for r in g]))]

    base = {4: [1.0], 16: [1.0]}
    assert labels(by_hand(base)) == ["lora"]
    assert labels(by_hand(base, rank=8), by_hand(base, rank=32)) == ["rank 8", "rank 32"]
    assert labels(by_hand(base), by_hand(base, num_train_rows=25000)) == [
        "512 rows",
        "25,000 rows",
    ]
    assert labels(by_hand(base), by_hand(base, model="hub/big")) == ["demo:1m", "big"]
    curves = make_curves(make_cells(by_hand(base) + by_hand(base, model="b", method="pissa")))
    assert varied_axes(curves) == ("method",), "the model follows from the method here"


def test_a_warm_up_ratio_is_one_curve_although_its_steps_differ():
    def with_warmup(ratio, schedule="cosine"):
        return [
            result(
                batch_size=size, warmup_steps=math.ceil(ratio * 2048 / size),
                num_train_rows=2048, schedule=schedule,
            )
            for size in (4, 16, 64)
        ]  # fmt: skip

    curves = make_curves(
        make_cells(with_warmup(0) + with_warmup(0.03) + with_warmup(0, "constant"))
    )
    assert [len(curve.points) for curve in curves] == [3, 3, 3]
    assert [curve.label for curve in curves] == ["cosine", "cosine with 3.1% warm-up", "constant"]


def test_a_cell_without_an_eligible_rate_stays_on_the_curve_without_a_score():
    results = sweep(lambda size, rate, seed: math.nan if size == 64 else 1.0, seeds=1)
    (curve,) = make_curves(make_cells(results))
    assert [point.score for point in curve.points] == [1.0, 1.0, None]
    assert curve.points[2].diverged_rates == (1e-4, 1e-3, 1e-2)


def graded(rate, seed, correct, loss, select_on="validation_loss"):
    return replace(
        result(loss, learning_rate=rate, seed=seed, select_on=select_on),
        scores=(score("gsm8k", correct, 100),),
    )


def test_the_selection_gap_is_test_at_its_own_best_less_test_at_the_chosen_rate():
    results = [
        graded(1e-4, 0, 60, 1.0), graded(1e-4, 1, 62, 1.0),
        graded(1e-3, 0, 70, 1.1), graded(1e-3, 1, 66, 1.1),
    ]  # fmt: skip
    cells = make_cells(results)
    (gap,) = selection_gaps(cells, task="gsm8k")
    assert (gap.chosen_learning_rate, gap.best_learning_rate) == (1e-4, 1e-3)
    assert gap.gap == pytest.approx(0.07)
    assert gap.optimism is None
    (curve,) = make_curves(cells, task="gsm8k")
    assert curve.points[0].score == pytest.approx(0.61)


def test_under_select_on_test_the_optimism_is_what_other_seeds_choice_loses():
    results = [
        graded(rate, seed, correct, 1.0, "test")
        for rate, row in {1e-4: (70, 50), 1e-3: (50, 68)}.items()
        for seed, correct in enumerate(row)
    ]
    (gap,) = selection_gaps(make_cells(results), task="gsm8k")
    assert gap.gap == 0.0
    # each seed is scored at the rate that the other one likes: 50 and 50, against 60 claimed
    assert gap.optimism == pytest.approx(0.10)
    assert gap.optimism_bound == pytest.approx(0.5642 * math.sqrt(0.6 * 0.4 * 0.5 / 100), rel=1e-3)
