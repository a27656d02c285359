"""A server of this machine that lives and says nothing, as one that was stopped: who asks is not kept waiting."""

from __future__ import annotations

import json
import os
import socket
from typing import TYPE_CHECKING

import pytest
from stored_job import StoredJob
from typer.testing import CliRunner

import modelops as mo
from modelops.cli.app import app
from modelops.client import client, served, server
from modelops.cluster.run_folder import KEEPER, SERVER, RunFolder
from modelops.home import Home

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A job that is recorded as queued in the home of a server that is silent."""
    monkeypatch.setenv("MODELOPS_HOME", str(tmp_path))
    monkeypatch.delenv("MODELOPS_SERVER", raising=False)
    for module, name in (
        (served, "STATUS_READ_S"),
        (served, "STATUS_PATIENCE_S"),
        (client, "LIST_READ_S"),
        (client, "LIST_PATIENCE_S"),
    ):
        monkeypatch.setattr(module, name, 0.1)
    home = Home.from_environ(os.environ)
    home.data.mkdir(parents=True, exist_ok=True)
    stored = StoredJob(home.data, [{"a": 1.0}], 2)
    run = RunFolder(home)
    holds = [run.hold(KEEPER), run.hold(SERVER)]
    with socket.create_server(("127.0.0.1", 0)) as silent:
        run.write("server.json", {"url": f"http://127.0.0.1:{silent.getsockname()[1]}", "pid": os.getpid()})
        yield stored.job
    for hold in holds:
        assert hold is not None
        hold.release()
    stored.records.close()
    server._here.cache_clear()


def test_a_client_made_anew_says_unknown_since_when(job: str) -> None:
    status = mo.Client().job(job).status()
    assert status.state == "unknown"
    assert status.unknown_since is not None
    assert "cannot be reached" in status.reason


def test_the_list_of_jobs_is_what_was_recorded_last(job: str) -> None:
    done = CliRunner().invoke(app, ["jobs", "list", "--json"])
    assert done.exit_code == 5
    said = json.loads(done.stdout)
    assert [(row["job"], row["state"]) for row in said["jobs"]] == [(job, "unknown")]
    assert "recorded last" in said["unreachable"]
    shown = CliRunner().invoke(app, ["jobs", "show", job[-12:]])
    assert shown.exit_code == 5
    assert "last recorded: queued" in shown.stdout
    assert "cannot be reached" in shown.stdout
