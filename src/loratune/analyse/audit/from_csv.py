"""A CSV as rows for the audit, by a map from its columns to ours.

Columns that bear our names are taken as they are, so that `loratune results DIR --format csv` needs
no map. Nothing is guessed from a column's content but the unit of an accuracy. Never executes or
unpickles anything.
"""

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from loratune.analyse.audit.rows import AuditRow, AuditTable, TaskScore, effective_scale
from loratune.errors import DataError

MOST_BYTES = 100 * 2**20
MOST_ROWS = 200_000

# Our fields and what they hold. `<task>_accuracy` and `<task>_total` come besides.
_TEXT = ("method", "model", "other", "select_on", "status", "purpose", "where")
_WHOLE = (
    "rank", "batch_size", "seed", "num_updates", "num_samples", "num_train_rows",
    "rows_per_microbatch", "gradient_accumulation_steps", "num_devices",
)  # fmt: skip
_NUMBERS = ("alpha", "learning_rate", "epochs", "train_loss", "validation_loss")
FIELDS = (*_TEXT, *_WHOLE, *_NUMBERS, "validation_accuracy")
_TASK_FIELD = re.compile(r"[A-Za-z][A-Za-z0-9-]*(?:_[A-Za-z0-9-]+)*_(accuracy|total)")
_SELECT_ON = ("validation_loss", "validation_accuracy", "test")
_PURPOSES = ("search", "adaptive", "confirm")
_FAILED = frozenset({"failed", "out_of_memory", "planned", "running"})
# May be infinite or NaN: a diverged run's.
_LOSSES = ("train_loss", "validation_loss")
# Below 1 these have no meaning.
_POSITIVE = frozenset(_WHOLE) - {"seed", "num_updates"}
# Bytes that no table holds: they would also reach the reader's terminal.
_CONTROL = bytes({*range(32), 127} - {9, 10, 13})
# Columns of our own tables that make two configurations differ, and are no field of a row.
_SETTINGS = (
    "study", "targets", "protocol", "schedule", "warmup_steps", "precision", "data_fingerprint",
    "num_train_rows", "epochs",
)  # fmt: skip


def parse_map(pairs: Sequence[str]) -> dict[str, str]:
    """{column: our field} from `column=ours` texts.

    Raises:
        DataError: no "=", an unknown field, or a column or field given twice.
    """
    found = dict[str, str]()
    for pair in pairs:
        column, equals, field = pair.rpartition("=")
        if not equals or not column or not field:
            raise DataError(f"--map {pair!r}: expected COLUMN=FIELD, as acc=gsm8k_accuracy")
        if field not in FIELDS and not _TASK_FIELD.fullmatch(field):
            raise DataError(
                f"--map {pair!r}: unknown field {field!r}; fields are {', '.join(FIELDS)}, "
                "<task>_accuracy and <task>_total"
            )
        if column in found or field in found.values():
            raise DataError(f"--map {pair!r}: {column!r} or {field!r} is mapped twice")
        found[column] = field
    return found


