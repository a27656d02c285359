"""Submissions: what is wrong is said in a sentence and leaves nothing; the same request made twice is one job."""

from __future__ import annotations

import hashlib
import io
import threading
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from http_service import Drivers, request_for, run_some
from wrong_submissions import SETS, WRONG

from modelops.errors import (
    BundleMissingError,
    ConflictError,
    NotFoundError,
    ParametersMissingError,
    QueueFullError,
    RequestError,
    StorageError,
)
from modelops.server import parameters
from modelops.server.requests import ExtendRequest, ResumeRequest, SubmitRequest, decode_submission
from modelops.server.service import JobService
from modelops.states import JobEvent, ReplicateStatus
from modelops.store import Records, submissions
from modelops.store.parameters import pour_parameters
from modelops.study.index_line import IndexLine

if TYPE_CHECKING:
    from pathlib import Path

    from modelops.home import Home


def names(service: JobService) -> list[str]:
    return [name for name in service.objects.list("v1/jobs") if not name.endswith("/results")]


@pytest.mark.parametrize(
    ("changes", "says"), WRONG, ids=[f"{n}-{says[:20]}" for n, (_, says) in enumerate(WRONG)]
)
def test_a_wrong_spec_is_refused_with_a_sentence_and_leaves_nothing(
    service: JobService, bundle: str, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(RequestError, match=says):
        service.submit(request_for(bundle, **changes), "key", "me")
    assert (service.jobs(), names(service)) == ([], [])


@pytest.mark.parametrize(("texts", "says"), SETS)
def test_wrong_parameter_sets_are_named(
    service: JobService, bundle: str, texts: list[bytes], says: str
) -> None:
    request = msgspec.structs.replace(request_for(bundle), parameters=[msgspec.Raw(text) for text in texts])
    with pytest.raises(RequestError, match=says):
        service.submit(request, None, "me")
    assert (service.jobs(), names(service)) == ([], [])


def test_parameter_sets_are_stored_in_their_canonical_form(service: JobService, bundle: str) -> None:
    texts = [b'{"b": 2.50, "a": [1, true]}', b'{"x":{"$float":"nan"}}', b'{"x":1E2,"y":"\\u00e9"}']
    request = msgspec.structs.replace(request_for(bundle), parameters=[msgspec.Raw(text) for text in texts])
    job = service.submit(request, None, "me")[0].job
    assert [service.parameter_set(job, i).canonical for i in range(3)] == [
        b'{"a":[1,true],"b":2.5}', b'{"x":{"$float":"nan"}}', '{"x":100.0,"y":"é"}'.encode(),
    ]  # fmt: skip


def upload(service: JobService, data: bytes, digest: str = "") -> str:
    digest = digest or hashlib.sha256(data).hexdigest()
    with service.uploads.receiving() as file:
        file.write(data)
        service.uploads.add_parameters(digest, file)
    return digest


def parquet(**columns: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


def by_file(service: JobService, bundle: str, data: bytes, **changes: Any) -> SubmitRequest:
    request = request_for(bundle, **changes)
    return msgspec.structs.replace(request, parameters=None, parameters_sha256=upload(service, data))


def test_many_parameter_sets_come_as_a_file(service: JobService, bundle: str) -> None:
    file = io.BytesIO()
    pour_parameters(file, (b'{"x":%d}' % i for i in range(10_000)))
    row, new = service.submit(
        by_file(service, bundle, file.getvalue(), line=IndexLine.of(10_000, 2)), "k", "me"
    )
    assert new
    assert service.parameter_set(row.job, 9_999).canonical == b'{"x":9999}'
    assert service.status(row.job).size == 20_000


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"not parquet", "cannot be read"),
        (b"PAR1" + b"\xff" * 100 + b"PAR1", "cannot be read"),
        (b"", "cannot be read"),
        (parquet(x=[1, 2, 3]), "no column 'canonical'"),
        (parquet(canonical=[1, 2, 3]), "cannot be read|cannot be used"),
        (parquet(canonical=['{"x":1}', None, '{"x":2}']), "parameter set 1 cannot be used"),
        (parquet(canonical=['{"x":1}', '{"x":2}']), "line has 3 parameter sets, but 2 were given"),
        (parquet(canonical=['{"x":1}', '{"x":2}', '{"x":1}']), "parameter sets 0 and 2 are the same"),
    ],
)
def test_a_parameter_file_that_is_none_is_refused(
    service: JobService, bundle: str, data: bytes, says: str
) -> None:
    with pytest.raises(RequestError, match=says):
        service.submit(by_file(service, bundle, data), None, "me")
    assert (service.jobs(), names(service)) == ([], [])


