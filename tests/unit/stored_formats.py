"""The job that tests/data/formats/v1 holds, and the script that made it."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelops.store import Objects, Records
from modelops.store.contents import JobContents

if TYPE_CHECKING:
    from types import ModuleType

DATA = Path(__file__).parents[1] / "data" / "formats"
V1 = DATA / "v1"


def script() -> ModuleType:
    """Import ``make_v1.py``: its constants and `content` say what is stored."""
    spec = importlib.util.spec_from_file_location("make_v1", DATA / "make_v1.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


made: Any = script()
FOLDER = f"v1/jobs/{made.JOB}"


def copy_of_v1(to: Path) -> Path:
    """Copy the stored home, because opening a database or unpacking writes beside it."""
    shutil.copytree(V1, to)
    return to


def contents_of(home: Path) -> JobContents:
    """Open the job in a home."""
    records = Records.open(f"sqlite:///{home / 'modelops.db'}")
    try:
        return JobContents.of(Objects.open(home / "objects"), records, made.JOB)
    finally:
        records.close()