def read_csv(path: Path, *, columns: Mapping[str, str]) -> AuditTable:
    """The rows of a CSV with a header, without those that confirm a choice: they choose nothing.

    Args:
        path: a file of at most 100 MiB and 200,000 rows, UTF-8, comma-separated.
        columns: {its column: our field}, as from `parse_map`.

    Raises:
        DataError: the file is empty, too large, no text or no CSV, lacks a mapped column or the
            method, or holds something that is not a number where one is expected.
    """
    header, lines = _read(path)
    fields = _fields(path, header, columns)
    index = {field: position for position, field in fields.items()}
    tasks = sorted({f.rsplit("_", 1)[0] for f in index if _TASK_FIELD.fullmatch(f)})
    tasks = [task for task in tasks if f"{task}_accuracy" in index and task != "validation"]
    settings = [header.index(name) for name in _SETTINGS if name in header]
    remarks = list[str]()
    percents = {
        name for name in (*(f"{task}_accuracy" for task in tasks), "validation_accuracy")
        if name in index and _in_percent(path, name, lines, index[name])
    }  # fmt: skip
    remarks += [f"{name} is taken as percent: it exceeds 1" for name in sorted(percents)]
    purposes = [cells[index["purpose"]] if "purpose" in index else "" for _, cells in lines]
    if others := sorted({one for one in purposes if one and one not in _PURPOSES}):
        named = ", ".join(map(repr, others[:3])) + (" and others" if len(others) > 3 else "")
        remarks.append(
            f"purpose {named} is taken as absent: it is none of ours ({', '.join(_PURPOSES)})"
        )
    if left_out := purposes.count("confirm"):
        remarks.append(
            f"{left_out} of {len(lines)} rows are left out: by their purpose, confirm, they choose "
            "nothing"
        )
    rows = tuple(
        _row(path, number, cells, index, tasks, settings, percents)
        for (number, cells), purpose in zip(lines, purposes, strict=True)
        if purpose != "confirm"
    )
    return AuditTable(f"CSV {path.name}", rows, tuple(remarks))


Line = tuple[int, list[str]]


def _read(path: Path) -> tuple[list[str], list[Line]]:
    """The header, and every line that is not blank with its number in the file."""
    size = path.stat().st_size
    if size == 0:
        raise DataError(f"{path} is empty; expected a CSV with a header")
    if size > MOST_BYTES:
        raise DataError(
            f"{path} has {size / 2**20:,.0f} MiB; at most {MOST_BYTES // 2**20} MiB are read: keep "
            "one row for each training run"
        )
    content = path.read_bytes()
    if content[:1] == b"\x80" or len(content.translate(None, _CONTROL)) < len(content):
        raise DataError(
            f"{path} is no text (a pickle or another binary file); only CSV and JSON are read, "
            "export it as CSV"
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason}); save it as UTF-8") from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    lines = list[Line]()
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                lines.append((reader.line_num, [cell.strip() for cell in cells]))
            if len(lines) > MOST_ROWS + 1:
                raise DataError(f"{path} has more than {MOST_ROWS:,} rows; keep one for each run")
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: no CSV ({error})") from error
    if len(lines) < 2:
        raise DataError(f"{path} has no rows; expected a CSV with a header and rows below it")
    header = lines[0][1]
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(
            f"{path}: columns {', '.join(map(repr, twice))} are there twice; rename one"
        )
    for number, cells in lines[1:]:
        if len(cells) != len(header):
            raise DataError(
                f"{path}, line {number}: {len(cells)} values under {len(header)} columns; "
                "values are separated by commas, and quoted where they hold one"
            )
    return header, lines[1:]


def _fields(path: Path, header: Sequence[str], columns: Mapping[str, str]) -> dict[int, str]:
    """{position: our field}: what is mapped, and what bears our name and is not mapped over."""
    missing = [name for name in columns if name not in header]
    if missing:
        raise DataError(
            f"{path}: no column {', '.join(map(repr, missing))}; "
            f"it has {', '.join(map(repr, header))}"
        )
    taken = set(columns.values())
    found = dict[int, str]()
    for position, name in enumerate(header):
        if name in columns:
            found[position] = columns[name]
        elif (name in FIELDS or _TASK_FIELD.fullmatch(name)) and name not in taken:
            found[position] = name
    if "method" not in found.values():
        raise DataError(
            f"{path}: no column says which method a row is; name it with --map COLUMN=method "
            f"(the columns are {', '.join(map(repr, header))})"
        )
    return found


