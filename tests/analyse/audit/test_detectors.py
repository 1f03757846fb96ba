import json
from typing import Any

import numpy as np
import pytest
from scipy import stats

from audit_tables import audited, clean_rows, spoilt
from loratune.analyse.audit.detectors import DETECTORS
from loratune.analyse.audit.effects import CORRELATION, detectable_paired, detectable_unpaired
from loratune.analyse.selection_bias import selection_bias
from loratune.planning.power import detectable_effect
from loratune.report.audit_text import audit_text


def numbers(one) -> dict[str, Any]:
    return dict(one.numbers)


def test_a_clean_file_has_no_finding_and_everything_is_checked(tmp_path):
    found = audited(tmp_path, clean_rows())
    assert found.findings == ()
    assert found.not_checked == ()
    assert (found.num_rows, found.methods) == (36, ("lora", "pissa"))
    assert "no finding" in audit_text(found)


def test_unequal_tuning_budgets(tmp_path):
    found = spoilt(
        tmp_path,
        lambda row: None if row["method"] == "lora" and row["learning_rate"] == 1e-3 else row,
    )
    one = found["unequal_budgets"]
    assert numbers(one)["configurations of lora"] == 4
    assert numbers(one)["configurations of pissa"] == 6
    assert one.methods == ("lora",)
    # E[max 6] - E[max 4] = 1.2672 - 1.0294 (Harter 1961)
    spread = (0.5 * 0.5 * 0.5 / 1319) ** 0.5
    assert numbers(one)["gain_by_luck"] == pytest.approx(0.2378 * spread, rel=0.02)
    # the rate left out also leaves the best one at the edge
    assert set(found) == {"unequal_budgets", "learning_rate_edge"}


def test_a_best_rate_on_the_edge(tmp_path):
    def shift(row):
        if row["method"] == "lora" and row["learning_rate"] == 1e-3:
            row["validation_loss"] -= 0.2
        return row

    found = spoilt(tmp_path, shift)
    one = found["learning_rate_edge"]
    assert one.methods == ("lora",)
    assert numbers(one)["num_at_edge"] == numbers(one)["num_cells"] == 2
    assert "0.001 is the highest of 0.0001, 0.0003, 0.001" in audit_text(
        audited(tmp_path, [shift(dict(row)) for row in clean_rows()])
    )
    assert set(found) == {"learning_rate_edge"}


def test_a_rate_that_diverged_was_tried_and_is_no_edge(tmp_path):
    def diverge(row):
        if row["learning_rate"] == 1e-3:
            row |= {"validation_loss": "nan", "gsm8k_accuracy": "", "gsm8k_total": ""}
        return row

    assert spoilt(tmp_path, diverge) == {}


def test_one_learning_rate_only(tmp_path):
    found = spoilt(tmp_path, lambda row: row if row["learning_rate"] == 3e-4 else None)
    assert numbers(found["one_learning_rate"])["num_methods"] == 2
    assert set(found) == {"one_learning_rate"}


def test_one_batch_size_only(tmp_path):
    found = spoilt(tmp_path, lambda row: row if row["batch_size"] == 8 else None)
    assert numbers(found["one_batch_size"])["batch_sizes"] == "8"
    assert set(found) == {"one_batch_size"}
    own = {"lora": 8, "pissa": 32}
    apart = spoilt(
        tmp_path, lambda row: row if row["batch_size"] == own[str(row["method"])] else None
    )
    assert "a batch size of their own" in apart["one_batch_size"].what


def test_one_seed(tmp_path):
    found = spoilt(tmp_path, lambda row: row if row["seed"] == 0 else None)
    assert numbers(found["one_seed"])["num_seeds"] == 1
    assert set(found) == {"one_seed"}


def test_seeds_that_change_nothing(tmp_path):
    first = {
        (row["method"], row["batch_size"], row["learning_rate"]): row
        for row in clean_rows()
        if row["seed"] == 0
    }

    def same(row):
        like = first[row["method"], row["batch_size"], row["learning_rate"]]
        return like | {"seed": row["seed"]}

    found = spoilt(tmp_path, same)
    one = found["seeds_change_nothing"]
    assert numbers(one) == {
        "num_configurations": 12, "num_configurations_with_seeds": 12, "num_runs": 36,
    }  # fmt: skip
    assert set(found) == {"seeds_change_nothing"}


def test_two_of_three_seeds_with_the_same_loss_are_found(tmp_path):
    def same(row):
        if row["seed"] == 1 and row["batch_size"] == 8 and row["method"] == "lora":
            (like,) = [
                one
                for one in clean_rows()
                if one | {"seed": 1} == row | {n: one[n] for n in ("validation_loss", *gsm8k)}
                and one["seed"] == 0
            ]
            return like | {"seed": 1}
        return row

    gsm8k = ("gsm8k_accuracy", "gsm8k_total")
    one = spoilt(tmp_path, same)["seeds_change_nothing"]
    assert numbers(one) == {
        "num_configurations": 3, "num_configurations_with_seeds": 12, "num_runs": 6,
    }  # fmt: skip


