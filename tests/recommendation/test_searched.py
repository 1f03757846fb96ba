"""What is recommended from the trials of an adaptive search."""

import math

import numpy as np
import pytest

from loratune.analyse.cells import cells_table, make_cells
from loratune.analyse.compare import compare
from loratune.analyse.curves import make_curves
from loratune.recommendation.grid import Recommendation, recommendations
from loratune.recommendation.rounds import confirmation
from loratune.recommendation.searched import answered
from loratune.records import TrialResult
from loratune.study.schema import Seeds
from simulated import result

SIZES = (4, 16, 64)
RATES = (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3)
NUMBERS = ("batch_size", "batch_size_low", "learning_rate", "acceptable_batch_sizes")


def bowl(size: int, rate: float, seed: int) -> float:
    """Least at batch size 16 and 4e-4; a seed moves it by a thousandth."""
    off = 0.02 * math.log2(size / 16) ** 2 + 0.05 * math.log(rate / 4e-4) ** 2
    return 0.8 * (1 + off) + 1e-3 * ((seed * 7 + size) % 3 - 1)


def trial(size: int, rate: float, seed: int = 0, **fields: object) -> TrialResult:
    loss = fields.pop("loss", bowl(size, rate, seed))
    return result(
        loss,  # type: ignore[arg-type]
        batch_size=size,
        learning_rate=rate,
        seed=seed,
        purpose=fields.pop("purpose", "adaptive"),  # type: ignore[arg-type]
        **fields,  # type: ignore[arg-type]
    )


def searched() -> list[TrialResult]:
    """Every batch size at three rates or more, one seed; three seeds at the best."""
    return [
        *(trial(size, rate) for size in SIZES for rate in RATES),
        *(trial(16, 4e-4, seed) for seed in (1, 2)),
    ]


def recommend(results: list[TrialResult], *, margin: float = 0.005) -> Recommendation:
    (answer,) = recommendations(results, margin=margin)
    return answer


def test_the_best_is_named_with_its_regret_and_nothing_is_called_an_edge():
    found = recommend(searched())
    assert found.undecided == ()
    assert (found.batch_size, found.learning_rate) == (16, 4e-4)
    assert found.expected_regret is not None
    assert found.expected_regret < 0.005
    assert found.acceptable_batch_sizes == (16,)
    assert found.cost_fraction is None
    assert not any("edge" in note or "that was tried" in note for note in found.evidence.notes)


def test_a_best_at_an_end_of_what_was_tried_is_said():
    found = recommend([one for one in searched() if one.trial.learning_rate <= 4e-4])
    assert found.learning_rate == 4e-4
    assert any("0.0004 is the highest that was tried" in note for note in found.evidence.notes)


def test_too_few_trials_for_the_margin_are_undecided_without_a_number():
    few = [trial(size, rate) for size, rate in ((4, 1e-4), (16, 1.6e-3), (64, 4e-4))]
    found = recommend(few)
    assert found.undecided
    assert "max_trials" in found.undecided[0]
    assert all(getattr(found, name) is None for name in NUMBERS)


def test_where_all_diverged_there_is_no_number_and_lower_rates_are_advised():
    lost = [trial(size, rate, status="diverged", loss=None) for size in SIZES for rate in RATES]
    found = recommend(lost)
    assert all(getattr(found, name) is None for name in NUMBERS)
    assert "below the lowest one, 0.0001" in found.undecided[0]


def test_an_infinite_loss_counts_as_diverged_and_what_failed_does_not():
    infinite = trial(16, 1.6e-3, 1, loss=math.inf)
    failed = trial(4, 1.6e-3, 1, loss=None, status="failed")
    notes = recommend([*searched(), infinite, failed]).evidence.notes
    assert any(note.startswith("1 of the trials diverged") for note in notes)


@pytest.mark.parametrize("loss", [0.1, 5.0])
def test_seeds_that_confirm_choose_nothing(loss: float):
    fresh = [trial(16, 4e-4, seed, loss=loss, purpose="confirm") for seed in (7, 8)]
    plain, confirmed = recommend(searched()), recommend([*searched(), *fresh])
    assert confirmed.expected_regret == plain.expected_regret
    assert confirmed.batch_size == plain.batch_size


def noisy(method: str = "lora") -> list[TrialResult]:
    """The same with noise of 3%: the surface and the lowest mean name different points."""
    draw = np.random.default_rng(0)
    points = [
        *((size, rate, 0) for size in SIZES for rate in RATES),
        (16, 4e-4, 1),
        (16, 4e-4, 2),
    ]
    return [
        trial(*point, loss=bowl(*point) * (1 + 0.03 * draw.normal()), method=method)
        for point in points
    ]


def test_what_is_confirmed_compared_and_shown_is_what_is_recommended():
    (raw,) = make_curves(make_cells(noisy()))
    (curve,) = make_curves(answered(noisy()))
    assert raw.best is not None
    assert curve.best is not None
    point = (curve.best.batch_size, curve.best.learning_rate)
    assert point != (raw.best.batch_size, raw.best.learning_rate)
    found = recommend(noisy(), margin=1.0)
    assert (found.batch_size, found.learning_rate) == point == (16, 8e-4)
    chosen = confirmation(curve.cells, seeds=Seeds(grid=(0, 1, 2), confirm=2))
    assert chosen is not None
    best, points = chosen
    assert (best.trial.batch_size, {rate for rate, _ in points}) == (16, {8e-4})
    table = cells_table(answered(noisy()))
    assert table.loc[table["batch_size"] == 16, "best_learning_rate"].tolist() == [8e-4]
    fresh = [
        trial(16, 8e-4, seed, loss=1.0 + 0.01 * seed + 0.001 * (seed * index % 3), method=method,
              purpose="confirm")
        for index, method in ((1, "lora"), (2, "pissa"))
        for seed in (7, 8, 9)
    ]  # fmt: skip
    (compared,) = compare([*noisy(), *noisy("pissa"), *fresh], cells_of=answered)
    assert (compared.baseline_batch_size, compared.baseline_learning_rate) == point
    assert compared.seeds == "fresh"
    (unaware,) = compare([*noisy(), *noisy("pissa"), *fresh])
    assert unaware.seeds == "chose"


def test_a_trial_that_was_stopped_with_a_seed_of_its_own_is_not_lost():
    stopped = trial(16, 2e-4, 9, status="stopped", loss=None)
    (curve,) = make_curves(answered([*searched(), stopped]))
    assert stopped in [one for cell in curve.cells for one in cell.results]
    (_, middle, _) = curve.cells
    assert middle.seeds == (0, 1, 2)


def test_a_grid_has_no_answer_but_its_means():
    grid = [trial(size, rate, purpose="search") for size in SIZES for rate in RATES]
    assert answered(grid) == make_cells(grid)
