"""Bring a database to the schema of this version, or refuse it.

The schema's revision is one plain SELECT; alembic is imported only where something has to be done.
Each numbered migration runs in a transaction of its own, which looks at the revision again under
the write lock, so that two processes may open a new database at the same moment.
"""

from pathlib import Path

from sqlalchemy import Connection, Engine, inspect, text

from loratune.errors import StoreError
from loratune.store.tables import REVISIONS

MIGRATIONS = Path(__file__).parent / "migrations"


def read_revision(connection: Connection) -> str | None:
    """The revision of the schema; None for a database without any table.

    Raises:
        StoreError: the database belongs to something else.
    """
    names = set(inspect(connection).get_table_names())
    if not names:
        return None
    if "alembic_version" in names and names & {"studies", "trials"}:
        return connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one()
    raise StoreError(
        f"the database holds other tables ({', '.join(sorted(names)[:5])}); "
        "give a file that loratune made, or a path where nothing is yet"
    )


def check_known(revision: str) -> None:
    """Refuse a schema that this version does not know.

    Raises:
        StoreError: the revision is not among this version's.
    """
    if revision not in REVISIONS:
        raise StoreError(
            f"the database has schema {revision}, written by a newer version of loratune; this "
            f"version knows up to {REVISIONS[-1]}: install a newer one. Nothing was written"
        )


def check_writable(connection: Connection) -> None:
    """Fail now, not after hours, where the database is read-only: a write that changes no row."""
    connection.execute(text("UPDATE alembic_version SET version_num = version_num WHERE 1 = 0"))


def upgrade(engine: Engine) -> None:
    """Run the migrations that the database lacks; `engine` must begin with the write lock."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    # A percent sign begins an interpolation in the configuration's own language.
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    while True:
        with engine.begin() as connection:
            revision = read_revision(connection)
            if revision is not None:
                check_known(revision)
            if revision == REVISIONS[-1]:
                return
            config.attributes["connection"] = connection
            command.upgrade(config, "+1")
