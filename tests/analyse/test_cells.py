import json
import math

import numpy as np
import pytest
from scipy import stats

from loratune.analyse.cells import cells_table, make_cells
from loratune.analyse.tables import results_table, table_bytes
from simulated import result, score, sweep


def losses(table):
    return lambda size, rate, seed: table[rate][seed]


def only(results):
    (cell,) = make_cells(results)
    return cell


def test_the_best_rate_is_best_in_the_mean_not_at_one_seed():
    cell = only(
        sweep(
            losses({1e-4: [1.0, 1.0], 1e-3: [0.5, 1.6], 1e-2: [2.0, 2.0]}),
            batch_sizes=[8],
            seeds=2,
        )
    )
    assert cell.best is not None
    assert cell.best.learning_rate == 1e-4


def test_a_rate_at_which_one_seed_diverged_is_not_eligible_and_is_shown():
    cell = only(
        sweep(
            losses({1e-4: [3.0, 3.0], 1e-3: [2.0, 2.0], 1e-2: [0.1, math.nan]}),
            batch_sizes=[8],
            seeds=2,
        )
    )
    assert cell.best is not None
    assert cell.best.learning_rate == 1e-3
    assert cell.diverged_rates == (1e-2,)
    assert cell.lr_at_edge is False, "the next higher rate was tried: it diverged"
    assert cells_table([cell])["diverged_learning_rates"].tolist() == ["0.01"]


def test_a_finished_trial_whose_loss_is_not_finite_counts_as_diverged():
    cell = only([result(math.inf), result(1.0, learning_rate=1e-4)])
    assert cell.diverged_rates == (1e-3,)


@pytest.mark.parametrize("status", ["planned", "failed", "out_of_memory", "stopped"])
def test_a_rate_without_a_score_for_one_seed_is_not_eligible(status):
    results = [
        result(2.0, learning_rate=1e-4, seed=0),
        result(2.0, learning_rate=1e-4, seed=1),
        result(1.0, learning_rate=1e-3, seed=0),
        result(None, learning_rate=1e-3, seed=1, status=status),
    ]
    cell = only(results)
    assert cell.best is not None
    assert cell.best.learning_rate == 1e-4
    assert cell.incomplete_rates == (1e-3,)
    assert cells_table([cell])["num_seeds"].tolist() == [2]


def test_an_untried_higher_rate_leaves_the_best_one_at_the_edge():
    planned = result(learning_rate=1e-2, status="planned")
    cell = only([result(2.0, learning_rate=1e-4), result(1.0, learning_rate=1e-3), planned])
    assert cell.lr_at_edge is True


def test_a_cell_in_which_everything_diverged_has_nulls():
    cell = only(sweep(lambda *_: math.nan, batch_sizes=[8]))
    row = json.loads(table_bytes(cells_table([cell]), format="json"))[0]
    for name in (
        "best_learning_rate",
        "lr_at_edge",
        "score",
        "score_low",
        "score_high",
        "num_seeds",
        "validation_loss",
        "trial_id",
    ):
        assert row[name] is None, name
    assert row["status"] == "diverged"
    assert row["score_metric"] == "validation_loss"
    assert row["higher_is_better"] is False


def test_the_interval_is_scipys_and_null_with_one_seed():
    values = [1.0, 1.2, 1.7]
    cell = only([result(value, seed=seed) for seed, value in enumerate(values)])
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert cell.score is not None
    assert (cell.score.low, cell.score.high) == pytest.approx((low, high), rel=1e-9)
    one = only([result()])
    assert one.score is not None
    assert one.score.low is None
    assert one.score.high is None


def test_the_interval_covers_the_true_mean_95_times_in_100():
    draw = np.random.default_rng(0)
    covered = 0
    for values in draw.normal(2.0, 0.3, size=(2000, 3)):
        cell = only([result(float(v), seed=seed) for seed, v in enumerate(values)])
        assert cell.score is not None
        assert cell.score.low is not None
        assert cell.score.high is not None
        covered += cell.score.low <= 2.0 <= cell.score.high
    assert abs(covered / 2000 - 0.95) < 0.015  # three standard errors


def test_accuracies_are_maximised_and_named_by_their_task():
    held_out = only(
        [
            result(
                learning_rate=rate,
                scores=[score("validation", correct, 10, split="validation")],
                select_on="validation_accuracy",
            )
            for rate, correct in ((1e-4, 3), (1e-3, 8))
        ]
    )
    assert held_out.metric.name == "validation_accuracy"
    assert held_out.best is not None
    assert held_out.best.learning_rate == 1e-3
    test = only(
        [
            result(learning_rate=rate, scores=[score("gsm8k", correct, 10)], select_on="test")
            for rate, correct in ((1e-4, 9), (1e-3, 8))
        ]
    )
    assert test.metric.name == "gsm8k_accuracy"
    assert test.metric.higher_is_better
    assert test.best is not None
    assert test.best.learning_rate == 1e-4


def test_the_columns_are_the_trials_without_what_differs_within_a_cell_then_the_choice():
    results = sweep(lambda size, rate, seed: rate + seed, seeds=2)
    table = cells_table(make_cells(results))
    shared = [
        name
        for name in results_table(results).columns
        if name not in ("learning_rate", "seed", "purpose")
    ]
    assert list(table.columns)[: len(shared)] == shared
    assert list(table.columns)[len(shared) :][:8] == [
        "best_learning_rate",
        "lr_at_edge",
        "score",
        "score_metric",
        "higher_is_better",
        "score_low",
        "score_high",
        "num_seeds",
    ]
    assert table["seconds"].tolist() == [20.0] * 3, "the sum over the two seeds at the best rate"
    assert table["batch_size"].tolist() == [4, 16, 64]


def test_trials_that_differ_in_anything_else_are_in_different_cells():
    different = [
        result(),
        result(method="pissa"),
        result(batch_size=16),
        result(rank=16),
        result(num_train_rows=64),
        result(model="demo:4m"),
        result(schedule="linear"),
        result(warmup_steps=3),
        result(steps=7),
        result(study="another"),
    ]
    assert len(make_cells(different)) == len(different)
    assert len(make_cells([result(), result(seed=1), result(learning_rate=1.0)])) == 1
