"""Our own trials as rows for the audit."""

import math
from collections.abc import Sequence

from loratune.analyse.audit.rows import AuditRow, AuditTable, TaskScore
from loratune.analyse.scores import VALIDATION, find_score, method_label
from loratune.records import TrialResult

# What makes two configurations differ and is no field of a row of its own.
_SETTINGS = (
    "targets", "dropout", "schedule", "warmup_steps", "num_train_rows", "protocol", "epochs",
    "steps", "precision", "beta2_rule", "data_fingerprint",
)  # fmt: skip


def table_of_results(results: Sequence[TrialResult]) -> AuditTable:
    """The trials of a results folder, without those that confirm a choice: they choose nothing.

    Planned and running trials are left out too, and counted in a remark.
    """
    waiting = sum(one.status in ("planned", "running") for one in results)
    rows = tuple(
        _row(one)
        for one in results
        if one.purpose != "confirm" and one.status not in ("planned", "running")
    )
    remarks = [f"{waiting} trials have not been trained yet and are left out"] if waiting else []
    return AuditTable("results folder", rows, tuple(remarks))


def _row(result: TrialResult) -> AuditRow:
    trial, outcome = result.trial, result.outcome
    done = result.status == "done" and outcome is not None
    held_out = find_score(result, VALIDATION) if done else None
    loss = outcome.validation_loss if done and outcome is not None else None
    return AuditRow(
        where=trial.trial_id,
        method=method_label(result),
        model=trial.model,
        other=repr((result.study, *(getattr(trial, name) for name in _SETTINGS))),
        rank=trial.rank,
        alpha=trial.alpha,
        scale=trial.scale,
        batch_size=trial.batch_size,
        learning_rate=trial.learning_rate,
        seed=trial.seed,
        num_updates=outcome.num_updates if done and outcome is not None else None,
        num_samples=trial.num_samples if done else None,
        num_train_rows=trial.num_train_rows,
        epochs=trial.epochs,
        train_loss=outcome.train_loss if done and outcome is not None else None,
        validation_loss=loss,
        validation_accuracy=None if held_out is None else held_out.accuracy,
        tests=tuple(
            TaskScore(score.task, score.accuracy, score.total)
            for score in (result.scores if done else ())
            if score.split == "test" and score.total > 0
        ),
        select_on=result.select_on,
        diverged=result.status == "diverged" or (loss is not None and not math.isfinite(loss)),
        is_searched=result.purpose == "adaptive",
        failed=result.status in ("failed", "out_of_memory"),
        stopped=result.status == "stopped",
    )
