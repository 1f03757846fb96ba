"""What a study may say and what not: limits, impossible combinations, and what values become."""

import time

import pytest

from loratune.errors import StudyError
from loratune.records import NoiseSchedule
from planned_studies import study

ACCEPTED = [
    ("seeds", "2", (0, 1)),
    ("seeds", "[7, 3]", (7, 3)),
    ("seeds", "9223372036854775807", None),
    ("rank", "8", (8,)),
    ("rank", "[8, 4]", (8, 4)),
    ("batch_size", "0o10", (8,)),
    ("alpha", "2*rank", ("2*rank",)),
    ("alpha", "[rank, 3]", ("rank", 3.0)),
    ("dropout", "0", 0.0),
    ("targets", "q_proj", ("q_proj",)),
]


@pytest.mark.parametrize(("key", "text", "value"), ACCEPTED)
def test_one_value_and_a_list_of_them_are_both_lists(key, text, value):
    if value is None:
        with pytest.raises(StudyError, match="give at most 1,000,000, or a list"):
            study(**{key: text})
    else:
        read = getattr(study(**{key: text}), key)
        assert (read.grid if key == "seeds" else read) == value


def test_learning_rates_are_numbers_in_ascending_order_however_they_are_written():
    one = study(learning_rate="[3e-4, 1e-5, .001, 1]")
    assert one.learning_rates() == (1e-5, 3e-4, 1e-3, 1.0)
    assert study(learning_rate="2e-5").learning_rates() == (2e-5,)


BASE = {"train": "rows.jsonl", "prompt": "q", "response": "a", "max_tokens": "64"}


def data(**changes):
    keys = {**BASE, "validation": "{rows: 8}", **changes}
    return "{" + ", ".join(f"{key}: {value}" for key, value in keys.items() if value) + "}"


def test_sources_in_short_form_are_told_apart_by_their_looks():
    def train(text):
        return study(data=data(train=text)).data.train

    assert train("openai/gsm8k").id == "openai/gsm8k"
    assert train("rows.parquet").file == "rows.parquet"
    assert train("demo:task").demo == "task"
    assert train("{id: openai/gsm8k, subset: main, split: test}").split == "test"


