"""What workers announce to whoever listens, by topic. Each message names its ``job``."""

from __future__ import annotations

from typing import Final

RECEIPTS_TOPIC: Final = "modelops-receipts"
"""Of attempts whose driver was replaced, and of parts of attempts that go on: ``held``, a `HeldAttempt`."""
BEGUN_TOPIC: Final = "modelops-begun"
"""An ``attempt`` that must be alone runs now, or one has run for a second."""
STORAGE_TOPIC: Final = "modelops-storage"
"""What storage says while an ``attempt`` waits for it: ``text``; empty: it does no more."""
PROGRESS_TOPIC: Final = "modelops-progress"
"""Reports: ``index``, ``fraction``, ``values``; about one a second of each attempt."""
CHECKPOINT_TOPIC: Final = "modelops-checkpoints"
"""Each replicate's first checkpoint in an attempt: ``index``."""
SLOW_TOPIC: Final = "modelops-slow"
"""A worker takes long to prepare the job's environment: ``text``."""
