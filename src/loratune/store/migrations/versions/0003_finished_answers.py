"""Whether an answer came to its end, so that it can be graded anew."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Of older answers nobody knows."""
    op.add_column("predictions", sa.Column("finished", sa.Boolean(), nullable=True))
