"""What is imported when: starting is quick because what is large is imported when it is needed."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {
    "dask",
    "distributed",
    "numpy",
    "pandas",
    "pyarrow",
    "sqlalchemy",
    "obstore",
    "uvicorn",
    "cryptography",
}
HELP = """
import sys
sys.argv = ["modelops", "--help"]
from modelops.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""


@pytest.mark.parametrize(
    "program", ["import modelops as mo", HELP], ids=["import modelops", "modelops --help"]
)
def test_nothing_large_is_imported_before_it_is_needed(program: str) -> None:
    said = subprocess.run(
        [sys.executable, "-c", f"{program}\nimport sys\nprint(*sys.modules, sep='\\n', file=sys.stderr)"],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {name.partition(".")[0] for name in said.stderr.split()}
    assert "modelops" in loaded
    assert not loaded & HEAVY
