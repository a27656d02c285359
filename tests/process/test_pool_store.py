"""A pool whose database is away, newer, or needed by nobody."""

from __future__ import annotations

import contextlib
import http.client
import json
import sqlite3
import sys
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
from tests.process.pools import DEADLINE_S, PoolHome, wait_for

from modelops.errors import ClusterError
from modelops.store import Records

if TYPE_CHECKING:
    from pathlib import Path

    from modelops.cluster.run_folder import ServerAddress

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")


def asked(address: ServerAddress, path: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(urlsplit(address.url).netloc, timeout=DEADLINE_S)
    with contextlib.closing(connection):
        connection.request("GET", path, headers={"Authorization": f"Bearer {address.token}"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


def test_a_database_that_is_away_is_named_to_clients_until_it_is_back(tmp_path: Path) -> None:
    folder = tmp_path / "not a folder yet"
    folder.write_text("")
    url = f"sqlite:///{folder}/modelops.db"
    with contextlib.closing(PoolHome.at(tmp_path / "home", MODELOPS_DATABASE=url)) as pool:
        address = pool.ensure()
        status, problem = asked(address, "/v1/server")
        assert (status, problem["error"]) == (503, "StorageError")
        assert str(folder) in problem["detail"]
        folder.unlink()
        folder.mkdir()
        wait_for(lambda: asked(address, "/v1/jobs")[0] == 200, "requests are answered")


def test_a_newer_database_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with contextlib.closing(PoolHome.at(tmp_path / "home")) as pool:
        Records.open(pool.home.database_url).close()
        with contextlib.closing(sqlite3.connect(pool.home.data / "modelops.db")) as sql, sql:
            sql.execute("UPDATE alembic_version SET version_num = '9999'")
        with pytest.raises(
            ClusterError, match=r"does not start \(exit code 1\): .*newer ModelOps.*upgrade"
        ) as raised:
            pool.ensure()
        assert "\n" not in str(raised.value)  # a sentence, and no traceback
        wait_for(lambda: not pool.processes(), "nothing is left of what did not start")


def test_a_pool_that_nobody_needs_ends_by_itself_but_not_one_that_shall_stay(tmp_path: Path) -> None:
    with contextlib.closing(PoolHome.at(tmp_path / "home")) as pool:
        pool.ensure()
        wanted = pool.run.read("wanted.json")
        assert wanted["idle_s"] == 1800
        pool.run.write("wanted.json", {**wanted, "idle_s": 0.2})
        wait_for(lambda: not pool.processes(), "all have ended")
        assert "nobody has needed" in (pool.home.logs / "server.log").read_text()
        assert not pool.stop()
