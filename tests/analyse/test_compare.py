import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from loratune.analyse.compare import compare, comparisons_document
from loratune.analyse.intervals import equivalence_p, holm
from loratune.errors import AnalysisError
from simulated import faked_results, result, score


def two_methods(lora, other, *, method="pissa", **fields):
    return [
        result(loss, batch_size=size, seed=seed, method=name, **fields)
        for name, table in (("lora", lora), (method, other))
        for size, losses in table.items()
        for seed, loss in enumerate(losses)
    ]


def test_each_method_stands_at_its_own_best_batch_size_and_seeds_are_paired():
    lora = {4: [1.0, 1.5, 2.1], 64: [3.0, 3.0, 3.0]}
    pissa = {4: [2.0, 2.0, 2.0], 64: [0.80, 1.29, 1.92]}
    (found,) = compare(two_methods(lora, pissa))
    assert (found.baseline_batch_size, found.method_batch_size) == (4, 64)
    assert found.difference == pytest.approx((-0.2 - 0.21 - 0.18) / 3)
    assert found.p_value == pytest.approx(stats.ttest_rel(pissa[64], lora[4]).pvalue)
    interval = stats.ttest_rel(pissa[64], lora[4]).confidence_interval()
    assert (found.difference_low, found.difference_high) == pytest.approx(tuple(interval))
    assert found.verdict == "better"
    assert [one.better_above for one in found.crossovers] == ["pissa"]


def test_one_seed_is_undecided_with_the_reason():
    (found,) = compare(two_methods({4: [1.0]}, {4: [0.5]}))
    assert found.verdict == "undecided"
    assert found.p_value is None
    assert found.difference == -0.5
    assert "one seed cannot tell, run at least 5" in found.undecided[0]


def test_equivalence_needs_evidence_not_just_a_failure_to_reject():
    close = {4: [1.0005, 0.9995, 1.0001]}
    (found,) = compare(two_methods({4: [1.0, 1.0, 1.0]}, close))
    assert (found.equivalence, found.verdict) == ("equivalent", "equivalent")
    (noisy,) = compare(two_methods({4: [1.0, 1.0, 1.0]}, {4: [1.1, 0.9, 1.0]}))
    assert (noisy.equivalence, noisy.verdict) == ("not shown", "undecided")
    assert noisy.undecided


def test_holm_is_the_textbook_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    assert holm([]) == ()


def test_tost_agrees_with_two_scipy_tests():
    values = [0.001, -0.002, 0.0015]
    left: float = stats.ttest_1samp(values, 0.01, alternative="less")[1]  # type: ignore[assignment]
    right: float = stats.ttest_1samp(values, -0.01, alternative="greater")[1]  # type: ignore[assignment]
    assert equivalence_p(values, margin=0.01) == pytest.approx(max(left, right))


def test_the_test_set_is_compared_at_the_choices_that_validation_made():
    def one(method, size, seed, loss, correct):
        return result(
            loss, method=method, batch_size=size, seed=seed, scores=[score("gsm8k", correct, 100)]
        )

    results = [
        one(method, size, seed, loss, correct + seed)
        for method, size, loss, correct in (
            ("lora", 4, 1.0, 50),
            ("lora", 64, 2.0, 90),
            ("pissa", 4, 1.0, 60),
        )
        for seed in (0, 1)
    ]
    loss, accuracy = compare(results)
    assert (loss.metric, accuracy.metric) == ("validation_loss", "gsm8k_accuracy")
    assert accuracy.baseline_batch_size == 4, "not 64, which only the test likes"
    assert accuracy.difference == pytest.approx(0.1)


def test_ranks_are_compared_apart_and_methods_adjusted_together():
    results = [
        result(1.0 + 0.1 * (method != "lora") + 0.001 * seed * (rank + len(method)) % 0.0031,
               method=method, rank=rank, seed=seed)
        for method in ("lora", "pissa", "milora")
        for rank in (8, 32)
        for seed in range(3)
    ]  # fmt: skip
    found = compare(results)
    assert [(one.setting, one.method) for one in found] == [
        ("rank 8", "pissa"), ("rank 8", "milora"), ("rank 32", "pissa"), ("rank 32", "milora"),
    ]  # fmt: skip
    assert all(one.p_holm is not None and one.p_value is not None for one in found)
    assert all((one.p_holm or 0) >= (one.p_value or 0) for one in found)


def test_the_document_is_plain_json():
    document = comparisons_document(compare(two_methods({4: [1.0, 1.1]}, {4: [1.2, 1.15]})))
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert set(document["comparisons"][0]) >= {
        "method",
        "difference",
        "p_holm",
        "equivalence",
        "crossovers",
    }


def test_a_study_without_the_baseline_says_what_it_has():
    with pytest.raises(AnalysisError, match="no trials of 'lora'; the study has pissa"):
        compare([result(method="pissa")])
    with pytest.raises(AnalysisError, match="lora alone"):
        compare([result()])


def test_equal_methods_are_called_different_5_times_in_100():
    draw = np.random.default_rng(8)
    called = 0
    for _ in range(1000):
        losses = 1.0 + 0.1 * draw.normal(size=(2, 3))
        (found,) = compare(two_methods({4: list(losses[0])}, {4: list(losses[1])}))
        called += found.verdict in ("better", "worse")
    assert abs(called / 1000 - 0.05) < 0.021  # three standard errors


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
