"""The client's transport against a server that misbehaves as told: drops, stalls, cuts, refuses."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest

from modelops.cli.exits import exit_of_error
from modelops.client.http import Address, Http, checked_url
from modelops.client.served import HttpSource
from modelops.client.server import remote
from modelops.client.status import JobFile
from modelops.client.sync import sync_files
from modelops.errors import (
    ClusterError,
    InternalError,
    NotFoundError,
    QueueFullError,
    RequestError,
    ServerUnreachableError,
    StorageError,
)
from modelops.home import Home
from modelops.server.http.problems import problem_response
from modelops.states import JobState
from modelops.study.ids import JobId
from modelops_runner.values import encode

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

JOB = JobId("job_" + "0" * 32)
CUT, DROP = "cut", "drop"


class Scripted(ThreadingHTTPServer):
    """Does to each request what the script says, in order, then answers with ``last``."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script: list[Any] = []
        self.last: Any = {"ok": True}
        self.heard: list[tuple[str, str, dict[str, str], bytes]] = []

    @property
    def address(self) -> Address:
        return Address(f"http://127.0.0.1:{self.server_port}", "secret", "the test's server", "start it")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Scripted

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.heard.append((self.command, self.path, dict(self.headers), body))
        what = self.server.script.pop(0) if self.server.script else self.server.last
        if what == DROP:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        cut = isinstance(what, tuple) and what[0] == CUT
        status, answer = (200, what[1]) if cut else what if isinstance(what, tuple) else (200, what)
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        asked = self.headers.get("Range")
        if asked and status == 200:
            status, data = 206, data[int(asked.removeprefix("bytes=").rstrip("-")) :]
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.close_connection = True

    do_GET = do_POST = do_PUT = do_HEAD = _answer  # noqa: N815  names that http.server looks for

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Scripted]:
    with Scripted() as started:
        thread = threading.Thread(target=started.serve_forever, args=(0.01,))
        thread.start()
        yield started
        started.shutdown()
        thread.join()


@pytest.fixture
def http(server: Scripted) -> Iterator[Http]:
    http = Http(lambda: server.address, patience_s=20.0)
    yield http
    http.close()


@pytest.fixture
def source(http: Http, tmp_path: Path) -> HttpSource:
    return HttpSource(http, Home.at(tmp_path))


@pytest.mark.parametrize(
    "trouble", [DROP, (CUT, {"some": "thing"}), (503, {"detail": "the database is away"})]
)
def test_what_may_be_repeated_is_repeated_until_it_is_answered(
    server: Scripted, http: Http, trouble: object
) -> None:
    server.script = [trouble, trouble]
    assert http.get("/server").as_type(dict) == {"ok": True}
    assert [path for _, path, _, _ in server.heard] == ["/v1/server"] * 3


def test_a_submission_is_repeated_with_the_key_and_the_body_it_had(server: Scripted, http: Http) -> None:
    server.script = [DROP]
    http.request("POST", "/jobs", body=b'{"a": 1}', headers={"Idempotency-Key": "k"})
    assert [(h["Idempotency-Key"], b) for _, _, h, b in server.heard] == [("k", b'{"a": 1}')] * 2


def test_an_upload_begins_again_at_its_first_byte(server: Scripted, http: Http, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 3_000_000)
    server.script = [DROP]
    with path.open("rb") as file:
        file.seek(100)
        http.request("PUT", "/bundles/d", body=file)
    assert [len(body) for *_, body in server.heard] == [3_000_000] * 2


def test_what_may_not_be_repeated_is_not(server: Scripted, http: Http) -> None:
    server.script = [DROP]
    with pytest.raises(ServerUnreachableError, match="the test's server cannot be reached"):
        http.request("POST", f"/jobs/{JOB}/resume", body=b"{}")
    assert len(server.heard) == 1


def test_a_connection_that_was_refused_did_nothing_and_is_made_again() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and nobody listens
        nobody = Address(f"http://127.0.0.1:{taken.getsockname()[1]}", "t", "the server", "start it")
        tries = []

        def find() -> Address:
            tries.append(nobody)
            return nobody

        with pytest.raises(ServerUnreachableError, match="Connection refused; start it"):
            Http(find, patience_s=0.5).request("POST", "/jobs", body=b"{}")
        assert len(tries) > 1


def test_a_server_never_met_is_given_up_sooner_and_a_long_wait_is_said(
    server: Scripted, monkeypatch: pytest.MonkeyPatch, warned: list[str]
) -> None:
    for name, seconds in (("NEVER_MET_S", 0.4), ("LONG_WAIT_S", 0.4), ("SAY_AFTER_S", 0.1)):
        monkeypatch.setattr(f"modelops.client.http.{name}", seconds)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        nobody = Address(f"http://127.0.0.1:{taken.getsockname()[1]}", "t", "the server", "start it")
        stranger = Http(lambda: nobody, patience_s=600.0)
        with pytest.raises(ServerUnreachableError, match="Connection refused"):
            stranger.get("/jobs")
        assert len(warned) == 1
        assert "the server cannot be reached: " in warned[0]
        assert "Connection refused; trying until " in warned[0]

        tries: list[Address] = []

        def find() -> Address:
            tries.append(server.address if len(tries) != 1 else nobody)
            return tries[-1]

        met = Http(find, patience_s=600.0)
        monkeypatch.setattr("modelops.client.http.NEVER_MET_S", 0.0)
        assert [met.get("/jobs").status for _ in range(2)] == [200, 200]
        assert nobody in tries
        stranger.close()
        met.close()


