"""``mo.run`` where people write it: at the top level of a script, in a file or on stdin."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from modelops.home import Home

SCRIPT = """\
import modelops as mo

print("begun")
job = mo.run(mo.Study(bundle={bundle!r}, parameters=mo.grid(x=[1, 2]), replicates=2), workers=1)
print(job.status().counts)
"""


@pytest.mark.parametrize("by", ["file", "stdin"])
def test_a_script_that_runs_a_study_is_run_once(
    by: str, home: Home, tmp_path: Path, write_bundle: Callable[..., Path]
) -> None:
    bundle = write_bundle("def simulate(params, seed):\n    return {'y': params['x']}\n")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(bundle=str(bundle)))
    done = subprocess.run(
        [sys.executable, str(script) if by == "file" else "-"],
        input=script.read_text() if by == "stdin" else "",
        capture_output=True,
        text=True,
        timeout=280,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout) == (0, "begun\n{'succeeded': 4}\n"), done.stderr
