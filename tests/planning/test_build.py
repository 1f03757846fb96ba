"""A plan's totals, and the keys that others rely on."""

import math

import pytest

from loratune.planning.build import detectable_effect, make_plan
from loratune.planning.cost import H100
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
    expected += " disk_bytes detectable_effect provisional packs"
    assert list(planned().to_json()) == ["study", *expected.split()]
    assert planned().to_json()["detectable_effect"] is None


def test_the_detectable_effect_is_that_of_paired_answers():
    one = study(evaluate="{tasks: [gsm8k]}")
    assert detectable_effect(one) == pytest.approx(2.801585 * math.sqrt(0.2 / 1319))
    few = study(evaluate="{tasks: [{name: gsm8k, questions: 100}]}")
    assert detectable_effect(few) == pytest.approx(2.801585 * math.sqrt(0.2 / 100))
    assert detectable_effect(study()) is None


def test_what_is_kept_decides_the_disk():
    sizes = [planned(keep_adapters=keep).disk_bytes for keep in ("none", "best", "all")]
    assert sizes == sorted(sizes)
    assert sizes[0] == 8 * 4096