def test_every_request_carries_the_token_and_no_url_does(server: Scripted, http: Http) -> None:
    http.get("/jobs", [("state", "running"), ("cursor", None)])
    (_, path, headers, _) = server.heard[0]
    assert (path, headers["Authorization"]) == ("/v1/jobs?state=running", "Bearer secret")


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        ((404, {"detail": "there is no job x"}), NotFoundError, "there is no job x"),
        ((422, {"detail": "wrong", "advice": "mend it"}), RequestError, "wrong; mend it"),
        ((409, {"detail": "it runs", "error": "ConflictError"}), RequestError, "it runs"),
        ((429, {"detail": "full", "error": "QueueFullError"}), QueueFullError, "full"),
        ((401, {"detail": "unknown token"}), RequestError, "modelops up"),
        ((500, {"title": "Internal error"}), InternalError, "log of the test's server"),
        ((507, {"detail": "disk full", "error": "ClusterError"}), ClusterError, "disk full"),
        ((418, b"<html>a proxy"), RequestError, "a proxy"),
        ((400, {"error": "SystemExit", "detail": "no class of ours"}), RequestError, "no class of ours"),
    ],
)
def test_an_error_of_the_server_is_raised_as_ours_with_its_sentence(
    server: Scripted, http: Http, answer: object, error: type[Exception], words: str
) -> None:
    server.last = answer
    with pytest.raises(error, match=words):
        http.get("/jobs/x")


def test_who_is_refused_by_a_server_elsewhere_hears_who_makes_tokens_and_where_to_put_one(
    server: Scripted,
) -> None:
    asks = "ask its operator for (one|another) .'modelops tokens create NAME' makes (one|it)., and set MODELOPS_TOKEN"
    with pytest.raises(RequestError, match=f"the server https://there needs a token: {asks}"):
        remote("https://there", None)
    server.last = (401, {"detail": "it is revoked", "advice": "look into the file 'token' of this machine"})
    there = remote("https://there", "secret")()._replace(url=server.address.url)
    with contextlib.closing(Http(lambda: there)) as http, pytest.raises(RequestError) as refused:
        http.get("/jobs")
    assert re.search(
        f"the server https://there does not accept the token: it is revoked; {asks}", str(refused.value)
    )
    assert "this machine" not in str(refused.value)


def test_who_is_refused_by_the_server_of_this_machine_hears_how_to_get_one_that_knows_the_token(
    server: Scripted,
) -> None:
    """As when the file of the token was removed while it ran; MODELOPS_TOKEN is for servers elsewhere."""
    server.last = (401, {"detail": "it is wrong"})
    here = Address(server.address.url, "secret", "the server of this machine", "it is away")
    with contextlib.closing(Http(lambda: here)) as http, pytest.raises(RequestError) as refused:
        http.get("/jobs")
    assert "it is wrong; 'modelops down', then 'modelops up', starts one that does" in str(refused.value)
    assert "MODELOPS_TOKEN" not in str(refused.value)


def test_a_transfer_that_is_cut_goes_on_where_it_was(
    server: Scripted, source: HttpSource, tmp_path: Path
) -> None:
    data = bytes(range(256)) * 20_000
    listing = {
        "files": [{"name": "packs/p", "n_bytes": len(data), "sha256": sha256(data).hexdigest()}],
        "final": True,
    }
    server.script = [listing, (CUT, data), (CUT, data), data]
    assert sync_files(source, JOB, tmp_path / "to").copied == ("packs/p",)
    assert (tmp_path / "to" / "packs" / "p").read_bytes() == data
    ranges = [headers.get("Range") for _, path, headers, _ in server.heard if path.endswith("/packs/p")]
    assert ranges[0] is None
    starts = [int(r.removeprefix("bytes=").rstrip("-")) for r in ranges[1:] if r]
    assert len(starts) == 2
    assert 0 < starts[0] < starts[1] < len(data)


def test_pieces_from_a_server_without_ranges_are_still_the_right_ones(
    source: HttpSource, server: Scripted
) -> None:
    server.last = (203, b"0123456789")  # the handler cuts only what is 200
    assert b"".join(source.pieces(JOB, JobFile("f", 10, ""), 4)) == b"456789"


def test_a_transfer_that_the_server_cannot_begin_says_why_as_the_server_does(
    source: HttpSource, server: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source.http, "_patience_s", 0.2)
    server.last = (503, {"detail": "the database is away"})
    with pytest.raises(ServerUnreachableError, match="cannot do its work now: the database is away"):
        list(source.pieces(JOB, JobFile("f", 10, "")))