REFUSED = [
    # Impossible combinations.
    ({"data": data(response=None)}, "data: give prompt and response, or messages"),
    ({"data": data(messages="m")}, "data: give prompt and response, or messages, not both"),
    (
        {"data": data(prompt=None, response=None, messages="m")},
        "data: messages needs template: chat or chatml",
    ),
    ({"data": data(train="{id: x, file: y.csv}")}, "data.train: give exactly one of id"),
    ({"data": data(train="{file: y.csv, subset: s}")}, "data.train: subset belongs to a hub"),
    ({"data": data(validation="{rows: 8, file: v.csv}")}, "data.validation: give either rows"),
    (
        {"data": data(validation="{file: v.csv, group_by: q}")},
        "data.validation: group_by belongs to held-out rows",
    ),
    ({"data": data(validation=None)}, "select_on: validation_loss needs data.validation"),
    ({"select_on": "validation_accuracy", "data": data(validation=None)}, "needs data.validation"),
    ({"select_on": "test"}, "select_on: test holds nothing out; remove data.validation"),
    ({"select_on": "test", "data": data(validation=None)}, "select_on: test needs a task"),
    (
        {"select_on": "test", "data": data(validation=None), "evaluate": "{tasks: [gsm8k]}"},
        "select_on: test scores every trial; set evaluate.when: all",
    ),
    ({"protocol": "{kind: fixed_steps, epochs: 1}"}, "protocol: fixed_steps takes steps and no"),
    ({"protocol": "{kind: fixed_samples}"}, "protocol: fixed_samples takes epochs and no steps"),
    ({"schedule": "{kind: linear, warmup_ratio: 0.1, warmup_steps: 3}"}, "schedule: give warmup_"),
    ({"learning_rate": "{search: adaptive}"}, "learning_rate: an adaptive search needs low and"),
    ({"learning_rate": "{search: adaptive, low: 1, high: 0.1}"}, "low 1 is not below high 0.1"),
    ({"learning_rate": "{values: [1e-3], max_trials: 9}"}, "max_trials belong to search: adaptive"),
    (
        {
            "learning_rate": "{search: adaptive, low: 1e-4, high: 1e-2}",
            "seeds": "{grid: 2, around_best: 1}",
        },
        "around_best belongs to a grid",
    ),
    (
        {
            "learning_rate": "{search: adaptive, low: 1e-4, high: 1e-2}",
            "select_on": "validation_accuracy",
        },
        "searches the validation loss",
    ),
    ({"optimizer": "{beta2: {rule: fixed, half_life_tokens: 3}}"}, "beta2: give fixed or {half"),
    ({"evaluate": "{tasks: [gsm8k, {name: gsm8k}]}"}, "task 'gsm8k' is listed twice"),
    # Values out of range.
    ({"seeds": "[-1]"}, "seeds: seed -1; give whole numbers from 0 to 2**63 - 1"),
    ({"seeds": f"[{2**63}]"}, f"seeds: seed {2**63}; give whole numbers from 0 to 2**63 - 1"),
    ({"protocol": "{kind: fixed_samples, epochs: 0}"}, "got 0.0; expected greater than 0"),
    ({"protocol": "{kind: fixed_samples, epochs: 1e300}"}, "protocol.epochs: got 1e+300; expected"),
    ({"protocol": f"{{kind: fixed_steps, steps: {10**30}}}"}, "protocol.steps: got 1000000"),
    ({"learning_rate": "[.inf]"}, "learning_rate: got inf; expected a finite number"),
    ({"learning_rate": f"[{10**400}]"}, "learning_rate: got inf; expected a finite number"),
    ({"methods": f"[{{name: loraplus, ratio: {10**400}}}]"}, "'ratio': got 1000000000"),
    ({"learning_rate": "[.nan]"}, "learning_rate: got nan; expected a finite number"),
    ({"alpha": ".inf"}, "alpha: got inf; expected 'rank' or '2*rank', or a finite number"),
    ({"methods": "[{name: lora, alpha: .inf}]"}, "methods.alpha: got inf; expected 'rank' or"),
    ({"methods": "[{name: lora, alpha: -1}]"}, "methods.alpha: alpha -1; give rank, 2*rank or"),
    ({"methods": "[{name: lora, rank: 0}]"}, "methods.rank: got 0; expected greater than or eq"),
    ({"data": data(max_tokens="1")}, "data.max_tokens: got 1; expected greater than 1"),
    ({"data": data(rows="[8, 0]")}, "data.rows: 0 rows; give a positive number"),
    ({"schedule": "{kind: cosine, warmup_ratio: 1.0}"}, "got 1.0; expected less than 1"),
    ({"optimizer": "{max_grad_norm: 0}"}, "optimizer.max_grad_norm: got 0.0; expected greater"),
    ({"optimizer": "{eps: -1e-8}"}, "optimizer.eps: got -1e-08; expected greater than or equal"),
    # Empty texts and wrong types.
    ({"model": "''"}, "model: an empty text; give a name"),
    ({"targets": "['']"}, "targets: an empty text; give a name"),
    ({"data": data(train="''")}, "data.train: got ''; String should have at least 1 char"),
    ({"data": "rows.jsonl"}, "data: got 'rows.jsonl'; expected keys and values"),
    ({"optimizer": "{betas: 0.9}"}, "optimizer.betas: got 0.9; expected a list"),
    ({"optimizer": "{betas: [0.9]}"}, "optimizer.betas: got (0.9,); expected more values"),
    ({"alpha": "half"}, "alpha: got 'half'; expected 'rank' or '2*rank', or a valid number"),
    ({"methods": "[lora, {name: lora}]"}, "methods: {'name': 'lora'} is listed twice"),
    ({"protocol": "[{kind: fixed_steps, steps: 3}, {kind: fixed_steps, steps: 3}]"}, "is listed t"),
    ({"seeds": "1.5"}, "seeds: got 1.5; expected a valid integer"),
    ({"seeds": "yes"}, "seeds: got 'yes'; expected a valid integer"),
    # What is declared for planning.
    (
        {"declared": "{data: {rows: 3, mean_tokens: 4, mean_target_tokens: 9}}"},
        "declared.data: mean_target_tokens 9 is above mean_tokens 4",
    ),
    (
        {
            "declared": "{models: {m: {hidden_size: 8, intermediate_size: 8, num_layers: 1, "
            "num_attention_heads: 2, num_key_value_heads: 2, head_dim: 4, vocab_size: 9, "
            "num_sliding_layers: 2}}}"
        },
        "declared.models.m: num_sliding_layers 2 is above num_layers 1",
    ),
]


