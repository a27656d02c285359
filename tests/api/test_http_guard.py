"""What no request gets past: the token, the host, the limits; and that every refusal is a problem that says why."""

from __future__ import annotations

import contextlib
import hmac
import http.client
import json
import logging
import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest
from http_service import TOKEN, Client, Drivers, request_for, serving

from modelops.home import Home
from modelops.server.http import connections, jobs, make_app, uploads
from modelops.server.http.app import OPERATIONS
from modelops.server.service import JobService
from modelops.store import Objects, Records, overview

if TYPE_CHECKING:
    from collections.abc import Iterator

SAMPLE = {
    "job": "job_x",
    "param": "0",
    "table": "failures",
    "digest": "0" * 64,
    "sha256": "0" * 64,
    "token": "x",
}


def path_of(operation: Any) -> str:
    return str(operation.path).replace("{name:path}", "a/b").format(**SAMPLE)


def problem(answer: Any, status: int) -> dict[str, Any]:
    found: dict[str, Any] = answer.json()
    assert (answer.status, answer.headers["Content-Type"]) == (status, "application/problem+json")
    assert found["status"] == status
    assert found["type"] == f"urn:modelops:error:{found['error']}"
    return found


@pytest.fixture(scope="module")
def one_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """Serve for all tests that leave a server as it was."""
    home = Home.at(tmp_path_factory.mktemp("guarded"))
    with contextlib.closing(Records.open(home.database_url)) as records:
        service = JobService(records, Objects.open(home.objects), home, Drivers())
        with serving(service) as client:
            yield client


@pytest.fixture
def standing(one_server: Client) -> Iterator[Client]:
    """Return a client of the one server, with the right headers again after each test."""
    before = one_server.headers
    yield one_server
    one_server.headers = before


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)
def test_nothing_but_health_is_answered_without_the_token(standing: Client, operation: Any) -> None:
    for token in ("", "wrong", TOKEN[:-1], TOKEN + "x", TOKEN.upper()):
        standing.headers = {"Authorization": f"Bearer {token}"} if token else {}
        answer = standing(operation.method, path_of(operation))
        if operation.path in ("/health", "/ready"):
            assert answer.json() == {"status": "ok" if operation.path == "/health" else "ready"}
        else:
            assert not operation.open
            assert problem(answer, 401)["error"] == "UnauthorizedError"
            assert answer.headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "header", ["Basic " + TOKEN, TOKEN, f"Bearer{TOKEN}", f"Token {TOKEN}", "Bearer", "Bearer "]
)
def test_only_a_bearer_token_counts(standing: Client, header: str) -> None:
    standing.headers = {"Authorization": header}
    problem(standing("GET", "/v1/jobs"), 401)


def test_every_path_there_is_not_needs_the_token_too(standing: Client) -> None:
    standing.headers = {}
    for method in ("GET", "POST", "DELETE", "OPTIONS", "TRACE"):
        for path in ("/", "/v2", "/v1/nothing", "/health/", "/health/x", "//health", "/metrics"):
            assert standing(method, path).status == 401


def test_a_server_without_a_token_does_not_start(service: JobService) -> None:
    with pytest.raises(ValueError, match="without a token"):
        make_app(service, token="")


def test_tokens_are_compared_in_constant_time_and_whatever_their_length(
    monkeypatch: pytest.MonkeyPatch, service: JobService
) -> None:
    compared: list[tuple[int, int]] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return a == b

    monkeypatch.setattr(hmac, "compare_digest", compare)
    with serving(service) as client:
        for token in ("a", "b" * 1000, TOKEN):
            client.headers = {"Authorization": f"Bearer {token}"}
            client("GET", "/v1/server")
    assert compared == [(32, 32)] * 3  # digests: neither place nor length of the difference shows


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "127.0.0.1.evil.example",
        "evil.example:80",
        "localhost.evil",
        "",
        "[::2]:80",
        "[::1]evil.example",
        "[::1",
        "[localhost]",
        "localhost:80.evil.example",
        "localhost:80:80",
    ],
)
def test_a_request_for_another_host_is_refused(standing: Client, host: str) -> None:
    assert problem(standing("GET", "/v1/jobs", headers={"Host": host}), 421)["error"] == "WrongHostError"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:99", "[::1]:80", "[::1]"])
