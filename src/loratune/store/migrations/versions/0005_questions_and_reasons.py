"""What was asked, and why an answer is not right."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Of older scores nobody knows the questions; they are read from the task's data again."""
    op.add_column("predictions", sa.Column("reason", sa.LargeBinary(), nullable=True))
    op.create_table(
        "question_sets",
        sa.Column("set_id", sa.Integer(), nullable=False),
        sa.Column("task", sa.Text(), nullable=False),
        sa.Column("task_version", sa.Text(), nullable=False),
        sa.Column("decoding", sa.Text(), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("set_id", name=op.f("pk_question_sets")),
        sa.UniqueConstraint(
            "task",
            "task_version",
            "decoding",
            name=op.f("uq_question_sets_task_task_version_decoding"),
        ),
    )
