"""What an audit says: findings, and what the file did not allow to be looked at."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from loratune.analyse.audit.rows import AuditRow

Kind = Literal[
    "unequal_budgets",
    "learning_rate_edge",
    "one_learning_rate",
    "one_batch_size",
    "one_seed",
    "seeds_change_nothing",
    "unequal_scale",
    "selected_on_test",
    "below_detectable",
    "batch_size_mismatch",
]
Number = int | float | str | None
# Rows are named up to this many; `num_rows` counts all.
_NAMED = 20


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that makes a comparison less than fair, or less than sure.

    `what` is the finding in a sentence, `methods` and `rows` where (at most 20 rows are named,
    `num_rows` counts them), `numbers` what was measured, by name; `why` it matters, and what to
    `run` (or look up) to do away with it.
    """

    kind: Kind
    what: str
    methods: tuple[str, ...]
    rows: tuple[str, ...]
    num_rows: int
    numbers: tuple[tuple[str, Number], ...]
    why: str
    run: str

    def to_json(self) -> dict[str, Any]:
        """The record as plain values, `numbers` as an object."""
        return {
            "kind": self.kind,
            "what": self.what,
            "methods": list(self.methods),
            "rows": list(self.rows),
            "num_rows": self.num_rows,
            "numbers": dict(self.numbers),
            "why": self.why,
            "run": self.run,
        }


@dataclass(frozen=True, slots=True)
class NotChecked:
    """A check that the file has no data for: its silence says nothing."""

    kind: Kind
    reason: str


Answer = tuple[Finding, ...] | NotChecked


def finding(
    kind: Kind,
    what: str,
    rows: Sequence[AuditRow],
    numbers: dict[str, Number],
    *,
    why: str,
    run: str,
) -> Finding:
    """A finding about these rows and their methods."""
    return Finding(
        kind=kind,
        what=what,
        methods=tuple(dict.fromkeys(row.method for row in rows)),
        rows=tuple(row.where for row in rows[:_NAMED]),
        num_rows=len(rows),
        numbers=tuple(numbers.items()),
        why=why,
        run=run,
    )
