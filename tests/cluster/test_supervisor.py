"""Many jobs, one pool: who is driven when, and what a restart of the drivers leaves as it was."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import closing
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import driving
import pytest
from driving import submitted, wait_for
from msgspec.structs import replace

import modelops as mo
from modelops.driver import loop, machine
from modelops.driver.hands import Hands
from modelops.errors import StorageError
from modelops.server import aside, setbacks
from modelops.server import supervisor as supervising
from modelops.server.drive import JobDriver
from modelops.server.extend import resume_job
from modelops.server.job_files import known_lock
from modelops.server.store_ledger import StoreLedger
from modelops.states import JobEvent, JobState, ReplicateStatus
from modelops.store import Records
from modelops.store.leases import FileLeases
from modelops.store.overview import picture
from modelops.store.segments import job_folder
from modelops.store.submissions import record_submission
from modelops.study.ids import new_job_id
from modelops.study.pools import Aliases, Membership
from modelops.study.spec import RetryPolicy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from modelops.cluster.embedded import EmbeddedCluster
    from modelops.server.supervisor import Supervisor
    from modelops.study.ids import JobId
    from modelops.worker.messages import HeldAttempt


class Server(driving.Server):
    def submit(self, bundle: Path, **study: Any) -> JobId:
        defaults: dict[str, Any] = {"parameters": [{"folder": str(self.folder)}], "aggregate": []}
        return submitted(
            mo.Study(bundle=bundle, **{**defaults, **study}), self.cluster.home, database=self.url
        )

    def state(self, job: JobId) -> JobState:
        return self.records.job(job).state


@pytest.fixture
def server(cluster: EmbeddedCluster, tmp_path: Path) -> Iterator[Server]:
    server = Server(cluster, tmp_path)
    with closing(server.records):
        yield server
        (tmp_path / "go").touch()  # nothing of a test that failed keeps the workers of the next one
        server.stop()


WAITS = """
import time
from pathlib import Path

def simulate(params, seed):
    folder = Path(params["folder"])
    with open(folder / "starts", "a") as f:
        f.write(f"{seed}\\n")
    while not (folder / "go").exists():
        time.sleep(0.01)
    return {"x": seed}
"""


def n_starts(folder: Path) -> int:
    path = folder / "starts"
    return len(path.read_text().split()) if path.exists() else 0


def test_jobs_beyond_the_limit_wait_in_order_and_can_be_cancelled_while_they_do(
    server: Server, write_bundle: Callable[..., Path]
) -> None:
    bundle = write_bundle(WAITS)
    first, second, third = (server.submit(bundle, seeds=[n]) for n in range(3))
    supervisor = server.start(max_driven=1)
    wait_for(lambda: n_starts(server.folder) == 1, "the first job runs")
    assert server.records.ask_cancel(third, "somebody")
    supervisor.wake()
    server.wait_for(third, JobState.CANCELLED)
    assert server.records.job(third).reason == "cancelled by somebody"
    assert (server.state(first), server.state(second)) == (JobState.RUNNING, JobState.QUEUED)
    assert supervisor.view(second) is None

    def runs() -> bool:
        view = supervisor.view(first)
        return view is not None and (view.state, view.counts) == (JobState.RUNNING, {"running": 1})

    wait_for(runs, "its view says so")
    (server.folder / "go").touch()
    server.wait_for(first, JobState.SUCCEEDED)
    server.wait_for(second, JobState.SUCCEEDED)
    assert n_starts(server.folder) == 2
    assert not server.records.ask_cancel(first, "too late")


def test_jobs_that_no_worker_can_run_now_do_not_keep_others_from_running(
    server: Server, write_bundle: Callable[..., Path]
) -> None:
    bundle = write_bundle("def simulate(params, seed):\n    return {'x': 1 // seed}")
    retry = mo.Retry(max_retries=1, initial_delay=3600, on={"failed"})
    elsewhere = server.submit(bundle, seeds=[1], pools=["moon"])
    later = server.submit(bundle, seeds=[0], retry=retry, fail_fast=False)
    here = server.submit(bundle, seeds=[1])
    supervisor = server.start(max_driven=1)
    server.wait_for(here, JobState.SUCCEEDED)
    assert (server.state(elsewhere), server.state(later)) == (JobState.RUNNING, JobState.RUNNING)
    wait_for(lambda: not supervisor.is_full, "its driver has ended, too")


def test_any_number_of_jobs_that_wait_for_a_worker_of_their_pool_holds_up_no_other_and_runs_when_one_comes(
    server: Server, write_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervising, "MAX_WAITING", 1)
    monkeypatch.setattr(supervising, "MAX_HELD_UP", 2)
    bundle = write_bundle("def simulate(params, seed):\n    return {'x': seed}")
    waiting = [server.submit(bundle, seeds=[n], pools=["Moon"]) for n in range(6)]
    here = server.submit(bundle, seeds=[7])
    supervisor = server.start(max_driven=1)
    server.wait_for(here, JobState.SUCCEEDED)
    wait_for(lambda: len(supervisor.driven()) == 1, "no more than one of those that wait has a driver")
    (first,) = supervisor.driven()
    views = {job: supervisor.view(job) for job in waiting}
    assert all(v is not None and [p.name for p in v.pools] == ["Moon"] for v in views.values())
    assert all(v is not None and v.pools[0].waiting_since is not None for v in views.values())
    assert server.records.ask_cancel(waiting[-1], "somebody")
    supervisor.wake()
    server.wait_for(waiting[-1], JobState.CANCELLED)
    other = server.submit(bundle, seeds=[8])
    supervisor.wake()
    server.wait_for(other, JobState.SUCCEEDED)
    monkeypatch.setattr(server.cluster, "membership", lambda _worker: Membership("moon"))
    supervisor.wake()
    for job in {*waiting[:-1]} - {first}:  # this one has not heard that the workers say something else now
        server.wait_for(job, JobState.SUCCEEDED)


SECOND_TIME = """
from pathlib import Path

