"""Models that checkpoint and report, in real runners of every isolation, with a desk as a worker has it."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from tests.process.pool_bench import spec_of

from modelops.errors import StorageError
from modelops.processes import Outcome, ProcessPool, ReplicateSet, RunEnd, RunnerSpec, StopSignal
from modelops.states import ReplicateStatus as Status
from modelops.store.objects import FolderObjects
from modelops.study.ids import JobId, attempt_id
from modelops.worker.attempts import Attempt
from modelops.worker.desk import Desk, Report
from modelops.worker.storage_wait import when_storage_allows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from modelops.store.objects import Content

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")
DEADLINE_S = 60.0
CODE = """
    import multiprocessing, os, signal, subprocess, sys, threading, time

    def counts(params, seed, context):
        "Count to five. Dies by signal when it has counted as far as `dies` says, before or after a checkpoint."
        path = os.path.join(context.checkpoint_dir, "n")
        n = int(open(path).read()) if os.path.exists(path) else 0
        while n < 5:
            n += 1
            with open(params["log"], "a") as log: log.write(f"{seed}:{n} ")
            with open(path, "w") as file: file.write(str(n))
            if params.get("dies") == n and params["when"] == "before": os.kill(os.getpid(), signal.SIGKILL)
            context.checkpoint()
            if params.get("dies") == n: os.kill(os.getpid(), signal.SIGKILL)
        return {"n": n}

    def waits_for_storage(params, seed, context):
        context.checkpoint()
        return {}

    def by_others(params, seed, context):
        said = []
        open(os.path.join(context.checkpoint_dir, "state"), "w").write("x")
        def try_it():
            try: said.append(context.checkpoint())
            except ValueError as e: said.append(str(e))
        threads = [threading.Thread(target=try_it) for _ in range(3)]
        for one in threads: one.start()
        for one in threads: one.join()
        pid = os.fork()
        if pid == 0:
            try_it()
            os._exit(0 if "child" in said[-1] else 1)
        return {"said": said, "child": os.waitpid(pid, 0)[1]}

    def links_out(params, seed, context):
        os.symlink("/etc/passwd", os.path.join(context.checkpoint_dir, "users"))
        context.checkpoint()

    def reports(params, seed, context):
        for i in range(100_000):
            context.report(i / 200_000, i=i, loss=0.5)
        while not os.path.exists(params["seen"]):
            time.sleep(0.001)
        for i in range(100_000):
            context.report(0.5 + i / 200_000, i=i)
        context.report(7, end=True)
        return {"fraction": context.progress}

    def wrong_report(params, seed, context):
        context.report(*[(0.5,), (float("nan"),), (0.5,)][seed], **[{"x": open}, {}, {"x": "long" * 3_000}][seed])

    def one_report(params, seed, context):
        context.report(0.25, seed=seed)
"""


@pytest.fixture
def spec(tmp_path: Path) -> RunnerSpec:
    return spec_of(tmp_path / "bundle", CODE)


class Machine:
    """A worker's pool and desks on a machine of its own; storage is what machines share."""

    def __init__(self, folder: Path, objects: FolderObjects) -> None:
        self.folder, self.objects = folder, objects
        self.pool = ProcessPool(folder, slots=2)
        self.reports: list[dict[str, Any]] = []
        self.settled: list[str] = []
        self.notes: list[str] = []
        self.said: list[str] = []

    def run(
        self,
        spec: RunnerSpec,
        entry: str,
        n: int = 1,
        *,
        number: int = 1,
        stop: StopSignal | None = None,
        on_report: Callable[[dict[str, Any]], None] = lambda _: None,
        **params: object,
    ) -> tuple[list[Outcome], RunEnd]:
        """Run ``n`` replicates as attempt ``number``; those after the first may resume."""

        def report(one: Report) -> None:
            self.reports.append(dict(one))
            on_report(dict(one))

        def take(outcome: Outcome) -> None:
            outcomes.append(outcome)
            if outcome.index == desk.current:
                desk.ended(succeeded=outcome.status is Status.SUCCEEDED)

        outcomes: list[Outcome] = []
        stop = stop or StopSignal()
        attempt = Attempt(JobId("job_1"), attempt_id(1, number), 1, ((0, n),), stop=stop)
        desk = Desk(
            self.objects,
            lambda index: f"checkpoints/{index}",
            attempt.attempt,
            self.folder / "checkpoints" / str(number),
            may_resume=number > 1,
            stop=stop,
            patiently=lambda act: when_storage_allows(act, attempt, self.said.append),
            on_report=report,
        )
        one = ReplicateSet(
            params=msgspec.Raw(msgspec.json.encode(params)),
            param=0,
            index=0,
            replicate=0,
            seeds=tuple(range(n)),
            entropy_key="00" * 16,
        )
        try:
            end = self.pool.run(spec, entry, [one], on_outcome=take, desk=desk, stop=stop)
        finally:
            desk.close()
        self.settled += desk.settled
        self.notes += desk.notes
        assert not (self.folder / "checkpoints" / str(number)).exists()
        return outcomes, end


