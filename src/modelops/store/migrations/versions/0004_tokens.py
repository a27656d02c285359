"""Keep tokens of clients: names, scopes, ends, and digests of the secrets."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the table, and the rule that a name is that of one token at a time."""
    time = sa.DateTime(timezone=True)
    op.create_table(
        "tokens",
        sa.Column("token", sa.String(64), primary_key=True),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False, unique=True),
        sa.Column("scopes", sa.JSON, nullable=False),
        sa.Column("created_by", sa.Text, nullable=False),
        sa.Column("created_at", time, nullable=False),
        sa.Column("expires_at", time),
        sa.Column("revoked_at", time),
    )
    valid = sa.text("revoked_at IS NULL")
    op.create_index(
        "ix_tokens_name", "tokens", ["name"], unique=True, sqlite_where=valid, postgresql_where=valid
    )