def simulate(params, seed):
    first = not (Path(params["folder"]) / f"tried-{seed}").exists()
    (Path(params["folder"]) / f"tried-{seed}").touch()
    return {"x": 1 // (not first)}
"""


def test_any_number_of_jobs_with_nothing_but_delayed_retries_holds_up_no_other_and_goes_on_in_time(
    server: Server, write_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervising, "MAX_WAITING", 1)
    monkeypatch.setattr(supervising, "MAX_HELD_UP", 2)
    bundle = write_bundle(SECOND_TIME)
    retry = mo.Retry(max_retries=1, initial_delay=3600.0, on={"failed"})
    waiting = [server.submit(bundle, seeds=[n], retry=retry) for n in range(6)]
    here = server.submit(
        write_bundle("def simulate(params, seed):\n    return {'x': seed}", name="other"), seeds=[7]
    )
    supervisor = server.start(max_driven=1)
    server.wait_for(here, JobState.SUCCEEDED)
    wait_for(lambda: len(supervisor.driven()) == 1, "no more than one of those that sleep has a driver")
    views = [supervisor.view(job) for job in waiting]
    assert all(v is not None and (v.state, v.counts) == (JobState.RUNNING, {"pending": 1}) for v in views)
    assert all(v is not None and v.eta is not None and v.eta <= 3600.0 for v in views)
    assert server.records.ask_cancel(waiting[-1], "somebody")
    supervisor.wake()
    server.wait_for(waiting[-1], JobState.CANCELLED)
    asleep = {*waiting[:-1]} - {*supervisor.driven()}
    monkeypatch.setattr(
        aside, "WAKE_BEFORE_S", 3600.0
    )  # as if their time had come; their drivers wait for it again
    monkeypatch.setattr(supervising, "WORTH_SLEEPING_S", 3600.0)
    monkeypatch.setattr(supervising, "MAX_HELD_UP", 6)
    supervisor.wake()
    wait_for(lambda: asleep <= {*supervisor.driven()}, "they are driven again")
    recorded = {job: server.records.retried(job) for job in asleep}
    assert all([number for _, number, _ in retried] == [2] for retried in recorded.values())


@pytest.mark.parametrize("damaged", [False, True], ids=["gone", "damaged"])
def test_a_job_whose_parameters_are_lost_says_so_ends_soon_and_goes_on_when_they_are_back(
    server: Server, write_bundle: Callable[..., Path], damaged: bool
) -> None:
    job = server.submit(write_bundle("def simulate(params, seed):\n    return {'x': seed}"), seeds=[1, 2])
    name = f"{job_folder(job)}/parameters.parquet"
    parameters = server.objects.get(name)
    server.objects.delete(name)
    if damaged:
        server.objects.put_new(name, parameters[:-8] + bytes(8))
    wrong = f"{name} is {'damaged' if damaged else 'gone'}"
    supervisor = server.start()

    def doing() -> str:
        view = supervisor.view(job)
        return "" if view is None else view.doing

    wait_for(lambda: "as its driver failed" in doing(), "what is wrong is seen while it is tried again")
    assert wrong in doing()
    server.wait_for(job, JobState.FAILED)
    assert wrong in server.records.job(job).reason
    kinds = [event.kind for event in server.records.events(job)]
    assert kinds.count("driver_failed") == 2, "what is gone is looked for once more, and no more"
    server.objects.put(name, parameters)
    resume_job(server.records, server.objects, job, "me")
    supervisor.wake()
    server.wait_for(job, JobState.SUCCEEDED)


def test_a_new_job_is_driven_from_the_moment_it_is_recorded_unless_it_must_wait_its_turn(
    server: Server, write_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path}/elsewhere.db"  # what two jobs need is stored, and here there are no rows of them
    study = mo.Study(bundle=write_bundle("def simulate(params, seed):\n    return {'x': seed}"), aggregate=[])
    jobs = [submitted(study, server.cluster.home, database=url) for _ in range(2)]
    with closing(Records.open(url)) as elsewhere:
        first, second = (replace(elsewhere.job(job), n_events=1) for job in jobs)
    supervisor = server.start(max_driven=1)
    supervisor.wake = lambda: None  # type: ignore[method-assign]  # nobody looks for jobs because of this one
    with supervisor.beginning(first.job, first.bundle, None) as new:
        assert new is not None
        with supervisor.beginning(second.job, second.bundle, None) as other:
            assert other is None, "one is driven already"
        recorded = record_submission(server.records, first, None, who="me", why="", limit=9, begin=new.take)
        new.recorded(recorded)
    assert (recorded.epoch, recorded.n_events) == (1, 2)
    server.wait_for(first.job, JobState.SUCCEEDED)
    kinds = [event.kind for event in server.records.events(first.job)]
    assert kinds[:3] == ["created", "lease_taken", "started"], "by no driver but the first"
    assert kinds.count("lease_taken") == 1


def test_work_of_a_new_job_goes_out_before_it_is_recorded_that_the_job_has_begun(
    server: Server, write_bundle: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path}/elsewhere.db"
    home, bundle = server.cluster.home, write_bundle("def simulate(params, seed):\n    return {'x': seed}")
    supervisor = server.start()
    server.wait_for(
        server.submit(bundle, parameters=[{}]), JobState.SUCCEEDED
    )  # its environment is there now
    job = submitted(mo.Study(bundle=bundle, parameters=[{}], aggregate=[]), home, database=url)
    with closing(Records.open(url)) as elsewhere:
        row = replace(elsewhere.job(job), n_events=1)
    done: list[object] = []
    simulate, change = Hands.simulate, StoreLedger.change_state

    def submitting(self: Hands, command: Any) -> None:
        done.append("submitted")
        simulate(self, command)

    def changing(self: StoreLedger, command: Any) -> None:
        done.append(command.event)
        change(self, command)

    monkeypatch.setattr(Hands, "simulate", submitting)
    monkeypatch.setattr(StoreLedger, "change_state", changing)
    lock = known_lock(home.cache, row.bundle)
    assert lock is not None
    server.objects.put_new(f"{job_folder(job)}/lock", lock.text.encode())
    with supervisor.beginning(job, row.bundle, lock) as new:
        assert new is not None
        wait_for(lambda: supervisor._driven[job].driver._is_prepared(), "it is prepared")
        assert not done, "nothing goes out for a job that is not recorded"
        new.recorded(record_submission(server.records, row, None, who="me", why="", limit=9, begin=new.take))
    server.wait_for(job, JobState.SUCCEEDED)
    assert done[:3] == ["submitted", JobEvent.STARTED, JobEvent.ENVIRONMENT_READY]


def test_whoever_is_told_of_the_end_of_a_job_finds_that_it_does_not_go_on(
    server: Server, write_bundle: Callable[..., Path]
) -> None:
    """Who asks whether it goes on, and then waits to be told, would otherwise have missed that."""
    told: list[tuple[bool, bool]] = []
    (server.folder / "go").touch()
    job = server.submit(write_bundle(WAITS), replicates=1)
    supervisor: Supervisor = server.start(
        on_recorded=lambda job, ended: told.append((ended, supervisor.goes_on(job)))
    )
    server.wait_for(job, JobState.SUCCEEDED)
    wait_for(lambda: not supervisor.driven(), "the driver has ended")
    assert told == [(False, True)] * (len(told) - 1) + [(True, False)]
    assert not supervisor.goes_on(job)


def test_of_a_job_that_is_not_recorded_no_driver_and_no_lease_is_left(server: Server) -> None:
    supervisor = server.start()
    with pytest.raises(StorageError), supervisor.beginning(new_job_id(), "0" * 64, None) as new:  # noqa: PT012
        assert new is not None
        assert supervisor.driven() == [new.job]
        raise StorageError("the connection broke before the answer came")
    leases = server.folder / "leases"
    wait_for(lambda: not supervisor.driven() and not list(leases.iterdir()), "nothing is left")


def test_a_job_is_cancelled_at_once_if_nothing_of_it_has_begun_behind_another_job(
    server: Server, write_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "STOP_GRACE_S", 3600.0)
    bundle = write_bundle(WAITS)
    first = server.submit(bundle, seeds=[0, 1])
    supervisor = server.start()
    wait_for(lambda: n_starts(server.folder) == 2, "the first job has all workers")
    second = server.submit(bundle, seeds=[2, 3, 4, 5])
    supervisor.wake()
    wait_for(lambda: bool(supervisor.attempts(second)), "its chunks wait on the workers")

    def stands() -> bool:
        view = supervisor.view(second)
        return view is not None and view.counts == {"pending": 4}

    wait_for(stands, "it says that none of them runs")
    assert server.records.ask_cancel(second, "somebody")
    supervisor.wake()
    server.wait_for(second, JobState.CANCELLED)  # while the workers are another's
    (server.folder / "go").touch()
    server.wait_for(first, JobState.SUCCEEDED)
    assert n_starts(server.folder) == 2


def test_a_recorded_cancel_is_heard_by_whoever_drives_next(
    server: Server, write_bundle: Callable[..., Path]
) -> None:
    job = server.submit(write_bundle(WAITS), seeds=[0])
    server.start()
    wait_for(lambda: n_starts(server.folder) == 1, "it runs")
    server.stop()
    assert server.records.ask_cancel(job, "somebody")
    server.start()
    server.wait_for(job, JobState.CANCELLED)
    table = held(server, job)
    wait_for(lambda: not [x for x in table() if x.state != "ended"], "the replicate is stopped")


def test_a_cancel_that_comes_while_the_result_files_are_written_takes_nothing_away(
    server: Server, write_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go_on, finalize = threading.Event(), StoreLedger.finalize

    def when_it_may(ledger: StoreLedger) -> Any:
        assert may_go_on.wait(driving.DEADLINE_S)
        return finalize(ledger)

    monkeypatch.setattr(StoreLedger, "finalize", when_it_may)
    (server.folder / "go").touch()
    job = server.submit(write_bundle(WAITS), seeds=[4, 5])
    supervisor = server.start()
    server.wait_for(job, JobState.FINALIZING)
    assert server.records.ask_cancel(job, "somebody")
    supervisor.wake()
    may_go_on.set()
    server.wait_for(job, JobState.SUCCEEDED)  # all had succeeded when it was asked
    kinds = [event.kind for event in server.records.events(job)]
    assert kinds[-3:] == ["cancel_wanted", "results_written", "all_succeeded"]
    assert server.records.counts(job) == {ReplicateStatus.SUCCEEDED: 2}
    assert n_starts(server.folder) == 2
    assert not server.records.ask_cancel(job, "too late")


def held(server: Server, job: JobId) -> Callable[[], list[HeldAttempt]]:
    from modelops.worker import tasks

    client = server.cluster.client
    return lambda: [x for found in client.run(tasks.attempts, job, 0).values() for x in found]


def test_a_small_job_does_not_wait_for_the_end_of_a_big_one(
    server: Server, write_bundle: Callable[..., Path]
) -> None:
    slow = "import time\ndef simulate(params, seed):\n    time.sleep(0.05)\n    return {'x': seed}\n"
    big = server.submit(write_bundle(slow, name="slow"), replicates=2000)
    server.start()
    wait_for(lambda: bool(server.records.counts(big)), "the big job has outcomes")
    small = server.submit(write_bundle("def simulate(params, seed):\n    return {'x': 1}\n"), replicates=20)
    server.wait_for(small, JobState.SUCCEEDED)
    assert server.state(big) == JobState.RUNNING
    server.records.ask_cancel(big, "test")
    server.wait_for(big, JobState.CANCELLED)


FAILS = """
import os
from pathlib import Path

def simulate(params, seed):
    with open(Path(params["folder"]) / "starts", "a") as f:
        f.write(f"{seed}\\n")
    os._exit(3)
"""


def test_attempts_are_one_and_the_retries_whoever_drives_and_a_delayed_one_holds_no_worker(
    server: Server, write_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    n_passed = 0  # delays: each but these lasts longer than the test

    def delay_s(_retry: RetryPolicy, failed_attempts: int) -> float:
        return 0.0 if failed_attempts <= n_passed else 3600.0

    monkeypatch.setattr(RetryPolicy, "delay_s", delay_s)
    job = server.submit(write_bundle(FAILS), seeds=[7], retry=mo.Retry(max_retries=2, initial_delay=3600.0))
    table = held(server, job)
    for n in (1, 2):
        server.start()
        wait_for(lambda n=n: len(server.records.retried(job)) == n, f"attempt {n} has failed")  # type: ignore[misc]
        assert [x for x in table() if x.state != "ended"] == []
        server.stop()
        n_passed = n
    server.start()
    server.wait_for(job, JobState.FAILED)
    assert n_starts(server.folder) == 3
    assert server.records.counts(job) == {ReplicateStatus.CRASHED: 1}
    assert [number for _, number, _ in server.records.retried(job)] == [2, 3]


def test_the_timeout_counts_what_earlier_drivers_used(
    server: Server, write_bundle: Callable[..., Path]
) -> None:
    job = server.submit(write_bundle(WAITS), seeds=[0], timeout="1h")
    server.start()
    wait_for(lambda: n_starts(server.folder) == 1, "it runs")
    server.stop()
    row = server.records.job(job)
    assert 0 < row.used_s < 600
    server.records.record_use(job, row.epoch, 3599.0)
    server.start()
    server.wait_for(job, JobState.FAILED)
    assert server.records.job(job).reason.startswith("timeout of 3,600 s")
    assert server.records.counts(job) == {}


def test_drivers_that_die_soon_do_not_make_a_timeout_last_longer(
    server: Server, write_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "RECORD_USE_EVERY_S", 3600.0)  # each dies before that
    monkeypatch.setattr(loop.DriverLoop, "_record_use_at_the_end", lambda _self: None)
    job, used = server.submit(write_bundle(WAITS), seeds=[0], timeout="1h"), 0.0
    for _ in range(3):
        server.start()
        wait_for(lambda used=used: server.records.job(job).used_s > used, "time is counted")  # type: ignore[misc]
        server.stop()
        used = server.records.job(job).used_s
    server.records.record_use(job, server.records.job(job).epoch, 3599.9)
    server.start()
    server.wait_for(job, JobState.FAILED)
    assert server.records.job(job).reason.startswith("timeout of 3,600 s")


def test_a_second_cancel_waits_for_no_worker_that_does_not_answer(
    server: Server, write_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "STOP_GRACE_S", 3600.0)
    job = server.submit(write_bundle(WAITS), seeds=[0])
    supervisor = server.start()
    wait_for(lambda: n_starts(server.folder) == 1, "it runs")
    pids = server.cluster.client.run(os.getpid).values()
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        assert server.records.ask_cancel(job, "somebody")
        supervisor.wake()
        server.wait_for(job, JobState.CANCELLING)
        supervisor.abandon(job, "somebody")
        server.wait_for(job, JobState.CANCELLED)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    table = held(server, job)
    wait_for(lambda: not [x for x in table() if x.state != "ended"], "the replicate is stopped")


def test_a_job_whose_drivers_always_fail_ends_and_says_so(
    server: Server, write_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setbacks, "LONGEST_DELAY_S", 0.0)
    job = server.submit(write_bundle(WAITS), seeds=[0])
    real = JobDriver.run

    def run(self: JobDriver, pool: object) -> JobState:
        if self.job == job:
            raise RuntimeError("a bug")
        return real(self, pool)  # type: ignore[arg-type]

    monkeypatch.setattr(JobDriver, "run", run)
    other = server.submit(
        write_bundle("def simulate(params, seed):\n    return {}\n", name="good"), seeds=[0]
    )
    server.start()
    server.wait_for(other, JobState.SUCCEEDED)
    server.wait_for(job, JobState.FAILED)
    assert "RuntimeError('a bug')" in server.records.job(job).reason
    assert [e.kind for e in server.records.events(job)].count("driver_failed") == setbacks.MAX_FAILURES


def test_drivers_that_fail_after_a_good_while_do_not_add_up_to_the_end_of_a_job(
    server: Server, write_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job of weeks may lose more drivers than would end it if they failed in a row."""
    monkeypatch.setattr(setbacks, "LONGEST_DELAY_S", 0.0)
    monkeypatch.setattr(setbacks, "GOOD_RUN_S", 0.0)  # each lives for as long as that
    job = server.submit(write_bundle("def simulate(params, seed):\n    return {'x': seed}"), seeds=[0])
    real = JobDriver.run
    failed: list[JobId] = []

    def run(self: JobDriver, pool: object) -> JobState:
        if len(failed) <= setbacks.MAX_FAILURES:
            failed.append(self.job)
            raise RuntimeError("a bug")
        return real(self, pool)  # type: ignore[arg-type]

    monkeypatch.setattr(JobDriver, "run", run)
    server.start()
    server.wait_for(job, JobState.SUCCEEDED)
    assert len(failed) == setbacks.MAX_FAILURES + 1


def test_a_job_for_which_no_thread_can_be_started_is_taken_up_when_there_is_one(
    server: Server, write_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setbacks, "LONGEST_DELAY_S", 0.05)
    bundle = write_bundle("def simulate(params, seed):\n    return {'x': seed}")
    job, start = server.submit(bundle, seeds=[0]), threading.Thread.start
    refused: list[str] = []

    def refusing(thread: threading.Thread) -> None:
        if thread.name.startswith("modelops-drive-") and len(refused) < 2:
            refused.append(thread.name)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refusing)
    supervisor = server.start()
    wait_for(lambda: len(refused) == 2, "it is tried again")
    server.wait_for(job, JobState.SUCCEEDED)
    refused.clear()
    with supervisor.beginning(new_job_id(), "0" * 64, None) as new:
        assert new is None, "whoever submits it hears nothing of that; it waits its turn"
    leases = server.folder / "leases"
    wait_for(lambda: not supervisor.driven() and not list(leases.iterdir()), "nothing is left")


