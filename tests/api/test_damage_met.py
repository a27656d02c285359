"""A table of a job whose segment is damaged: the server repairs and answers, with a status for the rest."""

from __future__ import annotations

import contextlib
import io
from typing import TYPE_CHECKING

import pyarrow as pa
import pytest
from rich.console import Console
from stored_job import StoredJob
from test_reconcile import SETS, N, damage, names
from test_reconciler import Nobody, reconciler

from modelops.cli.tables import show_failures
from modelops.client.job import Job
from modelops.errors import IntegrityError, NotFoundError
from modelops.home import Home
from modelops.server.service import JobService
from modelops.store.failures import failure_summary, failures_table
from modelops.store.results import aggregates_table, finalize, replicates_table, stream_table
from modelops.store.segments import job_folder
from modelops.study.pools import NO_ALIASES, NO_POOL, Aliases, Membership

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from modelops.environments import Lock
    from modelops.server.views import Live
    from modelops.study.ids import JobId


class Idle(Nobody):
    """Drivers as a service sees them."""

    def wake(self) -> None:
        pass

    def beginning(
        self, job: JobId, bundle: str, lock: Lock | None
    ) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def abandon(self, job: JobId, who: str) -> None:
        pass

    def view(self, job: JobId) -> Live | None:
        return None

    def driven(self) -> list[JobId]:
        return []

    def goes_on(self, job: JobId) -> bool:
        return False

    def workers(self) -> dict[str, int]:
        return {}

    @property
    def aliases(self) -> Aliases:
        return NO_ALIASES

    def membership(self, worker: str) -> Membership:
        return NO_POOL

    def refused(self) -> dict[str, str]:
        return {}

    def connected(self) -> bool:
        return True

    def listen(self, listener: Callable[[JobId, bool], None]) -> None:
        pass


def test_a_damaged_segment_is_repaired_and_what_is_left_is_told(tmp_path: Path) -> None:
    job = StoredJob(tmp_path, SETS, N)
    job.run()
    (lost, *_) = job.records.segments(job.job)
    n_lost = sum(hi - lo for lo, hi in lost.ranges)
    damage(job, names(job, "segments")[0], "flip")
    driving = Idle(job)
    service = JobService(job.records, job.objects, Home.at(tmp_path), driving)
    with pytest.raises(IntegrityError):
        service.answer(job.job, replicates_table)
    service.reconciler = reconciler(job, driving)
    statuses = service.answer(job.job, replicates_table)["status"].to_pylist()
    assert statuses.count("pending") == n_lost
    assert len(statuses) == job.spec.line.size
    assert [e.kind for e in job.records.events(job.job)].count("mismatch") == 1


def test_without_a_server_what_is_damaged_is_left_out_with_a_warning_and_nothing_is_changed(
    tmp_path: Path, warned: list[str]
) -> None:
    job = StoredJob(tmp_path, SETS, N)
    job.run()
    stored = Job(job.job, Home.at(tmp_path))
    before = stored.results().select(["param", "replicate", "status"]).to_pylist()
    assert not warned
    segments = job.records.segments(job.job)
    damage(job, names(job, "segments")[0], "flip")
    damage(job, names(job, "aggregates")[0], "remove")
    (gone,) = {ref.name for ref in segments if ref.name in names(job, "segments")[0]}
    (lost,) = (ref for ref in segments if ref.name == gone)
    indices = {k for lo, hi in lost.ranges for k in range(lo, hi)}
    after = stored.results().select(["param", "replicate", "status"]).to_pylist()
    for k, (old, new) in enumerate(zip(before, after, strict=True)):
        assert new == ({**old, "status": "not_run"} if k in indices else old)
    assert "not_run" in stored.aggregates()["status"].to_pylist()
    (said,) = set(warned)
    assert gone in said
    assert "(and 1 more)" in said
    assert f"'modelops jobs reconcile {job.job}' repairs it" in said
    assert job.records.segments(job.job) == segments


