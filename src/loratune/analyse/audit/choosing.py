"""What a file's own choice must have been: the score that chose, and each method's best runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from loratune.analyse.audit.rows import AuditRow


@dataclass(frozen=True, slots=True)
class Chooser:
    """The score by which the configurations of a file are ranked."""

    name: str
    higher_is_better: bool

    def score(self, row: AuditRow) -> float | None:
        """The row's number; None where it has none."""
        if self.name == "validation_loss":
            return row.validation_loss
        if self.name == "validation_accuracy":
            return row.validation_accuracy
        return row.tests[0].accuracy if row.tests else None

    def better(self, one: float, other: float) -> bool:
        """Whether `one` is strictly better."""
        return one > other if self.higher_is_better else one < other


def chooser_of(rows: Sequence[AuditRow]) -> Chooser | None:
    """What the file says chose; else held-out loss, held-out accuracy or the test, in that order.

    Whichever comes first that every run which ended well has; None where there is none.
    """
    good = [row for row in rows if row.ended]
    stated = {row.select_on for row in rows}
    candidates = [
        Chooser("validation_loss", higher_is_better=False),
        Chooser("validation_accuracy", higher_is_better=True),
        Chooser("test", higher_is_better=True),
    ]
    if len(stated) == 1:
        candidates.sort(key=lambda one: one.name not in stated)
    for one in candidates:
        if good and all(one.score(row) is not None for row in good):
            return one
    return None


@dataclass(frozen=True, slots=True)
class TriedConfiguration:
    """All runs that differ in the seed alone, and the mean of their score.

    None if one diverged or was stopped.
    """

    rows: tuple[AuditRow, ...]
    mean: float | None

    @property
    def learning_rate(self) -> float | None:
        """The LR of all of them."""
        return self.rows[0].learning_rate


def configurations_of(rows: Sequence[AuditRow], chooser: Chooser) -> tuple[TriedConfiguration, ...]:
    """The configurations that were tried, in order of first appearance."""
    grouped = dict[tuple[object, ...], list[AuditRow]]()
    for row in rows:
        if row.tried:
            grouped.setdefault(row.configuration, []).append(row)
    return tuple(
        TriedConfiguration(tuple(of_one), _mean(of_one, chooser)) for of_one in grouped.values()
    )


def best_of(
    configurations: Sequence[TriedConfiguration], chooser: Chooser
) -> TriedConfiguration | None:
    """The best in the mean over seeds; of equal ones the first."""
    best: TriedConfiguration | None = None
    for one in configurations:
        if one.mean is not None and (
            best is None or best.mean is None or chooser.better(one.mean, best.mean)
        ):
            best = one
    return best


def _mean(rows: Sequence[AuditRow], chooser: Chooser) -> float | None:
    scores = [chooser.score(row) for row in rows]
    finite = [one for one in scores if one is not None and math.isfinite(one)]
    return fmean(finite) if len(finite) == len(rows) and all(row.ended for row in rows) else None
