"""Rows from where they are: a hub data set, a local file, or the shipped task.

Values come back as the file has them: a CSV cell stays a text, "007" included. What fields mean is
not known here.
"""
# datasets and pyarrow are untyped or only partly typed.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

import csv
import gzip
import io
import json
import zlib
from pathlib import Path
from typing import Any, cast

from loratune.data.demo_task import DEFAULT_NUM_ROWS, DEFAULT_SEED, generate_rows
from loratune.errors import DataError, MissingDataError
from loratune.study.schema import LOCAL_SUFFIXES, Source

_COMPRESSED = ".gz"
# The csv module refuses cells above 128 KiB unless told otherwise; a response can be longer.
_LARGEST_CELL_CHARACTERS = 2**31 - 1


def read_rows(source: Source, *, folder: Path) -> list[dict[str, Any]]:
    """All rows of a source, in its order.

    Args:
        source: the study's `train:` or `validation.file:`.
        folder: what relative paths are relative to: the study file's folder.

    Raises:
        DataError: the source cannot be read, holds something that is no row, or is empty.
    """
    if source.demo is not None:
        return [dict(row) for row in generate_rows(DEFAULT_NUM_ROWS["train"], seed=DEFAULT_SEED)]
    if source.id is not None:
        rows = _read_hub(source)
    else:
        assert source.file is not None  # the schema: exactly one of id, file, demo
        rows = _read_file(folder / Path(source.file).expanduser())
    if not rows:
        raise DataError(f"{source_name(source)} holds no rows; give a data set with at least one")
    return rows


def source_name(source: Source) -> str:
    """The source as people write it: a path, demo:task, or a hub id with subset and split."""
    if source.demo is not None:
        return f"demo:{source.demo}"
    if source.file is not None:
        return source.file
    parts = [source.id or "", *([source.subset] if source.subset else []), source.split]
    return ":".join(parts)


def _read_hub(source: Source) -> list[dict[str, Any]]:
    # Imported here: it takes seconds, and studies on local files do without it.
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        loaded = datasets.load_dataset(source.id or "", source.subset, split=source.split)
        return cast("list[dict[str, Any]]", cast("Any", loaded).to_list())
    except (
        OSError,  # the hub's HTTP errors, missing files, no space
        ValueError,  # an unknown split or subset
        RuntimeError,  # a loading script, which datasets no longer runs
        DatasetsError,
    ) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"hub data set {source_name(source)!r} cannot be loaded: {reason[:300]}; check id, "
            f"subset, split and network, or give a local file ({', '.join(LOCAL_SUFFIXES)})"
        ) from error


def _read_file(path: Path) -> list[dict[str, Any]]:
    readers = {
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".csv": _read_csv,
        ".parquet": _read_parquet,
    }
    name = path.name.lower()
    ending = next((one for one in LOCAL_SUFFIXES if name.endswith(one)), None)
    if ending is None:
        raise DataError(f"data file {path} has an unknown ending; use {', '.join(LOCAL_SUFFIXES)}")
    reader = readers[ending.removesuffix(_COMPRESSED)]
    if not path.is_file():
        advice = f"give a {', '.join(LOCAL_SUFFIXES)} file"
        if path.exists():
            raise DataError(f"data file {path} is a folder; {advice}")
        raise MissingDataError(f"data file {path} does not exist; {advice}")
    try:
        return reader(path)
    except OSError as error:
        raise DataError(f"data file {path} cannot be read: {error.strerror or error}") from error


def _read_text(path: Path) -> str:
    content = path.read_bytes()
    if path.name.lower().endswith(_COMPRESSED):
        try:
            content = gzip.decompress(content)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(
                f"{path} is no whole gzip file ({error}); get it again, or give it uncompressed"
            ) from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: byte {content[error.start]:#04x} is no UTF-8; "
            "save the file as UTF-8"
        ) from error


def _row(value: Any, *, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        kind = "null" if value is None else type(value).__name__
        raise DataError(f"{where}: a row is an object such as {{...}}, this is {kind}")
    return cast("dict[str, Any]", value)


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    # Not splitlines: it also cuts at characters such as U+2028, which JSON texts may hold.
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{where}: no JSON ({error}); expected one object a line") from error
        rows.append(_row(value, where=where))
    return rows


def _read_json(path: Path) -> list[dict[str, Any]]:
    text = _read_text(path)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {error.lineno}: no JSON ({error.msg}); "
            "one object a line is a .jsonl file"
        ) from error
    except RecursionError as error:
        raise DataError(f"{path}: no JSON that can be read: it is nested too deeply") from error
    if isinstance(value, dict):
        named = cast("dict[str, Any]", value)
        lists = [key for key, held in named.items() if isinstance(held, list)]
        if len(lists) != 1:
            raise DataError(
                f"{path} holds one object with {len(lists)} lists; "
                "expected a list of objects, or an object with a single list"
            )
        value = named[lists[0]]
    if not isinstance(value, list):
        raise DataError(f"{path} holds a {type(value).__name__}; expected a list of objects")
    items = cast("list[Any]", value)
    return [_row(item, where=f"{path}, row {n}") for n, item in enumerate(items, start=1)]


def _read_csv(path: Path) -> list[dict[str, Any]]:
    csv.field_size_limit(_LARGEST_CELL_CHARACTERS)
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    rows: list[dict[str, Any]] = []
    try:
        header = next(reader, list[str]())
        repeated = {name for name in header if header.count(name) > 1}
        if repeated:
            raise DataError(f"{path}, line 1: column {repeated.pop()!r} stands twice")
        for cells in reader:
            if not cells:  # a blank line
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{path}, line {reader.line_num}: {len(cells)} cells under {len(header)} "
                    "columns; put texts that hold commas or line breaks in double quotes"
                )
            rows.append(dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: no CSV ({error})") from error
    return rows


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    # Imported here: only this format needs it.
    import pyarrow
    from pyarrow import parquet

    failure = cast("type[Exception]", cast("Any", pyarrow).ArrowException)
    try:
        return cast("list[dict[str, Any]]", cast("Any", parquet).read_table(path).to_pylist())
    except failure as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} is no Parquet file that can be read: {reason}") from error
