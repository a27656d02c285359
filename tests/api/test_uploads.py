"""Uploads over HTTP: nothing in an archive is believed, and what is refused leaves nothing behind."""

from __future__ import annotations

import gzip
import io
import tarfile
import threading
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import pytest
from http_service import Archive, Client, request_for

from modelops.bundles import pack_bundle, take_snapshot
from modelops.bundles.digest import FILE, Entry, digest_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from modelops.home import Home
    from modelops.server.service import JobService


def tar_of(*members: tuple[tarfile.TarInfo, bytes], file_format: str | None = "1") -> bytes:
    out = io.BytesIO()
    headers = {"modelops.format": file_format} if file_format else {}
    with tarfile.open(fileobj=out, mode="w:gz", format=tarfile.PAX_FORMAT, pax_headers=headers) as tar:
        for member, content in members:
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


def member(name: str, content: bytes = b"x", kind: bytes = tarfile.REGTYPE, link: str = "") -> Any:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(content) if kind == tarfile.REGTYPE else 0
    return info, content


SYM, HARD = tarfile.SYMTYPE, tarfile.LNKTYPE
HOSTILE = [
    # what it tries        members                                                        what is said
    ("absolute path", [member("/tmp/evil")], "unsafe path"),
    ("zip-slip", [member("../../evil")], "leads out of the bundle"),
    ("hidden zip-slip", [member("a/../../evil")], "unsafe path"),
    ("backslashes", [member("a\\..\\evil")], "unsafe path"),
    ("link out", [member("l", kind=SYM, link="../../etc/passwd")], "leads out of the bundle"),
    ("absolute link", [member("l", kind=SYM, link="/etc/passwd")], "leads out of the bundle"),
    ("write through a link", [member("l", kind=SYM, link="d"), member("l/evil")], "below a file or link"),
    ("link to a link", [member("a", kind=SYM, link="b"), member("b", kind=SYM, link="c"), member("c")], "another link"),
    ("hard link", [member("h", kind=HARD, link="/etc/passwd")], "neither a file nor"),
    ("device", [member("d", kind=tarfile.CHRTYPE)], "neither a file nor"),
    ("fifo", [member("f", kind=tarfile.FIFOTYPE)], "neither a file nor"),
    ("many files", [member(str(i), b"") for i in range(60)], "limits are 50 files"),
    ("bomb of zeros", [member("a", b"\0" * 300_000)], "limits are 50 files and 200000 bytes"),
]  # fmt: skip


@pytest.fixture
def small(service: JobService) -> JobService:
    service.uploads._limits = {"max_files": 50, "max_bytes": 200_000}
    return service


def refused(client: Client, digest: str, data: bytes, status: int) -> str:
    answer = client("PUT", f"/v1/bundles/{digest}", body=data)
    assert (answer.status, answer.headers["Content-Type"]) == (status, "application/problem+json"), (
        answer.data
    )
    return str(answer.json()["detail"])


@pytest.mark.parametrize(("members", "says"), [h[1:] for h in HOSTILE], ids=[h[0] for h in HOSTILE])
def test_a_hostile_archive_is_refused_and_nothing_of_it_is_written(
    client: Client, small: JobService, server_home: Home, members: Sequence[Any], says: str
) -> None:
    detail = refused(client, "0" * 64, tar_of(*members), 422)
    assert says in detail
    assert "upload-" not in detail  # no path of the server
    assert not small.uploads.has_bundle("0" * 64)
    assert [path for path in server_home.cache.rglob("*") if path.is_file()] == []


def test_bombs_in_headers_and_in_gzip_are_stopped_early(client: Client, small: JobService) -> None:
    info, content = member("a")
    info.pax_headers = {"comment": "x" * 50_000_000}
    assert "header larger than" in refused(client, "0" * 64, tar_of((info, content)), 422)
    assert "damaged" in refused(client, "0" * 64, gzip.compress(b"\0" * 100_000_000), 409)
    assert not small.uploads.has_bundle("0" * 64)