def test_the_names_of_the_own_host_are_answered(standing: Client, host: str) -> None:
    assert standing("GET", "/v1/server", headers={"Host": host}).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        ["Host: evil.example", "Host: localhost", f"Authorization: Bearer {TOKEN}"],
        ["Host: localhost", "Host: evil.example", f"Authorization: Bearer {TOKEN}"],
        ["Host: localhost", "Authorization: Bearer wrong", f"Authorization: Bearer {TOKEN}"],
        ["Host: localhost", f"Authorization: Bearer {TOKEN}", "Authorization: Bearer wrong"],
        [f"Authorization: Bearer {TOKEN}"],
    ],
)
def test_a_header_that_is_there_twice_or_not_at_all_opens_nothing(
    standing: Client, headers: list[str]
) -> None:
    request = "\r\n".join(["GET /v1/server HTTP/1.1", *headers, "Connection: close", "", ""])
    with socket.create_connection(("127.0.0.1", standing.port), timeout=30) as raw:
        raw.sendall(request.encode())
        answer = raw.makefile("rb").readline().split()
    assert answer[1] in (b"400", b"401", b"421"), answer


def test_a_server_for_others_answers_by_the_names_it_was_given(service: JobService) -> None:
    with serving(service, allowed_hosts=["models.example"]) as client:
        assert client("GET", "/v1/server", headers={"Host": "models.example:8443"}).status == 200
        problem(client("GET", "/v1/server"), 421)
    with serving(service, allowed_hosts=["*"]) as client:
        assert client("GET", "/v1/server", headers={"Host": "anything"}).status == 200


def test_paths_and_methods_that_there_are_not_are_problems(standing: Client) -> None:
    assert "openapi.json" in problem(standing("GET", "/v1/nothing"), 404)["detail"]
    problem(standing("GET", "/v1/jobs/"), 404)
    for method in ("DELETE", "PATCH", "OPTIONS", "TRACE", "PUT"):
        answer = standing(method, "/v1/jobs")
        problem(answer, 405)
        assert answer.headers["Allow"] == "GET, HEAD, POST"
    assert standing("HEAD", "/v1/jobs").status == 200


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=1001", "limit=x", "limit=1.0", "limit=null", "limit=", "limit=1&limit=2",
              "state=done", "colour=blue", "cursor=a%20b", "limit=%ff", "match=%00"],
)  # fmt: skip
def test_a_query_that_is_not_as_the_schema_says_is_refused(standing: Client, query: str) -> None:
    assert problem(standing("GET", f"/v1/jobs?{query}"), 400)["error"] == "MalformedRequestError"


@pytest.mark.parametrize("wait", ["-1", "61", "nan", "inf", "1e9", "null", "true", "x"])
def test_a_wait_must_be_a_number_within_limits(standing: Client, wait: str) -> None:
    problem(standing("GET", f"/v1/jobs/job_x?tag=a&wait_s={wait}"), 400)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"null", b"[]", b'{"spec": 1}', b'{"spec": {}}', b'{"spec": {"format": {}}}',
        b'"\xff"', b"{" * 100_000, b'{"spec":' * 50_000,
        b'{"spec": {"name": "\\ud800"}}',
    ],
)  # fmt: skip
def test_a_body_that_is_not_as_the_schema_says_is_refused(standing: Client, body: bytes) -> None:
    answer = standing("POST", "/v1/jobs", body=body, headers={"Content-Type": "application/json"})
    assert "not as the schema says" in problem(answer, 400)["detail"]


def test_a_body_of_another_media_type_is_refused(standing: Client) -> None:
    problem(standing("POST", "/v1/jobs", body=b"<a/>", headers={"Content-Type": "text/xml"}), 415)


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> int:
    """Lower the limits of all bodies, so that tests send little."""
    for operation in OPERATIONS:
        if operation.body is not None:
            monkeypatch.setitem(operation.body.__dict__, "max_bytes", 100_000)
    return 100_000


