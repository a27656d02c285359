"""What is secret stays so: token, password of the database and keys of the storage are nowhere where others look."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.conftest import descendants
from tests.process.pools import PoolHome, wait_for
from tests.process.test_pool_doors import listening

import modelops as mo
from modelops.states import JobState

if TYPE_CHECKING:
    from collections.abc import Callable

    from services import Postgres

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
PASSWORD, KEY = "a-password-nobody-may-see", "a-key-nobody-may-see"

MODEL = """
import os, sys, time

def simulate(params, seed):
    print(dict(os.environ))
    if seed % 4 == 0:
        raise ValueError(str(dict(os.environ)))
    while not os.path.exists(params["go"]):
        time.sleep(0.02)
    return {"environ": repr(dict(os.environ)), "argv": repr(sys.orig_argv), "pid": os.getpid()}
"""


def test_no_secret_is_in_logs_stories_process_lists_results_or_the_environment_of_bundles(
    tmp_path: Path,
    shared_cache: Path,
    write_bundle: Callable[..., Path],
    postgres: Postgres,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = postgres.new_database().replace("postgres@", f"postgres:{PASSWORD}@")
    go = tmp_path / "go"
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "cache").symlink_to(shared_cache)
    with contextlib.ExitStack() as stack:
        pool = PoolHome.at(tmp_path / "home", MODELOPS_DATABASE=url, AWS_SECRET_ACCESS_KEY=KEY)
        stack.callback(pool.close)
        for name in ("MODELOPS_HOME", "MODELOPS_DATABASE"):
            monkeypatch.setenv(name, pool.environ[name])
        token = pool.ensure().token
        processes = pool.wait_until_up()
        secrets = [token, PASSWORD, KEY]
        study = mo.Study(
            bundle=write_bundle(MODEL),
            parameters=[{"go": str(go)}],
            seeds=[1, 2, 3, 4, 5, 6],
            fail_fast=False,
        )
        job = mo.submit(study)
        wait_for(lambda: job.status().counts.get("running", 0) > 0, "a replicate runs")

        runners = descendants(processes["worker-0"])
        assert runners
        lists = {pid: _read(pid, "cmdline") for pid in pool.processes() | runners}
        environs = {pid: _read(pid, "environ") for pid in runners if b"modelops_runner" in lists[pid]}
        assert environs
        assert not listening(runners), "runners and their reaper listen nowhere"
        postgres.stop()
        wait_for(lambda: str(postgres.port) in _logs(pool), "the log says that the database is away")
        postgres.start()
        go.touch()
        wait_for(lambda: job.status().final, "the job ends")
        assert job.status().state == JobState.PARTIAL

        seen = {
            "process lists": repr(lists),
            "environments": repr(environs),
            "logs": _logs(pool),
            "story": repr(job.events()),
            "results": repr(job.results().to_pylist()),
            "failures": repr(job.failures().to_pylist()),
            "output": repr([job.output(0, r) for r in (0, 1, 2, 4, 5)]),
            "what was printed": job.log(),
        }
        found = [(where, secret) for where, text in seen.items() for secret in secrets if secret in text]
        assert not found
        assert "PATH" in seen["output"]
        assert "PATH" in seen["what was printed"]


def _read(pid: int, what: str) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/{what}").read_bytes()
    return b""


def _logs(pool: PoolHome) -> str:
    return "".join(path.read_text(errors="replace") for path in pool.home.state.rglob("*.log*"))
