"""Answers that are kept until there is a score of them."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """An older database has none: it kept answers with their score alone."""
    op.create_table(
        "answers",
        sa.Column("trial_id", sa.String(length=128), nullable=False),
        sa.Column("set_id", sa.Integer(), nullable=False),
        sa.Column("question_index", sa.Integer(), nullable=False),
        sa.Column("num_tokens", sa.Integer(), nullable=False),
        sa.Column("finished", sa.Boolean(), nullable=False),
        sa.Column("text", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["trial_id"], ["trials.trial_id"], name=op.f("fk_answers_trial_id")
        ),
        sa.ForeignKeyConstraint(
            ["set_id"], ["question_sets.set_id"], name=op.f("fk_answers_set_id")
        ),
        sa.PrimaryKeyConstraint("trial_id", "set_id", "question_index", name=op.f("pk_answers")),
    )
