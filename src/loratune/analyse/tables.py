"""Trials as a tidy table, and tables as CSV, JSON and Parquet that keep every bit.

The column names are a promise to others. Null means absent and is never 0. A loss that is not a
number (a diverged trial) stays NaN in the table, in CSV (`nan`; null is the empty field) and in
Parquet; JSON has no NaN and gets null, beside a status that says why.
"""

# pandas and pyarrow come without complete types: what they return is unknown to pyright.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import pandas as pd

from loratune.analyse.scores import method_label, task_column
from loratune.records import Score, ScoreRecord, TrialResult

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Value = str | int | float | bool | None
TableFormat = Literal["csv", "json", "parquet"]

# Name and kind of the columns before and after the tasks' columns.
IDENTITY_COLUMNS = {
    "trial_id": "text",
    "study": "text",
    "status": "text",
    "method": "text",
    "model": "text",
    "rank": "int",
    "alpha": "float",
    "targets": "text",
    "batch_size": "int",
    "learning_rate": "float",
    "seed": "int",
    "protocol": "text",
    "epochs": "float",
    "num_train_rows": "int",
    "schedule": "text",
    "warmup_steps": "int",
    "beta2": "float",
    "precision": "text",
    "data_fingerprint": "text",
    "select_on": "text",
    "num_updates": "int",
    "train_loss": "float",
    "validation_loss": "float",
}
TASK_COLUMNS = {"accuracy": "float", "correct": "int", "total": "int"}
RUN_COLUMNS = {
    "seconds": "float",
    "tokens": "int",
    "peak_memory_bytes": "int",
    "engine": "text",
    "error": "text",
    "purpose": "text",
}


def results_table(
    results: Sequence[TrialResult], *, all_scores: Sequence[ScoreRecord] = ()
) -> pd.DataFrame:
    """One row per trial, in the order given.

    `num_updates` counts the updates made (null before the trial has an outcome); `error` is the
    traceback of a failed trial and the reason of a diverged or stopped one. `targets` are joined by
    "+". Each task of the study's choice has three columns, `<task>_accuracy`, `<task>_correct`,
    `<task>_total`; the score on held-out rows is the task `validation`. With `all_scores`, every
    other stored score follows under `<task>[<grader>,<version>,<decoding>,<split>]`, the newest
    where one was repeated.
    """
    columns = results_columns(results)
    rows = [trial_row(result) for result in results]
    extra = _other_scores(results, all_scores)
    if extra:
        names = [f"{name}_{part}" for name in extra for part in TASK_COLUMNS]
        kinds = [kind for _ in extra for kind in TASK_COLUMNS.values()]
        position = list(columns).index("seconds")
        items = list(columns.items())
        columns = dict([*items[:position], *zip(names, kinds, strict=True), *items[position:]])
        for row in rows:
            for name, by_trial in extra.items():
                row |= score_values(name, by_trial.get(str(row["trial_id"])))
    return make_frame(columns, rows)


def results_columns(results: Iterable[TrialResult]) -> dict[str, str]:
    """The columns of `results_table` in order, with their kinds."""
    tasks = dict.fromkeys(task_column(score) for one in results for score in one.scores)
    scores = {f"{task}_{part}": kind for task in tasks for part, kind in TASK_COLUMNS.items()}
    return {**IDENTITY_COLUMNS, **scores, **RUN_COLUMNS}


def trial_row(result: TrialResult) -> dict[str, Value]:
    """One trial's values by column name; columns of tasks that it has no score for are absent."""
    trial, outcome = result.trial, result.outcome
    row: dict[str, Value] = {
        "trial_id": trial.trial_id,
        "study": result.study,
        "status": result.status,
        "method": method_label(result),
        "model": trial.model,
        "rank": trial.rank,
        "alpha": trial.alpha,
        "targets": "+".join(trial.targets),
        "batch_size": trial.batch_size,
        "learning_rate": trial.learning_rate,
        "seed": trial.seed,
        "protocol": trial.protocol,
        "epochs": trial.epochs,
        "num_train_rows": trial.num_train_rows,
        "schedule": trial.schedule,
        "warmup_steps": trial.warmup_steps,
        "beta2": trial.beta2,
        "precision": trial.precision,
        "data_fingerprint": trial.data_fingerprint,
        "select_on": result.select_on,
        "engine": result.engine,
        "purpose": result.purpose,
    }
    if outcome is not None:
        row |= {
            "num_updates": outcome.num_updates,
            "train_loss": outcome.train_loss,
            "validation_loss": outcome.validation_loss,
            "seconds": outcome.seconds,
            "tokens": outcome.num_tokens,
            "peak_memory_bytes": outcome.peak_memory_bytes,
            "error": outcome.error or outcome.reason,
        }
    for score in result.scores:
        row |= score_values(task_column(score), score)
    return row