def chunked(n_bytes: int) -> Iterator[bytes]:
    for _ in range(0, n_bytes, 1000):
        yield b"x" * 1000


UPLOADS = [("PUT", f"/v1/bundles/{'0' * 64}"), ("PUT", f"/v1/parameters/{'0' * 64}"), ("POST", "/v1/jobs")]


@pytest.mark.parametrize(("method", "path"), UPLOADS)
@pytest.mark.parametrize("with_length", [True, False])
def test_a_body_beyond_the_limit_is_refused_whether_it_says_its_length_or_not(
    client: Client, service: JobService, small_limits: int, method: str, path: str, with_length: bool
) -> None:
    body: Any = b"x" * (small_limits + 1) if with_length else chunked(2 * small_limits)
    answer = client(method, path, body=body, headers={"Content-Type": "application/octet-stream"})
    assert str(small_limits) in problem(answer, 413)["detail"]
    assert list(service.uploads.folder.glob("*")) == []
    assert client("GET", "/v1/server").status == 200


def test_who_is_refused_while_sending_much_still_reads_why(standing: Client) -> None:
    standing.headers = {}
    answer = standing("PUT", f"/v1/bundles/{'0' * 64}", body=chunked(5_000_000))
    problem(answer, 401)


def test_an_upload_does_not_go_through_memory(client: Client, service: JobService) -> None:
    largest = 0
    real = service.uploads.add_parameters

    def add(digest: str, file: Any) -> bool:
        nonlocal largest
        largest = file.seek(0, 2)
        return real(digest, file)

    service.uploads.add_parameters = add  # type: ignore[method-assign]
    answer = client("PUT", f"/v1/parameters/{'0' * 64}", body=chunked(8_000_000))
    assert largest == 8_000_000
    assert "has the SHA-256" in problem(answer, 409)["detail"]
    assert largest > uploads.PIECE_BYTES  # it came to the disk in pieces of this


def test_who_sends_slowly_and_who_reads_nothing_hold_nobody_up(
    client: Client, service: JobService, bundle: str
) -> None:
    job = client.submit(request_for(bundle))["job"]
    service.objects.put_new(f"v1/bundles/{'1' * 64}", bytes(30_000_000))  # more than sockets take unread
    stuck = []
    for n in range(40):  # more than there are threads
        connection = socket.create_connection(("127.0.0.1", client.port))
        head = f"Host: localhost\r\nAuthorization: Bearer {TOKEN}\r\n"
        if n % 2:
            connection.sendall(
                f"PUT /v1/bundles/{n:064x} HTTP/1.1\r\n{head}Content-Length: 1000\r\n\r\nx".encode()
            )
        else:
            connection.sendall(f"GET /v1/bundles/{'1' * 64} HTTP/1.1\r\n{head}\r\n".encode())
            assert connection.recv(12) == b"HTTP/1.1 200"  # it is being sent
        stuck.append(connection)
    answers = [client.get(f"/v1/jobs/{job}")["state"] for _ in range(5)]
    assert answers == ["queued"] * 5
    for connection in stuck:
        connection.close()


def test_a_body_of_which_nothing_comes_is_given_up(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    from modelops.server.http import api

    monkeypatch.setattr(api, "BODY_IDLE_S", 0.05)
    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=30)
    connection.putrequest("PUT", f"/v1/bundles/{'0' * 64}")
    for name, value in (*client.headers.items(), ("Content-Length", "1000")):
        connection.putheader(name, value)
    connection.endheaders()
    assert connection.getresponse().status == 408
    connection.close()


