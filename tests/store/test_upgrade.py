"""Migrations, and what opening a database refuses."""

import os
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateIndex, CreateTable

from loratune.errors import StoreError
from loratune.records import FINAL_STATUSES
from loratune.store import tables
from loratune.store.database import open_store
from loratune.store.upgrade import MIGRATIONS
from store.samples import trial


def make(file: Path) -> None:
    with open_store(file, create=True) as store:
        store.add_study("study", text="", select_on="test", trials=[trial(1)])


def query(file: Path, statement: str) -> list[Any]:
    connection = sqlite3.connect(file)
    try:
        with connection:
            return connection.execute(statement).fetchall()
    finally:
        connection.close()


def schema(file: Path) -> dict[str, Any]:
    """Every table's columns, keys and indexes as SQLite understands them."""
    found: dict[str, Any] = {}
    for (name,) in query(file, "SELECT name FROM sqlite_master WHERE type = 'table'"):
        indexes = query(file, f"PRAGMA index_list({name})")
        found[name] = {
            "columns": query(file, f"PRAGMA table_info({name})"),
            "keys": query(file, f"PRAGMA foreign_key_list({name})"),
            "indexes": {
                index[1]: (index[2:], query(file, f"PRAGMA index_info({index[1]})"))
                for index in indexes
            },
        }
    found["index sql"] = query(
        file, "SELECT name, sql FROM sqlite_master WHERE type = 'index' ORDER BY name"
    )
    return found


def test_the_migrations_make_the_tables_that_the_code_uses(tmp_path: Path) -> None:
    migrated, created = tmp_path / "migrated.db", tmp_path / "created.db"
    with open_store(migrated, create=True):
        pass
    engine = create_engine(f"sqlite:///{created}")
    tables.metadata.create_all(engine)
    engine.dispose()
    found = schema(migrated)
    del found["alembic_version"]
    found["index sql"] = [row for row in found["index sql"] if "alembic" not in row[0]]
    assert found == schema(created)


def test_the_list_of_revisions_is_that_of_the_migrations() -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.set_main_option("path_separator", "os")
    scripts = ScriptDirectory.from_config(config)
    newest_first = [script.revision for script in scripts.walk_revisions()]
    assert list(tables.REVISIONS) == newest_first[::-1]


def test_the_index_of_final_outcomes_knows_the_final_statuses() -> None:
    (index,) = [one for one in tables.outcomes.indexes if one.name == "ix_outcomes_final"]
    where = str(index.dialect_options["postgresql"]["where"])
    assert where == "status IN (" + ", ".join(f"'{status}'" for status in FINAL_STATUSES) + ")"


def test_every_table_and_index_has_a_form_in_postgresql() -> None:
    dialect = postgresql.dialect()
    for table in tables.metadata.sorted_tables:
        assert "CREATE TABLE" in str(CreateTable(table).compile(dialect=dialect))
        for index in table.indexes:
            made = str(CreateIndex(index).compile(dialect=dialect))
            assert ("WHERE" in made) == bool(index.unique)


