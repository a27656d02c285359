"""Find the few events that tell of a disagreement without reading all: metrics count them at every scrape."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add an index of those events alone, so that writing others costs nothing more."""
    which = sa.text("kind = 'mismatch'")
    op.create_index("ix_events_mismatch", "events", ["kind"], sqlite_where=which, postgresql_where=which)
