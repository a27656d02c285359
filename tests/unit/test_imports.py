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


SUMMARIES = """
from modelops.store import columns, failures
schema = failures.FAILURES_SCHEMA.remove(failures.FAILURES_SCHEMA.get_field_index("attempts"))
row = dict.fromkeys(schema.names, "x") | {"param": 0, "replicate": 0, "seed": 3, "status": "failed"}
(found,) = failures.failure_summary(columns.table([row, row], schema), str).to_pylist()
assert found == {**row, "count": 2, "command": found["command"]}
"""


ASKING = "import modelops.cluster.status, modelops.client.http, modelops.client.server"


@pytest.mark.parametrize(
    "program",
    ["import modelops as mo", HELP, ASKING],
    ids=["import modelops", "modelops --help", "what asks for a status"],
)
def test_nothing_large_is_imported_before_it_is_needed(program: str) -> None:
    loaded = loaded_by(program)
    assert "modelops" in loaded
    assert not loaded & HEAVY


def test_summaries_of_failures_are_made_without_pandas() -> None:
    assert "pandas" not in loaded_by(SUMMARIES)


def loaded_by(program: str) -> set[str]:
    """Run a program of its own, and return the packages that it has imported."""
    said = subprocess.run(
        [sys.executable, "-c", f"{program}\nimport sys\nprint(*sys.modules, sep='\\n', file=sys.stderr)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return {name.partition(".")[0] for name in said.stderr.split()}
