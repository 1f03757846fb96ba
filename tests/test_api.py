"""The Python API over a results folder that was written without any training."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from loratune import api
from loratune.planning.alternatives import TRIALS_OF_TARGET
from loratune.planning.power import DifferenceNoise
from loratune.records import DataSummary, Prediction, Provenance, Score
from loratune.store.database import open_store
from loratune.study.loading import load_study, parse_study
from planned_studies import TEXT
from simulated import result

NUM_SEEDS, NUM_QUESTIONS = 4, 60
SUMMARY = DataSummary("rows.jsonl", 600, 0, 0, 60, 20, 28, 512, 0)


@pytest.fixture(scope="module")
def answers():
    """(method, seed) -> right answers; by threes the questions are one and the same."""
    draw = np.random.default_rng(5)
    hard = draw.random(NUM_QUESTIONS // 3)
    return {
        (method, seed): np.repeat(draw.random(len(hard)) < 0.2 + 0.5 * hard + gain, 3)
        for method, gain in (("lora", 0.0), ("pissa", 0.3))
        for seed in range(NUM_SEEDS)
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory, answers):
    """lora and pissa at two LRs and two batch sizes; at the better point they answered well."""
    root = tmp_path_factory.mktemp("results")
    text = TEXT.replace("methods: [lora]", "methods: [lora, pissa]")
    text += "select_on: validation_accuracy\n"
    (root / "study.yaml").write_text(text)
    trials = [
        (method, seed, rate, size)
        for method, seed in answers
        for rate, size in ((1e-3, 8), (1e-2, 8), (1e-3, 16))
    ]
    with open_store(root / "loratune.db", create=True) as store:
        made = {
            key: result(1.0, method=key[0], seed=key[1], learning_rate=key[2], batch_size=key[3])
            for key in trials
        }
        store.add_study(
            load_study(root / "study.yaml").study.study,
            text=text,
            select_on="validation_accuracy",
            trials=[one.trial for one in made.values()],
        )
        run = Provenance("reference", "cpu", (), None, "host", 1)
        for (method, seed, *point), one in made.items():
            attempt = store.claim(one.trial.trial_id, provenance=run)
            assert attempt is not None
            assert one.outcome is not None
            store.finish(attempt, one.outcome)
            right = answers[method, seed] if point == [1e-3, 8] else np.zeros(NUM_QUESTIONS, bool)
            score = Score(
                "validation", "1", "strict", "greedy", "validation",
                int(right.sum()), int((~right).sum()), 0, 0,
            )  # fmt: skip
            given = [
                Prediction(index, "", 1, "correct" if yes else "wrong")
                for index, yes in enumerate(right)
            ]
            store.add_score(one.trial.trial_id, score, given)
        fingerprint = next(iter(made.values())).trial.data_fingerprint
        sources = tuple(np.repeat(np.arange(NUM_QUESTIONS // 3), 3).tolist())
        store.add_data_summary(fingerprint, replace(SUMMARY, validation_sources=sources))
    return root


def test_compare_reads_the_answers_and_their_sources(folder, answers):
    (found,) = api.compare(folder)
    assert (found.metric, found.num_questions) == ("validation_accuracy", NUM_QUESTIONS)
    gaps = [
        answers["pissa", seed].mean() - answers["lora", seed].mean() for seed in range(NUM_SEEDS)
    ]
    assert found.difference == pytest.approx(np.mean(gaps))
    # Three questions of one source are one: the same as comparing every third.
    table = np.array(
        [
            answers["pissa", seed][::3].astype(float) - answers["lora", seed][::3]
            for seed in range(NUM_SEEDS)
        ]
    )
    question_part = table.mean(axis=0).var(ddof=1) / table.shape[1]
    seeds = table.shape[1] * table.mean(axis=1).var(ddof=1)
    residuals = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    residual = (residuals**2).sum() / (3 * 19)
    variance = max(question_part + (seeds - residual) / table.size, 0.05 * question_part)
    assert found.standard_error == pytest.approx(np.sqrt(variance))


def test_the_report_says_what_compare_says(folder):
    page = api.report(folder).page.read_text(encoding="utf-8")
    (found,) = api.compare(folder)
    assert f"pissa against lora, validation accuracy: {found.verdict}" in page
    assert "4 shared seeds and 60 questions (crossed model, Satterthwaite)" in page


def test_noise_is_measured_from_a_folder(folder):
    noise = api.noise_of(folder)["validation_accuracy"]
    assert isinstance(noise, DifferenceNoise)
    assert noise.residual_variance > 0.0
    assert noise.source == "measured on 1 pair of methods"


DECLARED = """
declared:
  models:
    Qwen/Qwen3-8B: {num_layers: 36, hidden_size: 4096, intermediate_size: 12288,
      num_attention_heads: 32, num_key_value_heads: 8, head_dim: 128, vocab_size: 151936,
      tied_embeddings: false}
  data: {rows: 64, mean_tokens: 10, mean_target_tokens: 5}
"""


def test_the_search_that_a_plan_offers_is_the_one_that_tune_takes_on_few_rows():
    text = TEXT.replace("model: small", "model: Qwen/Qwen3-8B")
    text = text.replace("batch_size: [8]", "batch_size: [1, 2, 4, 8]") + DECLARED
    planned, _ = api.plan_with_remarks(parse_study(text, name="study.yaml", folder=Path()))
    offered = planned.alternatives[-1]
    # Qwen3-0.6B in the place of 8B: 0.075 x 18 trials over 3 x 10 x 3 is 1.5% as with many rows,
    # which asks for the second of the searches. 56 rows train, and leave updates enough to batch
    # sizes 1, 2 and 4.
    assert offered.kind == "proxy"
    assert offered.num_trials == 3 * (2 + 2) + TRIALS_OF_TARGET
