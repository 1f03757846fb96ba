"""Which trials of a search stop half-way: the rule, and what becomes of a stopped one."""

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from loratune.analyse.cells import cells_table, make_cells
from loratune.planning.bar import half_way_loss
from loratune.recommendation.early_stopping import bar, expected_loss
from loratune.recommendation.grid import recommendations
from loratune.recommendation.searched import answer_point, observed
from loratune.records import TrialResult
from simulated import result


def trained(loss: float, *half: float, rate: float = 1e-3, steps: int = 20) -> TrialResult:
    """A finished trial of 20 updates, whose losses are 9 but for those before half-way."""
    made = result(loss, learning_rate=rate, steps=steps, purpose="adaptive")
    assert made.outcome is not None
    end = steps // 2
    losses = (9.0,) * (end - len(half)) + half + (9.0,) * (steps - end)
    return replace(made, outcome=replace(made.outcome, losses=losses))


def stopped(*half: float, rate: float = 1e-2) -> TrialResult:
    whole = trained(1.0, *half, rate=rate)
    assert whole.outcome is not None
    outcome = replace(
        whole.outcome, status="stopped", validation_loss=None, losses=whole.outcome.losses[:10]
    )
    return replace(whole, status="stopped", outcome=outcome)


def test_the_bar_is_a_fifth_above_the_worst_of_the_good_ones_half_way():
    # The late bloomer ended within 2% of the best; the one that ended 3% off does not count.
    known = [trained(1.0, 2.0, 2.0), trained(1.019, 3.0, 3.5), trained(1.03, 8.0, 8.0)]
    found = bar(20, known)
    assert found is not None
    assert (found.begin, found.end, found.loss) == (8, 10, pytest.approx(1.2 * 3.25))
    assert found.reason_after([9.0] * 8 + [3.8, 3.9]) is None
    assert found.reason_after([9.0] * 8 + [4.0, 3.9]) is not None
    # It is looked at once.
    assert found.reason_after([9.0] * 9) is None
    assert found.reason_after([9.0] * 11) is None


@pytest.mark.parametrize(
    ("num_updates", "stretch"), [(4, (1, 2)), (5, (2, 3)), (2048, (819, 1024))]
)
def test_the_stretch_is_the_tenth_before_half_way_and_one_update_at_least(num_updates, stretch):
    found = bar(num_updates, [trained(1.0, 2.0, 2.0)] * 3)
    assert found is not None
    assert (found.begin, found.end) == stretch


def test_nothing_is_asked_of_short_trials_nor_before_three_have_finished():
    known = [trained(1.0, 2.0, 2.0)] * 3
    assert bar(3, known) is None
    assert bar(20, known[:2]) is None
    # One that diverged or was stopped has not finished, and losses that are not there say nothing.
    diverged = result(None, status="diverged", steps=20)
    assert bar(20, [*known[:2], stopped(2.0, 2.0), diverged, result(1.0, steps=20)]) is None


def test_a_stopped_trial_is_expected_to_end_as_far_off_as_it_was():
    known = [trained(1.0, 2.0, 2.0), trained(0.5, 1.0, 1.0)]
    assert expected_loss(stopped(3.0, 3.0), known) == pytest.approx(1.5)
    assert expected_loss(stopped(3.0, 3.0), []) is None
    assert half_way_loss(stopped(3.0, 3.0)) == pytest.approx(3.0)


def test_a_stopped_trial_shapes_the_surface_and_is_never_the_answer():
    sizes, rates = (4, 16), (1e-4, 2e-4, 4e-4)

    def one(size: int, rate: float, seed: int = 0) -> TrialResult:
        loss = 1.0 + 0.1 * (size == 4) + 0.05 * abs(rates.index(rate) - 1)
        made = result(
            loss, batch_size=size, learning_rate=rate, seed=seed, steps=20, purpose="adaptive"
        )
        assert made.outcome is not None
        return replace(made, outcome=replace(made.outcome, losses=(2.0 * loss,) * 20))

    results = [one(size, rate, seed) for size in sizes for rate in rates for seed in (0, 1)]
    halted = replace(
        stopped(),
        trial=one(16, 4e-4).trial,
        outcome=replace(one(16, 4e-4).outcome, losses=(1.0,) * 10),  # type: ignore[arg-type]
    )
    assert halted.outcome is not None
    halted = replace(
        halted, outcome=replace(halted.outcome, status="stopped", validation_loss=None)
    )
    results = [r for r in results if r.trial.trial_id != halted.trial.trial_id]
    results = [r for r in results if (r.trial.batch_size, r.trial.learning_rate) != (16, 4e-4)]
    # Half-way it was twice as good as any: expected to be the best, and yet no candidate.
    seen = observed([*results, halted])
    (last,) = [r for r in seen if r.stopped]
    assert last.loss == pytest.approx(0.5)
    assert answer_point([*results, halted]) == (16, 2e-4)
    (answer,) = recommendations([*results, halted])
    assert "batch size 16 at learning rate 0.0002, is still expected to be" in answer.undecided[0]
    assert any("1 of the trials were stopped half-way" in n for n in answer.evidence.notes)


@pytest.mark.parametrize(("half_way", "is_known"), [(1.0, False), (7.0, True)])
def test_a_cell_whose_stopped_trial_was_ahead_of_those_that_ended_has_no_known_best(
    half_way, is_known
):
    # The low LR ended badly; a stopped one was far ahead of it half-way, or was not.
    low = trained(4.0, 6.0, 6.0, rate=1e-4)
    (cell,) = make_cells([low, stopped(half_way, half_way, rate=1e-2)])
    assert (cell.best is not None) == is_known
    (row,) = cells_table([cell]).to_dict("records")
    assert row["status"] == ("done" if is_known else "incomplete")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return import_module("early_stopping")


def test_on_recorded_curves_no_trial_within_2_percent_of_the_best_is_stopped(benchmark: Any):
    for grid in benchmark.grids():
        found = benchmark.stops(grid, num_draws=300)
        assert found.false == {0.005: 0.0, 0.01: 0.0, 0.02: 0.0}
        assert found.num_near[0.02] > 0
        assert found.saved > 0.1