def test_tables_of_an_ended_job_are_those_of_its_result_files_unless_these_are_damaged(
    tmp_path: Path,
) -> None:
    job = StoredJob(tmp_path, SETS, N)
    service = JobService(job.records, job.objects, Home.at(tmp_path), Idle(job))
    file = io.BytesIO()
    assert not service.write_finished(job.job, "replicates", file), "the job has not begun"
    job.run()
    for name in ("replicates", "aggregates", "attempts"):
        made, found = io.BytesIO(), io.BytesIO()
        service.answer(job.job, lambda contents, name=name, made=made: stream_table(contents, name, made))  # type: ignore[misc]
        assert service.write_finished(job.job, name, found)
        made.seek(0)
        found.seek(0)
        expected, table = (pa.ipc.open_stream(f).read_all() for f in (made, found))
        assert table.equals(expected, check_metadata=True)
        assert table.num_rows
    assert not service.write_finished(job.job, "failures", file), "it has no file"
    path = f"{job_folder(job.job)}/results/replicates.parquet"
    data = job.objects.get(path)
    job.objects.put(path, data[:200] + bytes([data[200] ^ 1]) + data[201:])
    assert not service.write_finished(job.job, "replicates", file)
    job.objects.delete(path)
    assert not service.write_finished(job.job, "replicates", file)


def test_without_its_parameters_a_job_says_what_is_lost_what_is_not_and_what_to_do(tmp_path: Path) -> None:
    job = StoredJob(tmp_path, SETS, N)
    job.run()
    service = JobService(
        job.records, job.objects, Home.at(tmp_path), Idle(job), reconciler=reconciler(job, Idle(job))
    )
    (parameters,) = names(job, "parameters.parquet")
    contents = service.contents(job.job)
    before = {
        "replicates": replicates_table(contents),
        "aggregates": aggregates_table(contents),
        "failures": failures_table(contents),
    }
    for harm in ("zero", "remove"):
        damage(job, parameters, harm)
        with pytest.raises((NotFoundError, IntegrityError)) as raised:
            finalize(service.contents(job.job))
        said = str(raised.value)
        assert "parameters.parquet is" in said
        assert "outcomes are not lost with it ('modelops jobs sync' copies them)" in said
        assert "from a backup" in said
        for name, whole in before.items():
            file = io.BytesIO()
            service.answer(job.job, lambda contents, name=name, file=file: stream_table(contents, name, file))  # type: ignore[misc]
            file.seek(0)
            bare = pa.ipc.open_stream(file).read_all()
            assert bare.schema.metadata[b"modelops.parameters_lost"].decode() == said
            known = [column for column in whole.column_names if column in bare.column_names]
            unknown = {"param_id", "seed"} & set(known)
            assert set(whole.column_names) - set(known) == ({"a", "bad"} if name != "failures" else set())
            assert bare.select([c for c in known if c not in unknown]) == whole.select(
                [c for c in known if c not in unknown]
            )
            assert all(bare[column].null_count == whole.num_rows for column in unknown)
        stored = Job(job.job, Home.at(tmp_path))  # without a server
        assert stored.results().select(["param", "replicate", "status", "x"]) == before["replicates"].select(
            ["param", "replicate", "status", "x"]
        )
        kinds = stored.failure_summary().to_pylist()
        whole_kinds = failure_summary(before["failures"], stored._rerun_command).to_pylist()
        assert kinds == [{**kind, "param_id": None, "seed": None} for kind in whole_kinds] != []
        assert all(" --param 1 --replicate " in kind["command"] for kind in kinds)
        printed = io.StringIO()
        show_failures(Console(file=printed), stored, [{**kinds[0], "error_type": "KeyError"}])
        assert f"run it again: {kinds[0]['command']}\n" in printed.getvalue()
        (found,) = service.reconcile(job.job).findings
        assert service.reconcile(job.job).before[-1] == found, "whoever asks soon afterwards is told as well"
        assert found.text.startswith("parameters.parquet is"), "no name below the root of the storage"
    listed = [file.name for file in service.files.page(job.job, "", 1000, 60.0).files]
    assert [name for name in listed if name.startswith("segments/")]
