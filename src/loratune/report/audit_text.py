"""An audit in plain words, for the terminal."""

from loratune.analyse.audit.findings import Finding, Number
from loratune.analyse.audit.inspect import Audit

# More numbers than these are in the JSON alone.
_MOST_NUMBERS = 12
_MOST_NAMES = 8


def audit_text(audit: Audit) -> str:
    """How much was read, every finding with its numbers, and what could not be checked."""
    count = len(audit.findings)
    runs = "1 run" if audit.num_rows == 1 else f"{audit.num_rows} runs"
    methods = "1 method" if len(audit.methods) == 1 else f"{len(audit.methods)} methods"
    found = "no finding" if not count else "1 finding" if count == 1 else f"{count} findings"
    parts = [f"{audit.source}: {runs} of {methods}, {found}."]
    parts += [_finding_text(number, one) for number, one in enumerate(audit.findings, start=1)]
    notes = [f"Not checked: {one.kind} ({one.reason})." for one in audit.not_checked]
    notes += [f"{remark[0].upper()}{remark[1:]}." for remark in audit.remarks]
    if notes:
        parts.append("\n".join(notes))
    return "\n\n".join(parts)


def _finding_text(number: int, one: Finding) -> str:
    lines = [f"{number}. {one.what}."]
    lines.append(f"   where: {_names(one.methods)} ({_counted(one.num_rows)}: {_names(one.rows)})")
    shown = one.numbers[:_MOST_NUMBERS]
    lines += [f"   {name.replace('_', ' ')}: {_value(value)}" for name, value in shown]
    if len(one.numbers) > len(shown):
        lines.append(f"   and {len(one.numbers) - len(shown)} more, with --json")
    lines += [f"   why it matters: {one.why}", f"   to do: {one.run}"]
    return "\n".join(lines)


def _counted(count: int) -> str:
    return "1 run" if count == 1 else f"{count} runs"


def _names(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _value(value: Number) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
