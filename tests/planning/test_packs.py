"""What a study's packs are planned to be."""

import pytest

from loratune.methods import load_method
from loratune.methods.base import Packable
from loratune.planning.build import make_plan
from loratune.planning.cost import H100, stated_rate, weight_bytes
from loratune.planning.pack_shape import pack_bytes
from loratune.planning.packs import H100_PACKED, packed_flops_per_second
from loratune.planning.text import plan_text
from loratune.study.methods import descriptions
from planned_studies import DATA, model, study


def planned(rate=H100, **changes):
    one = study(batch_size="[8, 16]", learning_rate="[1e-3, 1e-2]", seeds="2", **changes)
    return make_plan(one, models={"small": model()}, data={("small", None): DATA}, rate=rate)


def test_every_trial_that_can_be_packed_is_in_one_pack():
    plan = planned(methods="[lora, pissa, adalora]")
    (pack,) = plan.packs
    assert pack.num_trials == 16
    assert len(plan.trials) == 24
    assert pack.shape.corrected
    trial = plan.trials[0]
    assert pack.peak_memory_bytes == pack_bytes(
        pack.shape, model=model(), precision=trial.precision, targets=trial.targets
    )
    flops = sum(
        cost.flops
        for trial, cost in zip(plan.trials, plan.costs, strict=True)
        if trial.method.name != "adalora"
    )
    assert pack.hours * 3600 == pytest.approx(flops / packed_flops_per_second(32))


def test_a_pack_stands_in_the_text_and_in_the_json():
    plan = planned()
    (line,) = [line for line in plan_text(plan, list_trials=False).splitlines() if "slots" in line]
    shape = plan.packs[0].shape
    assert f"8 trials of small in {shape.num_slots} slots" in line
    assert f"{shape.tokens_per_step} tokens a step" in line
    (pack,) = (one.to_json() for one in plan.packs)
    assert plan.to_json()["packs"] == [pack]
    assert pack["num_slots"] == shape.num_slots
    assert pack["peak_memory_bytes"] == plan.packs[0].peak_memory_bytes


def test_a_device_of_unknown_memory_and_a_base_in_int8_have_no_pack():
    assert planned(rate=stated_rate(100)).packs == ()
    assert planned(precision="int8").packs == ()


def test_over_nf4_a_pack_is_planned_with_the_quantised_weights_and_one_unpacked_group():
    (whole,), (packed,) = planned().packs, planned(precision="nf4").packs
    assert packed.shape == whole.shape
    saved = weight_bytes(model(), "bfloat16") - weight_bytes(model(), "nf4")
    # Gate and up, 48 x 32 each, in 16 bits.
    unpacked = 2 * 2 * 48 * 32
    assert whole.peak_memory_bytes - packed.peak_memory_bytes == saved - unpacked
    assert packed.hours == whole.hours
    text = plan_text(planned(precision="nf4"), list_trials=False)
    assert f"8 trials of small in {packed.shape.num_slots} slots" in text


def test_each_target_set_and_each_base_has_a_pack_of_its_own():
    one = study(model="[small, other]", batch_size="[8, 16]")
    plan = make_plan(
        one,
        models={"small": model(), "other": model(fingerprint="other")},
        data={("small", None): DATA, ("other", None): DATA},
        rate=H100,
    )
    assert [(pack.model, pack.num_trials) for pack in plan.packs] == [("small", 2), ("other", 2)]


@pytest.mark.parametrize(("width", "rate"), H100_PACKED)
def test_the_packed_rate_is_the_measured_one_at_the_measured_widths(width, rate):
    assert packed_flops_per_second(width) == pytest.approx(rate)


def test_the_packed_rate_grows_with_width_and_ends_at_the_widest():
    rates = [packed_flops_per_second(width) for width in (64, 288, 576, 800, 1536, 4096, 8192)]
    assert rates == sorted(rates)
    assert rates[1] == pytest.approx(rates[2] / 2)
    assert rates[-1] == rates[-2]


@pytest.mark.parametrize("name", sorted(descriptions()))
def test_the_description_says_of_every_method_whether_it_can_be_packed(name):
    assert descriptions()[name].packable == isinstance(load_method(name), Packable)
