"""A study that learns a few answers by heart, so that some of what it says is right."""

from pathlib import Path

BY_HEART = """\
study: by_heart
model: {model}
precision: float32
data:
  train: {rows}
  prompt: q
  response: a
  template: "Question: {{prompt}}\\nAnswer:"
  max_tokens: 64
  validation: {{rows: 1}}
protocol: {{kind: fixed_samples, epochs: 60}}
methods: [lora]
rank: 8
alpha: rank
targets: all-linear
batch_size: [2]
learning_rate: {rates}
seeds: {seeds}
schedule: {{kind: cosine}}
select_on: validation_loss
keep_adapters: all
{more}
"""


def study_by_heart(
    folder: Path, *, model: str | Path, rows: str | Path, rates: str, seeds: int, more: str = ""
) -> Path:
    """Its file in `folder`; `rows` have the fields q and a, `more` is a further section."""
    path = folder / "study.yaml"
    text = BY_HEART.format(model=model, rows=rows, rates=rates, seeds=seeds, more=more)
    path.write_text(text, encoding="utf-8")
    return path
