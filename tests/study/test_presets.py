"""Every preset against what was published, typed here anew, one fact at a time."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from loratune.errors import StudyError
from loratune.study.loading import parse_study
from loratune.study.presets import preset_names, preset_scales, preset_text
from loratune.study.schema import DeclaredModel, Study

FIGURES = ("fig1", "fig2a", "fig2b", "fig2c", "fig3", "fig4", "fig5", "fig7a", "fig7b", "fig7c")
SECTIONS = ("proxy", "noise")
PUBLISHED = ("published-pissa", "published-milora", "published-peft")
ALL = [
    *product((*FIGURES, *SECTIONS), ("paper", "small")),
    *((name, "paper") for name in PUBLISHED),
]
LLAMA = ("meta-llama/Llama-2-7b-hf",)
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DOUBLING = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
APPENDIX_E = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3, 3e-3)

# Parameters of the published checkpoints, and how many of them are norms.
PUBLISHED_PARAMETERS = {
    "meta-llama/Llama-2-7b-hf": (6_738_415_616, 65 * 4096),
    "meta-llama/Llama-2-13b-hf": (13_015_864_320, 81 * 5120),
    "meta-llama/Llama-3.2-3B": (3_212_749_824, 57 * 3072),
    "Qwen/Qwen3-0.6B": (596_049_920, 57 * 1024 + 28 * 2 * 128),
    "google/gemma-3-1b-pt": (999_885_952, 105 * 1152 + 26 * 2 * 256),
    "google/gemma-3-270m": (268_098_176, 73 * 640 + 18 * 2 * 256),
    "HuggingFaceTB/SmolLM2-135M": (134_515_008, 61 * 576),
    "HuggingFaceTB/SmolLM2-360M": (361_821_120, 65 * 960),
}


def study_of(name: str, scale: str) -> Study:
    content: Any = YAML(typ="safe", pure=True).load(preset_text(name, scale=scale))
    return Study.model_validate(content)


def lines_with(text: str, words: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if words in line]


def num_trials(study: Study) -> int:
    lists = (study.model, study.data.rows, study.protocol, study.batch_size, study.schedule)
    num = len(study.adapters()) * len(study.learning_rates()) * len(study.seeds.grid)
    for values in lists:
        num *= len(values)
    return num


def test_the_presets_are_the_papers_figures_two_sections_and_three_published_comparisons():
    assert preset_names() == (*FIGURES, *SECTIONS, *PUBLISHED)
    assert {preset_scales(name) for name in (*FIGURES, *SECTIONS)} == {("small", "paper")}
    assert {preset_scales(name) for name in PUBLISHED} == {("paper",)}


@pytest.mark.parametrize(("name", "scale"), ALL)
def test_every_preset_loads_without_a_complaint_and_is_named_after_itself(name: str, scale: str):
    loaded = parse_study(preset_text(name, scale=scale), name=name, folder=Path())
    expected = name if name in PUBLISHED else f"{name}-{scale}"
    assert loaded.study.study == expected


@pytest.mark.parametrize(("name", "scale"), ALL)
def test_every_preset_is_commented_in_ascii_within_100_columns(name: str, scale: str):
    text = preset_text(name, scale=scale)
    assert text.isascii()
    assert max(len(line) for line in text.splitlines()) <= 100
    lines = text.splitlines()
    assert lines[0].startswith("# ")
    for number, line in enumerate(lines):
        key = line.split(":")[0]
        if line and line[0] not in "# -" and key not in ("optimizer",):
            assert lines[number - 1].startswith("#"), f"{line!r} stands without a comment"
    assert "our assumption" in text


@pytest.mark.parametrize(("name", "scale"), ALL)
def test_every_preset_writes_out_every_key_that_decides_a_result(name: str, scale: str):
    content: Any = YAML(typ="safe", pure=True).load(preset_text(name, scale=scale))
    # The noise scale is measured beside the trials and changes none of them.
    assert set(content) | {"noise_scale"} == set(Study.model_fields)
    for section in ("optimizer", "evaluate"):
        fields: Any = Study.model_fields[section].annotation
        assert set(content[section]) == set(fields.model_fields)
    data: Any = Study.model_fields["data"].annotation
    assert set(content["data"]) == set(data.model_fields) - {"messages"}


@pytest.mark.parametrize(("name", "scale"), ALL)
def test_the_learning_rate_is_never_chosen_on_the_test_set(name: str, scale: str):
    study = study_of(name, scale)
    assert study.select_on == "validation_loss"
    assert study.data.validation is not None
    assert study.data.validation.rows == 512
    assert study.evaluate.when == "selected"


@pytest.mark.parametrize(("name", "scale"), ALL)
def test_every_model_of_a_preset_is_declared_and_the_data_too(name: str, scale: str):
    study = study_of(name, scale)
    assert set(study.declared.models) == set(study.model)
    assert study.declared.data is not None
    assert study.declared.data.mean_target_tokens < study.declared.data.mean_tokens
    assert study.declared.data.mean_tokens < study.data.max_tokens


def test_declared_shapes_have_as_many_parameters_as_the_published_checkpoints():
    declared = dict[str, DeclaredModel]()
    for name, scale in ALL:
        declared |= study_of(name, scale).declared.models
    assert set(declared) == set(PUBLISHED_PARAMETERS)
    for source, shape in declared.items():
        total, num_norms = PUBLISHED_PARAMETERS[source]
        attention = 2 * shape.num_attention_heads + 2 * shape.num_key_value_heads
        block = shape.hidden_size * (attention * shape.head_dim + 3 * shape.intermediate_size)
        embeddings = (1 if shape.tied_embeddings else 2) * shape.vocab_size * shape.hidden_size
        assert shape.num_layers * block + embeddings + num_norms == total, source


def test_only_gemma_slides_with_every_sixth_layer_over_all_tokens():
    for name, scale in ALL:
        for source, shape in study_of(name, scale).declared.models.items():
            if "gemma" not in source:
                assert shape.sliding_window is None
                continue
            sliding = [layer for layer in range(shape.num_layers) if (layer + 1) % 6]
            assert (shape.sliding_window, shape.num_sliding_layers) == (512, len(sliding))


def test_metamathqa_and_codefeedback_are_declared_with_their_published_rows():
    for name, rows in (("fig1", 395_000), ("fig7c", 156_526), ("published-milora", 395_000)):
        declared = study_of(name, "paper").declared.data
        assert declared is not None
        assert declared.rows == rows
    small = study_of("fig1", "small").declared.data
    assert small is not None
    assert small.rows == 7_473


@pytest.mark.parametrize("name", FIGURES)
def test_paper_scale_keeps_table_1_but_for_what_its_figure_varies(name: str):
    study = study_of(name, "paper")
    if name != "fig2a":
        assert study.rank == (128,)
    assert study.alpha == ("rank",)
    assert study.optimizer.name == "adamw"
    assert study.dropout == 0
    assert (study.schedule[0].kind, study.schedule[0].warmup_ratio) == ("cosine", 0)
    if name != "fig3":
        assert [(p.kind, p.epochs) for p in study.protocol] == [("fixed_samples", 1)]
    assert study.targets == SEVEN


@pytest.mark.parametrize("name", FIGURES)
def test_paper_scale_sweeps_appendix_e_over_batch_sizes_by_doubling(name: str):
    study = study_of(name, "paper")
    assert study.learning_rates() == APPENDIX_E
    assert study.batch_size == DOUBLING
    marked = lines_with(preset_text(name, scale="paper"), "batch_size:")
    assert all(line.endswith("# our assumption") for line in marked)


@pytest.mark.parametrize("name", FIGURES)
def test_paper_scale_shows_three_seeds_but_one_in_figures_3_4_and_5(name: str):
    num_seeds = 1 if name in ("fig3", "fig4", "fig5") else 3
    assert len(study_of(name, "paper").seeds.grid) == num_seeds


@pytest.mark.parametrize("name", FIGURES)
def test_paper_scale_reads_metamathqa_as_pissa_does_and_codefeedback_for_7c(name: str):
    data = study_of(name, "paper").data
    if name == "fig7c":
        assert data.train.id == "m-a-p/CodeFeedback-Filtered-Instruction"
        assert (data.prompt, data.response) == ("query", "answer")
    else:
        assert data.train.id == "meta-math/MetaMathQA"
        assert (data.prompt, data.response) == ("query", "response")
        assert data.validation is not None
        assert data.validation.group_by == "original_question"
    assert (data.template, data.suffix, data.max_tokens) == ("alpaca", "\n", 512)
    assert data.rows_order == "first"
    if name != "fig2b":
        assert data.rows == (100_000,)


@pytest.mark.parametrize("name", FIGURES)
def test_paper_scale_marks_what_the_paper_does_not_say(name: str):
    text = preset_text(name, scale="paper")
    for key in ("precision", "suffix", "max_tokens", "betas", "weight_decay", "max_grad_norm"):
        (line,) = lines_with(text, f"{key}:")
        assert line.endswith("# our assumption"), line
    for key in ("rank", "alpha", "targets", "dropout", "learning_rate"):
        line = next(line for line in text.splitlines() if line.startswith(f"{key}:"))
        assert ("our assumption" in line) == (key == "rank" and name == "fig2a"), line


def test_paper_scale_says_how_to_select_on_the_test_set_and_that_way_is_a_valid_study():
    text = preset_text("fig1", scale="paper")
    assert "select_on: test" in text
    content: Any = YAML(typ="safe", pure=True).load(text)
    del content["data"]["validation"]
    content["select_on"] = "test"
    content["evaluate"]["when"] = "all"
    assert Study.model_validate(content).select_on == "test"


def test_only_figure_1_compares_methods_and_they_are_lora_pissa_and_milora():
    for name, scale in product(FIGURES, ("paper", "small")):
        methods = [method.name for method in study_of(name, scale).methods]
        assert methods == (["lora", "pissa", "milora"] if name == "fig1" else ["lora"])


def test_figure_1_at_paper_scale_is_900_trials():
    assert num_trials(study_of("fig1", "paper")) == 3 * 10 * 10 * 3


def test_figure_2_varies_rank_rows_and_model_over_the_papers_ranges():
    assert study_of("fig2a", "paper").rank == (32, 64, 128, 256)
    assert study_of("fig2b", "paper").data.rows == (25_000, 50_000, 100_000, 200_000)
    assert study_of("fig2c", "paper").model == (*LLAMA, "meta-llama/Llama-2-13b-hf")
    assert study_of("fig2c", "small").model == (
        "HuggingFaceTB/SmolLM2-135M",
        "HuggingFaceTB/SmolLM2-360M",
    )
    assert len(study_of("fig2a", "small").rank) >= 3
    assert len(study_of("fig2b", "small").data.rows) >= 3


def test_figure_3_makes_200_updates_whatever_the_batch_size():
    (protocol,) = study_of("fig3", "paper").protocol
    assert (protocol.kind, protocol.steps) == ("fixed_steps", 200)
    (small,) = study_of("fig3", "small").protocol
    assert small.kind == "fixed_steps"


@pytest.mark.parametrize("scale", ["paper", "small"])
def test_figure_4_has_cosine_without_and_with_warm_up_and_no_schedule(scale: str):
    schedules = [(s.kind, s.warmup_ratio) for s in study_of("fig4", scale).schedule]
    assert schedules == [("cosine", 0), ("cosine", 0.03), ("constant", None)]
    (line,) = lines_with(preset_text("fig4", scale=scale), "0.03}")
    assert line.endswith("# our assumption")


def test_figure_5_is_lora_of_figure_1_over_the_whole_grid_of_learning_rates():
    assert study_of("fig5", "paper").learning_rates() == APPENDIX_E
    assert study_of("fig5", "small").learning_rates() == APPENDIX_E


def test_figure_7_is_qwen_gemma_and_code():
    assert study_of("fig7a", "paper").model == ("Qwen/Qwen3-0.6B",)
    assert study_of("fig7a", "small").model == ("Qwen/Qwen3-0.6B",)
    assert study_of("fig7b", "paper").model == ("google/gemma-3-1b-pt",)
    assert study_of("fig7c", "paper").model == LLAMA
    assert [task.name for task in study_of("fig7c", "paper").evaluate.tasks] == ["humaneval"]
    for name in ("fig7a", "fig7b"):
        (line,) = lines_with(
            preset_text(name, scale="paper"), f"model: {study_of(name, 'paper').model[0]}"
        )
        assert line.endswith("# our assumption")


@pytest.mark.parametrize("name", [name for name in FIGURES if name != "fig7c"])
def test_paper_scale_scores_gsm8k_greedily_with_the_published_grader(name: str):
    (task,) = study_of(name, "paper").evaluate.tasks
    assert (task.name, task.grader, task.max_new_tokens) == ("gsm8k", "pissa", 1024)
    assert task.stop == ()


@pytest.mark.parametrize("name", FIGURES)
def test_small_scale_is_minutes_at_four_updates_and_240_rows_a_second(name: str):
    # Measured with one adapter at a time on one H100, 135M parameters: about 4 updates a second up
    # to batch 64, 244 rows a second from there. The three larger models are at most about twice as
    # slow.
    study = study_of(name, "small")
    per_rate = 0.0
    for rows, protocol, size in product(study.data.rows, study.protocol, study.batch_size):
        assert rows is not None
        num_updates = protocol.steps or rows / size
        per_rate += num_updates * max(1 / 4, size / 240)
    repeats = len(study.model) * len(study.adapters()) * len(study.learning_rates())
    seconds = per_rate * repeats * len(study.seeds.grid) * len(study.schedule)
    assert seconds / 60 < 40


@pytest.mark.parametrize("name", FIGURES)
def test_no_small_batch_is_larger_than_the_rows(name: str):
    study = study_of(name, "small")
    assert all(rows is not None and rows >= max(study.batch_size) for rows in study.data.rows)


@pytest.mark.parametrize("scale", ["paper", "small"])
def test_the_proxy_crosses_two_models_and_ranks_on_all_rows(scale: str):
    study = study_of("proxy", scale)
    assert study.data.rows == (None,)
    assert study.model == study_of("fig2c", scale).model
    assert study.rank == (8, 128)
    assert study.batch_size == study_of("fig1", scale).batch_size


@pytest.mark.parametrize("scale", ["paper", "small"])
def test_the_noise_scale_is_measured_over_batch_sizes_and_ranks_of_figure_2a(scale: str):
    study, figure = study_of("noise", scale), study_of("fig2a", scale)
    assert study.noise_scale is not None
    assert study.noise_scale.held_out is not None
    assert (study.rank, study.batch_size) == (figure.rank, figure.batch_size)
    assert [one for one in FIGURES if study_of(one, scale).noise_scale is not None] == []


def test_published_pissa_is_its_own_setting():
    study = study_of("published-pissa", "paper")
    assert study.model == LLAMA
    assert study.data.rows == (100_000,)
    assert study.data.rows_order == "first"
    assert study.batch_size == (128,)
    assert study.learning_rates() == (2e-5,)
    assert [(p.kind, p.epochs) for p in study.protocol] == [("fixed_samples", 1)]
    assert [(s.kind, s.warmup_ratio) for s in study.schedule] == [("cosine", 0.03)]
    assert [(m.name, r, a) for m, r, a in study.adapters()] == [
        ("lora", 128, 128),
        ("pissa", 128, 128),
        ("milora", 128, 128),
    ]
    assert dict(study.adapters()[1][0].options) == {"niter": 16}
    assert study.dropout == 0
    assert study.targets == SEVEN
    assert study.data.max_tokens == 512
    assert study.data.suffix == "\n"
    assert (study.optimizer.weight_decay, study.optimizer.max_grad_norm) == (0, 1)
    (task,) = study.evaluate.tasks
    assert (task.max_new_tokens, task.stop, task.grader) == (1024, (), "pissa")


def test_published_milora_is_its_own_setting_with_alpha_128_for_lora_alone():
    study = study_of("published-milora", "paper")
    assert study.model == LLAMA
    assert study.data.rows == (None,)
    assert study.batch_size == (16,)
    assert study.learning_rates() == (3e-4,)
    assert [(p.kind, p.epochs) for p in study.protocol] == [("fixed_samples", 3)]
    assert [(s.kind, s.warmup_steps) for s in study.schedule] == [("linear", 100)]
    assert [(m.name, r, a) for m, r, a in study.adapters()] == [
        ("lora", 64, 128),
        ("pissa", 64, 64),
        ("milora", 64, 64),
    ]
    assert study.dropout == 0.05
    assert study.targets == ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
    assert study.data.max_tokens == 2048
    assert study.data.suffix == ""
    assert (study.optimizer.weight_decay, study.optimizer.max_grad_norm) == (0, 1)
    (task,) = study.evaluate.tasks
    assert task.prompt is not None
    assert task.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\n{prompt}\n\n"
        "### Response: Let's think step by step."
    )
    assert task.stop == ("Instruction:", "Instruction", "Response:", "Response")
    assert task.grader == "pissa"


def test_published_peft_is_its_own_setting_with_rank_64_for_rslora_alone():
    study = study_of("published-peft", "paper")
    assert study.model == ("meta-llama/Llama-3.2-3B",)
    assert study.batch_size == (4,)
    assert [(p.kind, p.steps) for p in study.protocol] == [("fixed_steps", 5000)]
    assert study.learning_rates() == (1e-4,)
    assert [(s.kind, s.warmup_ratio) for s in study.schedule] == [("cosine", 0.1)]
    assert [(m.name, r, a) for m, r, a in study.adapters()] == [
        ("lora", 32, 64),
        ("rslora", 64, 64),
        ("dora", 32, 64),
    ]
    assert study.targets == ("q_proj", "v_proj")
    assert study.data.template == "Question: {prompt} Think step by step.\nAnswer:"
    assert study.data.max_tokens == 768
    assert study.seeds.grid == (0,)
    assert study.optimizer.weight_decay == 0.1


def test_without_a_scale_a_figure_is_small_and_a_published_comparison_whole():
    assert preset_text("fig1") == preset_text("fig1", scale="small")
    assert preset_text("published-peft") == preset_text("published-peft", scale="paper")


def test_an_unknown_preset_names_the_nearest_and_lists_them_all():
    with pytest.raises(StudyError, match=r"'fig2'.*did you mean 'fig2\w'\?.*fig1, fig2a"):
        preset_text("fig2", scale="paper")


def test_an_unknown_scale_lists_those_that_are_offered():
    with pytest.raises(StudyError, match="'huge'; expected small or paper"):
        preset_text("fig1", scale="huge")
    with pytest.raises(StudyError, match="no scale 'small'; expected paper"):
        preset_text("published-pissa", scale="small")