def test_a_table_in_which_all_diverged_says_so(tmp_path):
    rows = [
        row | {"validation_loss": "nan", "gsm8k_accuracy": "", "gsm8k_total": ""}
        for row in clean_rows()
    ]
    found = audited(tmp_path, rows)
    assert "every run diverged: there is no score" in found.remarks[0]
    assert "Every run diverged" in audit_text(found)
    assert "diverged" not in "".join(audited(tmp_path, clean_rows()).remarks)


def test_runs_without_a_score_are_named(tmp_path):
    empty = {"validation_loss": "", "gsm8k_accuracy": "", "gsm8k_total": ""}
    rows = clean_rows()
    rows[2] |= empty
    assert audited(tmp_path, rows).remarks == ("1 run is left out for want of a score: line 4",)
    for row in rows[:10]:
        row |= empty
    (remark,) = audited(tmp_path, rows).remarks
    assert remark.startswith("10 runs are left out")
    assert remark.endswith("line 9 and 2 more")


def test_two_seeds_with_the_same_accuracy_are_luck_three_are_not(tmp_path):
    # Without losses all that is known is a count of right answers.
    def bare(row):
        del row["validation_loss"], row["select_on"]
        row["validation_accuracy"] = row["gsm8k_accuracy"] = 0.5 + (row["method"] == "pissa") / 10
        return row

    def kept(seeds):
        def change(row):
            if row["seed"] in seeds and row["batch_size"] == 8 and row["learning_rate"] == 3e-4:
                return bare(row) if row["method"] == "lora" else None
            return None

        return change

    assert "seeds_change_nothing" not in spoilt(tmp_path, kept((0, 1)))
    assert "seeds_change_nothing" in spoilt(tmp_path, kept((0, 1, 2)))


def test_another_scale_at_the_same_rate(tmp_path):
    def change(row):
        if row["learning_rate"] != 3e-4:
            return None
        return row | {"alpha": 32} if row["method"] == "pissa" else row

    one = spoilt(tmp_path, change)["unequal_scale"]
    assert numbers(one)["largest_over_smallest"] == 2
    assert numbers(one)["pissa, rank 16, alpha 32"] == 2
    assert numbers(one)["learning_rates"] == "0.0003"


def test_another_scale_is_no_finding_where_each_method_has_its_own_rate_inside(tmp_path):
    found = spoilt(tmp_path, lambda row: row | {"alpha": 32} if row["method"] == "pissa" else row)
    assert found == {}


def test_rslora_is_scaled_by_the_root_of_the_rank(tmp_path):
    def change(row):
        if row["learning_rate"] != 3e-4:
            return None
        return row | {"method": "rslora"} if row["method"] == "pissa" else row

    one = spoilt(tmp_path, change)["unequal_scale"]
    assert numbers(one)["rslora, rank 16, alpha 16"] == 4


def test_selection_on_the_test_set_where_it_is_stated(tmp_path):
    found = spoilt(tmp_path, lambda row: row | {"select_on": "test"})
    one = found["selected_on_test"]
    assert numbers(one)["num_questions"] == 1319
    # 6 configurations: E[max] 1.2672
    assert numbers(one)["expected_maximum"] == pytest.approx(1.2672, abs=1e-4)
    assert numbers(one)["bias"] == pytest.approx(
        selection_bias(6, accuracy=0.52, num_questions=1319, correlation=CORRELATION), rel=0.05
    )
    assert set(found) == {"selected_on_test"}


def test_selection_on_the_test_set_where_nothing_else_is_in_the_file(tmp_path):
    def change(row):
        del row["validation_loss"], row["select_on"]
        return row

    one = spoilt(tmp_path, change)["selected_on_test"]
    # Another choice may have been made, of which the file says nothing.
    assert "nothing in the file shows another choice" in one.what
    # one configuration of each method: nothing was chosen
    single = spoilt(
        tmp_path,
        lambda row: (
            change(row) if row["learning_rate"] == 3e-4 and row["batch_size"] == 8 else None
        ),
    )
    assert "selected_on_test" not in single


def test_a_difference_below_the_detectable_effect(tmp_path):
    def close(row):
        if row["method"] == "pissa":
            row["gsm8k_accuracy"] = round(row["gsm8k_accuracy"] * 1319 - 120) / 1319
        return row

    found = spoilt(tmp_path, close)
    one = found["below_detectable"]
    assert numbers(one)["difference"] == pytest.approx(12 / 1319)
    assert numbers(one)["detectable_paired"] == pytest.approx(0.0345, abs=5e-5)
    assert numbers(one)["num_questions"] == 1319
    assert "sqrt(d / n" in str(numbers(one)["formula"])
    assert set(found) == {"below_detectable"}