def test_opening_a_current_database_imports_neither_alembic_nor_torch(tmp_path: Path) -> None:
    file = tmp_path / "loratune.db"
    make(file)
    code = (
        "import sys; from loratune.store.database import open_store\n"
        f"store = open_store({str(file)!r}, create=False); store.results('study'); store.close()\n"
        "print([name for name in ('alembic', 'torch', 'pandas') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


def test_a_database_from_before_noise_probes_is_brought_up_to_date_and_keeps_its_rows(
    tmp_path: Path,
) -> None:
    file = tmp_path / "loratune.db"
    make(file)
    query(file, "DROP TABLE noise_probes")
    query(file, "DROP TABLE answers")
    query(file, "DROP TABLE question_sets")
    query(file, "ALTER TABLE predictions DROP COLUMN reason")
    query(file, "UPDATE alembic_version SET version_num = '0003'")
    with open_store(file, create=False) as store:
        assert store.trials("study") == (trial(1),)
        assert store.noise_probes("study") == ()
    fresh = tmp_path / "fresh.db"
    make(fresh)
    assert schema(file) == schema(fresh)


@pytest.mark.parametrize("revision", ["0000", "9999"])
@pytest.mark.parametrize("create", [True, False])
def test_a_schema_of_another_version_is_refused_and_nothing_is_written(
    tmp_path: Path, revision: str, create: bool
) -> None:
    file = tmp_path / "loratune.db"
    make(file)
    query(file, f"UPDATE alembic_version SET version_num = '{revision}'")
    before = file.read_bytes()
    with pytest.raises(StoreError, match=f"schema {revision}, written by a newer version"):
        open_store(file, create=create)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_a_missing_database_is_an_error_and_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"there is no database .*loratune.db; `loratune run"):
        open_store(tmp_path / "loratune.db", create=False)
    with pytest.raises(StoreError, match=r"there is no folder .*deeper to make loratune.db in"):
        open_store(tmp_path / "deeper" / "loratune.db", create=True)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_file_holds_no_results_but_can_become_a_database(tmp_path: Path) -> None:
    file = tmp_path / "loratune.db"
    file.touch()
    with pytest.raises(StoreError, match="holds no results"):
        open_store(file, create=False)
    assert file.stat().st_size == 0
    make(file)


@pytest.mark.parametrize("create", [True, False])
def test_a_file_that_is_no_database_is_refused_and_untouched(tmp_path: Path, create: bool) -> None:
    file = tmp_path / "loratune.db"
    file.write_text("trial,accuracy\n" * 200)
    with pytest.raises(StoreError, match=r"file is not a database; give a file that loratune made"):
        open_store(file, create=create)
    assert file.read_text() == "trial,accuracy\n" * 200


def test_a_database_of_another_program_is_refused_and_untouched(tmp_path: Path) -> None:
    file = tmp_path / "other.db"
    query(file, "CREATE TABLE recipes (name TEXT)")
    before = file.read_bytes()
    with pytest.raises(StoreError, match=r"holds other tables \(recipes\)"):
        open_store(file, create=True)
    assert file.read_bytes() == before


def test_a_folder_in_the_place_of_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is a folder; give the database file in it"):
        open_store(tmp_path, create=True)


def test_a_read_only_database_can_be_read_and_says_so_when_written(tmp_path: Path) -> None:
    file = tmp_path / "loratune.db"
    make(file)
    url = f"sqlite:///file:{file}?mode=ro&uri=true"
    with open_store(url, create=False) as store:
        assert store.trials("study") == (trial(1),)
        with pytest.raises(StoreError, match="readonly database; the file or its folder is not"):
            store.add_study("other", text="", select_on="test", trials=[])
    with pytest.raises(StoreError, match="readonly database"):
        open_store(url, create=True)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere"
)
def test_an_unwritable_folder_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with pytest.raises(StoreError, match="is not writable"):
            open_store(tmp_path / "loratune.db", create=True)
    finally:
        tmp_path.chmod(stat.S_IRWXU)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("mysql://root@localhost/x", "mysql is not supported"),
        ("postgresql+nosuch://u:secret@h/x", "driver is not installed"),
        ("://", "is no URL"),
    ],
)
def test_a_database_that_cannot_be_had_is_an_error_without_the_password(
    url: str, told: str
) -> None:
    with pytest.raises(StoreError, match=told) as caught:
        open_store(url, create=True)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_path_with_odd_characters_is_a_path(tmp_path: Path) -> None:
    folder = tmp_path / "50% of \u6570 #1? a:b"
    folder.mkdir()
    make(folder / "loratune.db")
    with open_store(folder / "loratune.db", create=False) as store:
        assert store.trials("study") == (trial(1),)


def test_a_copy_of_the_one_file_is_the_whole_database(tmp_path: Path) -> None:
    """While it is open elsewhere, too: nothing that was committed waits in a second file."""
    file, copy = tmp_path / "loratune.db", tmp_path / "copy.db"
    with open_store(file, create=True) as store:
        store.add_study("study", text="", select_on="test", trials=[trial(1)])
        copy.write_bytes(file.read_bytes())
        with open_store(copy, create=False) as copied:
            assert copied.studies() == store.studies()
            assert copied.trials("study") == (trial(1),)
