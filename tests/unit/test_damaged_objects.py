"""Any stored object of a finished job, cut, zeroed or changed at any byte: who reads it says so, and none reads wrong.

What is run again because of it, is in ``test_reconcile.py``. Here: what readers say, and what the reconciler says of
what nothing could be made from again.
"""

from __future__ import annotations

import shutil
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from stored_job import SUMMARIZE, StoredJob
from test_reconciler import Nobody, reconciler

from modelops.bundles import bundle_digest, pack_bundle
from modelops.errors import ModelOpsError, StorageError
from modelops.server.reconcile import BEYOND_REPAIR, Mismatch
from modelops.states import FINAL_JOB_STATES
from modelops.store import Objects, Records
from modelops.store.aggregate_value import aggregate_value
from modelops.store.contents import JobContents
from modelops.store.failures import failures_table
from modelops.store.fetch import bundle_object, check_stored_bundle, fetch_snapshot
from modelops.store.job_log import read_log
from modelops.store.results import aggregates_table, attempts_table, replicates_table
from modelops.store.segments import job_folder
from modelops.study.ids import BundleDigest, attempt_id
from modelops.worker.job_lock import read_lock
from modelops.worker.job_log import JobLog

if TYPE_CHECKING:
    from collections.abc import Callable

SETS: list[dict[str, Any]] = [{"a": 1}, {"a": 2, "bad": True}, {"a": 0.5}]
N = 5
KINDS = ("segments", "packs", "aggregates", "executions", "parameters.parquet", "study.json", "lock", "logs",
         "results", "bundles")  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> StoredJob:
    """A job that has ended, with a bundle, a lock and a log."""
    root = tmp_path_factory.mktemp("finished")
    bundle = root / "bundle"
    bundle.mkdir()
    (bundle / "pyproject.toml").write_text(
        '[project]\nname = "b"\nversion = "1"\n[tool.modelops]\nmodel = "m:f"\n'
    )
    (bundle / "m.py").write_text("def f(params, seed):\n    return {}\n" * 20)
    digest = bundle_digest(bundle)
    job = StoredJob(root / "store", SETS, N, bundle=digest)
    with (root / "archive").open("w+b") as archive:
        pack_bundle(bundle, archive)
    job.objects.put_new(bundle_object(digest), root / "archive")
    with JobLog(job.objects, job.job, attempt_id(1, 1)) as log:
        log.write(0, b"hello\n" * 50)
    job.run(chunk=4)
    job.records.close()
    return job


def copy_of(finished: StoredJob, folder: Path) -> StoredJob:
    """Return the same job, in a place of its own."""
    root = finished.objects.local_path("v1").parents[1]  # type: ignore[union-attr]  # a folder is local
    shutil.copytree(root, folder / "store")
    copy = object.__new__(StoredJob)
    copy.__dict__ |= finished.__dict__
    copy.objects = Objects.open(folder / "store" / "objects")
    copy.records = Records.open(f"sqlite:///{folder / 'store' / 'modelops.db'}")
    return copy


def readings(job: StoredJob, cache: Path) -> dict[str, Callable[[], Any]]:
    """Return everything that can be read of a job, by name."""
    records, objects = job.records, job.objects
    bundle = records.job(job.job).bundle

    def contents() -> JobContents:
        return JobContents.of(objects, records, job.job)

    return {
        "replicates": lambda: replicates_table(contents()).to_pylist(),
        "aggregates": lambda: aggregates_table(contents()).to_pylist(),
        "attempts": lambda: attempts_table(contents()).num_rows,
        "failures": lambda: failures_table(contents()).to_pylist(),
        "outputs": lambda: [contents().output(0, replicate) for replicate in range(N)],
        "aggregate": lambda: [aggregate_value(contents(), param, SUMMARIZE) for param in range(len(SETS))],
        "ids": lambda: [id_ for ids in contents().parameters.ids() for id_ in ids],
        "sets": lambda: [one.values() for sets in contents().parameters.groups() for one in sets],
        "log": lambda: read_log(contents(), None, None),
        "lock": lambda: read_lock(objects, job.job),
        "bundle": lambda: sorted(
            (path.name, path.read_bytes())
            for path in fetch_snapshot(objects, BundleDigest(bundle), cache).iterdir()
            if path.is_file()
        ),
        "archive": lambda: check_stored_bundle(objects, BundleDigest(bundle)),
    }


def mark(value: Any) -> str:
    """Return what is short and tells whether another reading gives the same."""
    return sha256(repr(value).encode()).hexdigest()


