"""Open a connection: what a path or a URL means, the checks before, and errors as one line.

Knows SQLite's and PostgreSQL's peculiarities, so that `database.py` need not; knows no table.
"""

import os
import sqlite3
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.pool import ConnectionPoolEntry, QueuePool

from loratune.errors import StoreError

# How long a process waits for another one's transaction before it gives up.
LOCK_WAIT_SECONDS = 60.0
# Execution options of an engine whose transactions take SQLite's write lock at their beginning.
WRITES = {"loratune_writes": True}


@dataclass(frozen=True, slots=True)
class Location:
    """Where a database is. `name` stands in messages (no password); `file` is SQLite's alone."""

    url: URL
    name: str
    file: Path | None
    in_memory: bool

    @property
    def is_sqlite(self) -> bool:
        """Whether SQLite's rules apply."""
        return self.url.get_backend_name() == "sqlite"


def locate(url_or_path: str | Path) -> Location:
    """What a path or a URL names.

    Raises:
        StoreError: a URL that cannot be read, or of another database than SQLite and PostgreSQL.
    """
    if isinstance(url_or_path, Path) or ("://" not in url_or_path and url_or_path != ":memory:"):
        file = Path(url_or_path)
        url = URL.create("sqlite", database=str(file))
        return Location(url=url, name=str(file), file=file, in_memory=False)
    expected = "give a file's path, sqlite:///FILE or postgresql+psycopg://USER@HOST/NAME"
    try:
        url = make_url("sqlite://" if url_or_path == ":memory:" else url_or_path)
    except ArgumentError as error:
        raise StoreError(f"database {url_or_path!r} is no URL; {expected}") from error
    name = url.render_as_string(hide_password=True)
    backend = url.get_backend_name()
    if backend not in ("sqlite", "postgresql"):
        raise StoreError(f"database {name}: {backend} is not supported; {expected}")
    if backend == "postgresql":
        return Location(url=url, name=name, file=None, in_memory=False)
    in_memory = url.database in (None, "", ":memory:")
    # With uri=true, SQLite itself reads the name ("file:results.db?mode=ro").
    is_file = not in_memory and not url.query.get("uri")
    file = Path(url.database) if is_file and url.database else None
    return Location(url=url, name=name, file=file, in_memory=in_memory)


def check_file(location: Location, *, create: bool) -> None:
    """Refuse a database file that is not there or cannot be made, before SQLite touches anything.

    Raises:
        StoreError: no such file or folder, a folder in its place, or no permission.
    """
    file = location.file
    if file is None:
        return
    if file.is_dir():
        raise StoreError(f"{file} is a folder; give the database file in it, such as loratune.db")
    if not file.exists():
        if not create:
            raise StoreError(
                f"there is no database {file}; `loratune run STUDY.yaml --out DIR` makes one, "
                "or give the folder of an earlier run"
            )
        if not file.parent.is_dir():
            raise StoreError(f"there is no folder {file.parent} to make {file.name} in; make it")
    if create and not os.access(file.parent, os.W_OK):
        raise StoreError(f"the folder {file.parent} is not writable; give another one")
    if create and file.exists() and not os.access(file, os.W_OK):
        raise StoreError(f"the database {file} is not writable; change its permissions")


def make_engine(location: Location) -> Engine:
    """An engine; nothing is connected yet.

    Raises:
        StoreError: the database's driver is not installed.
    """
    options: dict[str, Any] = {}
    if location.is_sqlite:
        options["connect_args"] = {"timeout": LOCK_WAIT_SECONDS, "check_same_thread": False}
    if location.in_memory:
        # The database lives in its one connection; threads wait for their turn.
        options |= {"poolclass": QueuePool, "pool_size": 1, "max_overflow": 0}
    try:
        engine = create_engine(location.url, **options)
    except (ImportError, NoSuchModuleError) as error:
        raise StoreError(
            f"database {location.name}: its driver is not installed ({error}); "
            "for PostgreSQL install psycopg and give postgresql+psycopg://..."
        ) from error
    if location.is_sqlite:
        event.listen(engine, "connect", _set_up_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    return engine


def _set_up_sqlite(connection: sqlite3.Connection, record: ConnectionPoolEntry) -> None:
    del record
    # Python's driver would begin transactions late and commit before schema changes; the begin
    # below takes their place. (SQLAlchemy's documentation, "Serializable isolation / Savepoints".)
    connection.isolation_level = None
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA synchronous = EXTRA")


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("loratune_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


# What SQLite says, and what to do.
_ADVICE = {
    "not a database": "give a file that loratune made, or a path where nothing is yet",
    "malformed": "the file is damaged: put back a copy, with its -journal file if there is one",
    "readonly": "the file or its folder is not writable: change permissions, or copy it elsewhere",
    "locked": "another process has been writing to it for too long: end it, then try again",
    "unable to open": "make sure that the file's folder is there and can be written",
    "full": "make room on the disk, then run again: nothing that was finished is lost",
    "disk I/O": "check the disk, then run again: nothing that was finished is lost",
}


@contextmanager
def translated(place: str) -> Generator[None]:
    """The database's own errors as one line, without the statement and its values.

    Raises:
        StoreError: instead of any error of the database's driver.
    """
    try:
        yield
    except DBAPIError as error:
        told = " ".join(str(error.orig).split())
        advice = next(
            (line for key, line in _ADVICE.items() if key in told),
            "see the message of the database",
        )
        raise StoreError(f"database {place}: {told}; {advice}") from error
