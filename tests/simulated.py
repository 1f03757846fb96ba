"""Trial results with known answers, for the tests of the answer wing. No training, no torch."""

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from loratune.planning.build import make_plan
from loratune.planning.cost import H100
from loratune.planning.shapes import declared_data_facts, declared_model_facts
from loratune.records import MethodChoice, Outcome, Score, Trial, TrialResult, Verdicts
from loratune.study.loading import parse_study
from loratune.study.methods import choose
from loratune.study.presets import preset_text


def score(
    task: str, correct: int, total: int, *, split: str = "test", grader: str = "strict"
) -> Score:
    return Score(task, "1", grader, "greedy", split, correct, total - correct, 0, 0)  # type: ignore[arg-type]


def verdicts(
    of: TrialResult, correct: Sequence[bool], task: str = "gsm8k", split: str = "test"
) -> Verdicts:
    """A trial's answers to questions 0, 1, ..."""
    given = tuple(map(bool, correct))
    return Verdicts(of.trial.trial_id, task, split, tuple(range(len(given))), given)  # type: ignore[arg-type]


def result(
    loss: float | None = 1.0,
    *,
    method: str | MethodChoice = "lora",
    batch_size: int = 8,
    learning_rate: float = 1e-3,
    seed: int = 0,
    status: str = "done",
    scores: Sequence[Score] = (),
    select_on: str = "validation_loss",
    study: str = "simulated",
    model: str = "demo:1m",
    rank: int = 8,
    num_train_rows: int = 512,
    schedule: str = "cosine",
    warmup_steps: int = 0,
    steps: int | None = None,
    seconds: float = 10.0,
    rows_per_microbatch: int | None = 16,
    reason: str | None = None,
    data_fingerprint: str | None = None,
    purpose: str = "search",
) -> TrialResult:
    """One trial; fixed_samples over one epoch unless `steps` is given."""
    choice = method if isinstance(method, MethodChoice) else choose(method, {})
    num_updates = steps or math.ceil(num_train_rows / batch_size)
    num_samples = steps * batch_size if steps else num_train_rows
    identity = repr(
        (model, choice, rank, num_train_rows, schedule, warmup_steps, steps, batch_size)
    )
    trial = Trial(
        trial_id="trial-"
        + hashlib.sha256(f"{identity}{learning_rate}{seed}{data_fingerprint}".encode()).hexdigest()[
            :12
        ],
        provisional=False,
        model=model,
        model_fingerprint=f"model-{model}",
        precision="float32",
        data_fingerprint=data_fingerprint or f"data-{model}-{num_train_rows}",
        rows=num_train_rows,
        num_train_rows=num_train_rows,
        method=choice,
        rank=rank,
        alpha=float(rank),
        scale=1.0,
        targets=("q_proj", "v_proj"),
        dropout=0.0,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        protocol="fixed_steps" if steps else "fixed_samples",
        epochs=None if steps else 1.0,
        steps=steps,
        num_updates=num_updates,
        last_batch_size=num_samples - (num_updates - 1) * batch_size,
        num_samples=num_samples,
        schedule=schedule,  # type: ignore[arg-type]
        warmup_steps=warmup_steps,
        optimizer="adamw",
        beta1=0.9,
        beta2=0.999,
        beta2_rule="fixed",
        eps=1e-8,
        weight_decay=0.0,
        max_grad_norm=None,
    )
    outcome = None
    if status not in ("planned", "running"):
        done = status == "done"
        outcome = Outcome(
            trial_id=trial.trial_id,
            status=status,  # type: ignore[arg-type]
            num_updates=num_updates if done else 1,
            train_loss=loss,
            validation_loss=loss if done else None,
            seconds=seconds,
            num_tokens=num_samples * 10,
            peak_memory_bytes=1 << 20,
            rows_per_microbatch=rows_per_microbatch,
            stopped_at_update=None if done else 1,
            reason=reason,
        )
    return TrialResult(
        study=study,
        select_on=select_on,  # type: ignore[arg-type]
        trial=trial,
        status=status,  # type: ignore[arg-type]
        outcome=outcome,
        scores=tuple(scores),
        engine=None if outcome is None else "reference",
        purpose=purpose,  # type: ignore[arg-type]
    )


def sweep(
    loss: Callable[[int, float, int], float],
    *,
    batch_sizes: Sequence[int] = (4, 16, 64),
    learning_rates: Sequence[float] = (1e-4, 1e-3, 1e-2),
    seeds: int = 3,
    **fields: object,
) -> list[TrialResult]:
    """A full grid: `loss(batch_size, learning_rate, seed)`; a NaN loss is a diverged trial."""
    results = list[TrialResult]()
    for size in batch_sizes:
        for rate in learning_rates:
            for seed in range(seeds):
                value = loss(size, rate, seed)
                status = "diverged" if math.isnan(value) else "done"
                results.append(
                    result(
                        value,
                        batch_size=size,
                        learning_rate=rate,
                        seed=seed,
                        status=status,
                        reason="loss is nan" if status == "diverged" else None,
                        **fields,  # type: ignore[arg-type]
                    )
                )
    return results


def faked_results(preset: str) -> list[TrialResult]:
    """Every trial of a preset at paper scale, done, with a loss that grows with its rank."""
    study = parse_study(preset_text(preset, scale="paper"), name=preset, folder=Path()).study
    models = {name: declared_model_facts(name, study.declared.models[name]) for name in study.model}
    assert study.declared.data is not None
    data = {
        (name, rows): declared_data_facts(study.data, study.declared.data, rows=rows)
        for name in study.model
        for rows in study.data.rows
    }
    plan = make_plan(study, models=models, data=data, rate=H100)
    return [
        TrialResult(
            study=study.study,
            select_on=study.select_on,
            trial=trial,
            status="done",
            outcome=Outcome(
                trial_id=trial.trial_id,
                status="done",
                num_updates=trial.num_updates,
                train_loss=1.0,
                validation_loss=1.0 + trial.rank / 100 + trial.seed / 1000,
                seconds=1.0,
                num_tokens=1,
                peak_memory_bytes=None,
                rows_per_microbatch=1,
            ),
            scores=(),
            engine="reference",
        )
        for trial in plan.trials
    ]