@pytest.fixture(scope="module")
def whole(finished: StoredJob, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What is read when nothing is damaged."""
    folder = tmp_path_factory.mktemp("whole")
    job = copy_of(finished, folder)
    try:
        return {name: mark(read()) for name, read in readings(job, folder / "cache").items()}
    finally:
        job.records.close()


def names(job: StoredJob, kind: str) -> list[str]:
    """Return the objects of a kind."""
    if kind == "bundles":
        return list(job.objects.list("v1/bundles"))
    return [name for name in job.objects.list(job_folder(job.job)) if name.split("/")[3] == kind]


def damaged(data: bytes, how: str, at: float) -> bytes:
    k = int(at * (len(data) - 1))
    match how:
        case "cut":
            return data[:k]
        case "zero the rest":
            return data[:k] + bytes(len(data) - k)
        case "zero one":
            return data[:k] + b"\0" + data[k + 1 :]
        case _:
            return data[:k] + bytes([data[k] ^ 0x55]) + data[k + 1 :]


def read_all(job: StoredJob, cache: Path, whole: dict[str, str], name: str) -> set[str]:
    """Read everything; return what could not be read. What was read is right, and what was not is named.

    Execution data (where, how long, how often a replicate ran) has no digest: of that only what cannot be read is
    found; and what was run again because of damage is in it, too.
    """
    refused = {}
    for what, read in readings(job, cache).items():
        try:
            found = read()
        except ModelOpsError as error:
            refused[what] = str(error)
        else:
            alike = what == "attempts" or (what == "failures" and "/executions/" in name)
            assert alike or mark(found) == whole[what], what
    stem = name.rpartition("/")[2].partition(".")[0]
    assert all(stem in text for text in refused.values()), refused
    return set(refused)


BLOWS = st.tuples(
    st.sampled_from(KINDS),
    st.sampled_from(["cut", "zero the rest", "zero one", "change one"]),
    st.floats(0, 1),
    st.integers(0, 1000),
)


@settings(max_examples=50, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(blow=BLOWS)
@example(blow=("executions", "zero one", 0.8442947386543247, 310))
def test_no_reader_returns_another_value_and_what_is_repaired_reads_as_before(
    finished: StoredJob, whole: dict[str, str], blow: tuple[str, str, float, int]
) -> None:
    kind, how, at, which = blow
    with TemporaryDirectory() as folder:
        job = copy_of(finished, Path(folder))
        try:
            there = names(job, kind)
            name = there[which % len(there)]
            before = job.objects.get(name)
            after = damaged(before, how, at)
            job.objects.put(name, after)
            refused = read_all(job, Path(folder) / "cache", whole, name)

            found = reconciler(job, Nobody(job)).run(job.job)
            if job.records.job(job.job).state not in FINAL_JOB_STATES:
                job.run()
            beyond = {finding.kind for finding in found} & BEYOND_REPAIR
            if beyond:
                (finding,) = (finding for finding in found if finding.kind in beyond)
                assert finding.what == name
                assert name in finding.text
                assert "submit" in finding.text
            elif kind != "logs":
                assert read_all(job, Path(folder) / "again", whole, name) == set()
            if after == before:
                assert not found
                assert not refused
            if refused and kind != "logs":
                assert found
        finally:
            job.records.close()


@pytest.mark.parametrize(
    ("kind", "mismatch"),
    [
        ("parameters.parquet", Mismatch.PARAMETERS_DAMAGED),
        ("lock", Mismatch.LOCK_DAMAGED),
        ("bundles", Mismatch.BUNDLE_DAMAGED),
    ],
)
def test_what_cannot_be_made_again_is_said_once_in_the_story_with_what_to_do(
    finished: StoredJob, tmp_path: Path, kind: str, mismatch: Mismatch
) -> None:
    job = copy_of(finished, tmp_path)
    (name,) = names(job, kind)
    job.objects.put(name, job.objects.get(name)[:-40])
    one = reconciler(job, Nobody(job))
    for _ in range(3):
        (finding,) = one.run(job.job)
        assert (finding.kind, finding.what) == (mismatch, name)
    said = {event.text for event in job.records.events(job.job) if event.kind == "mismatch"}
    short = name.removeprefix(f"{job_folder(job.job)}/")
    assert all("submit" in text and short in text for text in said)
    assert len(said) == (2 if kind == "bundles" else 1), "damaged, and then removed"
    assert job.records.job(job.job).state in FINAL_JOB_STATES
    job.records.close()


def test_storage_that_is_empty_is_away_and_no_reason_to_run_everything_again(
    finished: StoredJob, tmp_path: Path
) -> None:
    job = copy_of(finished, tmp_path)
    shutil.rmtree(tmp_path / "store" / "objects" / "v1")
    before = job.records.job(job.job)
    with pytest.raises(StorageError, match="is its volume mounted"):
        reconciler(job, Nobody(job)).run(job.job)
    (tmp_path / "store" / "objects" / ".tmp").rmdir()
    with pytest.raises(StorageError, match="is its volume mounted"):
        job.objects.get("v1/anything")
    assert job.records.job(job.job) == before
    job.records.close()
