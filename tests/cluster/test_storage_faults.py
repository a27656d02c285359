"""Disks that fill up or cannot be written, databases and storage services that die, under a pool that runs a job.

Each time: what is wrong is said, by name and with what to do, by the job, its story, the log, and ``modelops status``;
nothing is begun while nothing can be kept; the job goes on by itself; and its results are those of an undisturbed run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.process.pools import PoolHome, wait_for
from volumes import Volume, can_mount

import modelops as mo
from modelops.client.http import Http
from modelops.client.server import Local
from modelops.errors import ServerUnreachableError
from modelops.states import JobState
from modelops.store import Records

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from services import S3, Postgres

    from modelops.client.job import Job

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
COMMAND = Path(sys.executable).parent / "modelops"
PARAMS, N = 3, 12

MODEL = """
import os, random, time


def note(params, text):
    fd = os.open(params["journal"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, text.encode())
    os.close(fd)


def simulate(params, seed, context):
    note(params, f"{params['p']} {context.replicate}\\n")
    chance = random.Random(seed)
    time.sleep(0.05)
    return {"x": chance.random(), "text": chance.randbytes(4000).hex(), "large": chance.randbytes(100_000)}


def summarize(replicates):
    return {"n": len(replicates), "mean": sum(r["x"] for r in replicates) / len(replicates)}
"""


@dataclass
class Place:
    """A pool that runs one study again and again."""

    pool: PoolHome
    root: Path
    bundle: Path
    calm: dict[str, str]

    def submit(self) -> Job:
        self.journal.unlink(missing_ok=True)
        parameters = [{"p": p, "journal": str(self.journal)} for p in range(PARAMS)]
        study = mo.Study(
            bundle=self.bundle, parameters=parameters, replicates=N, seed=7, aggregate="model:summarize"
        )
        return mo.submit(study)

    @property
    def journal(self) -> Path:
        return self.root / "journal"

    def begun(self) -> list[str]:
        return self.journal.read_text().splitlines() if self.journal.exists() else []

    def command(self, *words: str) -> tuple[int, Any]:
        done = subprocess.run(
            [COMMAND, *words, "--json"],
            env=self.pool.environ,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        return done.returncode, json.loads(done.stdout) if done.stdout else done.stderr

    def log(self, role: str) -> str:
        return (self.pool.home.logs / f"{role}.log").read_text()

    def digests(self, job: Job) -> dict[str, str]:
        """Return the digests of the result files, as a user gets them."""
        folder = self.root / "synced" / job.id
        job.sync(folder)
        names = ("replicates.parquet", "aggregates.parquet")
        return {n: hashlib.sha256((folder / "results" / n).read_bytes()).hexdigest() for n in names}

    def check_undisturbed(self, job: Job, *, again: int = 0) -> None:
        """Wait for the end of a job; check that it is as if nothing had happened.

        ``again``: how many replicates may have been begun twice, as their outputs had no place.
        """
        wait_for(lambda: job.status().final, f"job {job.id} ends")
        status = job.status()
        assert (status.state, status.counts) == (JobState.SUCCEEDED, {"succeeded": PARAMS * N}), status
        assert status.waiting_for == ""
        assert self.digests(job) == self.calm
        with contextlib.closing(Records.open(self.pool.home.database_url)) as records:
            indices = [k for ref in records.segments(job.id) for lo, hi in ref.ranges for k in range(lo, hi)]
            assert sorted(indices) == list(range(PARAMS * N))
            assert records.mismatches() == {}
        begun = self.begun()
        assert len(set(begun)) == PARAMS * N
        assert len(begun) - len(set(begun)) <= again, "what had ended was begun again"


@contextlib.contextmanager
def placed(root: Path, bundle: Path, cache: Path, **environ: str) -> Iterator[Place]:
    """Start a pool of two workers, and run the study undisturbed."""
    with contextlib.ExitStack() as stack:
        monkeypatch = stack.enter_context(pytest.MonkeyPatch.context())
        (root / "home").mkdir(exist_ok=True)
        (root / "home" / "cache").symlink_to(cache)
        pool = PoolHome.at(root / "home", MODELOPS_WORKERS="2", **environ)
        stack.callback(pool.close)
        for name in [n for n in os.environ if n.startswith("MODELOPS_")]:
            monkeypatch.delenv(name)
        for name, value in pool.environ.items():
            if name.startswith(("MODELOPS_", "AWS_", "TMPDIR")):
                monkeypatch.setenv(name, value)
        place = Place(pool, root, bundle, {})
        job = place.submit()
        wait_for(lambda: job.status().final, "the undisturbed job ends")
        place.calm = place.digests(job)
        yield place


@dataclass(frozen=True)
class Fault:
    """``stop``, ``mend``: of what. ``named``: a text of every message. ``advice``: likewise. ``kind``: of the event."""

    name: str
    stop: Callable[[], None]
    mend: Callable[[], None]
    named: str
    advice: str
    kind: str
    again: int = 0


def suffer(place: Place, fault: Fault) -> None:
    """Let a fault come while a job runs, look at what is said of it, and let it go."""
    job = place.submit()
    wait_for(lambda: len(place.begun()) >= 8, "the job runs")
    fault.stop()
    try:
        server = Http(Local(place.pool.home), patience_s=0)

        def told() -> str:
            answer: dict[str, Any] = server.get("/server").as_type(dict)
            return str(answer["waiting"].get(job.id) or answer["database"])

        wait_for(lambda: fault.named in told(), f"{fault.name}: the server says what is wrong")
        assert fault.advice in told()
        wait_for(lambda: _stands_still(place), "nothing is begun any more")
        n = len(place.begun())
        code, status = place.command("status")
        said = [status["jobs_unknown"], *status["waiting"].values()]
        assert code == 0
        assert any(fault.named in text and fault.advice in text for text in said), status
        _, shown = place.command("jobs", "show", job.id)
        text = shown.get("waiting_for") or shown["reason"]
        assert fault.named in text, shown
        assert shown["state"] in ("running", "unknown"), shown
        assert len(place.begun()) == n
    finally:
        fault.mend()
    place.check_undisturbed(job, again=fault.again)
    check_story(place, job, fault)


def check_story(place: Place, job: Job, fault: Fault) -> None:
    events = [event for event in job.events() if event.kind.startswith(("store_", "storage_"))]
    story = [event for event in events if event.kind == fault.kind]
    assert story, [event.kind for event in job.events()]
    assert all(fault.named in event.text for event in story)
    if fault.kind == "store_lost":
        assert [event.kind for event in events[:2]] == ["store_lost", "store_back"]
        assert all(" UTC)" in event.text for event in story), "since when is said"
    assert fault.named in place.log("server")


def _stands_still(place: Place) -> bool:
    """Whether nothing was begun for a second, which is the time of many replicates."""
    before = len(place.begun())
    subprocess.run(["sleep", "1"], check=True)
    return len(place.begun()) == before


@pytest.fixture
def bundle(write_bundle: Callable[..., Path]) -> Path:
    return write_bundle(MODEL, table='model = "model:simulate"\naggregate = "model:summarize"')


def test_full_and_read_only_volumes_stop_a_job_for_as_long_as_they_are_so(
    tmp_path: Path, shared_cache: Path, bundle: Path
) -> None:
    if not can_mount(tmp_path):
        pytest.skip("mounting file systems in memory needs root")
    with contextlib.ExitStack() as stack:
        (tmp_path / "home").mkdir()
        objects = stack.enter_context(Volume(tmp_path / "objects", "64m"))
        database = stack.enter_context(Volume(tmp_path / "database", "16m"))
        state = stack.enter_context(Volume(tmp_path / "home" / "state", "16m"))
        url = f"sqlite:///{database.path}/modelops.db"
        storage = str(objects.path / "objects")
        place = stack.enter_context(
            placed(tmp_path, bundle, shared_cache, MODELOPS_STORAGE=storage, MODELOPS_DATABASE=url)
        )
        where, free, kind = str(objects.path), "free some space", "storage_away"
        # Begun again is the one for which there is no room, in a chunk that has outcomes and in the next: 2 for each
        # worker. And each time that as many were stored as make room for another (ten): 1 more, of 36 at most 3.
        n_again = 2 * 2 + 3
        for fault in (
            Fault("objects full", objects.fill, objects.free, where, free, kind),
            Fault("read-only", objects.forbid_writing, objects.allow_writing, where, "allow writing", kind),
            Fault("database full", database.fill, database.free, str(database.path), free, "store_lost"),
            Fault("state full", state.fill, state.free, str(state.path), "free s", kind, again=n_again),
        ):
            suffer(place, fault)


def test_a_database_or_a_storage_service_that_dies_stops_a_job_until_it_is_back(
    tmp_path: Path, shared_cache: Path, bundle: Path, postgres: Postgres, s3: S3
) -> None:
    with placed(
        tmp_path, bundle, shared_cache,
        MODELOPS_STORAGE=f"{s3.url}/faults", MODELOPS_DATABASE=postgres.new_database(), **s3.environ,
    ) as place:  # fmt: skip
        up, service = "see whether it is up", "see whether that service is up"
        for fault in (
            Fault("PostgreSQL", postgres.stop, postgres.start, f"{postgres.port}", up, "store_lost"),
            Fault("S3", s3.stop, s3.start, f"127.0.0.1:{s3.port}", service, "storage_away"),
        ):
            suffer(place, fault)


def test_a_full_folder_of_temporary_files_is_named_and_waited_for(
    tmp_path: Path, shared_cache: Path, bundle: Path, write_bundle: Callable[..., Path]
) -> None:
    if not can_mount(tmp_path):
        pytest.skip("mounting file systems in memory needs root")
    code = "import random\ndef simulate(params, seed):\n    return {'x': random.Random(seed).random()}\n"
    many = mo.Study(bundle=write_bundle(code, name="many"), parameters=[{}], replicates=200_000, seed=7)
    with (
        Volume(tmp_path / "temporary", "1m") as temporary,
        placed(tmp_path, bundle, shared_cache, TMPDIR=str(temporary.path)) as place,
    ):
        job = mo.submit(many)
        wait_for(lambda: bool(job.status().waiting_for) or job.status().final, "the job waits")
        said = job.status().waiting_for
        assert f"volume {temporary.path}" in said
        assert "TMPDIR" in said
        assert f"the result files of {job.id}" in said
        assert not job.status().final
        server = Http(Local(place.pool.home), patience_s=0)
        with pytest.raises(ServerUnreachableError, match=f"volume {temporary.path}"):
            server.get(f"/jobs/{job.id}/tables/replicates")
        temporary.grow("64m")
        wait_for(lambda: job.status().final, "the job ends")
        assert job.status().counts == {"succeeded": 200_000}
        assert len(set(job.results()["x"].to_pylist())) == 200_000
        assert "driver_failed" not in [event.kind for event in job.events()]