HALF_A_HEAD = b"GET /v1/server HTTP/1.1\r\nHost: localhost\r\nX: "
WHOLE = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize("sends", [b"", HALF_A_HEAD, WHOLE + HALF_A_HEAD])
def test_a_connection_that_asks_for_nothing_is_closed_after_a_while(
    client: Client, monkeypatch: pytest.MonkeyPatch, sends: bytes
) -> None:
    monkeypatch.setattr(connections, "HEAD_WITHIN_S", 0.05)
    with socket.create_connection(("127.0.0.1", client.port), timeout=30) as silent:
        silent.sendall(sends)
        with contextlib.suppress(ConnectionResetError):
            while silent.recv(1000):
                pass  # the answer to what it asked for
    assert client.get("/v1/server")


@pytest.mark.parametrize("before", [b"", WHOLE], ids=["at first", "later"])
@pytest.mark.parametrize(
    ("begin", "more"),
    [
        (HALF_A_HEAD, b"x"),
        (b"GET /", b"x"),
        (HALF_A_HEAD + b"\r\n", b"Y: x\r\n"),
        (b"x", b"x"),
        (b"", b"x: y\r\n"),
    ],
    ids=["value", "path", "headers", "method", "no request"],
)
def test_a_head_without_end_is_refused_before_it_takes_memory(
    client: Client, before: bytes, begin: bytes, more: bytes
) -> None:
    sent = 0
    with socket.create_connection(("127.0.0.1", client.port), timeout=30) as one:
        one.sendall(before)
        if before:
            assert one.recv(12) == b"HTTP/1.1 200"
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            one.sendall(begin)
            while sent < 64 << 20:
                one.sendall(more * (8192 // len(more)))
                sent += 8192
        assert sent < 32 << 20  # what sockets hold, and no more
        answers = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := one.recv(1 << 16):
                answers += piece
        assert b"HTTP/1.1 400" in answers or not answers  # a reset takes the answer along
    assert client.get("/v1/server")


def everything(client: Client, sent: bytes) -> bytes:
    """Return all that a server answers until it closes the connection."""
    answers = b""
    with socket.create_connection(("127.0.0.1", client.port), timeout=30) as one:
        one.sendall(sent)
        with contextlib.suppress(ConnectionResetError):
            while piece := one.recv(1 << 16):
                answers += piece
    return answers


BAD_CHUNK = (
    b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer " + TOKEN.encode() + b"\r\n"
    b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nno length\r\n"
)


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
        b"hello\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost localhost\r\n\r\n",
        b"GET /health HTTP/9\r\nHost: localhost\r\n\r\n",
        BAD_CHUNK,
    ],
    ids=["TLS", "greeting", "header", "version", "chunk"],
)
def test_what_is_no_request_is_refused_as_a_problem(client: Client, sent: bytes) -> None:
    head, _, body = everything(client, sent).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert b"application/problem+json" in head
    assert json.loads(body)["error"] == "MalformedRequestError"
    assert client.get("/v1/server")


def test_what_comes_behind_a_request_takes_nothing_from_its_answer(client: Client) -> None:
    answers = everything(client, WHOLE + b"\0\0\0 nonsense\r\n\r\n")
    assert answers.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answers.count(b"HTTP/1.1") == 1
    assert answers.endswith(b'{"status":"ok"}')


def test_a_large_body_behind_a_head_and_a_request_behind_that_are_taken(client: Client) -> None:
    body = b'{"x": "' + b"y" * (1 << 20) + b'"}'
    head = f"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n"
    head += "Content-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", client.port), timeout=30) as one:
        one.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body + WHOLE)
        answers = b""
        while answers.count(b"HTTP/1.1") < 2 or not answers.endswith(b'"ok"}'):
            piece = one.recv(1 << 16)
            assert piece, answers
            answers += piece
    assert answers.startswith(b"HTTP/1.1 400")
    assert b"application/problem+json" in answers


