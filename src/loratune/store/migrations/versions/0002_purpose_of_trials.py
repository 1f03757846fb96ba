"""Why a study trains a trial: to search, or to confirm what was chosen with a fresh seed."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """All trials of older studies searched."""
    op.add_column(
        "study_trials",
        sa.Column("purpose", sa.String(length=16), nullable=False, server_default="search"),
    )
