"""How long a trial trains and which learning rate each of its updates has, as plain numbers.

Rows are one endless stream: permutation after permutation of the training rows. Update t takes the
next `batch_size` of them, across the border of two epochs too, so that every update but the last
holds exactly `batch_size` rows. (transformers' Trainer ends each epoch with a short batch instead;
for one epoch the two agree.)
"""

import math
from dataclasses import dataclass

from loratune.errors import StudyError
from loratune.study.schema import Protocol, Schedule


@dataclass(frozen=True, slots=True)
class Horizon:
    """Updates of one trial, the rows of the last one, and rows in all."""

    num_updates: int
    last_batch_size: int
    num_samples: int


def horizon(protocol: Protocol, *, num_train_rows: int, batch_size: int) -> Horizon:
    """The updates that a protocol asks for.

    Raises:
        StudyError: batch_size exceeds num_train_rows, or the epochs hold not even one row.
    """
    if batch_size > num_train_rows:
        raise StudyError(
            f"batch_size={batch_size} exceeds num_train_rows={num_train_rows}; "
            f"choose at most {num_train_rows}"
        )
    if protocol.steps is not None:
        return Horizon(
            num_updates=protocol.steps,
            last_batch_size=batch_size,
            num_samples=protocol.steps * batch_size,
        )
    assert protocol.epochs is not None
    num_samples = round(protocol.epochs * num_train_rows)
    if num_samples < 1:
        raise StudyError(
            f"epochs={protocol.epochs:g} of {num_train_rows} rows is less than one row; "
            "give more epochs"
        )
    num_updates = math.ceil(num_samples / batch_size)
    return Horizon(
        num_updates=num_updates,
        last_batch_size=num_samples - (num_updates - 1) * batch_size,
        num_samples=num_samples,
    )


def warmup_steps(schedule: Schedule, *, num_updates: int) -> int:
    """Warm-up as a number of updates; a ratio is rounded up, as transformers does.

    Raises:
        StudyError: the warm-up is as long as the training.
    """
    steps, given = schedule.warmup_steps, f"warmup_steps={schedule.warmup_steps}"
    if steps is None:
        # round() first: 0.07 * 100 is 7.000000000000001, which must not become 8.
        steps = math.ceil(round((schedule.warmup_ratio or 0.0) * num_updates, 9))
        given = f"warmup_ratio={schedule.warmup_ratio:g}" if steps else ""
    if steps >= num_updates:
        # Update 0 of a warm-up has LR 0: nothing would be learned, and it would count as done.
        raise StudyError(
            f"{given} leaves nothing of {num_updates} updates; "
            "choose less warm-up, smaller batches or more rows"
        )
    return steps


def lr_factor(kind: str, *, update: int, num_updates: int, warmup: int) -> float:
    """What multiplies the learning rate at update `update` (from 0) of `num_updates`.

    transformers' own formulas (`get_cosine_schedule_with_warmup` with half a cycle,
    `get_linear_schedule_with_warmup`, `get_constant_schedule_with_warmup`): with a warm-up the
    first update has factor 0, without one it has factor 1.
    """
    if update < warmup:
        return update / max(1, warmup)
    if kind == "constant":
        return 1.0
    if kind == "linear":
        return max(0.0, (num_updates - update) / max(1, num_updates - warmup))
    assert kind == "cosine", kind
    progress = (update - warmup) / max(1, num_updates - warmup)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * 2.0 * 0.5 * progress)))