def score_values(task: str, score: Score | None) -> dict[str, Value]:
    """The three columns of one task; nothing where there is no score or no question was asked."""
    if score is None or score.total == 0:
        return {}
    return {
        f"{task}_accuracy": score.accuracy,
        f"{task}_correct": score.correct,
        f"{task}_total": score.total,
    }


def make_frame(columns: Mapping[str, str], rows: Sequence[Mapping[str, Value]]) -> pd.DataFrame:
    """A data frame with exactly these columns; what a row lacks is null, and NaN stays NaN."""
    return pd.DataFrame(
        {name: _array(kind, [row.get(name) for row in rows]) for name, kind in columns.items()},
        columns=list(columns),
    )


def table_bytes(frame: pd.DataFrame, *, format: TableFormat) -> bytes:
    """The table as a file's content. Floats are written so that reading gives the same bits.

    CSV: RFC 4180 with "\\n" line ends, nulls empty, NaN `nan`. JSON: a list of objects, one per
    row, nulls and all that is not finite as null. Parquet: nulls as nulls, NaN as NaN.
    """
    if format == "parquet":
        buffer = io.BytesIO()
        frame.to_parquet(buffer, index=False)
        return buffer.getvalue()
    names = [str(name) for name in frame.columns]
    columns = [[_plain(value) for value in frame[name].tolist()] for name in names]
    rows = zip(*columns, strict=True)
    if format == "csv":
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(names)
        writer.writerows(["" if value is None else _cell(value) for value in row] for row in rows)
        return text.getvalue().encode()
    finite = [
        dict(zip(names, [None if _not_finite(value) else value for value in row], strict=True))
        for row in rows
    ]
    return (json.dumps(finite, indent=1, allow_nan=False) + "\n").encode()


def as_document(record: "DataclassInstance") -> dict[str, Any]:
    """A record as the values that JSON has: its fields by name, tuples at any depth as lists."""
    return {name: _listed(value) for name, value in asdict(record).items()}


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _listed(one) for key, one in cast("dict[str, Any]", value).items()}
    if isinstance(value, tuple | list):
        return [_listed(one) for one in cast("Sequence[Any]", value)]
    return value


def _cell(value: Value) -> str:
    return repr(value) if isinstance(value, float) else str(value)


def _not_finite(value: Value) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _plain(value: object) -> Value:
    if value is None or value is pd.NA:
        return None
    assert isinstance(value, str | int | float | bool)
    return value


def _array(kind: str, values: Sequence[Value]) -> object:
    """A pandas array of one kind. Masks are given by hand: pandas would take NaN for null."""
    mask = np.array([value is None for value in values], dtype=bool)
    if kind == "float":
        numbers = np.array([0.0 if value is None else value for value in values], dtype=np.float64)
        return pd.arrays.FloatingArray(numbers, mask)
    if kind == "int":
        return pd.array(list(values), dtype="Int64")
    if kind == "bool":
        return pd.array(list(values), dtype="boolean")
    return pd.array(list(values), dtype="string")


def _other_scores(
    results: Sequence[TrialResult], all_scores: Sequence[ScoreRecord]
) -> dict[str, dict[str, Score]]:
    """Column name -> trial -> the newest score, for the scores that are not the study's choice."""
    chosen = {(one.trial.trial_id, _score_name(s)) for one in results for s in one.scores}
    other = dict[str, dict[str, Score]]()
    for record in sorted(all_scores, key=lambda record: record.score_id):
        name = _score_name(record.score)
        if (record.trial_id, name) not in chosen:
            other.setdefault(name, {})[record.trial_id] = record.score
    return dict(sorted(other.items()))


def _score_name(score: Score) -> str:
    parts = (score.grader, score.task_version, score.decoding, score.split)
    return f"{score.task}[{','.join(parts)}]"
