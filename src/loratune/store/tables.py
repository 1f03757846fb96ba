"""The tables as SQLAlchemy Core sees them, and the column types that keep values exact.

What may be written into them, by whom and when, stands in `database.py`; how a database gets them
stands in `migrations/`. A test holds the two equal: a change here needs a numbered migration.

Only what SQLite and PostgreSQL both have is used (partial unique indexes included).
"""

import struct
from datetime import UTC, datetime

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.types import TypeDecorator

# Every numbered migration, oldest first. A database whose revision is not in this list was written
# by a newer version. Kept here, not asked of alembic, whose import takes longer than opening.
REVISIONS = ("0001", "0002", "0003", "0004", "0005", "0006")


class UtcDateTime(TypeDecorator[datetime]):
    """An instant, stored and returned in UTC. A datetime without a zone is refused."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """To UTC; SQLite keeps the digits and drops the zone."""
        if value is None:
            return None
        assert value.tzinfo is not None, "a datetime without a zone"
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Put the zone back that SQLite dropped."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class ExactFloat(TypeDecorator[float]):
    """A float as its shortest exact decimal text: `0.1`, `nan`, `inf`, `-inf`.

    Not a REAL, because SQLite turns NaN into NULL, and a loss that is not a number must not come
    back as a loss that was never measured.
    """

    impl = String(32)
    cache_ok = True

    def process_bind_param(self, value: float | None, dialect: Dialect) -> str | None:
        """`repr` of a float parses back to the same bits."""
        return None if value is None else repr(float(value))

    def process_result_value(self, value: str | None, dialect: Dialect) -> float | None:
        """The float that was bound."""
        return None if value is None else float(value)


class Float64Array(TypeDecorator[tuple[float, ...]]):
    """A tuple of floats as little-endian IEEE 754 doubles laid end to end."""

    impl = LargeBinary
    cache_ok = True

    def process_bind_param(self, value: tuple[float, ...] | None, dialect: Dialect) -> bytes | None:
        """8 bytes a number, on every machine in the same order."""
        return None if value is None else struct.pack(f"<{len(value)}d", *value)

    def process_result_value(
        self, value: bytes | None, dialect: Dialect
    ) -> tuple[float, ...] | None:
        """The numbers, bit for bit."""
        return None if value is None else struct.unpack(f"<{len(value) // 8}d", value)


class RawText(TypeDecorator[str]):
    """Text that a model or a traceback produced, whatever it holds, as UTF-8 bytes.

    PostgreSQL's text refuses NUL characters and SQLite's driver lone surrogates; a generation with
    one of them must not be lost, nor altered.
    """

    impl = LargeBinary
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> bytes | None:
        """Encode; lone surrogates pass."""
        return None if value is None else value.encode("utf-8", "surrogatepass")

    def process_result_value(self, value: bytes | None, dialect: Dialect) -> str | None:
        """Decode to the same characters."""
        return None if value is None else value.decode("utf-8", "surrogatepass")


metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# One row for each revision of a study; the newest revision of a name counts.
# `asks` is the JSON list of records.ScoreKey that the study asks for; null: whatever is newest.
studies = Table(
    "studies",
    metadata,
    Column("study_id", Integer, primary_key=True),
    Column("name", Text, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("text", Text, nullable=False),
    Column("select_on", String(32), nullable=False),
    Column("asks", Text, nullable=True),
    Column("created_at", UtcDateTime, nullable=False),
    UniqueConstraint("name", "revision"),
)

# `body` is the canonical JSON of records.Trial.
trials = Table(
    "trials",
    metadata,
    Column("trial_id", String(128), primary_key=True),
    Column("data_fingerprint", Text, nullable=False),
    Column("body", Text, nullable=False),
)

# `body` is null where the study writes the trial as `trials.body` does. It may differ in what does
# not enter the id, such as the path of a model folder. `purpose` is records.Purpose; the trials of
# the plan come first, those that their outcomes called for later.
study_trials = Table(
    "study_trials",
    metadata,
    Column("study_id", Integer, ForeignKey("studies.study_id"), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("trial_id", String(128), ForeignKey("trials.trial_id"), nullable=False),
    Column("body", Text),
    Column("purpose", String(16), nullable=False, server_default="search"),
    UniqueConstraint("study_id", "trial_id"),
)

# `number` counts a trial's attempts from 1; that it is unique decides between two claims that
# PostgreSQL runs at the same moment. The worker is the process that holds the claim.
attempts = Table(
    "attempts",
    metadata,
    Column("attempt_id", Integer, primary_key=True),
    Column("trial_id", String(128), ForeignKey("trials.trial_id"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("provenance", Text, nullable=False),
    Column("worker_host", Text, nullable=False),
    Column("worker_pid", Integer, nullable=False),
    Column("worker_started", ExactFloat, nullable=False),
    Column("started_at", UtcDateTime, nullable=False),
    Column("heartbeat_at", UtcDateTime, nullable=False),
    Column("ended_at", UtcDateTime),
    Column("end_kind", String(16)),
    UniqueConstraint("trial_id", "number"),
)
# At most one attempt of a trial is open.
Index(
    "ix_attempts_open",
    attempts.c.trial_id,
    unique=True,
    sqlite_where=text("ended_at IS NULL"),
    postgresql_where=text("ended_at IS NULL"),
)

# The long columns stand last: SQLite then reads the short ones without touching them.
outcomes = Table(
    "outcomes",
    metadata,
    Column("attempt_id", Integer, ForeignKey("attempts.attempt_id"), primary_key=True),
    Column("trial_id", String(128), ForeignKey("trials.trial_id"), nullable=False, index=True),
    Column("status", String(16), nullable=False),
    Column("num_updates", Integer, nullable=False),
    Column("train_loss", ExactFloat),
    Column("validation_loss", ExactFloat),
    Column("seconds", ExactFloat, nullable=False),
    Column("num_tokens", BigInteger, nullable=False),
    Column("peak_memory_bytes", BigInteger),
    Column("rows_per_microbatch", Integer),
    Column("stopped_at_update", Integer),
    Column("reason", RawText),
    Column("error", RawText),
    Column("losses", Float64Array, nullable=False),
    Column("grad_norms", Float64Array, nullable=False),
)
# Whatever else goes wrong, a trial never has two outcomes that stand (records.FINAL_STATUSES).
_FINAL = text("status IN ('done', 'diverged', 'stopped')")
Index(
    "ix_outcomes_final",
    outcomes.c.trial_id,
    unique=True,
    sqlite_where=_FINAL,
    postgresql_where=_FINAL,
)

scores = Table(
    "scores",
    metadata,
    Column("score_id", Integer, primary_key=True),
    Column("trial_id", String(128), ForeignKey("trials.trial_id"), nullable=False, index=True),
    Column("task", Text, nullable=False),
    Column("task_version", Text, nullable=False),
    Column("grader", Text, nullable=False),
    Column("decoding", Text, nullable=False),
    Column("split", String(16), nullable=False),
    Column("correct", Integer, nullable=False),
    Column("wrong", Integer, nullable=False),
    Column("truncated", Integer, nullable=False),
    Column("errors", Integer, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
)

predictions = Table(
    "predictions",
    metadata,
    Column("score_id", Integer, ForeignKey("scores.score_id"), primary_key=True),
    Column("question_index", Integer, primary_key=True),
    Column("num_tokens", Integer, nullable=False),
    Column("verdict", String(16), nullable=False),
    Column("text", RawText, nullable=False),
    Column("finished", Boolean, nullable=True),
    Column("reason", RawText, nullable=True),
)

# `body` is the JSON of records.QuestionSet. Written once; scores with equal columns are of it.
question_sets = Table(
    "question_sets",
    metadata,
    Column("set_id", Integer, primary_key=True),
    Column("task", Text, nullable=False),
    Column("task_version", Text, nullable=False),
    Column("decoding", Text, nullable=False),
    Column("body", Text, nullable=False),
    UniqueConstraint("task", "task_version", "decoding"),
)

# Answers of which there is no score yet.
answers = Table(
    "answers",
    metadata,
    Column("trial_id", String(128), ForeignKey("trials.trial_id"), primary_key=True),
    Column("set_id", Integer, ForeignKey("question_sets.set_id"), primary_key=True),
    Column("question_index", Integer, primary_key=True),
    Column("num_tokens", Integer, nullable=False),
    Column("finished", Boolean, nullable=False),
    Column("text", RawText, nullable=False),
)

artifacts = Table(
    "artifacts",
    metadata,
    Column("trial_id", String(128), ForeignKey("trials.trial_id"), primary_key=True),
    Column("kind", String(64), primary_key=True),
    Column("path", Text, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
)

# `body` is the canonical JSON of records.NoiseProbe. Who looks again writes over what was there.
noise_probes = Table(
    "noise_probes",
    metadata,
    Column("trial_id", String(128), ForeignKey("trials.trial_id"), primary_key=True),
    Column("split", String(16), primary_key=True),
    Column("at_update", BigInteger, primary_key=True, autoincrement=False),
    Column("body", Text, nullable=False),
)

# Append-only; the newest row of a fingerprint counts.
data_summaries = Table(
    "data_summaries",
    metadata,
    Column("summary_id", Integer, primary_key=True),
    Column("data_fingerprint", Text, nullable=False, index=True),
    Column("body", Text, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
)
