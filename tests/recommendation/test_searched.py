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


def test_an_answer_from_one_seed_is_undecided_however_sure_its_surface():
    one_seed = [one for one in searched() if one.trial.seed == 0]
    found = recommend(one_seed, margin=0.5)
    assert "one seed alone" in found.undecided[0]
    assert "seeds: 3" in found.undecided[0]
    assert all(getattr(found, name) is None for name in NUMBERS)
    assert found.expected_regret is None


def test_a_low_regret_that_is_not_likely_enough_is_undecided():
    found = recommend(searched())
    assert found.expected_regret is not None
    # A margin that the mean regret just meets, and many samples do not.
    just = recommend(searched(), margin=1.01 * found.expected_regret)
    assert "probability, and it takes 90%" in just.undecided[0]
    assert "lower margin" in just.undecided[0]


def test_untried_neighbours_make_an_answer_undecided_and_are_named():
    tried = [
        one
        for one in searched()
        if one.trial.batch_size != 64 or one.trial.learning_rate in (1e-4, 1.6e-3)
    ]
    found = recommend(tried, margin=0.5)
    assert found.batch_size is None
    assert len(found.undecided) == 1
    assert "untried neighbours" in found.undecided[0]
    assert "batch size 64 at about 0.0004" in found.undecided[0]


def test_a_search_that_is_not_over_is_undecided_and_one_with_a_failure_is_not():
    planned = trial(4, 1.6e-3, 1, loss=None, status="planned")
    found = recommend([*searched(), planned])
    assert found.batch_size is None
    assert "1 trials have not ended" in found.undecided[0]
    failed = trial(4, 1.6e-3, 1, loss=None, status="failed")
    assert recommend([*searched(), failed]).batch_size == 16


def test_few_trials_that_trained_well_are_not_called_diverged():
    found = recommend([trial(16, 4e-4), trial(4, 4e-4)])
    assert found.undecided == (
        "2 trials have ended, too few to say anything of the others; raise max_trials under "
        "learning_rate and run it again",
    )
    lost = [trial(size, 1.6e-3, status="diverged", loss=None) for size in SIZES]
    assert "3 of 4 trials diverged" in recommend([*lost, trial(16, 4e-4)]).undecided[0]


def test_noise_at_the_bound_of_the_model_is_said():
    draw = np.random.default_rng(4)
    wild = [
        trial(size, rate, loss=0.8 * math.exp(0.2 * draw.normal()))
        for size in SIZES
        for rate in RATES
    ]
    assert any("most that the model allows, 5%" in one for one in recommend(wild).evidence.notes)
    assert not any("model allows" in one for one in recommend(searched()).evidence.notes)


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


def lucky(method: str = "lora") -> list[TrialResult]:
    """The same with three seeds at 8e-4 too, the first lucky by a tenth: its mean is the lowest.

    The surface, which knows the other rates and the spread of the seeds, stays lowest at 4e-4.
    """
    points = [
        *((size, rate, 0) for size in SIZES for rate in RATES),
        *((16, rate, seed) for rate in (4e-4, 8e-4) for seed in (1, 2)),
    ]
    return [
        trial(*point, loss=bowl(*point) * (0.9 if point == (16, 8e-4, 0) else 1.0), method=method)
        for point in points
    ]


def test_what_is_confirmed_compared_and_shown_is_what_is_recommended():
    (raw,) = make_curves(make_cells(lucky()))
    (curve,) = make_curves(answered(lucky()))
    assert raw.best is not None
    assert curve.best is not None
    point = (curve.best.batch_size, curve.best.learning_rate)
    assert point != (raw.best.batch_size, raw.best.learning_rate)
    found = recommend(lucky(), margin=1.0)
    assert (found.batch_size, found.learning_rate) == point == (16, 4e-4)
    chosen = confirmation(curve.cells, seeds=Seeds(grid=(0, 1, 2), confirm=2))
    assert chosen is not None
    best, points = chosen
    assert (best.trial.batch_size, {rate for rate, _ in points}) == (16, {4e-4})
    table = cells_table(answered(lucky()))
    assert table.loc[table["batch_size"] == 16, "best_learning_rate"].tolist() == [4e-4]
    fresh = [
        trial(16, 4e-4, seed, loss=1.0 + 0.01 * seed + 0.001 * (seed * index % 3), method=method,
              purpose="confirm")
        for index, method in ((1, "lora"), (2, "pissa"))
        for seed in (7, 8, 9)
    ]  # fmt: skip
    (compared,) = compare([*lucky(), *lucky("pissa"), *fresh], cells_of=answered)
    assert (compared.baseline_batch_size, compared.baseline_learning_rate) == point
    assert compared.seeds == "fresh"
    (unaware,) = compare([*lucky(), *lucky("pissa"), *fresh])
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
