"""The first schema: studies, trials, attempts, outcomes, scores, artifacts, data summaries.

Spelled out, not taken from `store/tables.py`, which moves on while this file stays as it is.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make every table of the first version."""
    op.create_table(
        "data_summaries",
        sa.Column("summary_id", sa.Integer(), nullable=False),
        sa.Column("data_fingerprint", sa.Text(), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("summary_id", name=op.f("pk_data_summaries")),
    )
    op.create_index(
        op.f("ix_data_summaries_data_fingerprint"), "data_summaries", ["data_fingerprint"]
    )
    op.create_table(
        "studies",
        sa.Column("study_id", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("select_on", sa.String(length=32), nullable=False),
        sa.Column("asks", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("study_id", name=op.f("pk_studies")),
        sa.UniqueConstraint("name", "revision", name=op.f("uq_studies_name_revision")),
    )
    op.create_table(
        "trials",
        sa.Column("trial_id", sa.String(length=128), nullable=False),
        sa.Column("data_fingerprint", sa.Text(), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("trial_id", name=op.f("pk_trials")),
    )
    op.create_table(
        "artifacts",
        sa.Column("trial_id", sa.String(length=128), nullable=False),
        sa.Column("kind", sa.String(length=64), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["trial_id"], ["trials.trial_id"], name=op.f("fk_artifacts_trial_id")
        ),
        sa.PrimaryKeyConstraint("trial_id", "kind", name=op.f("pk_artifacts")),
    )
    op.create_table(
        "attempts",
        sa.Column("attempt_id", sa.Integer(), nullable=False),
        sa.Column("trial_id", sa.String(length=128), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("provenance", sa.Text(), nullable=False),
        sa.Column("worker_host", sa.Text(), nullable=False),
        sa.Column("worker_pid", sa.Integer(), nullable=False),
        sa.Column("worker_started", sa.String(length=32), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("heartbeat_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("end_kind", sa.String(length=16), nullable=True),
        sa.ForeignKeyConstraint(
            ["trial_id"], ["trials.trial_id"], name=op.f("fk_attempts_trial_id")
        ),
        sa.PrimaryKeyConstraint("attempt_id", name=op.f("pk_attempts")),
        sa.UniqueConstraint("trial_id", "number", name=op.f("uq_attempts_trial_id_number")),
    )
    op.create_index(
        "ix_attempts_open",
        "attempts",
        ["trial_id"],
        unique=True,
        sqlite_where=sa.text("ended_at IS NULL"),
        postgresql_where=sa.text("ended_at IS NULL"),
    )
    op.create_table(
        "scores",
        sa.Column("score_id", sa.Integer(), nullable=False),
        sa.Column("trial_id", sa.String(length=128), nullable=False),
        sa.Column("task", sa.Text(), nullable=False),
        sa.Column("task_version", sa.Text(), nullable=False),
        sa.Column("grader", sa.Text(), nullable=False),
        sa.Column("decoding", sa.Text(), nullable=False),
        sa.Column("split", sa.String(length=16), nullable=False),
        sa.Column("correct", sa.Integer(), nullable=False),
        sa.Column("wrong", sa.Integer(), nullable=False),
        sa.Column("truncated", sa.Integer(), nullable=False),
        sa.Column("errors", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["trial_id"], ["trials.trial_id"], name=op.f("fk_scores_trial_id")),
        sa.PrimaryKeyConstraint("score_id", name=op.f("pk_scores")),
    )
    op.create_index(op.f("ix_scores_trial_id"), "scores", ["trial_id"])
    op.create_table(
        "study_trials",
        sa.Column("study_id", sa.Integer(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("trial_id", sa.String(length=128), nullable=False),
        sa.Column("body", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(
            ["study_id"], ["studies.study_id"], name=op.f("fk_study_trials_study_id")
        ),
        sa.ForeignKeyConstraint(
            ["trial_id"], ["trials.trial_id"], name=op.f("fk_study_trials_trial_id")
        ),
        sa.PrimaryKeyConstraint("study_id", "position", name=op.f("pk_study_trials")),
        sa.UniqueConstraint("study_id", "trial_id", name=op.f("uq_study_trials_study_id_trial_id")),
    )
    op.create_table(
        "outcomes",
        sa.Column("attempt_id", sa.Integer(), nullable=False),
        sa.Column("trial_id", sa.String(length=128), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("num_updates", sa.Integer(), nullable=False),
        sa.Column("train_loss", sa.String(length=32), nullable=True),
        sa.Column("validation_loss", sa.String(length=32), nullable=True),
        sa.Column("seconds", sa.String(length=32), nullable=False),
        sa.Column("num_tokens", sa.BigInteger(), nullable=False),
        sa.Column("peak_memory_bytes", sa.BigInteger(), nullable=True),
        sa.Column("rows_per_microbatch", sa.Integer(), nullable=True),
        sa.Column("stopped_at_update", sa.Integer(), nullable=True),
        sa.Column("reason", sa.LargeBinary(), nullable=True),
        sa.Column("error", sa.LargeBinary(), nullable=True),
        sa.Column("losses", sa.LargeBinary(), nullable=False),
        sa.Column("grad_norms", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["attempt_id"], ["attempts.attempt_id"], name=op.f("fk_outcomes_attempt_id")
        ),
        sa.ForeignKeyConstraint(
            ["trial_id"], ["trials.trial_id"], name=op.f("fk_outcomes_trial_id")
        ),
        sa.PrimaryKeyConstraint("attempt_id", name=op.f("pk_outcomes")),
    )
    op.create_index(
        "ix_outcomes_final",
        "outcomes",
        ["trial_id"],
        unique=True,
        sqlite_where=sa.text("status IN ('done', 'diverged', 'stopped')"),
        postgresql_where=sa.text("status IN ('done', 'diverged', 'stopped')"),
    )
    op.create_index(op.f("ix_outcomes_trial_id"), "outcomes", ["trial_id"])
    op.create_table(
        "predictions",
        sa.Column("score_id", sa.Integer(), nullable=False),
        sa.Column("question_index", sa.Integer(), nullable=False),
        sa.Column("num_tokens", sa.Integer(), nullable=False),
        sa.Column("verdict", sa.String(length=16), nullable=False),
        sa.Column("text", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["score_id"], ["scores.score_id"], name=op.f("fk_predictions_score_id")
        ),
        sa.PrimaryKeyConstraint("score_id", "question_index", name=op.f("pk_predictions")),
    )
