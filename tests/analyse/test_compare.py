import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from loratune.analyse.compare import compare, comparisons_document, trials_to_compare
from loratune.analyse.crossed import crossed_difference
from loratune.analyse.intervals import holm
from loratune.errors import AnalysisError
from loratune.planning.power import detectable_effect
from recorded_sweep import recorded_results
from simulated import faked_results, result, score, sweep, verdicts

RATES = (1e-3, 1e-2)
LOWER = 1e-4
NUM_ROWS = 512  # of `simulated.result`


def two_methods(lora, other, *, method="pissa", **fields):
    """{batch size: [loss of each seed]} of two methods at the first LR; the others add 1.

    So do half the smallest and twice the largest batch size, at the first LR alone.
    """
    return [
        result(
            loss + penalty, batch_size=size, seed=seed, method=name, learning_rate=rate, **fields
        )
        for name, table in (("lora", lora), (method, other))
        for size, losses, penalties in (
            *((size, losses, (0.0, 1.0, 1.0)) for size, losses in table.items()),
            *((end, table[size], (1.0,)) for end, size in beside(table)),
        )
        for rate, penalty in zip((*RATES, LOWER), penalties, strict=False)
        for seed, loss in enumerate(losses)
    ]


def beside(sizes):
    """(batch size, the neighbour that was given) below and above those given, if possible."""
    ends = [(min(sizes) // 2, min(sizes)), (2 * max(sizes), max(sizes))] if sizes else []
    return [(end, size) for end, size in ends if 1 <= end <= NUM_ROWS]


def test_each_method_stands_at_its_own_best_batch_size_and_seeds_are_paired():
    lora = {4: [1.0, 1.5, 2.1], 64: [3.0, 3.0, 3.0]}
    pissa = {4: [2.0, 2.0, 2.0], 64: [0.80, 1.29, 1.92]}
    (found,) = compare(two_methods(lora, pissa))
    assert (found.baseline_batch_size, found.method_batch_size) == (4, 64)
    assert found.difference == pytest.approx((-0.2 - 0.21 - 0.18) / 3)
    assert found.p_value == pytest.approx(stats.ttest_rel(pissa[64], lora[4])[1])
    interval = stats.ttest_rel(pissa[64], lora[4]).confidence_interval()
    assert (found.difference_low, found.difference_high) == pytest.approx(tuple(interval))
    assert (found.verdict, found.seeds, found.paired) == ("better", "chose", True)
    assert (found.what_varied, found.num_questions) == ("seeds", None)
    assert [one.better_above for one in found.crossovers] == ["pissa"]


def test_equivalence_needs_evidence_not_just_a_failure_to_reject():
    close = {4: [1.0005, 0.9995, 1.0001]}
    (found,) = compare(two_methods({4: [1.0, 1.0, 1.0]}, close))
    assert (found.equivalence, found.verdict) == ("equivalent", "equivalent")
    (noisy,) = compare(two_methods({4: [1.0, 1.0, 1.0]}, {4: [1.1, 0.9, 1.0]}))
    assert (noisy.equivalence, noisy.verdict) == ("not shown", "undecided")
    assert noisy.undecided


def test_what_is_significant_but_smaller_than_what_can_be_detected_is_undecided():
    def at(difference):
        noise = np.array([-1.0, 1.0, -1.0, 1.0, 0.0]) * 0.1
        (found,) = compare(
            two_methods({4: list(3.0 - 0.0 * noise)}, {4: list(3.0 - difference + noise)})
        )
        return found

    detectable = at(1.0).detectable
    assert detectable is not None
    assert detectable == pytest.approx(detectable_effect(0.1 * 5**-0.5, df=4.0))
    below, above = at(0.99 * detectable), at(1.01 * detectable)
    assert below.p_holm is not None
    assert below.p_holm < 0.05
    assert (below.verdict, above.verdict) == ("undecided", "better")
    assert "smaller than what this comparison finds with 80% power" in below.undecided[0]
    assert "run more seeds" in below.undecided[0]


# What makes a number meaningless


def blocked(results, **options):
    (found,) = compare(results, **options)
    assert found.verdict == "undecided"
    assert (found.difference, found.difference_low, found.p_value, found.p_holm) == (None,) * 4
    assert (found.equivalence, found.equivalence_p, found.detectable) == ("undecided", None, None)
    assert found.crossovers == ()
    return found.undecided


@pytest.mark.parametrize("num_seeds", [2, 5])
def test_seeds_that_change_nothing_decide_nothing(num_seeds):
    lora, pissa = [1.0] * num_seeds, [0.9] * num_seeds
    (found,) = compare(two_methods({4: lora}, {4: pissa}))
    assert (found.verdict, found.difference, found.p_value) == ("undecided", None, None)
    assert f"all {num_seeds} seeds gave the same difference, -0.1" in found.undecided[0]
    # One method may have no luck to vary; the other's is seen.
    (one,) = compare(two_methods({4: [1.0, 1.01, 0.99]}, {4: [0.8, 0.8, 0.8]}))
    assert one.verdict == "better"


def test_seeds_that_answer_alike_decide_nothing():
    results, given = [], []
    for method, right in (("lora", 100), ("pissa", 160)):
        for rate, loss in zip(RATES, (1.0, 2.0), strict=True):
            for seed in range(5):
                one = result(
                    loss + 0.001 * seed, method=method, seed=seed, learning_rate=rate,
                    scores=[score("gsm8k", right, 200)],
                )  # fmt: skip
                results.append(one)
                given.append(verdicts(one, [True] * right + [False] * (200 - right)))
        results += [result(2.0, method=method, batch_size=16, seed=seed) for seed in range(5)]
    found = compare(results, verdicts=given)[1]
    assert (found.metric, found.verdict, found.difference) == ("gsm8k_accuracy", "undecided", None)
    assert "all 5 seeds gave the same answers" in found.undecided[0]


def test_one_seed_gives_no_number():
    (reason,) = blocked(two_methods({4: [1.0]}, {4: [0.5]}))
    assert "one seed is too few to see how much seeds matter" in reason
    assert "run at least 5" in reason


def test_one_learning_rate_gives_no_number():
    results = [
        result(size + seed / 10, method=method, batch_size=size, seed=seed)
        for method in ("lora", "pissa")
        for size in (8, 16)
        for seed in range(3)
    ]
    first, second = blocked(results)
    assert "pissa's own best is not known: learning rate 0.001 alone was tried" in first
    assert "add lower and higher ones" in first
    assert second.startswith("lora's own best")


def test_one_batch_size_gives_no_number():
    results = two_methods({4: [1.0, 1.1, 1.2]}, {4: [1.5, 1.6, 1.8]})
    alone = [one for one in results if one.trial.batch_size == 4]
    first, second = blocked(alone)
    assert first.startswith("pissa's own best is not known: batch size 4 alone was tried")
    assert "add smaller and larger ones to the study" in first
    assert second.startswith("lora's own best")
    # Nor is the one better that was tried at one.
    (only,) = blocked([one for one in results if one.trial.method.name == "pissa"] + alone[:9])
    assert only == second


def test_a_method_that_always_diverged_gives_no_number():
    results = two_methods({4: [1.0, 1.1, 1.2]}, {4: [1.0, 1.1, 1.2]})
    results = [
        result(None, method="pissa", batch_size=4, seed=one.trial.seed, status="diverged",
               learning_rate=one.trial.learning_rate)
        if one.trial.method.name == "pissa" else one
        for one in results
    ]  # fmt: skip
    (reason,) = blocked(results)
    assert "pissa has no batch size with a score: every learning rate diverged" in reason
    assert "try rates below the lowest one, 0.0001" in reason


def test_missing_trials_give_no_number():
    results = two_methods({4: [1.0, 1.1], 8: [1.0, 1.1]}, {4: [1.0, 1.2], 8: [1.0, 1.2]})
    planned = [
        replace(one, status="planned", outcome=None)
        if one.trial.method.name == "pissa" and one.trial.batch_size == 8 else one
        for one in results
    ]  # fmt: skip
    (reason,) = blocked(planned)
    assert "pissa's own best is not known: trials are missing (6 planned)" in reason
    assert "`loratune run` tries them" in reason


def test_mixed_data_gives_no_number():
    lora = two_methods({4: [1.0, 1.1, 1.2]}, {})
    pissa = two_methods({}, {4: [1.0, 1.1, 1.2]}, data_fingerprint="data-other")
    (reason,) = blocked([*lora, *pissa])
    assert "different data (data-demo:1m-512 and data-other)" in reason or (
        "different data (data-other and data-demo:1m-512)" in reason
    )
    assert "run both in one study" in reason


def test_where_the_same_data_are_there_too_only_those_are_compared():
    same = two_methods({4: [1.0, 1.1, 1.2]}, {4: [1.3, 1.1, 1.2]})
    other = two_methods({}, {4: [0.1, 0.2, 0.3]}, data_fingerprint="data-other")
    (found,) = compare([*same, *other])
    assert found.difference == pytest.approx(0.1)
    (said,) = found.unequal
    assert said.startswith(
        "pissa's trials at batch size 2, 4, 8 are left out: they were trained on diff"
    )
    assert "data-other" in said


# Tuning budgets and edges


def test_a_longer_search_is_not_called_better_where_that_may_be_why():
    many = {size: [1.0, 1.001, 1.002] for size in (2, 4, 8)}
    few = {4: [1.1, 1.101, 1.1005]}
    (found,) = compare(two_methods(few, many))
    assert (found.method_tried, found.baseline_tried) == (11, 5)
    # Five drawn from 1.001 (three times) and 2.001 (eight times): the best is the worse one with
    # chance 56/462.
    assert found.unequal == (
        "pissa was tuned over 11 (batch size, learning rate) points, lora over 5 "
        "(the best of 5 drawn from pissa's is expected at 1.122)",
    )
    assert found.verdict == "undecided"
    # It says what can be written into the study.
    assert (
        "that may be why: add batch_size 1, 16 to the study file, so that lora has them too"
        in (found.undecided[-1])
    )
    (turned,) = compare(two_methods(many, few))
    assert turned.verdict == "undecided"
    assert "so that pissa has them too" in turned.undecided[-1]
    (in_spite,) = compare(
        two_methods({size: [2.0, 2.001, 2.0005] for size in (2, 4, 8)}, {4: [1.0, 1.001, 1.002]})
    )
    assert in_spite.verdict == "better", "with less than half of the budget"


def test_a_longer_search_is_called_better_where_the_budget_does_not_explain_it():
    many = {size: [1.0, 1.001, 1.002] for size in (2, 4, 8)}
    (found,) = compare(two_methods({4: [1.4, 1.401, 1.4005]}, many))
    # 1.122 expected of five of its points, still 0.28 better.
    assert (found.verdict, found.undecided) == ("better", ())
    assert found.unequal  # and said
    # At 1.15 it is 0.02 better, which an interval of +-0.1 does not tell.
    many = {2: [1.01, 1.012, 1.011], 4: [1.0, 1.001, 1.002], 8: [1.01, 1.013, 1.011]}
    close = two_methods({4: [1.11, 1.15, 1.19]}, many)
    (found,) = compare(close)
    assert found.difference_high is not None
    assert found.difference_high < 0
    assert found.verdict == "undecided"
    # Fresh seeds had no luck in being chosen: that it stays ahead is enough.
    (found,) = compare(with_fresh(close, [1.13, 1.15, 1.17], [1.0, 1.001, 1.002]))
    assert (found.seeds, found.verdict) == ("fresh", "better")
    (found,) = compare(with_fresh(close, [1.07, 1.09, 1.11], [1.0, 1.001, 1.002]))
    assert (found.seeds, found.verdict) == ("fresh", "undecided")


def test_two_searches_of_one_study_have_the_same_budget():
    def searched(**change):
        rows = two_methods({4: [2.0, 2.001, 2.0005]}, {s: [1.0, 1.001, 1.002] for s in (2, 4, 8)})
        return [replace(one, purpose="adaptive", **change) for one in rows]

    (found,) = compare(searched())
    assert (found.method_tried, found.baseline_tried) == (11, 5)
    assert found.unequal == ()


def test_an_optimum_at_the_edge_is_said_and_a_method_does_not_lose_by_it():
    def edged(lora, other, *, method, purpose="search"):
        """Without the LR below the best one, for one method."""
        return [
            replace(one, purpose=purpose)
            for one in two_methods({4: lora}, {4: other})
            if one.trial.method.name != method or one.trial.learning_rate != LOWER
        ]

    good, bad = [1.0, 1.001, 1.0], [1.3, 1.301, 1.302]
    (found,) = compare(edged(bad, good, method="lora"))
    assert "lora's learning rate 0.001 is the lowest of those tried" in found.at_edge
    assert found.verdict == "undecided"
    assert "lora's own best is not known" in found.undecided[-1]
    assert "a lower one may be better; add one to learning_rate" in found.undecided[-1]
    # The one at the edge wins: better still may be possible, and better it is.
    (found,) = compare(edged(good, bad, method="lora"))
    assert (found.verdict, found.undecided) == ("worse", ())
    (found,) = compare(edged(good, bad, method="pissa"))
    assert found.verdict == "undecided"
    # A search has bounds, if no grid.
    (found,) = compare(edged(bad, good, method="lora", purpose="adaptive"))
    assert "lora's learning rate 0.001 is the lowest of those tried" in found.at_edge
    assert found.verdict == "undecided"
    assert "move low under learning_rate" in found.undecided[-1]


@pytest.mark.parametrize(
    ("end", "only", "beyond"),
    [
        ("smallest", (4, 8), "a smaller one may be better; add 2 to batch_size"),
        ("largest", (2, 4), "a larger one may be better; add 8 to batch_size"),
    ],
)
def test_a_method_neither_loses_nor_is_equal_with_its_best_batch_size_at_an_edge(end, only, beyond):
    def edged(lora, other, *, method, purpose="search"):
        """The batch sizes on one side of the best one alone, for one method."""
        return [
            replace(one, purpose=purpose)
            for one in two_methods({4: lora}, {4: other})
            if one.trial.method.name != method or one.trial.batch_size in only
        ]

    good, bad = [1.0, 1.001, 1.0], [1.3, 1.301, 1.302]
    at_edge = f"lora's batch size 4 is the {end} of those tried"
    (found,) = compare(edged(bad, good, method="lora"))
    assert (found.at_edge, found.verdict) == ((at_edge,), "undecided")
    (reason,) = found.undecided
    assert reason.startswith("lora's own best is not known: its best batch size, 4, is the " + end)
    assert f"{beyond} in the study and run it again" in reason
    # The one at the edge wins: better still may be possible, and better it is.
    (found,) = compare(edged(good, bad, method="lora"))
    assert (found.at_edge, found.verdict, found.undecided) == ((at_edge,), "worse", ())
    # Beyond the edge it may be better than one that is as good now.
    (found,) = compare(edged(good, [1.0005, 0.9995, 1.0001], method="lora"))
    assert (found.equivalence, found.verdict) == ("equivalent", "undecided")
    assert found.undecided == (reason,)
    # A search may not have come to a batch size that its study has.
    (found,) = compare(edged(bad, good, method="lora", purpose="adaptive"))
    assert "in the study, or raise max_trials if it is there," in found.undecided[-1]


def test_batch_size_1_and_all_rows_are_no_edge_and_neither_is_one_beyond_which_all_diverged():
    good, bad = [1.0, 1.001, 1.0], [1.3, 1.301, 1.302]
    for size in (1, NUM_ROWS):
        (found,) = compare(two_methods({4: good}, {size: bad, 4: [5.0, 5.1, 5.2]}))
        assert (found.method_batch_size, found.at_edge, found.verdict) == (size, (), "worse")
    lost = [
        result(None, method="pissa", batch_size=8, seed=one.trial.seed, status="diverged")
        if (one.trial.method.name, one.trial.batch_size) == ("pissa", 8) else one
        for one in two_methods({4: good}, {4: bad})
    ]  # fmt: skip
    (found,) = compare(lost)
    assert (found.at_edge, found.verdict) == ((), "worse")


# Seeds that chose, and seeds that did not


def with_fresh(results, lora, pissa):
    """Further seeds of the best points (batch size 4, first LR)."""
    return results + [
        result(
            loss,
            batch_size=4,
            seed=10 + index,
            method=method,
            learning_rate=RATES[0],
            purpose="confirm",
        )
        for method, losses in (("lora", lora), ("pissa", pissa))
        for index, loss in enumerate(losses)
    ]


def test_fresh_seeds_alone_are_compared_and_choose_nothing():
    grid = two_methods({4: [1.0, 1.1], 8: [1.2, 1.3]}, {4: [0.9, 1.0], 8: [1.2, 1.3]})
    (before,) = compare(grid)
    # So bad that they would have turned the choice.
    (found,) = compare(with_fresh(grid, [2.0, 2.2, 2.1], [2.1, 2.2, 2.3]))
    assert (before.seeds, found.seeds) == ("chose", "fresh")
    assert (found.method_batch_size, found.baseline_batch_size) == (4, 4)
    assert found.difference == pytest.approx(0.1)
    assert found.num_seeds == 3
    # What was chosen looked better, by 1.05 and 1.25, than it is.
    assert found.baseline_selection_gap == pytest.approx(2.1 - 1.05)
    assert found.method_selection_gap == pytest.approx(2.2 - 0.95)
    assert (found.method_flattery, found.baseline_flattery) == (None, None)
    assert before.method_selection_gap is None


def test_seeds_that_chose_are_said_to_flatter_and_by_how_much_at_most():
    draw = np.random.default_rng(1)
    sigma = 0.1

    def flattered(blown):
        """By how much the best of 12 equal points looks better, and what is said of it."""
        gained, said = [], []
        for _ in range(200):
            results = [
                one
                for method in ("lora", "pissa")
                for one in sweep(
                    lambda size, rate, _: (
                        # One learning rate is far too high: at one batch size a seed is lost.
                        3.0 + 2.0 * draw.normal()
                        if blown and (size, rate) == (64, 3e-2)
                        else 1.0 + (rate == 3e-2) + sigma * draw.normal()
                    ),
                    batch_sizes=(4, 8, 16, 64),
                    learning_rates=(1e-3, 3e-3, 1e-2, 3e-2),
                    method=method,
                )
            ]
            (found,) = compare(results)
            assert found.baseline_score is not None
            gained.append(1.0 - found.baseline_score)
            said += [found.baseline_flattery, found.method_flattery]
        return np.mean(gained), np.mean(said)

    (gained, said), (_, in_spite) = flattered(blown=False), flattered(blown=True)
    # Of 12 equal points 1.629 sigma / sqrt(3), of all 16, as which it is given, 1.766.
    assert gained == pytest.approx(1.629 * sigma / 3**0.5, rel=0.07)
    assert said == pytest.approx(1.766 * sigma / 3**0.5, rel=0.05)
    assert in_spite == pytest.approx(said, rel=0.05)


def test_of_the_recorded_sweep_no_method_is_called_and_blown_up_trials_do_not_count_as_luck():
    pissa, milora = compare(recorded_results())
    # LoRA's lowest loss is 0.0071 lower, but PiSSA's best batch size is the smallest tried.
    assert (pissa.method_batch_size, pissa.difference) == (2, pytest.approx(0.0071, abs=5e-5))
    assert (pissa.verdict, milora.verdict) == ("undecided", "undecided")
    assert "a smaller one may be better; add 1 to batch_size" in pissa.undecided[0]
    # One of LoRA's learning rates scattered between 0.75 and 5.3; beside its best, seeds differ by
    # 0.001.
    flattery = (pissa.method_flattery, milora.method_flattery, pissa.baseline_flattery)
    assert flattery == pytest.approx((1.16e-3, 1.00e-3, 0.94e-3), rel=5e-3)


def test_a_method_is_not_better_by_less_than_its_choice_may_have_flattered_it():
    others = {2: [1.2, 0.95, 1.0], 8: [1.0, 1.2, 1.0]}
    lora, pissa = [1.0, 1.1, 0.9], [0.98, 1.079, 0.881]
    close = two_methods({4: lora, **others}, {4: pissa, **others})
    (found,) = compare(close)
    assert found.difference == pytest.approx(-0.02)
    assert found.p_holm is not None
    assert found.p_holm < 0.05
    assert found.method_flattery is not None
    assert found.method_flattery > 0.02
    assert found.verdict == "undecided"
    (reason,) = found.undecided
    assert "the seeds that are compared also chose pissa's batch size and learning rate" in reason
    assert f"better by up to {found.method_flattery:.2g}, and the difference is 0.02" in reason
    assert "add confirm: 5 to seeds in the study and run it again" in reason
    (turned,) = compare(two_methods({4: pissa, **others}, {4: lora, **others}))
    assert turned.verdict == "undecided"
    assert "also chose lora's batch size" in turned.undecided[0]
    # What chose nothing is not flattered.
    (fresh,) = compare(with_fresh(close, lora, pissa))
    assert (fresh.verdict, fresh.undecided) == ("better", ())


def test_seeds_that_are_not_shared_are_compared_unpaired():
    lora = {4: [1.0, 1.1, 1.2]}
    pissa = two_methods({}, {4: [1.5, 1.4, 1.7]})
    moved = [replace(one, trial=replace(one.trial, seed=one.trial.seed + 50)) for one in pissa]
    (found,) = compare([*two_methods(lora, {}), *moved])
    known: Any = stats.ttest_ind([1.5, 1.4, 1.7], lora[4], equal_var=False)
    assert (found.paired, found.procedure) == (False, "Welch t over seeds")
    assert found.p_value == pytest.approx(known[1])


# Accuracy: seeds and questions


def answered(tables, *, losses=(1.0, 2.0), task="gsm8k"):
    """Two methods with {method: [S, Q] of right answers} at the first LR; (results, verdicts)."""
    results, given = [], []
    for method, table in tables.items():
        for seed, row in enumerate(table):
            one = result(
                losses[0] + seed / 100, method=method, seed=seed, learning_rate=RATES[0],
                scores=[score(task, int(sum(row)), len(row))],
            )  # fmt: skip
            results += [
                one,
                *(
                    result(losses[1], method=method, seed=seed, learning_rate=rate)
                    for rate in (RATES[1], LOWER)
                ),
                *(
                    result(losses[1], method=method, seed=seed, batch_size=size)
                    for size, _ in beside([8])
                ),
            ]
            given.append(verdicts(one, row, task))
    return results, given


def drawn(num_seeds, *, gain=0.1, seed=2):
    draw = np.random.default_rng(seed)
    hard = draw.random(200)
    return {
        method: (draw.random((num_seeds, 200)) < 0.2 + 0.6 * hard + more).astype(int)
        for method, more in (("lora", 0.0), ("pissa", gain))
    }


@pytest.mark.parametrize(
    ("num_seeds", "procedure"), [(4, "crossed model, Satterthwaite"), (10, "two-way bootstrap")]
)
def test_accuracies_vary_over_seeds_and_questions(num_seeds, procedure):
    tables = drawn(num_seeds)
    results, given = answered(tables)
    _, found = compare(results, verdicts=given)
    known = crossed_difference(tables["pissa"], tables["lora"], paired=True)
    assert (found.metric, found.procedure) == ("gsm8k_accuracy", procedure)
    assert (found.what_varied, found.num_questions) == ("seeds and questions", 200)
    assert found.difference == pytest.approx(known.value)
    assert (found.difference_low, found.difference_high) == (known.low, known.high)
    assert found.verdict == "better"
    assert set(trials_to_compare(results)) == {one.trial_id for one in given}
    # The same answers, the same bytes.
    again = comparisons_document(compare(results, verdicts=given))
    assert json.dumps(again) == json.dumps(comparisons_document(compare(results, verdicts=given)))


def test_questions_of_one_source_are_one_question():
    # Every source is asked ten times over, and the methods differ by source, whatever the seed.
    draw = np.random.default_rng(3)
    tables = {
        method: (np.repeat(draw.random(20) < 0.5, 10) ^ (draw.random((5, 200)) < 0.05)).astype(int)
        for method in ("lora", "pissa")
    }
    results, given = answered(tables)
    where = {(results[0].trial.data_fingerprint, "gsm8k"): np.repeat(np.arange(20), 10).tolist()}
    naive = compare(results, verdicts=given)[1]
    clustered = compare(results, verdicts=given, sources=where)[1]
    assert naive.standard_error is not None
    assert clustered.standard_error is not None
    assert clustered.standard_error > 2 * naive.standard_error
    assert clustered.difference == pytest.approx(naive.difference)


def test_a_test_of_one_question_or_one_source_leaves_the_other_comparisons_alone():
    results, given = answered(drawn(4))
    where = {(results[0].trial.data_fingerprint, "gsm8k"): [0] * 200}
    loss, accuracy = compare(results, verdicts=given, sources=where)
    assert (loss.metric, loss.baseline_learning_rate) == ("validation_loss", RATES[0])
    assert (accuracy.verdict, accuracy.difference) == ("undecided", None)
    assert "all questions share one source" in accuracy.undecided[0]


def test_an_accuracy_without_its_answers_is_undecided():
    results, given = answered(drawn(4))
    _, found = compare(results, verdicts=given[:-1])
    assert (found.verdict, found.what_varied) == ("undecided", "seeds")
    assert "which questions were answered right is not known" in found.undecided[0]


def test_two_seeds_are_too_few_for_an_accuracy():
    results, given = answered(drawn(2))
    accuracy = compare(results, verdicts=given)[1]
    assert accuracy.difference is None
    assert "2 seeds are too few to see how much seeds matter (it takes 3)" in accuracy.undecided[0]


def test_the_same_answers_throughout_are_no_certainty():
    right = np.ones((4, 100), dtype=int)
    results, given = answered({"lora": right, "pissa": right})
    _, found = compare(results, verdicts=given)
    # None of 100 questions answered differently: 3.6% may be.
    assert found.difference == 0.0
    assert found.difference_high == pytest.approx(1 - 0.025 ** (1 / 100))
    assert found.verdict == "undecided"


def test_the_test_set_is_compared_at_the_choices_that_validation_made():
    def one(method, size, seed, loss, correct, rate):
        return result(
            loss, method=method, batch_size=size, seed=seed, learning_rate=rate,
            scores=[score("gsm8k", correct, 100)],
        )  # fmt: skip

    results = [
        one(method, size, seed, loss + (rate == RATES[1]), correct + seed, rate)
        for method, size, loss, correct in (
            ("lora", 4, 1.0, 50), ("lora", 64, 2.0, 90), ("pissa", 4, 1.0, 60), ("pissa", 64, 3, 1),
        )
        for rate in RATES
        for seed in (0, 1)
    ]  # fmt: skip
    loss, accuracy = compare(results)
    assert (loss.metric, accuracy.metric) == ("validation_loss", "gsm8k_accuracy")
    assert accuracy.baseline_batch_size == 4, "not 64, which only the test likes"
    assert accuracy.difference == pytest.approx(0.1)


def test_held_out_accuracy_less_test_accuracy_is_the_selection_gap():
    results = [
        result(
            1.0, method=method, seed=seed, learning_rate=rate, select_on="validation_accuracy",
            scores=[
                score("gsm8k", 70 - 10 * index, 100, split="validation"),
                score("gsm8k", 60, 100),
            ],
        )
        for method in ("lora", "pissa")
        for index, rate in enumerate(RATES)
        for seed in range(3)
    ]  # fmt: skip
    held_out, test = compare(results)
    assert (held_out.metric, test.metric) == ("validation_accuracy", "gsm8k_accuracy")
    assert held_out.method_selection_gap is None
    assert test.method_selection_gap == pytest.approx(0.1)


def test_the_crossing_of_two_accuracies_has_an_interval_over_questions_too():
    draw = np.random.default_rng(12)
    chances = {"lora": {4: 0.45, 16: 0.6, 64: 0.6}, "pissa": {4: 0.6, 16: 0.6, 64: 0.45}}
    hard = draw.random(2000)
    results, given = [], []
    for method, of_size in chances.items():
        for size, chance in of_size.items():
            for seed in range(4):
                # One draw for all decides a question unless a method's own chance does.
                row = (hard + 0.3 * draw.random(2000) < chance + 0.15).astype(int)
                best = result(
                    1.0, method=method, batch_size=size, seed=seed, learning_rate=RATES[0],
                    scores=[score("gsm8k", int(row.sum()), 2000)],
                )  # fmt: skip
                results += [best, result(2.0, method=method, batch_size=size, seed=seed,
                                         learning_rate=RATES[1])]  # fmt: skip
                given.append(verdicts(best, row.tolist()))
    _, found = compare(results, verdicts=given)
    crossing = next(one for one in found.crossovers if one.better_below == "pissa")
    assert 4 < crossing.batch_size < 64
    assert crossing.low is not None
    assert crossing.high is not None
    assert crossing.low <= crossing.batch_size <= crossing.high
    # Questions that are hard together and share a source say less, here as for the difference.
    source = (np.argsort(np.argsort(hard)) // 50).tolist()
    where = {(results[0].trial.data_fingerprint, "gsm8k"): source}
    clustered = compare(results, verdicts=given, sources=where)[1]
    wider = next(one for one in clustered.crossovers if one.better_below == "pissa")
    assert (wider.low, wider.high) != (crossing.low, crossing.high)


# Several settings and methods


def test_ranks_are_compared_apart_and_methods_adjusted_together():
    results = [
        result(
            1.0 + 0.1 * (method != "lora") + 0.001 * seed * (rank + len(method)) % 0.0031
            + (rate == RATES[1]) + (size == 16),
            method=method, rank=rank, seed=seed, batch_size=size, learning_rate=rate,
        )
        for method in ("lora", "pissa", "milora")
        for rank in (8, 32)
        for size in (8, 16)
        for rate in RATES
        for seed in range(3)
    ]  # fmt: skip
    found = compare(results)
    assert [(one.setting, one.method) for one in found] == [
        ("rank 8", "pissa"), ("rank 8", "milora"), ("rank 32", "pissa"), ("rank 32", "milora"),
    ]  # fmt: skip
    for pair in (found[:2], found[2:]):
        assert [one.p_holm for one in pair] == pytest.approx(
            holm([one.p_value for one in pair])  # type: ignore[misc]
        )


def test_optimizers_that_the_study_crosses_are_settings_of_their_own():
    results = [
        replace(one, trial=replace(one.trial, weight_decay=decay, trial_id=f"{index}-{decay}"))
        for decay, shift in ((0.0, 0.0), (0.1, 0.5))
        for index, one in enumerate(
            two_methods({4: [1 + shift, 1.1 + shift]}, {4: [1.2 + shift, 1.4 + shift]})
        )
    ]
    assert [one.difference for one in compare(results)] == pytest.approx([0.25, 0.25])


def test_the_document_is_plain_json():
    document = comparisons_document(compare(two_methods({4: [1.0, 1.1]}, {4: [1.2, 1.15]})))
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert set(document["comparisons"][0]) >= {
        "method",
        "difference",
        "p_holm",
        "equivalence",
        "crossovers",
        "detectable",
    }


def test_a_study_without_the_baseline_says_what_it_has():
    with pytest.raises(AnalysisError, match="no trials of 'lora'; the study has pissa"):
        compare([result(method="pissa")])
    with pytest.raises(AnalysisError, match="lora alone"):
        compare([result()])


def test_equal_methods_are_found_different_5_times_in_100_and_called_so_less_often():
    draw = np.random.default_rng(8)
    found = [
        compare(two_methods({4: list(losses[0])}, {4: list(losses[1])}))[0]
        for losses in 1.0 + 0.1 * draw.normal(size=(1000, 2, 3))
    ]
    rejected = np.mean([(one.p_value or 0.0) < 0.05 for one in found])
    assert abs(rejected - 0.05) < 0.021  # three standard errors
    # What is called must reach t = 5.65, not 4.30: 3.0% of t's with two degrees of freedom do.
    called = np.mean([one.verdict in ("better", "worse") for one in found])
    assert abs(called - 2 * stats.t.sf(5.653, 2)) < 0.017


def test_methods_with_an_alpha_of_their_own_are_compared_and_it_is_said():
    found = compare(faked_results("published-milora"))
    assert {one.method for one in found} == {"pissa", "milora"}
    assert {one.unequal for one in found} == {("alpha/r 1 against 2",)}


def test_methods_with_a_rank_of_their_own_are_compared_and_it_is_said():
    found = {one.method.partition("(")[0]: one for one in compare(faked_results("published-peft"))}
    assert set(found) == {"rslora", "dora"}
    assert found["rslora"].unequal[0] == "rank 64 against 32"
    assert found["dora"].unequal == ()


def test_in_a_crossed_study_every_rank_is_a_setting_of_its_own():
    results = [
        result(1.0 + seed / 10, method=method, rank=rank, seed=seed)
        for method in ("lora", "pissa")
        for rank in (8, 32)
        for seed in (0, 1)
    ]
    found = compare(results)
    assert [one.setting for one in found] == ["rank 8", "rank 32"]
    assert {one.unequal for one in found} == {()}


def test_in_a_crossed_study_a_method_with_its_own_rank_meets_every_rank_of_the_baseline():
    shapes = [("lora", 8), ("lora", 32), ("pissa", 8), ("pissa", 32), ("rslora", 64)]
    results = [
        result(1.0 + seed / 10, method=method, rank=rank, seed=seed)
        for method, rank in shapes
        for seed in (0, 1)
    ]
    found = [(one.setting, one.method, one.unequal) for one in compare(results)]
    assert found == [
        ("rank 8", "pissa", ()),
        ("rank 8", "rslora", ("rank 64 against 8",)),
        ("rank 32", "pissa", ()),
        ("rank 32", "rslora", ("rank 64 against 32",)),
    ]


def test_in_a_crossed_study_a_method_with_its_own_alpha_meets_the_same_rank():
    results = [
        replace(one, trial=replace(one.trial, alpha=64.0)) if one.trial.rank == 8 else one
        for one in (
            result(1.0 + seed / 10, method="lora", rank=rank, seed=seed)
            for rank in (8, 32)
            for seed in (0, 1)
        )
    ]
    results += [
        replace(one, trial=replace(one.trial, alpha=16.0))
        for one in (
            result(1.1 + seed / 10, method="pissa", rank=rank, seed=seed)
            for rank in (8, 32)
            for seed in (0, 1)
        )
    ]
    found = compare(results)
    assert [one.unequal for one in found] == [("alpha/r 2 against 8",), ("alpha/r 0.5 against 1",)]
