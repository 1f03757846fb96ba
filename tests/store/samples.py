"""Records and clocks for the store's tests; imports nothing heavy, so that children start fast."""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from loratune.records import (
    DataSummary,
    FinishedStatus,
    MethodChoice,
    Outcome,
    Prediction,
    Provenance,
    Score,
    Trial,
)
from loratune.store.workers import Worker

START = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
PROVENANCE = Provenance(
    engine="reference",
    device="cpu",
    versions=(("torch", "2.13.0"), ("peft", "0.21")),
    commit=None,
    host="a",
    pid=7,
)
# A process on a machine that cannot be seen from here: only its heartbeat can show it dead.
ELSEWHERE = Worker(host="another machine", pid=1, started=0.0)


@dataclass
class Clock:
    """A clock that a test moves."""

    now: datetime = field(default=START)

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


def trial(
    number: int,
    *,
    provisional: bool = False,
    model: str = "demo:1m",
    data_fingerprint: str = "data-a",
) -> Trial:
    return Trial(
        trial_id=f"trial-{number}",
        provisional=provisional,
        model=model,
        model_fingerprint="model-f",
        precision="float32",
        data_fingerprint=data_fingerprint,
        rows=None,
        num_train_rows=100,
        method=MethodChoice("loraplus", (("ratio", 16.0), ("use", True), ("why", None))),
        rank=8,
        alpha=8.0,
        scale=1.0,
        targets=("q_proj", "v_proj"),
        dropout=0.0,
        batch_size=8,
        learning_rate=0.1 + 0.2,
        seed=number,
        protocol="fixed_samples",
        epochs=1.0,
        steps=None,
        num_updates=13,
        last_batch_size=4,
        num_samples=100,
        schedule="cosine",
        warmup_steps=0,
        optimizer="adamw",
        beta1=0.9,
        beta2=0.999,
        beta2_rule="fixed",
        eps=1e-8,
        weight_decay=0.0,
        max_grad_norm=None,
    )


def outcome(
    number: int, *, status: FinishedStatus = "done", validation_loss: float | None = 1.25
) -> Outcome:
    return Outcome(
        trial_id=f"trial-{number}",
        status=status,
        num_updates=13,
        train_loss=0.1,
        validation_loss=validation_loss,
        seconds=2.5,
        num_tokens=5_000_000_000,
        peak_memory_bytes=None,
        rows_per_microbatch=8,
        losses=(3.0, 2.0, 0.1),
        grad_norms=(1.0, 0.5, 0.25),
    )


def score(
    *,
    task: str = "gsm8k",
    grader: str = "strict",
    correct: int = 1,
    wrong: int = 1,
    truncated: int = 1,
    errors: int = 1,
) -> Score:
    return Score(
        task=task,
        task_version="1",
        grader=grader,
        decoding="greedy",
        split="test",
        correct=correct,
        wrong=wrong,
        truncated=truncated,
        errors=errors,
    )


PREDICTIONS = (
    Prediction(0, "The answer is: 4", 6, "correct"),
    Prediction(
        1,
        "\u6570\u5b66 \U0001f600 \x00 nul, \ud800 lone surrogate",
        9,
        "wrong",
        True,
        "NameError: \x00 \ud800",
    ),
    Prediction(2, "", 256, "truncated"),
    Prediction(5, "?", 1, "error"),
)

SUMMARY = DataSummary(
    source="gsm8k/train.jsonl",
    num_source_rows=110,
    num_dropped_too_long=2,
    num_truncated=0,
    num_validation_rows=8,
    num_validation_groups=8,
    num_left_over=0,
    num_train_rows=100,
    num_duplicate_rows=3,
    num_in_test=(("gsm8k", 1),),
    validation_sources=(0, 0, 1, 2, 3, 4, 5, 6),
)