def test_a_head_without_end_behind_who_waits_takes_no_memory(
    client: Client, bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = 0
    take = connections.Connection.data_received

    def counted(connection: connections.Connection, data: bytes) -> None:
        nonlocal taken
        taken += len(data)
        take(connection, data)

    job = client.submit(request_for(bundle))
    tag = client.get(f"/v1/jobs/{job['job']}")["tag"]
    head = f"GET /v1/jobs/{job['job']}?tag={tag}&wait_s=1 HTTP/1.1\r\nHost: localhost\r\n"
    head += f"Authorization: Bearer {TOKEN}\r\n\r\n"
    monkeypatch.setattr(connections.Connection, "data_received", counted)
    with (
        socket.create_connection(("127.0.0.1", client.port), timeout=30) as one,
        contextlib.suppress(ConnectionResetError, BrokenPipeError),
    ):
        one.sendall(head.encode() + HALF_A_HEAD)
        for _ in range(8192):
            one.sendall(b"x" * 8192)
    assert connections.MAX_HEAD_BYTES < taken < 1 << 20
    assert client.get("/v1/server")


def test_who_waits_for_news_asks_for_something(
    client: Client, bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = client.submit(request_for(bundle))
    tag = client.get(f"/v1/jobs/{job['job']}")["tag"]
    monkeypatch.setattr(connections, "HEAD_WITHIN_S", 0.05)
    assert client("GET", f"/v1/jobs/{job['job']}?tag={tag}&wait_s=0.5").status == 200


def test_of_very_many_silent_connections_the_oldest_makes_room_and_others_are_answered(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "MOST_SILENT", 20)
    with contextlib.ExitStack() as stack:
        silent = []
        for _ in range(60):
            one = stack.enter_context(socket.create_connection(("127.0.0.1", client.port), timeout=30))
            one.sendall(HALF_A_HEAD)
            silent.append(one)
        assert client.get("/v1/server")
        for one in silent[:40]:
            with contextlib.suppress(ConnectionResetError):
                assert one.recv(1) == b""
        silent[-1].sendall(b"\r\n\r\n")
        assert silent[-1].recv(12) == b"HTTP/1.1 401"


def test_connections_never_take_all_the_files_that_may_be_open(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "SHARE", 0.0)
    with (
        socket.create_connection(("127.0.0.1", client.port), timeout=30) as one,
        contextlib.suppress(ConnectionResetError, BrokenPipeError),
    ):
        one.sendall(WHOLE)
        assert one.recv(1) == b""


def test_a_fault_of_the_server_is_a_problem_without_its_inside(
    client: Client, drivers: Drivers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> dict[str, int]:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(drivers, "workers", fail)
    found = problem(client("GET", "/v1/jobs"), 500)
    assert "secret" not in str(found)
    assert found["error"] == "InternalError"
    assert "ZeroDivisionError" in caplog.text


def test_a_database_that_is_away_is_said_and_waited_for(
    client: Client, service: JobService, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modelops.errors import StorageError

    def away(*_: object, **__: object) -> Any:
        raise StorageError("the database postgresql://db/modelops failed: connection refused")

    with monkeypatch.context() as patched:
        for name in ("page_of_jobs", "picture", "jobs_by_state", "replicates_by_status"):
            patched.setattr(overview, name, away)
        for path in ("/v1/jobs", "/v1/jobs/job_x", "/v1/jobs/job_x?tag=a&wait_s=5", "/metrics"):
            answer = client("GET", path)
            assert "connection refused" in problem(answer, 503)["detail"]
            assert int(answer.headers["Retry-After"]) > 0
        assert "connection refused" in client.get("/v1/server")["database"]
    assert client.get("/v1/server")["database"] == "ok"


def test_no_secret_is_logged(client: Client, bundle: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    client.submit(request_for(bundle), key="k")
    client("GET", "/v1/jobs", headers={"Authorization": f"Bearer {TOKEN}x"})
    client("GET", "/v1/nothing")
    ours = "\n".join(r.getMessage() for r in caplog.records if not r.name.startswith("urllib3"))
    assert "submitted" in ours
    assert TOKEN not in ours


def test_every_thread_that_served_has_ended_or_is_idle_when_the_server_stops(service: JobService) -> None:
    with serving(service) as client:
        client.get("/v1/server")
    assert not [t for t in threading.enumerate() if "uvicorn" in t.name]
    assert jobs.MAX_SUBMISSION_BYTES <= uploads.MAX_BUNDLE_BYTES