@pytest.mark.parametrize(("changes", "said"), REFUSED)
def test_what_cannot_be_meant_is_refused_in_one_line_that_names_the_place(changes, said):
    with pytest.raises(StudyError) as caught:
        study(**changes)
    (line,) = str(caught.value).splitlines()
    assert line.startswith("test.yaml:")
    assert int(line.split(":")[1]) >= 1
    assert said in line


def test_a_value_that_yaml_takes_for_a_date_or_number_and_cannot_read_is_refused():
    for changes in ({"study": "2026-13-45"}, {"seeds": "9" * 5000}):
        with pytest.raises(StudyError, match=r"test\.yaml: a value that cannot be read"):
            study(**changes)


def test_a_study_cannot_be_changed_after_it_was_read():
    one = study()
    with pytest.raises(ValueError, match="frozen"):
        one.rank = (9,)  # pyright: ignore[reportAttributeAccessIssue]  # what is tested
    assert one == study()
    assert hash(one.protocol) == hash(study().protocol)


def test_long_lists_are_checked_for_repeats_in_good_time():
    before = time.process_time()
    assert len(study(seeds="300000").seeds.grid) == 300_000
    assert time.process_time() - before < 2


def test_a_methods_own_rank_and_alpha_stand_in_the_place_of_the_lists():
    one = study(methods="[lora, {name: pissa, rank: 2}, {name: milora, alpha: 64}]", rank="[4, 8]")
    shapes = [(method.name, rank, alpha) for method, rank, alpha in one.adapters()]
    assert shapes == [
        ("lora", 4, 4.0),
        ("lora", 8, 8.0),
        ("pissa", 2, 2.0),
        ("milora", 4, 64.0),
        ("milora", 8, 64.0),
    ]


def test_what_selects_by_accuracy_is_scored_first():
    plain = study(evaluate="{tasks: [gsm8k]}")
    assert plain.scored_tasks() == ("gsm8k",)
    chosen = study(evaluate="{tasks: [gsm8k, validation]}", select_on="validation_accuracy")
    assert chosen.scored_tasks() == ("validation", "gsm8k")


def test_options_of_a_method_are_filled_in_and_one_choice_has_one_spelling():
    (whole,) = study(methods="[{name: loraplus, ratio: 16}]").methods_chosen()
    (float_,) = study(methods="[{name: loraplus, ratio: 16.0}]").methods_chosen()
    (left_out,) = study(methods="[loraplus]").methods_chosen()
    assert whole == float_ == left_out
    assert whole.options == (("ratio", 16.0),)


def test_further_and_fresh_seeds_are_new_numbers_counted_on_from_the_grids():
    seeds = study(seeds="{grid: [4, 9], around_best: 2, confirm: 3}").seeds
    assert (seeds.grid, seeds.further, seeds.fresh) == ((4, 9), (10, 11), (12, 13, 14))
    assert study(seeds="2").seeds.further == study(seeds="2").seeds.fresh == ()


def test_a_grid_of_learning_rates_may_grow():
    rates = study(learning_rate="{values: [1e-4, 3e-4], extend: 2}").learning_rate
    assert (rates.values, rates.extend) == ((1e-4, 3e-4), 2)
    assert study(learning_rate="{values: paper, extend: 1}").learning_rate.values is not None
    for refused in ("{extend: 2}", "{search: adaptive, low: 1e-5, high: 1e-2, extend: 2}"):
        with pytest.raises(StudyError):
            study(learning_rate=refused)


def test_the_noise_scale_is_off_unless_asked_for_and_refuses_what_cannot_be_measured():
    assert study().noise_scale is None
    asked = study(noise_scale="{held_out: 12}").noise_scale
    assert asked is not None
    assert asked.schedule() == NoiseSchedule(every=10, rows=32, held_out_rows=12)
    with pytest.raises(StudyError, match="single rows' gradients of method adalora"):
        study(noise_scale="{every: 10}", methods="[lora, adalora]")
    with pytest.raises(StudyError, match=r"noise_scale.*every"):
        study(noise_scale="{every: 0}")
