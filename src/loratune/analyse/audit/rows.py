"""What an audit works on: one row for each training run, whatever file it came from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TaskScore:
    """An accuracy (a fraction) on one task, and of how many questions, where that is known."""

    task: str
    accuracy: float
    total: int | None


@dataclass(frozen=True, slots=True)
class AuditRow:
    """One training run. None is what the file does not say.

    `where` names the row for a reader (file and line, or trial). `method` is the method's name with
    its variants; `other` is text that differs where any other setting does. `scale` multiplies BA:
    alpha / r, or alpha / sqrt(r) for rslora. `batch_size` is sequences per update as it was stated;
    `num_samples` how many the run is said to have seen; `rows_per_microbatch`,
    `gradient_accumulation_steps` and `num_devices` are the parts that should make the batch.
    `failed` runs (also out of memory, or not finished) have no scores. A `diverged` one was tried,
    and so was a `stopped` one: given up early because it would not be among the best.
    `select_on` is validation_loss, validation_accuracy or test, where the file says what chose.
    `is_searched`: an adaptive search chose the LR, together with those of other batch sizes.
    """

    where: str
    method: str
    model: str | None = None
    other: str = ""
    rank: int | None = None
    alpha: float | None = None
    scale: float | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    seed: int | None = None
    num_updates: int | None = None
    num_samples: int | None = None
    num_train_rows: int | None = None
    epochs: float | None = None
    rows_per_microbatch: int | None = None
    gradient_accumulation_steps: int | None = None
    num_devices: int | None = None
    train_loss: float | None = None
    validation_loss: float | None = None
    validation_accuracy: float | None = None
    tests: tuple[TaskScore, ...] = ()
    select_on: str | None = None
    diverged: bool = False
    failed: bool = False
    stopped: bool = False
    is_searched: bool = False

    @property
    def configuration(self) -> tuple[object, ...]:
        """What was chosen for this run, the seed apart."""
        return (*self.cell, self.learning_rate)

    @property
    def cell(self) -> tuple[object, ...]:
        """All that runs share which differ in LR and seed alone."""
        return (self.method, self.model, self.other, self.rank, self.alpha, self.batch_size)

    @property
    def tried(self) -> bool:
        """Whether the run says something of its configuration: a score, or why it has none."""
        return self.ended or (not self.failed and (self.diverged or self.stopped))

    @property
    def ended(self) -> bool:
        """Whether the run was trained to its end and has a score."""
        lacking = self.failed or self.diverged or self.stopped
        return not lacking and any(math.isfinite(score) for score in self.scores)

    @property
    def scores(self) -> tuple[float, ...]:
        """Every number that the run ended with."""
        found = (self.train_loss, self.validation_loss, self.validation_accuracy)
        return (*(one for one in found if one is not None), *(one.accuracy for one in self.tests))


@dataclass(frozen=True, slots=True)
class AuditTable:
    """The rows of one source. `source` says what it was read as, `remarks` what was assumed."""

    source: str
    rows: tuple[AuditRow, ...]
    remarks: tuple[str, ...] = ()


def methods_of(rows: Sequence[AuditRow]) -> tuple[str, ...]:
    """The methods, in order of first appearance."""
    return tuple(dict.fromkeys(row.method for row in rows))


def effective_scale(method: str, rank: int | None, alpha: float | None) -> float | None:
    """alpha / r, or alpha / sqrt(r) where the method's name says rslora; None where unknown."""
    if rank is None or alpha is None or rank < 1:
        return None
    return alpha / math.sqrt(rank) if "rslora" in method.lower() else alpha / rank
