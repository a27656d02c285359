"""A pool whose database is away, newer, or needed by nobody."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import sqlite3
import sys
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
from tests.process.pools import DEADLINE_S, PoolHome, wait_for
from volumes import Volume, can_mount

from modelops.errors import ClusterError, StorageError
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


def test_a_server_that_starts_on_a_full_volume_answers_as_soon_as_there_is_space(tmp_path: Path) -> None:
    if not can_mount(tmp_path):
        pytest.skip("this process may not mount file systems")
    with Volume(tmp_path / "small", "64m") as volume:
        with contextlib.closing(PoolHome.at(volume.path)) as pool:
            address = pool.ensure()
            before = pool.wait_until_up()
            volume.fill()
            os.kill(before["server"], signal.SIGKILL)

            def answers() -> int:
                if pool.run.holder("server") in (None, before["server"]):
                    return 0
                with contextlib.suppress(OSError, http.client.HTTPException):
                    status, problem = asked(address, "/v1/server")
                    assert status == 200 or str(volume.path) in problem["detail"]
                    return status
                return 0

            wait_for(lambda: answers() > 0, "the next server answers, at the address of the one before")
            assert pool.run.read("server.json").get("pid") != pool.pid("server"), "it cannot say so in a file"
            volume.free()
            wait_for(lambda: answers() == 200, "it does all its work")
            assert pool.wait_until_up()["scheduler"] == before["scheduler"]
        volume.fill()
        with pytest.raises(
            StorageError, match=rf"No space left on device \(volume {volume.path}, 0.0 MiB free"
        ):
            pool.ensure()
        assert not pool.processes()
