import math
from dataclasses import replace

import pytest

from loratune.analyse.audit.from_csv import read_csv
from loratune.analyse.audit.from_results import table_of_results
from loratune.analyse.audit.inspect import audit_table
from loratune.analyse.tables import results_table, table_bytes
from loratune.errors import AnalysisError
from simulated import faked_results, result, score, sweep


def bowl(size, rate, seed):
    off = abs(math.log10(rate / 1e-3)) + 0.1 * math.log2(size / 16) ** 2
    return 1 + 0.1 * off + 1e-4 * ((7 * seed + size) % 5)


def clean():
    worse = sweep(lambda *at: bowl(*at) + 0.1, method="pissa")
    return [*sweep(bowl), *worse]


def kinds(results):
    return {one.kind for one in audit_table(table_of_results(results)).findings}


def test_a_clean_study_has_no_finding():
    assert kinds(clean()) == set()


def test_a_study_selected_on_the_test_set_is_found():
    made = [
        result(
            bowl(size, rate, seed),
            method=method,
            batch_size=size,
            learning_rate=rate,
            seed=seed,
            select_on="test",
            scores=[score("gsm8k", correct + 100 * (method == "pissa") + seed, 1319)],
        )
        for method in ("lora", "pissa")
        for size in (4, 16)
        for rate, correct in ((1e-4, 500), (1e-3, 600), (1e-2, 550))
        for seed in range(3)
    ]
    (found,) = audit_table(table_of_results(made)).findings
    assert found.kind == "selected_on_test"
    assert dict(found.numbers)["num_questions"] == 1319


def test_what_is_not_trained_yet_is_left_out_and_said_and_a_failure_is_no_configuration():
    planned = [result(batch_size=64, learning_rate=1e-3, seed=9, status="planned")]
    failed = [result(batch_size=128, learning_rate=1e-3, status="failed")]
    table = table_of_results([*clean(), *planned, *failed])
    assert len(table.rows) == len(clean()) + 1
    assert "1 trials have not been trained" in table.remarks[0]
    assert audit_table(table).findings == ()


def test_one_seed_one_rate_and_one_batch_size_are_found():
    made = [result(1.0, batch_size=8), result(1.1, batch_size=8, method="pissa")]
    assert {"one_seed", "one_learning_rate", "one_batch_size"} <= kinds(made)


def test_another_scale_of_a_method_is_found_by_the_trials_own_scale():
    assert "unequal_scale" not in kinds(clean())
    made = [result(1.0), result(1.1, method="rslora")]
    made[1] = replace(made[1], trial=replace(made[1].trial, scale=8**0.5))
    assert "unequal_scale" in kinds(made)


def test_the_papers_own_figure_is_told_from_a_clean_one():
    # Figure 1 at paper scale: tuned at every cell, so only what is fake of it shows: all trials
    # have one loss per rank and seed, so that the lowest rate is as good as any.
    found = kinds(faked_results("fig1"))
    assert "one_batch_size" not in found
    assert "one_seed" not in found
    assert "batch_size_mismatch" not in found
    assert "learning_rate_edge" in found


def test_no_trials_are_refused():
    with pytest.raises(AnalysisError, match="no runs"):
        audit_table(table_of_results([]))


def test_an_adaptive_search_is_audited_but_for_edges_of_its_rates():
    # A search tries few rates at a batch size, so that the best of two is always at an end.
    made = [replace(one, purpose="adaptive") for one in clean()]
    made = [one for one in made if one.trial.learning_rate > 2e-4 or one.trial.batch_size == 16]
    table = table_of_results(made)
    assert len(table.rows) == len(made)
    audit = audit_table(table)
    assert "learning_rate_edge" not in {one.kind for one in audit.findings}
    (left_out,) = [one for one in audit.not_checked if one.kind == "learning_rate_edge"]
    assert "a search chose the learning rates" in left_out.reason


def test_a_trial_that_was_stopped_early_was_tried():
    # Nine rates and nine: two of lora's were given up half-way.
    made = [
        result(
            status="stopped" if method == "lora" and seed == 0 and rate > 5e-3 else "done",
            loss=bowl(size, rate, seed) + 0.1 * (method == "pissa"),
            method=method,
            batch_size=size,
            learning_rate=rate,
            seed=seed,
        )
        for method in ("lora", "pissa")
        for size in (4, 16, 64)
        for rate in (1e-4, 1e-3, 1e-2)
        for seed in range(3)
        if not (method == "lora" and seed > 0 and rate > 5e-3)
    ]
    # Without those stopped lora has six configurations, and 1e-3 at the upper edge.
    assert kinds(made) == set()


def test_the_table_of_a_search_is_audited_as_its_folder_is(tmp_path):
    made = [replace(one, purpose="adaptive") for one in clean()]
    made = [one for one in made if one.trial.learning_rate > 2e-4 or one.trial.batch_size == 16]
    made += [
        result(1.0, method="pissa", batch_size=16, learning_rate=1e-3, seed=s, purpose="confirm")
        for s in (7, 8)
    ]
    made.append(result(batch_size=16, learning_rate=3e-2, status="stopped", purpose="adaptive"))
    path = tmp_path / "results.csv"
    path.write_bytes(table_bytes(results_table(made), format="csv"))
    of_folder = audit_table(table_of_results(made))
    of_table = audit_table(read_csv(path, columns={}))
    assert of_table.num_rows == of_folder.num_rows == len(made) - 2
    assert [(one.kind, one.what, one.numbers) for one in of_table.findings] == [
        (one.kind, one.what, one.numbers) for one in of_folder.findings
    ]
    assert of_table.not_checked == of_folder.not_checked
    # lora's stopped rate is a configuration more.
    assert [one.kind for one in of_folder.findings] == ["unequal_budgets"]
