"""Gradients of single rows, summed up: the probes of the noise scale."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Trials from before have none."""
    op.create_table(
        "noise_probes",
        sa.Column("trial_id", sa.String(128), nullable=False),
        sa.Column("split", sa.String(16), nullable=False),
        sa.Column("at_update", sa.BigInteger(), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["trial_id"], ["trials.trial_id"], name="fk_noise_probes_trial_id_trials"
        ),
        sa.PrimaryKeyConstraint("trial_id", "split", "at_update", name="pk_noise_probes"),
    )
