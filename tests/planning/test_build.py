"""A plan's totals, and the keys that others rely on."""

import json
import math

import pytest
from statsmodels.stats.power import TTestPower

from loratune.data.demo_task import DEFAULT_NUM_ROWS
from loratune.planning.build import NUM_QUESTIONS, make_plan, plan_power
from loratune.planning.cost import H100
from loratune.planning.power import (
    ASSUMED_NOISE,
    DifferenceNoise,
    questions_to_detect,
    study_detectable_effect,
)
from loratune.planning.text import plan_text
from planned_studies import DATA, model, study


def planned(**changes):
    one = study(batch_size="[8, 16]", learning_rate="[1e-3, 1e-2]", seeds="2", **changes)
    return make_plan(one, models={"small": model()}, data={("small", None): DATA}, rate=H100)


def test_totals_are_the_sums_over_trials():
    plan = planned()
    assert len(plan.trials) == len(plan.costs) == 8
    assert plan.num_cells == 2
    assert plan.num_updates == 4 * 8 + 4 * 4
    assert plan.tokens == 8 * 640
    assert plan.flops == pytest.approx(sum(cost.flops for cost in plan.costs))
    assert plan.hours * 3600 == pytest.approx(sum(cost.seconds for cost in plan.costs))


def test_json_has_the_keys_that_others_rely_on():
    expected = "num_trials num_cells num_updates tokens flops hours device peak_memory_bytes"
    expected += " disk_bytes noise_probes detectable_effect provisional packs"
    expected += " alternatives power"
    assert list(planned().to_json()) == ["study", *expected.split()]
    assert planned().to_json()["detectable_effect"] is None
    text = plan_text(planned(), list_trials=False)
    assert "the same question by" in text
    assert "adaptive search about 8 trials (at most 11)" in text
    # Why there is no power, and how to get it.
    assert "no power figure" in text
    assert "--like DIR" in text


def test_the_detectable_effect_is_that_of_its_seeds_and_questions():
    one = study(evaluate="{tasks: [gsm8k]}", seeds="3")
    (power,) = plan_power(one)
    assert (power.metric, power.num_seeds, power.num_questions) == ("gsm8k_accuracy", 3, 1319)
    known = study_detectable_effect(ASSUMED_NOISE, num_seeds=3, num_questions=1319)
    assert power.detectable_effect == known
    # Above what questions alone hide, (z_.975 + z_.8) sqrt(discordance / n).
    assert known is not None
    assert 2.8016 * math.sqrt(0.2 / 1319) < known < 0.04
    assert power.called_effect is not None
    assert power.called_effect > known
    few = study(evaluate="{tasks: [{name: gsm8k, questions: 100}]}", seeds="3")
    assert plan_power(few)[0].num_questions == 100
    assert plan_power(study()) == ()
    made = planned(evaluate="{tasks: [gsm8k, humaneval]}")
    assert made.detectable_effect is None, "two seeds are too few"


def test_one_point_needs_more_seeds_and_more_questions():
    (power,) = plan_power(study(evaluate="{tasks: [gsm8k]}", seeds="5"))
    assert (power.target, power.seeds_needed, power.questions_needed) == (0.01, None, None)
    needed = dict(power.questions_needed_with)
    assert list(needed) == [5, 10, 20]
    assert needed[20] == questions_to_detect(0.01, ASSUMED_NOISE, num_seeds=20)
    assert needed[20] is not None
    assert 15_700 < needed[20] < 40_000  # 15.7k without any noise of seeds


def test_measured_noise_takes_the_place_of_what_is_assumed_and_tells_of_losses():
    noise = {
        "validation_loss": DifferenceNoise(0.02**2, 0.0, 0.0, "measured on 1 pair of methods"),
        "gsm8k_accuracy": DifferenceNoise(1e-6, 0.01, 0.05, "measured on 1 pair of methods"),
    }
    loss, accuracy = plan_power(study(evaluate="{tasks: [gsm8k]}", seeds="5"), noise)
    assert (loss.metric, loss.num_questions, loss.questions_needed_with) == (
        "validation_loss", None, (),
    )  # fmt: skip
    known = TTestPower().solve_power(nobs=5, alpha=0.05, power=0.8) * 0.02
    assert loss.detectable_effect == pytest.approx(known, rel=1e-3)
    assert loss.seeds_needed == math.ceil(
        TTestPower().solve_power(effect_size=0.01 / 0.02, alpha=0.05, power=0.8)
    )
    assert accuracy.noise == "measured on 1 pair of methods"
    assert accuracy.detectable_effect is not None
    assumed = plan_power(study(evaluate="{tasks: [gsm8k]}", seeds="5"))[0].detectable_effect
    assert assumed is not None
    assert accuracy.detectable_effect < 0.5 * assumed


def test_the_demo_tasks_size_is_that_of_its_test_split():
    assert NUM_QUESTIONS["demo"] == DEFAULT_NUM_ROWS["test"]


def test_the_text_says_what_can_be_shown_and_what_would_resolve_a_point():
    text = plan_text(planned(evaluate="{tasks: [gsm8k]}"), list_trials=False)
    assert "no difference between methods can be shown with 2 seeds, 1,319 questions" in text
    one = study(evaluate="{tasks: [gsm8k]}", seeds="5")
    made = make_plan(one, models={"small": model()}, data={("small", None): DATA}, rate=H100)
    text = plan_text(made, list_trials=False)
    assert "detectable     3.6 points (80% power" in text
    assert "1 point takes more seeds than can be had with these questions" in text
    assert "assumed: 20% of answers differ between two methods" in text
    json.dumps(made.to_json(), allow_nan=False)


def test_what_is_kept_decides_the_disk():
    sizes = [planned(keep_adapters=keep).disk_bytes for keep in ("none", "best", "all")]
    assert sizes == sorted(sizes)
    assert sizes[0] == 8 * 4096