def test_what_is_no_archive_damaged_cut_or_another_bundle_is_refused(
    client: Client, archive: Archive
) -> None:
    digest, data = archive
    for wrong in (b"", b"nothing", data[: len(data) // 2], gzip.compress(b"no tar")):
        assert "damaged" in refused(client, digest, wrong, 409)
    assert "not packed by" in refused(client, digest, tar_of(member("a"), file_format=None), 422)
    assert "newer ModelOps" in refused(client, digest, tar_of(member("a"), file_format="99"), 422)
    assert f"holds the bundle {digest}, not {'0' * 64}" in refused(client, "0" * 64, data, 409)
    assert client("HEAD", f"/v1/bundles/{digest}").status == 404
    assert client("PUT", f"/v1/bundles/{digest}", body=data).status == 201


def test_an_archive_is_checked_also_when_its_snapshot_is_in_the_cache(
    client: Client, service: JobService, server_home: Home, archive: Archive, tmp_path: Path
) -> None:
    folder = tmp_path / "mymodel"
    folder.mkdir()
    with tarfile.open(fileobj=io.BytesIO(archive.data)) as tar:
        options: dict[str, Any] = (
            {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        )  # from 3.11.4 on
        tar.extractall(folder, **options)
    digest, _ = take_snapshot(
        folder, server_home.cache / "bundles"
    )  # by a run on this machine, not by an upload
    assert digest == archive.digest
    refused(client, digest, tar_of(member("evil")), 409)
    assert not service.uploads.has_bundle(digest)


def test_a_bundle_without_a_model_is_refused_before_any_job_names_it(client: Client, tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    (folder / "pyproject.toml").write_text("[tool.modelops]\n")
    packed = io.BytesIO()
    digest = pack_bundle(folder, packed)
    assert "names no model" in refused(client, digest, packed.getvalue(), 422)


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("pyproject.toml", b"\xff", "pyproject.toml is not UTF-8 text"),
        ("pyproject.toml", b"tool.modelops = 3\n", "[tool.modelops] must be a table, not 3"),
        ("pyproject.toml", b"project = 3\n", "[project] must be a table, not 3"),
        ("pyproject.toml", b"a = " + b"[" * 100_000, "nested too deeply"),
        ("pyproject.toml", b"a = " + b"9" * 10_000, "is not valid TOML"),
        ("m.py", b"\0", "not valid Python"),
        ("m.py", b"-" * 100_000 + b"1", "not valid Python"),
    ],
)
def test_a_manifest_that_cannot_be_read_is_refused_with_its_reason(
    client: Client, file: str, text: bytes, says: str
) -> None:
    digest = digest_of([Entry(file, FILE, sha256(text).hexdigest())])
    detail = refused(client, digest, tar_of(member(file, text)), 422)
    assert says in detail
    assert digest not in detail  # no path of the server


def test_a_bundle_comes_back_as_it_was_uploaded_whole_or_in_parts(client: Client, archive: Archive) -> None:
    path = f"/v1/bundles/{archive.digest}"
    first = client("PUT", path, body=archive.data)
    assert (first.status, first.json()) == (201, {"digest": archive.digest, "new": True})
    again = client("PUT", path, body=archive.data)
    assert (again.status, again.json()["new"]) == (200, False)
    head = client("HEAD", path)
    assert (head.status, head.headers["Content-Length"]) == (200, str(len(archive.data)))
    assert client("GET", path).data == archive.data
    part = client("GET", path, headers={"Range": "bytes=10-19"})
    assert (part.status, part.data) == (206, archive.data[10:20])
    assert client.submit(request_for(archive.digest))["bundle"] == archive.digest


def test_eight_clients_that_upload_one_bundle_at_once_all_succeed(client: Client, archive: Archive) -> None:
    statuses: list[int] = []

    def upload() -> None:
        statuses.append(client("PUT", f"/v1/bundles/{archive.digest}", body=archive.data).status)

    threads = [threading.Thread(target=upload) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(statuses) == 8
    assert set(statuses) <= {200, 201}
    assert client("GET", f"/v1/bundles/{archive.digest}").data == archive.data


@pytest.mark.parametrize("digest", ["0" * 63, "0" * 65, "G" * 64, "..", "%2e%2e%2fjobs", "0" * 64 + "%0a"])
def test_what_is_no_digest_names_nothing(client: Client, digest: str) -> None:
    for method in ("GET", "PUT", "HEAD"):
        assert client(method, f"/v1/bundles/{digest}", body=b"x" if method == "PUT" else None).status == 404
