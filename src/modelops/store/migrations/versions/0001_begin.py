"""Create the tables of jobs, leases, events, segments and aggregates."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create everything."""
    time = sa.DateTime(timezone=True)
    op.create_table(
        "jobs",
        sa.Column("job", sa.String(64), primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("bundle", sa.Text, nullable=False),
        sa.Column("spec", sa.LargeBinary, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("run", sa.Integer, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("epoch", sa.Integer, nullable=False),
        sa.Column("n_events", sa.Integer, nullable=False),
        sa.Column("created_at", time, nullable=False),
        sa.Column("changed_at", time, nullable=False),
    )
    op.create_index("ix_jobs_state", "jobs", ["state"])
    op.create_table(
        "leases",
        sa.Column("job", sa.String(64), sa.ForeignKey("jobs.job"), primary_key=True),
        sa.Column("epoch", sa.Integer, primary_key=True),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("taken_at", time, nullable=False),
    )
    op.create_table(
        "events",
        sa.Column("job", sa.String(64), sa.ForeignKey("jobs.job"), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("at", time, nullable=False),
        sa.Column("who", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("data", sa.JSON, nullable=False),
    )
    for table, only_here in (
        ("segments", [sa.Column("execution", sa.Text)]),
        ("aggregates", [sa.Column("inputs", sa.JSON, nullable=False)]),
    ):
        op.create_table(
            table,
            sa.Column("job", sa.String(64), sa.ForeignKey("jobs.job"), primary_key=True),
            sa.Column("attempt", sa.String(64), primary_key=True),
            sa.Column("epoch", sa.Integer, nullable=False),
            sa.Column("name", sa.Text, nullable=False),
            sa.Column("digest", sa.String(64), nullable=False),
            sa.Column("n_bytes", sa.BigInteger, nullable=False),
            sa.Column("counts", sa.JSON, nullable=False),
            sa.Column("pack", sa.Text),
            sa.Column("pack_bytes", sa.BigInteger, nullable=False),
            sa.Column("committed_at", time, nullable=False),
            *only_here,
        )
        ranges = f"{table.removesuffix('s')}_ranges"
        op.create_table(
            ranges,
            sa.Column("job", sa.String(64), sa.ForeignKey("jobs.job"), primary_key=True),
            sa.Column("lo", sa.BigInteger, primary_key=True, autoincrement=False),
            sa.Column("hi", sa.BigInteger, nullable=False),
            sa.Column("attempt", sa.String(64), nullable=False),
            sa.ForeignKeyConstraint(["job", "attempt"], [f"{table}.job", f"{table}.attempt"]),
        )
