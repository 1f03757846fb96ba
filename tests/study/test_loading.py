"""A study file's errors: the file, the line, the key, what was given, what to do."""

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratune.errors import StudyError
from loratune.study.loading import load_study, parse_study
from loratune.study.schema import PAPER_LEARNING_RATES

# The study file that the design promises, key by key.
EXAMPLE = """\
study: fig1-small
model: HuggingFaceTB/SmolLM2-135M
precision: bfloat16
data:
  train: gsm8k/train.jsonl
  prompt: question
  response: answer
  template: alpaca
  suffix: ""
  max_tokens: 512
  too_long: drop
  rows: 100000
  rows_order: first
  validation: {rows: 512, group_by: question}
protocol: {kind: fixed_samples, epochs: 1}
methods: [lora, pissa, {name: loraplus, ratio: 16}]
rank: 128
alpha: rank
targets: [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]
dropout: 0.0
batch_size: [4, 8, 16]
learning_rate: [1e-5, 3e-4]
seeds: 3
optimizer: {name: adamw, betas: [0.9, 0.999], beta2: fixed, eps: 1e-8, max_grad_norm: null}
schedule: {kind: cosine, warmup_ratio: 0.0}
evaluate: {tasks: [], when: selected}
select_on: validation_loss
keep_adapters: best
"""


def parse(text):
    return parse_study(text, name="s.yaml", folder=Path()).study


def errors(old: str, new: str) -> list[str]:
    assert old in EXAMPLE
    with pytest.raises(StudyError) as caught:
        parse(EXAMPLE.replace(old, new))
    return str(caught.value).splitlines()


def test_the_example_parses_and_numbers_are_numbers():
    study = parse(EXAMPLE)
    assert study.learning_rates() == (1e-5, 3e-4)
    assert study.optimizer.eps == 1e-8
    assert study.seeds.grid == (0, 1, 2)
    assert study.methods_chosen()[2].options == (("ratio", 16.0),)
    paper = parse(EXAMPLE.replace("[1e-5, 3e-4]", "paper"))
    assert paper.learning_rates() == PAPER_LEARNING_RATES
    assert len(PAPER_LEARNING_RATES) == 10


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "batch_size: [",
            "bach_size: [",
            "s.yaml:21: unknown key 'bach_size'; did you mean 'batch",
        ),
        ("max_tokens: 512", "max_token: 512", "s.yaml:10: unknown key 'data.max_token'; did you m"),
        ("warmup_ratio: 0.0", "warmup_rato: 0", "s.yaml:25: unknown key 'schedule.warmup_rato'"),
        ("when: selected", "wen: all", "s.yaml:26: unknown key 'evaluate.wen'; did you mean 'when"),
        (
            "ratio: 16",
            "rato: 16",
            "s.yaml:16: methods: method 'loraplus' has no option 'rato' (did",
        ),
        (
            "[lora, pissa",
            "[lora, pisa",
            "s.yaml:16: methods: unknown method 'pisa' (did you mean 'p",
        ),
        ("[4, 8, 16]", "[4, 0]", "s.yaml:21: batch_size: 0; give a whole number of at least 1"),
        ("[4, 8, 16]", "[4, 4]", "s.yaml:21: batch_size: 4 is listed twice"),
        ("[4, 8, 16]", "[]", "s.yaml:21: batch_size: the list is empty; give at least one value"),
        ("[4, 8, 16]", "[4, 8.5]", "s.yaml:21: batch_size: got 8.5; expected a valid integer"),
        ("[1e-5, 3e-4]", "[1e-5, -1]", "s.yaml:22: learning_rate: learning rate -1; give a posit"),
        ("[1e-5, 3e-4]", "0", "s.yaml:22: learning_rate: learning rate 0; give a positive number"),
        ("rank: 128", "rank: 0", "s.yaml:17: rank: 0; give a whole number of at least 1"),
        ("rank: 128", "rank: true", "s.yaml:17: rank: got True; expected a valid integer"),
        ("alpha: rank", "alpha: 0", "s.yaml:18: alpha: alpha 0; give rank, 2*rank or a positive"),
        ("bfloat16", "bf16", "s.yaml:3: precision: got 'bf16'; expected 'bfloat16', 'float16', 'f"),
        ("seeds: 3", "seeds: 0", "s.yaml:23: seeds: 0 seeds; give at least 1, or a list of seeds"),
        ("dropout: 0.0", "dropout: 1.0", "s.yaml:20: dropout: got 1.0; expected less than 1"),
        ("epochs: 1}", "steps: 3}", "s.yaml:15: protocol: fixed_samples takes epochs and no steps"),
        ("template: alpaca", "template: llama", "s.yaml:4: data: unknown template 'llama'"),
        ("betas: [0.9", "betas: [1.9", "s.yaml:24: optimizer.betas: betas (1.9, 0.999)"),
        ("  prompt: question\n", "", "s.yaml:4: data: give prompt and response, or messages"),
        ("study: fig1-small", "study: a b", "s.yaml:1: study: got 'a b'"),
        ("study: fig1-small\n", "", "s.yaml:1: missing key 'study': the study's name"),
        ("rank: 128", "rank: 1\nrank: 2", "s.yaml:18: malformed YAML: found duplicate key"),
        ("[4, 8, 16]", "[4, 8", "s.yaml:22: malformed YAML"),
    ],
)
def test_every_error_names_the_file_the_line_the_key_and_a_fix(old, new, expected):
    found = errors(old, new)
    # A misspelt key that is required is also a key that is missing.
    assert len(found) <= 2
    assert any(line.startswith(expected) for line in found)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("{rows: 512, group_by: question}", "null", "select_on: validation_loss needs data.val"),
        ("validation_loss", "test", "select_on: test holds nothing out; remove data.validation"),
    ],
)
def test_combinations_that_cannot_be_are_errors(old, new, expected):
    assert expected in errors(old, new)[0]


def test_two_mistakes_are_two_lines():
    text = EXAMPLE.replace("rank: 128", "rank: 0").replace("seeds: 3", "seeds: [0, 0]")
    with pytest.raises(StudyError) as caught:
        parse(text)
    assert len(str(caught.value).splitlines()) == 2


def test_a_missing_file_and_a_folder_are_said_to_be_so(tmp_path):
    with pytest.raises(StudyError, match=r"nowhere.yaml: no such file"):
        load_study(tmp_path / "nowhere.yaml")
    with pytest.raises(StudyError, match="is a folder"):
        load_study(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"study: \xe9\xe8")
    with pytest.raises(StudyError, match="not UTF-8"):
        load_study(tmp_path / "latin.yaml")


def test_an_adaptive_search_is_refused_in_plain_words_when_it_is_planned():
    study = parse(EXAMPLE.replace("[1e-5, 3e-4]", "{search: adaptive, low: 1e-5, high: 1e-2}"))
    with pytest.raises(StudyError, match="not available in this version; give a list"):
        study.learning_rates()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_mutilated_study_gives_a_study_error_or_a_study(data):
    lines = EXAMPLE.splitlines()
    for _ in range(data.draw(st.integers(1, 3))):
        index = data.draw(st.integers(0, len(lines) - 1))
        start = data.draw(st.integers(0, len(lines[index])))
        junk = data.draw(
            st.sampled_from(["", "[", "}", ": ", "- ", "~", "1e999", "&a", "*a", "\t"])
        )
        lines[index] = lines[index][:start] + junk + lines[index][start + 1 :]
    with suppress(StudyError):
        parse("\n".join(lines))
