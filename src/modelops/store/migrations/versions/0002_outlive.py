"""Let jobs outlive their drivers: leases that end, time used, cancels that wait, submissions that may be repeated."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add columns with the value that older rows mean, and one table."""
    time = sa.DateTime(timezone=True)
    op.add_column("jobs", sa.Column("study", sa.Text, nullable=False, server_default="study.json"))
    op.add_column("jobs", sa.Column("used_s", sa.Float, nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("cancel_by", sa.Text))
    op.add_column("jobs", sa.Column("stalled", sa.Text, nullable=False, server_default=""))
    op.add_column("leases", sa.Column("expires_at", time))
    op.add_column("leases", sa.Column("released_at", time))
    op.create_table(
        "submissions",
        sa.Column("key", sa.String(200), primary_key=True),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("job", sa.String(64), sa.ForeignKey("jobs.job"), nullable=False),
        sa.Column("created_at", time, nullable=False),
    )
