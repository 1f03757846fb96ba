"""A study to plan without a model, for the tests of planning."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from loratune.planning.shapes import declared_model_facts
from loratune.planning.trials import plan_trials
from loratune.records import DataFacts, ModelFacts, Trial
from loratune.study.loading import parse_study
from loratune.study.schema import DeclaredModel, Study

TEXT = """\
study: planned
model: small
precision: bfloat16
data: {train: rows.jsonl, prompt: q, response: a, max_tokens: 64, validation: {rows: 8}}
protocol: {kind: fixed_samples, epochs: 1}
methods: [lora]
rank: 4
alpha: rank
targets: all-linear
batch_size: [8]
learning_rate: [1e-3]
seeds: 1
schedule: {kind: cosine}
"""
SHAPE = DeclaredModel(
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=128,
)
DATA = DataFacts("data-1", 64, 8, 640, 6400, 320, 16)


def study(text: str = TEXT, **changes: str) -> Study:
    """The study with whole lines replaced: key -> the line's new value."""
    lines = text.splitlines()
    for key, value in changes.items():
        kept = [line for line in lines if not line.startswith(f"{key}:")]
        lines = [*kept, f"{key}: {value}"]
    return parse_study("\n".join(lines), name="test.yaml", folder=Path()).study


def model(**changes: Any) -> ModelFacts:
    return replace(declared_model_facts("small", SHAPE), **{"provisional": False, **changes})


def trials(
    one: Study, *, facts: ModelFacts | None = None, data: DataFacts = DATA
) -> tuple[Trial, ...]:
    return plan_trials(
        one,
        models={name: facts or model() for name in one.model},
        data={(name, rows): data for name in one.model for rows in one.data.rows},
    )
