"""Jobs on a pool: they go on while its server is dead, and after the pool was ended and started again."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.process.pools import PoolHome, wait_for

import modelops as mo
from modelops.client.prepare import prepare_job
from modelops.cluster.run_folder import SERVER
from modelops.states import JobState
from modelops.store import Objects, Records

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
COMMAND = Path(sys.executable).parent / "modelops"

MODEL = """
import os, time

def n_lines(log):
    return len(open(log).readlines()) if os.path.exists(log) else 0

def simulate(params, seed):
    try:
        os.close(os.open(params["log"] + ".first", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        pass
    else:
        raise ValueError("not yet")
    while n_lines(params["log"]) >= int(open(params["most"]).read()):
        time.sleep(0.01)
    with open(params["log"], "a") as file:
        file.write(f"{seed}\\n")
    time.sleep(0.4)
    return {"x": seed}
"""


def command(pool: PoolHome, *arguments: str, meanwhile: Callable[[], None] = lambda: None) -> tuple[int, str]:
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [COMMAND, *arguments], env=pool.environ, stdout=pipe, stderr=pipe, text=True
    ) as one:
        meanwhile()
        said, warned = one.communicate(timeout=120)
    assert warned == ""
    return one.returncode, said


def test_each_replicate_runs_once_though_the_server_is_killed_and_the_pool_ended(
    tmp_path: Path, shared_cache: Path, write_bundle: Callable[..., Path]
) -> None:
    log, most = tmp_path / "log", tmp_path / "most"

    def allow(n: int) -> None:
        """Let so many replicates begin; the next waits."""
        (tmp_path / "new").write_text(str(n))
        (tmp_path / "new").replace(most)

    allow(6)
    bundle = write_bundle(MODEL)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "cache").symlink_to(shared_cache)
    with contextlib.ExitStack() as stack:
        pool = PoolHome.at(tmp_path / "home")
        stack.callback(pool.close)
        records = stack.enter_context(contextlib.closing(Records.open(pool.home.database_url)))
        study = mo.Study(bundle=bundle, parameters=[{"log": str(log), "most": str(most)}], replicates=16,
                         seed=7, retry=mo.Retry(on="failed", initial_delay=0))  # fmt: skip
        job = prepare_job(study, pool.home, records, Objects.open(pool.home.storage)).job

        def n_done() -> int:
            return sum(records.counts(job).values())

        pool.ensure()
        wait_for(lambda: n_done() >= 3, "the job is under way")
        os.kill(pool.pid(SERVER), signal.SIGKILL)
        allow(12)
        wait_for(lambda: n_done() >= 9, "another server drives it")

        def let_one_end() -> None:
            told = pool.home.logs / "worker-0.log"
            wait_for(lambda: "told to end" in told.read_text(), "the worker is told to end")
            allow(16)

        code, said = command(pool, "down", "--json", meanwhile=let_one_end)
        answer = json.loads(said)
        assert (code, answer["ran"]) == (0, True)
        assert [(j["job"], j["state"]) for j in answer["unfinished"]] == [(job, "running")]
        assert not pool.processes()
        assert command(pool, "status")[0] == 5

        code, said = command(pool, "up", "--json")
        assert (code, json.loads(said)["answers"]) == (0, True)
        wait_for(lambda: records.job(job).state is JobState.SUCCEEDED, "the job has succeeded")
        code, said = command(pool, "status", "--json")
        assert (code, json.loads(said)["jobs"]) == (0, {"succeeded": 1})
        seeds = log.read_text().split()
        assert (len(seeds), len(set(seeds))) == (16, 16)
        lines = [
            json.loads(x) for file in pool.home.logs.glob("*.log*") for x in file.read_text().splitlines()
        ]
        mine = [line for line in lines if job in line["message"]]
        assert any(line["message"] == f"job {job} is succeeded" for line in mine)
        assert [line for line in mine if line.get("job") != job] == []
        (failed,) = [line for line in lines if "ValueError: not yet" in line["message"]]
        assert (failed["job"], failed["param"]) == (job, 0)
        assert failed["replicate"] in range(16)
        assert failed["attempt"].startswith("0001-")
        request = urllib.request.Request(f"{pool.ensure().url}/metrics")
        request.add_header("Authorization", f"Bearer {pool.run.token()}")
        with urllib.request.urlopen(request, timeout=60) as answered:
            metrics = answered.read().decode()
        (n_measured,) = re.findall(r"^modelops_replicate_seconds_count (\d+)$", metrics, re.MULTILINE)
        assert 1 <= int(n_measured) <= 13  # those that this server has committed; the ones before had some