def test_a_small_parameter_file_that_holds_gigabytes_is_stopped(
    service: JobService, bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parameters, "MAX_TEXT_BYTES", 1_000_000)
    data = parquet(canonical=['{"x":"' + "a" * 1000 + '"}'] * 100_000)  # all the same: it is small
    assert len(data) < 100_000
    with pytest.raises(RequestError, match="holds more than 1000000 bytes"):
        service.submit(by_file(service, bundle, data), None, "me")


def test_a_newer_parameter_file_and_a_newer_study_are_refused_with_both_numbers(
    service: JobService, bundle: str
) -> None:
    table = pa.table({"canonical": ['{"x":1}']}).replace_schema_metadata({"modelops.format": "9"})
    file = io.BytesIO()
    pq.write_table(table, file)
    with pytest.raises(RequestError, match="format 9, this server reads up to 1"):
        service.submit(by_file(service, bundle, file.getvalue()), None, "me")
    newer = msgspec.json.encode({"spec": {"format": 9, "line": "another form"}, "parameters": []})
    with pytest.raises(RequestError, match="format 9, this server reads up to"):
        decode_submission(newer)


def test_an_uploaded_file_waits_two_days_and_is_then_removed(
    server_home: Home, service: JobService, bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = parquet(canonical=['{"x":1}', '{"x":2}', '{"x":3}'])
    request = by_file(service, bundle, data)
    now = [datetime.now(UTC)]
    monkeypatch.setattr(service.uploads, "_clock", lambda: now[0])
    now[0] += timedelta(days=1)
    service.uploads.remove_old()
    assert service.submit(request, None, "me")[1]
    now[0] += timedelta(days=2)
    service.uploads.remove_old()
    assert list(service.objects.list("v1/uploads")) == []
    with pytest.raises(ParametersMissingError, match="upload the file to /v1/parameters/"):
        service.submit(request, None, "me")


def test_what_has_to_be_uploaded_first_is_said(service: JobService, bundle: str) -> None:
    with pytest.raises(BundleMissingError, match=f"upload its archive to /v1/bundles/{'1' * 64}"):
        service.submit(request_for("1" * 64), None, "me")
    with pytest.raises(BundleMissingError):
        service.submit(request_for("../../etc/passwd"), None, "me")
    request = msgspec.structs.replace(request_for(bundle), parameters=None, parameters_sha256="2" * 64)
    with pytest.raises(ParametersMissingError):
        service.submit(request, None, "me")
    for both in ({"parameters": None}, {"parameters_sha256": "2" * 64}):
        with pytest.raises(RequestError, match="either parameters or parameters_sha256"):
            service.submit(msgspec.structs.replace(request_for(bundle), **both), None, "me")


def test_sixteen_threads_with_one_key_make_one_job(
    service: JobService, bundle: str, drivers: Drivers
) -> None:
    made: list[tuple[str, bool]] = []
    together = threading.Barrier(16)

    def submit() -> None:
        together.wait()
        row, new = service.submit(request_for(bundle), "the key", "me")
        made.append((row.job, new))

    threads = [threading.Thread(target=submit) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 16
    assert {job for job, _ in made} == {service.jobs()[0].job}
    assert [new for _, new in made].count(True) == 1
    assert len(service.jobs()) == 1
    assert {name.split("/")[2] for name in names(service)} == {service.jobs()[0].job}  # nothing of the losers
    assert drivers.woken == 1


def test_a_key_is_for_one_request(service: JobService, bundle: str) -> None:
    job = service.submit(request_for(bundle), "key", "me")[0].job
    for other in (request_for(bundle, study_seed=1), request_for(bundle, n_params=2)):
        with pytest.raises(ConflictError, match=f"the key 'key' was used for another request.*{job}"):
            service.submit(other, "key", "me")
    run_some(service, job, {0: ReplicateStatus.SUCCEEDED}, end=JobEvent.SOME_SUCCEEDED)
    with pytest.raises(ConflictError, match="was used for another request"):
        service.resume(job, ResumeRequest(), "key", "me")
    assert service.submit(request_for(bundle), "another", "me")[1]
    assert service.submit(request_for(bundle), None, "me")[1]
    assert len(service.jobs()) == 3


def test_a_repeat_is_answered_even_when_the_queue_is_full_or_the_bundle_gone(
    service: JobService, bundle: str
) -> None:
    job = service.submit(request_for(bundle), "key", "me")[0].job
    service.max_jobs = 1
    service.objects.delete(f"v1/bundles/{bundle}")
    row, new = service.submit(request_for(bundle), "key", "me")
    assert (row.job, new) == (job, False)


def test_a_full_queue_is_said_and_takes_jobs_again_when_some_have_ended(
    service: JobService, bundle: str
) -> None:
    service.max_jobs = 3
    jobs = [service.submit(request_for(bundle), None, "me")[0].job for _ in range(3)]
    before = names(service)
    with pytest.raises(QueueFullError, match="3 jobs have not ended, and this server keeps at most 3"):
        service.submit(request_for(bundle), "key", "me")
    assert names(service) == before
    outcomes = dict.fromkeys(range(12), ReplicateStatus.SUCCEEDED)
    run_some(service, jobs[0], outcomes, end=JobEvent.ALL_SUCCEEDED)
    job = service.submit(request_for(bundle), "key", "me")[0].job
    with pytest.raises(QueueFullError):
        service.extend(jobs[0], ExtendRequest(replicates=9), None, "me")
    assert service.status(job).state == "queued"


def test_what_became_full_meanwhile_leaves_nothing(
    service: JobService, bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submissions, "refuse_when_full", lambda *_: None)  # there was room when it looked
    service.max_jobs = 0
    with pytest.raises(QueueFullError):
        service.submit(request_for(bundle), "key", "me")
    assert (service.jobs(), names(service)) == ([], [])


def test_bytes_are_stored_before_the_row_and_stay_when_it_is_not_known_whether_that_was_written(
    service: JobService, bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = submissions.record_submission

    def answer_lost(*args: Any, **kwargs: Any) -> Any:
        real(*args, **kwargs)
        raise StorageError("the connection broke before the answer came")

    with monkeypatch.context() as patched:
        patched.setattr(submissions, "record_submission", answer_lost)
        with pytest.raises(StorageError):
            service.submit(request_for(bundle), "key", "me")
    row, new = service.submit(request_for(bundle), "key", "me")
    assert not new
    assert service.parameter_set(row.job, 0).canonical == b'{"x":0}'


def test_requests_to_begin_again_from_many_threads_begin_one_run(service: JobService, bundle: str) -> None:
    job = service.submit(request_for(bundle), None, "me")[0].job
    run_some(service, job, {0: ReplicateStatus.SUCCEEDED}, end=JobEvent.SOME_SUCCEEDED)
    runs, refused = [], []
    together = threading.Barrier(16)

    def resume(n: int) -> None:
        together.wait()
        try:  # half of them are one request that was repeated
            runs.append(service.resume(job, ResumeRequest(), "shared" if n % 2 else f"own {n}", "me").run)
        except ConflictError as e:
            refused.append(str(e))

    threads = [threading.Thread(target=resume, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(runs) + len(refused) == 16
    assert set(runs) == {2}
    assert service.status(job).run == 2


def test_another_server_on_the_same_store_gives_the_same_answers(
    service: JobService, bundle: str, server_home: Home
) -> None:
    records = Records.open(server_home.database_url)
    try:
        other = JobService(records, service.objects, server_home, Drivers())
        job = service.submit(request_for(bundle), "key", "me")[0].job
        assert other.submit(request_for(bundle), "key", "me") == (service.records.job(job), False)
        assert other.status(job).counts == {"pending": 12}
        other.cancel(job, "other")
        assert service.status(job).cancel_asked
        with pytest.raises(NotFoundError, match="there is no job job_0"):
            other.cancel("job_0", "me")
    finally:
        records.close()


def test_an_upload_that_cannot_be_kept_names_the_folder(
    service: JobService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "a file"
    blocked.touch()
    monkeypatch.setattr(service.uploads, "folder", blocked / "uploads")
    with pytest.raises(StorageError, match=str(blocked)):
        upload(service, b"x")
