"""A replicate that runs long keeps nothing else waiting: what is finished beside it is stored, what is
behind it moves."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any

import driving
import pytest
from driving import submitted, wait_for

import modelops as mo
from modelops.states import JobState, ReplicateStatus
from modelops.store.segments import job_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from modelops.cluster.embedded import EmbeddedCluster
    from modelops.server.supervisor import Supervisor
    from modelops.study.ids import JobId

ONE_WAITS = """
import time
from pathlib import Path

def simulate(params, seed):
    folder = Path(params["folder"])
    with open(folder / "starts", "a") as f:
        f.write(f"{seed}\\n")
    print("seed", seed)
    while seed in params["long"] and not (folder / "go").exists():
        time.sleep(0.01)
    return {"x": seed}
"""


class Server(driving.Server):
    def submit(self, bundle: Path, folder: Path, long: list[int], **study: Any) -> JobId:
        folder.mkdir(exist_ok=True)
        sets = [{"folder": str(folder), "long": long}]
        return submitted(
            mo.Study(bundle=bundle, parameters=sets, **study), self.cluster.home, database=self.url
        )

    def n_succeeded(self, job: JobId) -> int:
        return self.records.counts(job).get(ReplicateStatus.SUCCEEDED, 0)


@pytest.fixture
def server(cluster: EmbeddedCluster, tmp_path: Path) -> Iterator[Server]:
    server = Server(cluster, tmp_path)
    with closing(server.records):
        yield server
        for folder in tmp_path.iterdir():  # nothing of a test that failed keeps the workers of the next one
            if folder.is_dir():
                (folder / "go").touch()
        server.stop()


def starts(folder: Path) -> list[int]:
    path = folder / "starts"
    return sorted(map(int, path.read_text().split())) if path.exists() else []


def shown(supervisor: Supervisor, job: JobId) -> dict[str, int]:
    view = supervisor.view(job)
    return {} if view is None else dict(view.counts)


def test_all_others_of_a_chunk_are_stored_and_shown_while_one_runs_long(
    server: Server, write_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    folder, n, long = tmp_path / "a", 400, 306
    job = server.submit(write_bundle(ONE_WAITS), folder, [long], seeds=list(range(n)))
    supervisor = server.start()
    wait_for(lambda: shown(supervisor, job) == {"succeeded": n - 1, "running": 1}, "all but one are shown")
    assert server.n_succeeded(job) == n - 1
    parts = [s for s in server.records.segments(job) if s.attempt.endswith("p")]
    assert parts, "the one that runs long had a chunk to itself, so this shows nothing"
    logs = {
        name.rpartition("/")[2].partition(".")[0] for name in server.objects.list(f"{job_folder(job)}/logs")
    }
    assert {s.attempt for s in parts} <= logs
    (folder / "go").touch()
    server.wait_for(job, JobState.SUCCEEDED)
    assert starts(folder) == list(range(n))  # none was begun twice


def test_a_new_driver_adopts_the_rest_of_an_attempt_that_has_handed_in_a_part(
    server: Server, write_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    folder, n, long = tmp_path / "a", 400, 306
    job = server.submit(write_bundle(ONE_WAITS), folder, [long], seeds=list(range(n)))
    server.start()
    wait_for(lambda: long in starts(folder), "the long one runs")
    server.stop()  # nobody hears of the part
    supervisor = server.start()
    wait_for(lambda: shown(supervisor, job) == {"succeeded": n - 1, "running": 1}, "all but one are shown")
    (folder / "go").touch()
    server.wait_for(job, JobState.SUCCEEDED)
    assert [seed for seed in starts(folder) if seed == long] == [long]


def test_what_waits_behind_another_job_moves_to_a_worker_that_is_free(
    server: Server, write_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    bundle, a, b = write_bundle(ONE_WAITS), tmp_path / "a", tmp_path / "b"
    first = server.submit(bundle, a, [0], seeds=[0])
    supervisor = server.start()
    wait_for(lambda: starts(a) == [0], "the first job has a worker")
    second = server.submit(bundle, b, [1, 2], seeds=[1, 2])
    wait_for(lambda: len(starts(b)) == 1, "the second job has the other one")
    wait_for(lambda: shown(supervisor, second) == {"running": 1, "pending": 1}, "its other replicate waits")
    (b / "go").touch()
    server.wait_for(second, JobState.SUCCEEDED)
    assert server.records.job(first).state == JobState.RUNNING
    assert starts(b) == [1, 2]
    (a / "go").touch()
    server.wait_for(first, JobState.SUCCEEDED)