def _row(
    path: Path,
    number: int,
    cells: Sequence[str],
    index: Mapping[str, int],
    tasks: Sequence[str],
    settings: Sequence[int],
    percents: set[str],
) -> AuditRow:
    def text(field: str) -> str | None:
        return (cells[index[field]] or None) if field in index else None

    def number_of(field: str) -> float | None:
        value = text(field)
        if value is None:
            return None
        try:
            parsed = float(value)
        except ValueError:
            raise DataError(
                f"{path}, line {number}: {field} is {value!r}; expected a number"
            ) from None
        if not math.isfinite(parsed) and field not in _LOSSES:
            raise DataError(
                f"{path}, line {number}: {field} is {value!r}; expected a finite number"
            )
        if field in ("learning_rate", "alpha", "epochs") and parsed <= 0:
            raise DataError(f"{path}, line {number}: {field} is {value!r}; expected more than 0")
        return parsed

    def whole(field: str) -> int | None:
        parsed = number_of(field)
        if parsed is None:
            return None
        if parsed != int(parsed) or parsed < (1 if field in _POSITIVE else 0):
            raise DataError(
                f"{path}, line {number}: {field} is {text(field)!r}; expected a whole number"
                + (", 1 or more" if field in _POSITIVE else "")
            )
        return int(parsed)

    def accuracy(field: str) -> float | None:
        parsed = number_of(field)
        if parsed is None:
            return None
        scaled = parsed / 100 if field in percents else parsed
        if not 0 <= scaled <= 1:
            raise DataError(
                f"{path}, line {number}: {field} is {text(field)!r}; expected a fraction from 0 to "
                "1, or percents throughout"
            )
        return scaled

    def total(task: str) -> int | None:
        found = whole(f"{task}_total")
        if found == 0:
            raise DataError(f"{path}, line {number}: {task}_total is 0; expected 1 or more")
        return found

    method = text("method")
    if method is None:
        raise DataError(f"{path}, line {number}: no method; fill the cell or leave the row out")
    select_on = text("select_on")
    if select_on is not None and select_on not in _SELECT_ON:
        raise DataError(
            f"{path}, line {number}: select_on is {select_on!r}; expected {', '.join(_SELECT_ON)}"
        )
    scored = [(task, accuracy(f"{task}_accuracy"), total(task)) for task in tasks]
    loss, status = number_of("validation_loss"), text("status")
    rank, alpha = whole("rank"), number_of("alpha")
    return AuditRow(
        where=text("where") or f"line {number}",
        method=method,
        model=text("model"),
        other="|".join([text("other") or "", *(cells[position] for position in settings)]),
        rank=rank,
        alpha=alpha,
        scale=effective_scale(method, rank, alpha),
        batch_size=whole("batch_size"),
        learning_rate=number_of("learning_rate"),
        seed=whole("seed"),
        num_updates=whole("num_updates") if status in (None, "done", "success") else None,
        num_samples=whole("num_samples"),
        num_train_rows=whole("num_train_rows"),
        epochs=number_of("epochs"),
        rows_per_microbatch=whole("rows_per_microbatch"),
        gradient_accumulation_steps=whole("gradient_accumulation_steps"),
        num_devices=whole("num_devices"),
        train_loss=number_of("train_loss"),
        validation_loss=loss,
        validation_accuracy=accuracy("validation_accuracy"),
        tests=tuple(
            TaskScore(task, value, count) for task, value, count in scored if value is not None
        ),
        select_on=select_on,
        diverged=status == "diverged" or (loss is not None and not math.isfinite(loss)),
        failed=status in _FAILED,
        stopped=status == "stopped",
        is_searched=text("purpose") == "adaptive",
    )


def _in_percent(path: Path, name: str, lines: Sequence[Line], position: int) -> bool:
    """Whether a column of accuracies holds percents: most of its numbers exceed 1.

    Raises:
        DataError: some do and as many do not: a typing error in a fraction, or both units mixed.
    """
    fractions, percents = list[Line](), list[Line]()
    for line in lines:
        try:
            value = float(line[1][position])
        except ValueError:
            continue
        if value > 1:
            percents.append(line)
        elif value > 0:
            fractions.append(line)
    if percents and len(fractions) >= len(percents):
        (one, cells), (other, others) = percents[0], fractions[0]
        raise DataError(
            f"{path}: {name} is {cells[position]} in line {one} and {others[position]} in line "
            f"{other}; expected fractions from 0 to 1 throughout, or percents throughout"
        )
    return bool(percents)