def test_a_difference_in_loss_below_what_seeds_can_tell(tmp_path):
    def close(row):
        row = {key: value for key, value in row.items() if not key.startswith("gsm8k")}
        if row["method"] == "pissa":
            row["validation_loss"] += 0.0499
        return row

    one = spoilt(tmp_path, close)["below_detectable"]
    assert "validation loss" in one.what
    # sd 0.001 over 3 seeds each, 4 degrees of freedom: scipy's noncentral t has power 0.8
    t = float(numbers(one)["detectable"]) / (0.001 * (2 / 3) ** 0.5)
    critical = stats.t.ppf(0.975, 4)
    assert stats.nct.sf(critical, 4, t) == pytest.approx(0.8, abs=1e-3)


def test_a_repeated_run_is_no_further_seed(tmp_path):
    rows = [row for row in clean_rows() if row["seed"] == 0]
    once, thrice = audited(tmp_path, rows), audited(tmp_path, [row for row in rows for _ in "abc"])
    found = [[(one.kind, one.what, one.numbers) for one in a.findings] for a in (once, thrice)]
    assert found[0] == found[1]
    assert {one.kind for one in thrice.findings} >= {"one_seed"}
    (remark,) = thrice.remarks
    assert remark.startswith(f"{2 * len(rows)} runs have the method, settings and seed")


def test_the_detectable_effects_are_the_published_ones():
    assert detectable_unpaired(0.6, 1319) == pytest.approx(0.053, abs=5e-4)
    assert 0.029 < detectable_paired(1319) < 0.038
    # 1 point at 5, 10, 20% discordance: 3.9k, 7.8k, 15.7k questions
    assert detectable_paired(15_700) == pytest.approx(0.01, rel=2e-3)
    # the power itself, simulated: a true difference of this size is found 80 times in 100
    draw = np.random.default_rng(0)
    gap = detectable_paired(1319)
    # Noisy seeds have few degrees of freedom: as `compare` has it for two seeds each.
    noisy = [(0.01**2 / 2, 1.0), (0.01**2 / 2, 1.0)]
    assert detectable_paired(10**9, seeds=noisy) == pytest.approx(
        detectable_effect(0.01, df=2.0), rel=1e-4
    )
    wins = draw.multinomial(1319, [0.1 + gap / 2, 0.1 - gap / 2, 0.8], size=4000)
    z = (wins[:, 0] - wins[:, 1]) / np.sqrt(wins[:, 0] + wins[:, 1])
    assert np.mean(np.abs(z) > 1.96) == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize(
    ("change", "effective"),
    [
        ({"num_updates": 256}, 16),  # label says 8, 4,096 rows in 256 updates
        ({"num_samples": 2048}, 4),
        ({"rows_per_microbatch": 2, "gradient_accumulation_steps": 2}, 4),
    ],
)
def test_a_batch_size_that_is_not_what_its_label_says(tmp_path, change, effective):
    def spoil(row):
        return row | change if row["method"] == "lora" and row["batch_size"] == 8 else row

    def fill(row):
        return dict.fromkeys(change, "") | spoil(row)

    one = spoilt(tmp_path, fill)["batch_size_mismatch"]
    assert one.methods == ("lora",)
    assert numbers(one)["stated_batch_size"] == 8
    assert numbers(one)["effective_batch_size"] == pytest.approx(effective)
    assert numbers(one)["num_runs"] == 9


def test_a_short_last_batch_kept_or_dropped_is_no_mismatch(tmp_path):
    for updates in (4100 // 8, -(-4100 // 8)):
        assert spoilt(
            tmp_path,
            lambda row, updates=updates: (
                None
                if row["batch_size"] != 8
                else row | {"num_train_rows": 4100, "num_updates": updates}
            ),
        ).keys() == {"one_batch_size"}


def test_what_the_file_does_not_say_is_not_checked_and_not_a_finding(tmp_path):
    rows = [
        {"method": row["method"], "learning_rate": row["learning_rate"], "loss_x": 1}
        | {"validation_loss": row["validation_loss"]}
        for row in clean_rows()
        if row["seed"] == 0 and row["batch_size"] == 8
    ]
    found = audited(tmp_path, rows)
    assert {one.kind for one in found.not_checked} == {
        "one_batch_size", "one_seed", "seeds_change_nothing", "unequal_scale", "selected_on_test",
        "below_detectable", "batch_size_mismatch",
    }  # fmt: skip
    assert found.findings == ()


def test_every_detector_is_the_only_one_of_its_kind_and_its_json_is_plain(tmp_path):
    assert len(DETECTORS) == 10
    rows = [row for row in clean_rows() if row["seed"] == 0 and row["batch_size"] == 8]
    document = audited(tmp_path, rows).to_json()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert {"kind", "what", "methods", "rows", "num_rows", "numbers", "why", "run"} == set(
        document["findings"][0]
    )
