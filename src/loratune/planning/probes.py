"""Which rows a trial's noise probes look at, and when. Pure.

A probe of training rows costs nothing but arithmetic where a whole batch is looked at while it
trains. What needs a pass of its own (pooled rows, held-out rows) comes so seldom that it runs
through the model one row for every `every` rows that train, whatever the batch size.
"""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

from loratune.records import NoiseSchedule, Trial

# A batch of fewer rows says too little of its own variance: rows are pooled instead.
FEWEST_ROWS = 8


@dataclass(frozen=True, slots=True)
class Probing:
    """The probes of one trial: a period in updates each, None where there is no such probe.

    `batch_every`: the batch's own rows, while it trains. `pooled_every`: `pooled_rows` rows of the
    trial's own stream, from the batch's first one on, in a pass of their own. `held_out_every`:
    `held_out_rows` validation rows, in a pass of their own.
    """

    batch_every: int | None = None
    pooled_every: int | None = None
    pooled_rows: int = 0
    held_out_every: int | None = None
    held_out_rows: int = 0

    def of_batch(self, update: int, *, num_rows: int) -> bool:
        """Whether update `update`, of `num_rows` rows, is a probe; a short last batch is none."""
        return _is_due(update, self.batch_every) and num_rows >= FEWEST_ROWS

    def of_pooled(self, update: int) -> bool:
        """Whether rows are pooled before this update."""
        return _is_due(update, self.pooled_every)

    def of_held_out(self, update: int) -> bool:
        """Whether validation rows are looked at before this update."""
        return _is_due(update, self.held_out_every)


NO_PROBES = Probing()


def probing(trial: Trial, schedule: NoiseSchedule | None, *, num_validation_rows: int) -> Probing:
    """The probes of a trial; at update 0 and every period from there."""
    if schedule is None:
        return NO_PROBES
    batch = trial.batch_size
    pooled = min(schedule.rows, trial.num_train_rows)
    held_out = min(schedule.held_out_rows or 0, num_validation_rows)
    takes_batch = batch >= FEWEST_ROWS
    pools = not takes_batch and pooled >= 2
    return Probing(
        batch_every=schedule.every if takes_batch else None,
        pooled_every=schedule.every * math.ceil(pooled / batch) if pools else None,
        pooled_rows=pooled if pools else 0,
        held_out_every=schedule.every * math.ceil(held_out / batch) if held_out >= 2 else None,
        held_out_rows=held_out if held_out >= 2 else 0,
    )


@dataclass(frozen=True, slots=True)
class ProbeCounts:
    """How many probes a trial makes, and how many rows go through the model for them alone."""

    num_train: int
    num_held_out: int
    num_rows_in_batches: int
    num_rows_apart: int


def count_probes(trial: Trial, plan: Probing) -> ProbeCounts:
    """The probes of a whole trial."""
    updates = trial.num_updates
    of_batch = _times(updates, plan.batch_every)
    rows_in_batches = of_batch * trial.batch_size
    if of_batch and plan.batch_every is not None and (updates - 1) % plan.batch_every == 0:
        # The last batch may be short.
        rows_in_batches += trial.last_batch_size - trial.batch_size
        if trial.last_batch_size < FEWEST_ROWS:
            of_batch -= 1
            rows_in_batches -= trial.last_batch_size
    pooled, held_out = _times(updates, plan.pooled_every), _times(updates, plan.held_out_every)
    return ProbeCounts(
        num_train=of_batch + pooled,
        num_held_out=held_out,
        num_rows_in_batches=rows_in_batches,
        num_rows_apart=pooled * plan.pooled_rows + held_out * plan.held_out_rows,
    )


@dataclass(frozen=True, slots=True)
class ProbeTotals:
    """What the noise scale takes over several trials: rows that go through the model for it alone,
    and their tokens and FLOPs, which the trials' own do not hold."""

    num_train: int
    num_held_out: int
    num_rows_apart: int
    tokens: float
    flops: float


def probe_totals(
    trials: Sequence[Trial],
    schedule: NoiseSchedule,
    *,
    num_validation_rows: int,
    tokens_per_row: Sequence[float],
    flops_per_row: Sequence[float],
) -> ProbeTotals:
    """The probes of all trials; a row costs what a training row of its trial does."""
    counts = [
        count_probes(trial, probing(trial, schedule, num_validation_rows=num_validation_rows))
        for trial in trials
    ]
    rows = [one.num_rows_apart for one in counts]
    return ProbeTotals(
        num_train=sum(one.num_train for one in counts),
        num_held_out=sum(one.num_held_out for one in counts),
        num_rows_apart=sum(rows),
        tokens=math.fsum(map(operator.mul, rows, tokens_per_row)),
        flops=math.fsum(map(operator.mul, rows, flops_per_row)),
    )


def _is_due(update: int, every: int | None) -> bool:
    return every is not None and update % every == 0


def _times(num_updates: int, every: int | None) -> int:
    return 0 if every is None else math.ceil(num_updates / every)
