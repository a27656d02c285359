"""A storage service at the end of a slow line: what takes long comes through, and what says nothing is named."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
from slow import SlowWay

from modelops.errors import StorageError
from modelops.store import Objects, remote

if TYPE_CHECKING:
    from collections.abc import Iterator

    from services import S3

SOME = b"0123456789abcdef" * (3 << 16)  # 3 MiB
RATE = 1 << 20
QUIET_S = 2.0  # shorter than SOME takes at RATE


@pytest.fixture
def objects(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Objects]:
    monkeypatch.setattr(remote, "QUIET_S", QUIET_S)
    with SlowWay(s3.port, RATE) as slow:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{slow.port}")
        yield Objects.open(f"{s3.url}/{uuid4()}")


@pytest.mark.parametrize("how", ["pieces", "replacing"])
def test_an_upload_may_take_longer_than_a_service_may_be_silent(objects: Objects, how: str) -> None:
    began = time.monotonic()
    if how == "replacing":
        objects.put("a/b", iter([SOME]))
    else:
        objects.put_new("a/b", iter([SOME[:9], SOME[9:]]))
    assert time.monotonic() - began > QUIET_S, "nothing was slow: this shows nothing"
    assert objects.size("a/b") == len(SOME)


def test_reading_may_take_longer_than_a_service_may_be_silent(
    objects: Objects, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.environ["AWS_ENDPOINT_URL"])
    assert isinstance(objects, remote.RemoteObjects)
    Objects.open(objects.where).put_new("a", SOME)  # quickly
    began = time.monotonic()
    assert b"".join(objects.stream("a")) == SOME
    assert time.monotonic() - began > QUIET_S, "nothing was slow: this shows nothing"


def test_a_service_that_takes_everything_and_says_nothing_is_named(
    s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "QUIET_S", 0.2)
    monkeypatch.setattr(remote, "SLOWEST_BYTES_PER_S", 1 << 30)
    with SlowWay(s3.port, 0) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.port}")
        objects = Objects.open(s3.url)
        for act in (
            lambda: objects.put_new("a", b"x"),
            lambda: objects.get("a"),
            lambda: objects.put("a", b""),
        ):
            with pytest.raises(StorageError, match=r"s3://modelops failed: .*is up"):
                act()


def test_what_the_environment_says_of_connections_is_obeyed(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    Objects.open(s3.url).put("plain", b"x")
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    with pytest.raises(StorageError):  # as obstore has it: without that, only TLS
        Objects.open(s3.url).put("plain", b"x")
