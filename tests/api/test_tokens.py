"""Tokens with names: each may do what its scopes say, until it expires or is revoked; its secret is kept nowhere."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sqlite3
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from http_service import TOKEN, Client, Drivers, request_for, serving

from modelops.client import tokens
from modelops.client.http import Address, Http
from modelops.errors import ConflictError, NotFoundError, RequestError, StorageError
from modelops.home import Home
from modelops.server.door import Door
from modelops.server.http import access
from modelops.server.http.app import OPERATIONS
from modelops.server.service import JobService
from modelops.store import Objects, Records
from modelops.store.tokens import TokenScope

if TYPE_CHECKING:
    from collections.abc import Iterator

SAMPLE = {
    "job": "job_x",
    "param": "0",
    "table": "failures",
    "digest": "0" * 64,
    "sha256": "0" * 64,
    "token": "nobody",
}


def made(client: Client, name: str, *scopes: str, expires_in_s: float | None = None) -> str:
    asked = {"name": name, "scopes": list(scopes), "expires_in_s": expires_in_s}
    answer = client("POST", "/v1/tokens", json=asked)
    assert answer.status == 201, answer.data
    secret: str = answer.json()["secret"]
    return secret


def with_token(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


@pytest.fixture(scope="module")
def by_scope(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[TokenScope, Client]]:
    """Serve one server for all operations, to a client with a token of each scope."""
    home = Home.at(tmp_path_factory.mktemp("scopes"))
    with contextlib.closing(Records.open(home.database_url)) as records:
        service = JobService(records, Objects.open(home.objects), home, Drivers())
        with serving(service) as client, contextlib.ExitStack() as stack:
            found = {}
            for scope in TokenScope:
                found[scope] = Client(client.port, made(client, f"a-{scope}", scope))
                stack.callback(found[scope].pool.clear)
            yield found


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)
def test_an_operation_is_done_for_its_scope_and_larger_ones_only(
    by_scope: dict[TokenScope, Client], operation: Any
) -> None:
    path = str(operation.path).replace("{name:path}", "a/b").format(**SAMPLE)
    for scope, client in by_scope.items():
        answer = client(operation.method, path)
        if operation.open or scope.allows(operation.scope):
            assert answer.status not in (401, 403)
        else:
            assert answer.status == 403
            found = answer.json()
            assert found["error"] == "ForbiddenError"
            assert f"'a-{scope}' has not the scope '{operation.scope}'" in found["detail"]


def test_whatever_changes_something_needs_more_than_read() -> None:
    for operation in OPERATIONS:
        assert operation.method in ("GET", "HEAD") or operation.scope is not TokenScope.READ
        assert "token" not in operation.path or operation.scope is TokenScope.ADMIN


def test_scopes_stand_in_the_schema(client: Client) -> None:
    paths = client.get("/v1/openapi.json")["paths"]
    for operation in OPERATIONS:
        described = paths[operation.path.replace(":path}", "}")][operation.method.lower()]
        assert described["security"] == ([] if operation.open else [{"token": [operation.scope]}])
        assert ("403" in described["responses"]) == (operation.scope is not TokenScope.READ)


def test_several_scopes_are_as_good_as_the_largest(client: Client) -> None:
    secret = made(client, "both", "read", "submit")
    assert client("POST", "/v1/jobs/job_x/cancel", headers=with_token(secret)).status == 404
    assert client("POST", "/v1/tokens/both/revoke", headers=with_token(secret)).status == 403


def test_a_revoked_token_is_refused_at_once_and_one_of_its_name_can_be_made_anew(client: Client) -> None:
    first = made(client, "ci", "read")
    assert client("GET", "/v1/jobs", headers=with_token(first)).status == 200
    assert client("POST", "/v1/tokens", json={"name": "ci", "scopes": ["read"]}).status == 409
    gone = client("POST", "/v1/tokens/ci/revoke").json()
    assert gone["state"] == "revoked"
    assert client("GET", "/v1/jobs", headers=with_token(first)).status == 401
    assert client("POST", "/v1/tokens/ci/revoke").json() == gone  # asking again changes nothing
    second = made(client, "ci", "read")
    assert client("GET", "/v1/jobs", headers=with_token(second)).status == 200
    assert (
        client("POST", f"/v1/tokens/{gone['token']}/revoke").json() == gone
    )  # the id is that of the first one
    assert client("GET", "/v1/jobs", headers=with_token(second)).status == 200
    listed = client.get("/v1/tokens")["tokens"]
    assert [(t["name"], t["state"]) for t in listed] == [("ci", "valid"), ("ci", "revoked")]
    assert client("POST", "/v1/tokens/nobody/revoke").status == 404


def test_a_token_that_another_server_has_revoked_is_soon_refused_here(
    client: Client, service: JobService, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = made(client, "ci", "read")
    now = [100.0]
    monkeypatch.setattr(access, "monotonic", lambda: now[0])
    with serving(service) as other:
        assert other("GET", "/v1/jobs", headers=with_token(secret)).status == 200
        client("POST", "/v1/tokens/ci/revoke")
        now[0] += access.REMEMBERED_S
        assert other("GET", "/v1/jobs", headers=with_token(secret)).status == 401


def test_an_expired_token_is_refused(new_database: Any, server_home: Home) -> None:
    now = [datetime(2026, 1, 1, tzinfo=UTC)]
    server_home.data.mkdir(parents=True)
    with contextlib.closing(Records.open(server_home.database_url, clock=lambda: now[0])) as records:
        service = JobService(records, Objects.open(server_home.objects), server_home, Drivers())
        with serving(service) as client:
            secret = made(client, "ci", "read", expires_in_s=60)
            assert client("GET", "/v1/jobs", headers=with_token(secret)).status == 200
        now[0] += timedelta(seconds=60)
        with serving(service) as client:
            assert client("GET", "/v1/jobs", headers=with_token(secret)).status == 401
            assert client.get("/v1/tokens")["tokens"][0]["state"] == "expired"


def test_no_secret_is_in_the_database_the_list_or_the_log(
    client: Client, server_home: Home, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    secret = made(client, "ci", "submit")
    assert client("GET", "/v1/jobs", headers=with_token(secret)).status == 200
    with contextlib.closing(sqlite3.connect(server_home.data / "modelops.db")) as raw:
        dumped = "\n".join(raw.iterdump())
    assert "'ci'" in dumped
    assert access.digest_of(secret.encode()) in dumped
    ours = "\n".join(r.getMessage() for r in caplog.records if not r.name.startswith("urllib3"))
    for text in (dumped, client("GET", "/v1/tokens").data.decode(), ours):
        assert secret not in text
        assert secret.removeprefix(access.PREFIX) not in text


def test_the_story_of_a_job_says_by_which_token_it_was_asked_for(client: Client, bundle: str) -> None:
    secret = made(client, "nightly", "submit")
    client.headers = {**with_token(secret), "ModelOps-User": "ada@lab"}
    job = client.submit(request_for(bundle))["job"]
    assert client.get(f"/v1/jobs/{job}/events")["events"][0]["who"] == "ada@lab (token nightly)"


@pytest.mark.parametrize(
    "changes",
    [
        {"name": ""}, {"name": "a b"}, {"name": "a\n"}, {"name": "../x"}, {"name": "x" * 101}, {"scopes": []},
        {"scopes": ["root"]}, {"expires_in_s": 0}, {"expires_in_s": -1}, {"expires_in_s": 1e12}, {"more": 1},
    ],
)  # fmt: skip
def test_a_token_that_cannot_be_is_refused(client: Client, changes: dict[str, Any]) -> None:
    assert client("POST", "/v1/tokens", json={"name": "x", "scopes": ["read"], **changes}).status == 400
    assert client.get("/v1/tokens")["tokens"] == []


def test_what_has_not_the_form_of_a_token_costs_no_transaction(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def look(_records: object, digest: str) -> None:
        asked.append(digest)

    monkeypatch.setattr(access, "token_of_digest", look)
    for text in ("x", "mot_", "mot_" + "x" * 42, "mot_" + "x" * 44, "Mot_" + "x" * 43, "mot_" + "é" * 43):
        assert client("GET", "/v1/jobs", headers=with_token(text)).status == 401
    assert asked == []
    assert client("GET", "/v1/jobs", headers=with_token("mot_" + "x" * 43)).status == 401
    assert asked == [access.digest_of(b"mot_" + b"x" * 43)]


def test_while_the_store_is_away_a_named_token_is_told_to_wait_and_not_that_it_is_wrong(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise StorageError("the database is away")

    monkeypatch.setattr(access, "token_of_digest", away)
    answer = client("GET", "/v1/jobs", headers=with_token("mot_" + "x" * 43))
    assert (answer.status, answer.json()["error"]) == (503, "StorageError")

    sent: list[Any] = []

    async def ask(door: Door, token: str, path: str = "/v1/jobs") -> int:
        headers = [(b"host", b"localhost"), (b"authorization", f"Bearer {token}".encode())]
        sent.clear()

        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        await door({"type": "http", "path": path, "method": "GET", "headers": headers}, receive, send)
        return int(sent[0]["status"])

    import asyncio

    door = Door(TOKEN, ["localhost"])
    door.explain("the database postgresql://db failed")
    assert asyncio.run(ask(door, "mot_" + "x" * 43)) == 503
    assert b"postgresql://db failed" in sent[1]["body"]
    assert asyncio.run(ask(door, TOKEN)) == 503
    assert asyncio.run(ask(door, "wrong")) == 401
    assert asyncio.run(ask(door, "", "/health")) == 200
    assert asyncio.run(ask(door, "", "/ready")) == 503
    assert b"postgresql" not in sent[1]["body"]  # who has no token learns that, and not why


@pytest.fixture
def http(client: Client) -> Iterator[Http]:
    with contextlib.closing(Http(lambda: Address(client.url, TOKEN, "the server", "look"))) as found:
        yield found


def test_the_client_makes_lists_and_revokes(client: Client, http: Http) -> None:
    first = tokens.create(http, "ci", ["read"], 3600)
    assert first.token.expires_at is not None
    assert tokens.every(http) == (first.token,)
    with pytest.raises(ConflictError, match="'modelops tokens revoke ci'"):
        tokens.create(http, "ci", ["read"], None)
    reader = Http(lambda: Address(client.url, first.secret, "the server", "look"))
    with contextlib.closing(reader), pytest.raises(RequestError, match="has not the scope 'admin'"):
        tokens.every(reader)
    assert tokens.revoke(http, "ci").state == "revoked"
    with pytest.raises(NotFoundError):
        tokens.revoke(http, "nobody")
    with contextlib.closing(reader), pytest.raises(RequestError, match="revoked or expired"):
        tokens.every(reader)


def test_the_command_prints_a_secret_once_and_alone(client: Client, tmp_path: Path) -> None:
    environ = {
        **os.environ,
        "MODELOPS_HOME": str(tmp_path),
        "MODELOPS_SERVER": client.url,
        "MODELOPS_TOKEN": TOKEN,
    }
    command = Path(sys.executable).with_name("modelops")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [command, "tokens", *arguments], env=environ, capture_output=True, text=True, check=False
        )

    said = run("create", "ci", "--scope", "read", "--expires", "90d")
    secret = said.stdout.strip()
    assert (said.returncode, secret[:4], len(secret)) == (0, "mot_", 47)
    assert "may read until" in said.stderr
    assert client("GET", "/v1/jobs", headers=with_token(secret)).status == 200
    listed = json.loads(run("list", "--json").stdout)["tokens"]
    assert [(t["name"], t["scopes"], t["state"]) for t in listed] == [("ci", ["read"], "valid")]
    assert "lets nobody in since" in run("revoke", "ci").stdout
    assert client("GET", "/v1/jobs", headers=with_token(secret)).status == 401
    for wrong, why in [
        (("create", "x", "--scope", "root"), "there is no scope 'root'"),
        (("create", "a b"), "the name of a token is"),
        (("create", "x", "--expires", "soon"), "is no duration"),
        (("revoke", "nobody"), "there is no token 'nobody'"),
    ]:
        refused = run(*wrong)
        assert (refused.returncode, why in refused.stderr) == (2, True), refused.stderr
