"""What the shipped demo claims, shown with the project's own engine at full size."""

from pathlib import Path

import pytest

from loratune import api
from loratune.evaluation.score import score_task
from loratune.evaluation.tasks import ask, load_questions
from loratune.models.load import load_base
from loratune.study.loading import parse_study

STUDY = """\
study: demo-claim
model: demo:4m
precision: float32
data:
  train: demo:task
  prompt: "Question: {question}\\nAnswer:"
  response: answer
  template: plain
  max_tokens: 128
  rows: 2000
  validation: {rows: 128}
protocol: {kind: fixed_samples, epochs: 1}
methods: [lora]
rank: 8
alpha: 2*rank
targets: all-linear
batch_size: [4, 64]
learning_rate: [2.0e-3, 1.0e-2]
seeds: 1
schedule: {kind: cosine, warmup_ratio: 0.0}
evaluate: {tasks: [{name: demo, questions: 256}], when: selected}
"""


def test_the_demo_study_is_small_and_has_an_answer_to_give():
    study = api.demo_study().study
    assert study.model == ("demo:1m",)
    assert study.data.rows[0] is not None
    assert study.data.rows[0] <= 512
    assert [method.name for method in study.methods] == ["lora", "pissa", "milora"]
    # One seed gives no interval, and so no recommendation.
    assert len(study.seeds.grid) == 2
    planned = api.plan(api.demo_study())
    assert len(planned.trials) == 54
    assert planned.provisional is False


@pytest.mark.slow
def test_two_thousand_rows_teach_demo_4m_its_task_and_the_batch_size_matters(tmp_path):
    loaded = parse_study(STUDY, name="claim.yaml", folder=Path())
    study = loaded.study
    (task,) = study.evaluate.tasks
    base = load_base("demo:4m", precision="float32", device="cpu")
    asked = ask(
        task,
        load_questions(task, folder=Path()),
        data=study.data,
        tokenizer=base.tokenizer,
    )
    before, _ = score_task(base, None, asked)
    assert before.accuracy < 0.1

    api.run(loaded, out=tmp_path / "out", device="cpu", quiet=True)
    table = api.cells(tmp_path / "out").set_index("batch_size")
    assert table.loc[4, "demo_accuracy"] > 0.6
    assert table.loc[64, "demo_accuracy"] < 0.5
    assert table.loc[64, "score"] > 2 * table.loc[4, "score"]
    assert table.loc[4, "best_learning_rate"] < table.loc[64, "best_learning_rate"]