def test_a_job_that_is_set_apart_goes_on_afterwards_and_nothing_is_begun_twice(
    server: Server, write_bundle: Callable[..., Path]
) -> None:
    job = server.submit(write_bundle(WAITS), seeds=[0, 1])
    supervisor = server.start()
    wait_for(lambda: n_starts(server.folder) == 2, "both run")
    with supervisor.apart(job) as epoch:
        assert epoch is not None
        supervisor._look()  # as its thread may at any moment
        server.records.hold(job, epoch)
        assert supervisor.driven() == []
        assert supervisor.view(job) is None
    wait_for(lambda: len(supervisor.attempts(job)) == 2, "both are adopted")
    (server.folder / "go").touch()
    server.wait_for(job, JobState.SUCCEEDED)
    assert n_starts(server.folder) == 2


def test_a_lease_that_could_not_be_given_back_is_not_given_back_once_the_job_is_driven_again(
    server: Server, write_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = server.submit(write_bundle(WAITS), seeds=[0])
    supervisor = server.start()
    wait_for(lambda: n_starts(server.folder) == 1, "it runs")
    with monkeypatch.context() as away:

        def refuse(_leases: FileLeases, _job: JobId) -> None:
            raise StorageError("the database does not answer")

        away.setattr(FileLeases, "release", refuse)
        with supervisor.apart(job) as epoch:
            assert epoch is not None
        wait_for(lambda: len(supervisor.attempts(job)) == 1, "it is driven again")
    supervisor._look()
    assert FileLeases(server.records, server.folder / "leases").take(job, "another") is None
    (server.folder / "go").touch()
    server.wait_for(job, JobState.SUCCEEDED)
    leases = server.folder / "leases"
    wait_for(lambda: not list(leases.iterdir()), "when it has ended the lease is given back")


def test_a_driver_that_was_cut_off_goes_on_with_what_the_workers_run(
    server: Server, write_bundle: Callable[..., Path]
) -> None:
    job = server.submit(write_bundle(WAITS), seeds=[0, 1])
    supervisor, told = server.start(), server.cluster._listeners
    wait_for(lambda: n_starts(server.folder) == 2, "both run")
    slots = server.cluster.workers()
    for worker in slots:
        told.left(worker, False)
    wait_for(lambda: not supervisor.attempts(job), "it has no worker")
    for worker in slots:
        told.joined(worker, 1)
    wait_for(lambda: len(supervisor.attempts(job)) == 2, "both are adopted")
    (server.folder / "go").touch()
    server.wait_for(job, JobState.SUCCEEDED)
    assert n_starts(server.folder) == 2


def test_a_job_waits_for_a_worker_of_its_pools_through_restarts_and_says_so(
    server: Server, write_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = sorted(server.cluster.workers())
    homes = {first: Membership("asia"), second: Membership("eu_west_1", {"region": "europe"})}
    homes["tls://old"] = Membership("us")
    monkeypatch.setattr(server.cluster, "membership", lambda worker: homes[worker])
    monkeypatch.setattr(server.cluster, "refused", lambda: {"tls://old": "a table of versions"})
    (server.folder / "go").touch()
    job = server.submit(write_bundle(WAITS), seeds=[*range(20)], pools=["us", "EU"])
    since = []
    for _ in range(2):
        supervisor = server.start(aliases=Aliases.of_table({"us": ["usa"]}, "aliases"))
        since += waiting(supervisor, job)
        wait_for(lambda: len(told(server, job)) == 2, "its story says so")
        assert not supervisor.attempts(job)
        server.stop()
    server.start(aliases=Aliases.of_table({"eu": ["eu-west-1"]}, "aliases"))
    server.wait_for(job, JobState.SUCCEEDED)
    assert len(since) == 4
    assert max(since) - min(since) < timedelta(seconds=2)  # not since each restart
    assert picture(server.records, job).pools == {"EU": {"succeeded": 20}}
    assert {text for kind, text in told(server, job) if kind == "pool_waits"} == {
        "no worker of the pool us can be given work: 1 worker is connected with versions that do not fit",
        "no worker of the pool EU is connected",
    }
    assert [text for kind, text in told(server, job) if kind == "pool_joined"] == [
        "a worker of the pool EU is connected"
    ]


def waiting(supervisor: Supervisor, job: JobId) -> list[datetime]:
    """Return since when the job waits for each pool, once it is known that it could run and does not."""

    def looks() -> bool:
        view = supervisor.view(job)
        return view is not None and view.state is JobState.RUNNING and view.pools != ()

    wait_for(looks, "its driver looks at the pools")
    view = supervisor.view(job)
    assert view is not None
    return [pool.waiting_since for pool in view.pools if pool.waiting_since is not None]


def told(server: Server, job: JobId) -> list[tuple[str, str]]:
    """Return what the job's story says of pools."""
    return [(e.kind, e.text) for e in server.records.events(job) if e.kind.startswith("pool_")]
