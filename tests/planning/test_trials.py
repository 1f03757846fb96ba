"""The crossing of a study's lists, and what makes two trials the same."""

import time
from dataclasses import replace
from itertools import pairwise

import pytest

from loratune.errors import ModelError, StudyError
from planned_studies import DATA, model, study, trials


def only(**changes):
    (trial,) = trials(study(**changes))
    return trial


def test_every_combination_is_there_exactly_once_and_cells_stand_together():
    crossed = trials(
        study(
            methods="[lora, pissa]",
            rank="[4, 8]",
            batch_size="[8, 16, 32]",
            learning_rate="[1e-3, 1e-4]",
            seeds="3",
        )
    )
    assert len(crossed) == len({one.trial_id for one in crossed}) == 2 * 2 * 3 * 2 * 3
    cells = [(one.method.name, one.rank, one.batch_size) for one in crossed]
    changes = sum(one != two for one, two in pairwise(cells))
    assert changes == 2 * 2 * 3 - 1


def test_two_spellings_of_one_alpha_are_one_trial():
    assert len(trials(study(alpha="[rank, 4]"))) == 1
    assert len(trials(study(alpha="[rank, 2*rank]"))) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"study": "another-name"},
        {"seeds": "[0]"},
        {"alpha": "4"},
        {"alpha": "4.0"},
        {"targets": "[down_proj, up_proj, gate_proj, o_proj, v_proj, k_proj, q_proj]"},
        {"schedule": "{kind: cosine, warmup_ratio: 0.0}"},
        {"schedule": "{kind: cosine, warmup_steps: 0}"},
        {"keep_adapters": "all"},
        {"methods": "[{name: lora}]"},
    ],
)
def test_what_changes_no_number_changes_no_id(changes):
    assert only(**changes).trial_id == only().trial_id


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "float32"},
        {"precision": "nf4"},
        {"precision": "int8"},
        {"methods": "[rslora]"},
        {"rank": "5"},
        {"alpha": "5"},
        {"targets": "[q_proj]"},
        {"dropout": "0.1"},
        {"optimizer": "{betas: [0.8, 0.999]}"},
        {"optimizer": "{betas: [0.9, 0.99]}"},
        {"optimizer": "{beta2: {half_life_tokens: 1000}}"},
        {"optimizer": "{eps: 1e-7}"},
        {"optimizer": "{weight_decay: 0.1}"},
        {"optimizer": "{max_grad_norm: 1.0}"},
        {"schedule": "{kind: linear}"},
        {"schedule": "{kind: cosine, warmup_steps: 2}"},
        {"protocol": "{kind: fixed_samples, epochs: 2}"},
        {"protocol": "{kind: fixed_steps, steps: 8}"},
        {"batch_size": "[16]"},
        {"learning_rate": "[2e-3]"},
        {"seeds": "[1]"},
    ],
)
def test_whatever_changes_a_number_changes_the_id(changes):
    assert only(**changes).trial_id != only().trial_id


def test_options_model_and_data_change_the_id():
    two = study(methods="[{name: loraplus, ratio: 4}, {name: loraplus, ratio: 16}]")
    assert len(trials(two)) == 2
    plain = only().trial_id
    assert trials(study(), facts=model(fingerprint="other"))[0].trial_id != plain
    assert trials(study(), data=replace(DATA, fingerprint="data-2"))[0].trial_id != plain


def test_ids_from_declared_facts_are_provisional():
    assert only().trial_id.startswith("trial-")
    (trial,) = trials(study(), facts=model(provisional=True))
    assert trial.provisional
    assert trial.trial_id.startswith("provisional-")


def test_a_half_life_in_tokens_is_beta2_to_the_ratio_of_batch_sizes():
    eight, sixteen = trials(
        study(batch_size="[8, 16]", optimizer="{beta2: {half_life_tokens: 4000}}")
    )
    # 5 target tokens a row: an update of 8 rows sees 40.
    assert eight.beta2 == pytest.approx(0.5 ** (40 / 4000))
    assert sixteen.beta2 == pytest.approx(eight.beta2**2)


def test_a_method_may_bring_its_own_rank_and_alpha():
    lora, milora = trials(study(methods="[lora, {name: milora, rank: 2, alpha: 6}]"))
    assert (lora.rank, lora.alpha, lora.scale) == (4, 4.0, 1.0)
    assert (milora.rank, milora.alpha, milora.scale) == (2, 6.0, 3.0)


def test_rslora_scales_by_the_root_of_the_rank():
    assert only(methods="[rslora]").scale == 2.0


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(StudyError, match="batch_size=65 exceeds num_train_rows=64"):
        trials(study(batch_size="[65]"))
    with pytest.raises(ModelError, match="rank=17 does not fit layer 'k_proj'"):
        trials(study(rank="17"))
    with pytest.raises(ModelError, match="w_proj"):
        trials(study(targets="[w_proj]"))


def test_a_hundred_thousand_trials_are_planned_in_five_seconds():
    many = study(
        methods="[lora, pissa]",
        batch_size="[1, 2, 4, 8, 16]",
        learning_rate="paper",
        seeds="1000",
    )
    before = time.process_time()
    assert len(trials(many)) == 100_000
    assert time.process_time() - before < 5


@pytest.mark.parametrize("precision", ["nf4", "int8"])
@pytest.mark.parametrize("method", ["pissa", "milora", "olora", "dora", "adalora"])
def test_a_method_that_cannot_train_over_a_quantised_base_is_refused_with_the_reason(
    method, precision
):
    with pytest.raises(StudyError) as caught:
        trials(study(precision=precision, methods=f"[lora, {method}]"))
    said = str(caught.value)
    assert f"{method} does not train over a base in precision {precision}: " in said
    assert said.endswith("; choose precision bfloat16, or leave it out")
    if method in ("pissa", "milora", "olora"):
        assert "the numbers would not be the method's" in said
    assert len(trials(study(precision="bfloat16", methods=f"[lora, {method}]"))) == 2


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_lora_over_a_quantised_base_is_planned(precision):
    planned = trials(study(precision=precision, methods="[lora, rslora, loraplus]"))
    assert [one.precision for one in planned] == [precision] * 3