class WatchedObjects(FolderObjects):
    """Counts what is looked for, and is away while ``away`` is set."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.looks = 0
        self.away = threading.Event()
        self.refused = threading.Event()

    def put_new(self, name: str, content: Content) -> None:
        if self.away.is_set():
            self.refused.set()
            raise StorageError("storage is away")
        super().put_new(name, content)

    def list(self, prefix: str) -> Iterator[str]:
        self.looks += 1
        return super().list(prefix)


@pytest.fixture
def objects(tmp_path: Path) -> WatchedObjects:
    return WatchedObjects(tmp_path / "objects")


@pytest.fixture
def machine(tmp_path: Path, objects: WatchedObjects) -> Iterator[Callable[[], Machine]]:
    started: list[Machine] = []

    def start() -> Machine:
        started.append(Machine(tmp_path / f"machine-{len(started)}", objects))
        return started[-1]

    yield start
    for one in started:
        one.pool.close()


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE_S} s: {what}"
        threading.Event().wait(0.01)


def values(outcome: Outcome) -> dict[str, Any]:
    assert outcome.status is Status.SUCCEEDED, outcome.error
    return {name: msgspec.json.decode(data) for name, _, data in outcome.outputs}  # type: ignore[arg-type]


@pytest.mark.parametrize("isolation", ["warm", "fork", "spawn"])
def test_a_killed_replicate_goes_on_from_its_last_checkpoint_on_another_machine(
    tmp_path: Path,
    spec: RunnerSpec,
    machine: Callable[[], Machine],
    objects: WatchedObjects,
    isolation: str,
) -> None:
    spec, log = replace(spec, isolation=isolation), tmp_path / "log"
    deaths = [(2, "after"), (3, "before"), (4, "after"), (None, "")]
    for number, (dies, when) in enumerate(deaths, 1):
        here = machine()
        outcomes, _ = here.run(spec, "m:counts", 2, number=number, log=str(log), dies=dies, when=when)
        assert [o.status for o in outcomes] == [Status.CRASHED if dies else Status.SUCCEEDED] * 2
        if number == 1:
            assert objects.looks == 0  # nobody was here before
    assert [values(outcome) for outcome in outcomes] == [{"n": 5}] * 2
    for seed in "01":
        counted = [step[2:] for step in log.read_text().split() if step[0] == seed]
        assert counted == ["1", "2", "3", "3", "4", "5"]  # only 3 was killed before its checkpoint
    assert here.settled == ["checkpoints/0", "checkpoints/1"]
    manifests = [name for name in objects.list("checkpoints/0") if name.endswith("manifest")]
    assert manifests == ["checkpoints/0/0001-000003/2/manifest", "checkpoints/0/0001-000004/1/manifest"]


def test_storage_that_is_away_is_waited_for_and_not_charged_to_the_replicate(
    spec: RunnerSpec, machine: Callable[[], Machine], objects: WatchedObjects
) -> None:
    here, timeout_s = machine(), 2.5
    specs = [replace(spec, isolation=i, replicate_timeout_s=timeout_s) for i in ("warm", "fork")]
    for one in specs:
        assert here.run(one, "m:waits_for_storage")[0][0].status is Status.SUCCEEDED
    objects.away.set()
    began = time.monotonic()
    with ThreadPoolExecutor(2) as threads:
        runs = [
            threads.submit(here.run, one, "m:waits_for_storage", number=i) for i, one in enumerate(specs, 2)
        ]
        wait_for(lambda: time.monotonic() > began + timeout_s + 0.5, "longer than the replicate may take")
        assert not any(run.done() for run in runs)
        objects.away.clear()
        for run in runs:
            (outcome,), end = run.result(DEADLINE_S)
            assert outcome.status is Status.SUCCEEDED
            assert end.unstarted == ()
    assert set(here.said) == {"storage is away", ""}
    assert here.said.count("") == 2  # each said once that its wait is over


def test_a_run_that_is_to_stop_does_not_wait_for_storage_for_ever(
    spec: RunnerSpec, machine: Callable[[], Machine], objects: WatchedObjects
) -> None:
    here, stop = machine(), StopSignal(grace_s=0.2)
    objects.away.set()
    with ThreadPoolExecutor(1) as threads:
        run = threads.submit(here.run, spec, "m:waits_for_storage", 2, stop=stop)
        assert objects.refused.wait(DEADLINE_S)
        stop.stop()
        outcomes, end = run.result(DEADLINE_S)
    assert outcomes == []
    assert end.unstarted == (0, 1)


def test_threads_of_a_model_may_checkpoint_and_its_children_are_told_why_not(
    spec: RunnerSpec, machine: Callable[[], Machine]
) -> None:
    here = machine()
    for isolation in ("warm", "fork"):
        (outcome,), _ = here.run(replace(spec, isolation=isolation), "m:by_others")
        assert values(outcome) == {"said": [None, None, None], "child": 0}


def test_a_checkpoint_that_cannot_be_kept_fails_the_replicate_and_says_why(
    spec: RunnerSpec, machine: Callable[[], Machine], objects: WatchedObjects
) -> None:
    (outcome,), _ = machine().run(spec, "m:links_out")
    assert outcome.status is Status.FAILED
    assert outcome.error is not None
    assert outcome.error.type == "ValueError"
    assert "'users' to '/etc/passwd'" in outcome.error.message
    assert list(objects.list("checkpoints")) == []


@pytest.mark.parametrize("isolation", ["warm", "fork"])
def test_of_a_flood_of_reports_a_few_arrive_and_always_the_newest(
    tmp_path: Path, spec: RunnerSpec, machine: Callable[[], Machine], isolation: str
) -> None:
    here, seen = machine(), tmp_path / "seen"

    def look(report: dict[str, Any]) -> None:
        if report["values"].get("i") == 99_999 and report["fraction"] < 0.5:
            seen.touch()  # the model is silent, and waits for this

    began = time.monotonic()
    spec = replace(spec, isolation=isolation)
    (outcome,), _ = here.run(spec, "m:reports", on_report=look, seen=str(seen))
    took_s = time.monotonic() - began
    assert values(outcome) == {"fraction": 1.0}
    assert here.reports[-1] == {"index": 0, "fraction": 1.0, "values": {"end": True}}
    fractions = [report["fraction"] for report in here.reports]
    assert fractions == sorted(fractions)
    assert len(fractions) <= took_s + 4


def test_reports_of_many_quick_replicates_are_few(spec: RunnerSpec, machine: Callable[[], Machine]) -> None:
    here, began = machine(), time.monotonic()
    outcomes, _ = here.run(spec, "m:one_report", 3_000)
    assert len(outcomes) == 3_000
    assert 1 <= len(here.reports) <= 2 * (time.monotonic() - began) + 4


def test_a_report_that_makes_no_sense_is_an_error_of_the_model(
    spec: RunnerSpec, machine: Callable[[], Machine]
) -> None:
    outcomes, _ = machine().run(spec, "m:wrong_report", 3)
    errors = [outcome.error for outcome in outcomes]
    assert [(error.type, error.message.split(" ")[0]) for error in errors if error] == [
        ("TypeError", "context.report:"),
        ("ValueError", "context.report:"),
        ("ValueError", "context.report:"),
    ]
