"""Decide what runs next. ``machine`` is pure; ``loop`` performs its commands on Dask and the store."""
