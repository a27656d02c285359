"""Keep in which pool of workers a segment was made, so that a job can say what was done where."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add a column; of older segments nobody knows."""
    op.add_column("segments", sa.Column("pool", sa.Text))