def summary(state: str, **more: object) -> dict[str, object]:
    return {
        "job": JOB,
        "state": state,
        "counts": {"succeeded": 3, "failed": 0},
        "tag": "t1",
        "new_key": 1,
        **more,
    }


def test_a_server_that_is_away_makes_a_status_unknown_and_never_failed(
    server: Scripted, source: HttpSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelops.client.served.STATUS_PATIENCE_S", 0.2)
    server.last = summary("running")
    before = source.status(JOB)
    assert (before.state, before.counts, before.unknown_since) == (JobState.RUNNING, {"succeeded": 3}, None)
    server.last = (503, {"detail": "the database is away"})
    first, second = source.status(JOB), source.status(JOB)
    assert (first.state, first.last_known, first.counts, first.final) == (
        "unknown", JobState.RUNNING, {"succeeded": 3}, False,
    )  # fmt: skip
    assert first.unknown_since is not None
    assert first.unknown_since == second.unknown_since
    assert first.reason.startswith("unknown since ")
    assert "(last known: running, 3 succeeded)" in first.reason
    assert "failed" not in str(first)
    server.last = summary("succeeded")
    assert source.status(JOB).state == JobState.SUCCEEDED


def test_of_a_job_never_seen_nothing_is_made_up(
    server: Scripted, source: HttpSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelops.client.served.STATUS_PATIENCE_S", 0.2)
    server.last = (503, {})
    status = source.status(JOB)
    assert (status.state, status.last_known, status.counts) == ("unknown", None, {})
    assert status.unknown_since is not None


def test_waiting_lets_the_server_say_when_something_has_changed(server: Scripted, source: HttpSource) -> None:
    server.last = summary("running")
    first = source.wait_for_change(JOB, None, 25.0)
    server.last = summary("succeeded", tag="t2")
    assert source.wait_for_change(JOB, first, 25.0).state == JobState.SUCCEEDED
    assert [path for _, path, _, _ in server.heard] == [
        f"/v1/jobs/{JOB}",
        f"/v1/jobs/{JOB}?wait_s=25&tag=t1",
    ]


def test_waiting_for_the_end_is_one_question_whatever_else_changes(
    server: Scripted, source: HttpSource
) -> None:
    server.last = summary("succeeded")
    assert source.wait_for_end(JOB, 25.0).state == JobState.SUCCEEDED
    assert [path for _, path, _, _ in server.heard] == [f"/v1/jobs/{JOB}?wait_s=25.000&ended=true"]


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://x", "http://", "http://no such", "http://[::1", "http://a\tb"]
)
def test_what_is_no_address_is_refused_with_an_example(url: str) -> None:
    with pytest.raises(RequestError, match=r"no address of a server: .* https://modelops\.example\.org"):
        checked_url(url)


@pytest.mark.parametrize(
    ("url", "says"), [("", "must be text"), ("http://x:y", "port"), ("http://x:0", "port")]
)
def test_an_address_without_text_or_with_a_wrong_port_is_refused(url: str, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        checked_url(url)


def test_values_come_back_as_they_were_stored(server: Scripted, source: HttpSource) -> None:
    kind, data = encode(np.arange(3))
    server.last = msgspec.msgpack.encode({"returned_dict": True, "outputs": [["x", kind, bytes(data)]]})
    assert source.output(JOB, 0, 1, "x").tolist() == [0, 1, 2]
    assert source.output(JOB, 0, 1, None)["x"].dtype == np.int64
    assert server.heard[0][1] == f"/v1/jobs/{JOB}/output?param=0&replicate=1&name=x"


def test_a_file_of_which_nothing_comes_is_given_up_with_what_the_server_says_of_its_storage(
    server: Scripted, tmp_path: Path
) -> None:
    http = Http(lambda: server.address, patience_s=1.5)
    away = (503, {"detail": "reading x in s3://models failed"})
    server.script = [n for _ in range(9) for n in (away, {"here": "HEAD finds the file, as ever"})]
    with contextlib.closing(http), pytest.raises(ServerUnreachableError) as caught:
        list(HttpSource(http, Home.at(tmp_path)).pieces(JOB, JobFile("f", 10, "")))
    assert caught.value.answers
    assert "reading x in s3://models failed" in str(caught.value)
    assert len(server.heard) < 9, "and it is not asked without a pause"


def test_a_full_storage_ends_a_command_with_5_if_a_server_says_so_and_with_1_if_there_is_none(
    server: Scripted,
) -> None:
    full = StorageError("storing x in /data failed: No space left on device")
    said = problem_response(full)
    server.last = (said.status_code, json.loads(bytes(said.body)))
    http = Http(lambda: server.address, patience_s=0)
    with contextlib.closing(http), pytest.raises(ServerUnreachableError, match=str(full)) as caught:
        http.request("POST", "/jobs", body=b"{}")
    assert [exit_of_error(error) for error in (caught.value, full)] == [5, 1]
