"""Alembic's scripts, one per change of the tables. Run by `modelops.store.database`, never by hand."""
