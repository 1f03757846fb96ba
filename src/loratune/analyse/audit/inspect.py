"""All detectors over one table."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loratune.analyse.audit.detectors import DETECTORS
from loratune.analyse.audit.findings import Finding, NotChecked
from loratune.analyse.audit.rows import AuditRow, AuditTable, methods_of
from loratune.errors import AnalysisError

MOST_METHODS = 500
# Rows without a score are named up to this many.
_NAMED = 8


@dataclass(frozen=True, slots=True)
class Audit:
    """What was read, what was found, and what could not be looked at.

    No finding is not a proof of fairness: `not_checked` says which checks the file has no data for.
    """

    source: str
    num_rows: int
    methods: tuple[str, ...]
    findings: tuple[Finding, ...]
    not_checked: tuple[NotChecked, ...]
    remarks: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The record as plain values."""
        return {
            "source": self.source,
            "num_rows": self.num_rows,
            "methods": list(self.methods),
            "findings": [one.to_json() for one in self.findings],
            "not_checked": [{"kind": o.kind, "reason": o.reason} for o in self.not_checked],
            "remarks": list(self.remarks),
        }


def audit_table(table: AuditTable) -> Audit:
    """Every finding about the rows of a table, in the order of the detectors.

    Raises:
        AnalysisError: no rows, none with a score or a reason to have none, or over 500 methods.
    """
    if not table.rows:
        raise AnalysisError(f"{table.source}: no runs; there is nothing to audit")
    if not any(row.tried for row in table.rows):
        raise AnalysisError(
            f"{table.source}: none of {len(table.rows)} runs has a score that could be audited; "
            "a CSV's column becomes one by --map COLUMN=validation_loss or COLUMN=gsm8k_accuracy"
        )
    methods = methods_of(table.rows)
    if len(methods) > MOST_METHODS:
        raise AnalysisError(
            f"{table.source}: {len(methods):,} methods in {len(table.rows):,} runs; at most "
            f"{MOST_METHODS} are compared: does the right column name the method?"
        )
    remarks = _without_score(table.rows)
    rows, repeated = _once_a_seed(table.rows)
    findings, not_checked = list[Finding](), list[NotChecked]()
    for detect in DETECTORS:
        answer = detect(rows)
        if isinstance(answer, NotChecked):
            not_checked.append(answer)
        else:
            findings += answer
    return Audit(
        source=table.source,
        num_rows=len(table.rows),
        methods=methods,
        findings=tuple(findings),
        not_checked=tuple(not_checked),
        remarks=(*table.remarks, *remarks, *repeated),
    )


def _without_score(rows: Sequence[AuditRow]) -> list[str]:
    """What no detector sees: rows that say nothing of their configuration, or a table of them."""
    remarks = list[str]()
    if not any(row.ended for row in rows):
        stopped = any(row.stopped for row in rows)
        remarks.append(
            f"every run {'diverged or was stopped' if stopped else 'diverged'}: there is no score "
            "that could be compared; run lower learning rates"
        )
    if empty := [row.where for row in rows if not row.tried]:
        count = "1 run is" if len(empty) == 1 else f"{len(empty)} runs are"
        more = f" and {len(empty) - _NAMED} more" if len(empty) > _NAMED else ""
        remarks.append(f"{count} left out for want of a score: {', '.join(empty[:_NAMED])}{more}")
    return remarks


def _once_a_seed(rows: Sequence[AuditRow]) -> tuple[tuple[AuditRow, ...], tuple[str, ...]]:
    """The first run of each configuration and seed; a repeated one is no further seed."""
    kept = dict[tuple[object, ...], AuditRow]()
    for number, row in enumerate(rows):
        # Of a run without its seed it cannot be told, nor of one that has no score.
        known = row.seed is not None and row.tried
        kept.setdefault((row.configuration, row.seed) if known else (number,), row)
    left_out = len(rows) - len(kept)
    remark = (
        f"{left_out} runs have the method, settings and seed of an earlier one and are left out: a "
        "repetition is no further seed"
    )
    return tuple(kept.values()), (remark,) if left_out else ()
