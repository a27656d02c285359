"""Keep runner processes warm and run chunks, aggregates and calls in them. The public face of this room.

A process is used by one thread at a time and belongs to one `RunnerSpec`. Those that are idle are kept, the
least recently used goes first. This layer tries no replicate again: one whose process died has that outcome,
and only the replicates behind it go to a fresh process. A process that dies before it began is replaced, a few
times.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelops.counters import Counted, count
from modelops.errors import OUT_OF_MEMORY, ProcessError, ProcessExitedError, StartFailedError, StorageError
from modelops.processes.aggregate import AggregateRun, call_function
from modelops.processes.aggregates import make_aggregates, make_table
from modelops.processes.cgroup import CgroupHome, find_home, surrounding_cgroup
from modelops.processes.chunk import ChunkRun, ForkRefusedError, PartEnd
from modelops.processes.context import Conversation
from modelops.processes.frames import FRAME_BYTES, first_frame
from modelops.processes.memory import Surroundings
from modelops.processes.outcome import RunEnd, after, indices, part
from modelops.processes.pool_folder import PoolFolder
from modelops.processes.process import Kill, RunnerProcess
from modelops.processes.reaper import Reaper
from modelops.processes.stop import StopSignal
from modelops.processes.watch import STALLED_AFTER_S, Watch
from modelops.volumes import NO_ROOM

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from modelops.processes.context import ContextDesk
    from modelops.processes.many_made import ManyMade
    from modelops.processes.outcome import (
        AggregateOutcome,
        AnySet,
        FloatOutcomes,
        LogSink,
        Outcome,
        Row,
        RunnerSpec,
    )
    from modelops.rpc import AggregateSet, AggregateTable

logger = logging.getLogger(__name__)
START_TIMEOUT_S = 120.0  # to start Python and import the bundle; the first import of a large one compiles
STARTS = 3  # fresh processes in a row that may die before they begin
# These come from outside (the kernel out of memory, an operator): they say nothing of the bundle, unless the limit of
# the study is what the process exceeded.
_FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM)
_AUTO = CgroupHome(Path(), 0)  # stands for "what the machine offers"


class ProcessPool:
    """Runner processes of one worker. Thread-safe: each call runs in the thread that makes it.

    Parameters
    ----------
    root
        Folder for working directories, spooled outputs and logs; several pools may share it. What pools that
        were killed left there is removed.
    slots
        How many idle processes of each isolation are kept.
    log
        Folder for the rotating stderr logs of the processes; None: below ``root``.
    idle_s
        An idle process is ended after this time, at the next use of the pool or by `trim`.
    cgroups
        Where memory cgroups are made; None: watch resident sizes. By default what the machine offers.
    """

    def __init__(
        self,
        root: Path,
        *,
        slots: int,
        log: Path | None = None,
        idle_s: float = 600.0,
        start_timeout_s: float = START_TIMEOUT_S,
        stalled_after_s: float = STALLED_AFTER_S,
        cgroups: CgroupHome | None = _AUTO,
    ) -> None:
        self._slots, self._idle_s, self._start_timeout_s = slots, idle_s, start_timeout_s
        self._home = PoolFolder(root, log)
        self.folder, self.logs = self._home.path, self._home.logs
        self._cgroups = find_home() if cgroups is _AUTO else cgroups
        self._lock = threading.Lock()
        self._idle: list[RunnerProcess] = []  # least recently used first
        self._busy: set[RunnerProcess] = set()
        self._numbers = itertools.count(1)
        self._closed = False
        self._reaper = Reaper(hold=(self._home.lock_fd,))
        self._surroundings = Surroundings(surrounding_cgroup())
        self._watch = Watch(stalled_after_s=stalled_after_s, at_each_look=self._surroundings.look)
        self._unforkable: dict[RunnerSpec, str] = {}
        self.starts = 0

    def __enter__(self) -> ProcessPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- what runs ---------------------------------------------------------------------------------------

    def run(
        self,
        spec: RunnerSpec,
        entry: str,
        sets: Sequence[AnySet],
        *,
        on_outcome: Callable[[Outcome], None],
        on_floats: Callable[[FloatOutcomes], None] | None = None,
        stop: StopSignal | None = None,
        log: LogSink | None = None,
        desk: ContextDesk | None = None,
    ) -> RunEnd:
        """Run a whole chunk; survives the deaths of its processes.

        Parameters
        ----------
        sets
            In order of index.
        on_outcome
            Called in this thread, in order of index, soon after each replicate has ended.
        on_floats
            Called instead for replicates that returned a dict of floats, many at once; None: ``on_outcome`` it is.
        log
            Called in another thread with what is printed; all calls are made before this returns.
        desk
            Who keeps checkpoints and takes reports, called in this thread; None: nobody.

        Returns
        -------
            The indices without an outcome; there are some only if ``stop`` was used. Unless it was stopped, one of
            them at least has an outcome: who is asked to give back the rest makes some progress.

        Raises
        ------
        StartFailedError
            Several fresh processes in a row ended before they began with a replicate (at an import); carries exit
            and stderr of the last one.
        ProcessExitedError
            The same, but the last one was killed from outside.
        RemoteError
            The entry point cannot be imported.
        HandshakeError, ProcessTimeoutError, ProtocolError
            The process is not what it should be, or did not start in time.
        """
        pending = list(sets)
        stop = stop if stop is not None else StopSignal()
        conversation = Conversation(desk)
        deaths = 0  # in a row
        n_ended = 0
        while pending and not stop.stopped and not (stop.gives_back and n_ended):
            safe = replace(spec, isolation="spawn") if spec in self._unforkable else spec
            try:
                end = self._run_part(
                    safe,
                    entry,
                    pending,
                    on_outcome=on_outcome,
                    on_floats=on_floats,
                    stop=stop,
                    log=log,
                    conversation=conversation,
                )
            except ForkRefusedError as refused:
                self._unforkable[spec] = str(refused)
                logger.warning("%s", refused)
                pending = after(pending, refused.n)
                continue
            except ProcessExitedError as death:
                deaths += 1
                if deaths < STARTS:
                    continue
                too_large = spec.memory_bytes is not None and death.stderr_tail.startswith(OUT_OF_MEMORY)
                if death.returncode in _FROM_OUTSIDE and not too_large:
                    raise
                raise StartFailedError(death.doing, death.returncode, death.stderr_tail) from death
            deaths = 0
            n_ended += end.n
            pending = after(pending, end.n)
            if end.stopped:
                break
        return RunEnd(unstarted=tuple(indices(pending)))

    def _run_part(
        self,
        spec: RunnerSpec,
        entry: str,
        pending: list[AnySet],
        *,
        on_outcome: Callable[[Outcome], None],
        on_floats: Callable[[FloatOutcomes], None] | None,
        stop: StopSignal,
        log: LogSink | None,
        conversation: Conversation,
    ) -> PartEnd:
        alone = spec.isolation == "spawn"  # a new interpreter for every replicate
        batch = part(pending[0], 0, 1) if alone else first_frame(pending, FRAME_BYTES)
        with self._process(spec, [entry], log) as process:
            if spec.isolation == "fork" and (reason := process.fork_refused) is not None:
                raise ForkRefusedError(f"fork isolation is not safe in this bundle: {reason}")
            reused = process.runs > 0
            end = ChunkRun(
                process,
                entry,
                batch,
                on_outcome=on_outcome,
                on_floats=on_floats,
                stop=stop,
                start_timeout_s=self._start_timeout_s,
                conversation=conversation,
            ).run()
            if end.not_begun and not reused:
                raise process.death("replicates/run")
            return end

    def not_forked(self, spec: RunnerSpec) -> str | None:
        """Return why replicates of this spec, which asks for forks, run in new interpreters instead."""
        return self._unforkable.get(spec)

    def aggregate(
        self,
        spec: RunnerSpec,
        entry: str,
        *,
        params: bytes,
        param: int,
        n: int,
        rows: Iterable[Row],
        target: bool | None = None,
        target_data: Any = None,
        stop: StopSignal | None = None,
        log: LogSink | None = None,
    ) -> AggregateOutcome:
        """Feed ``n`` rows to an aggregate and return what it makes of them; a death is an outcome, too.

        Parameters
        ----------
        params
            The tagged JSON of the parameter set.
        rows
            Succeeded replicates in order; read as the runner takes them, in bounded memory.
        target
            Call it as the wire convention calls targets; by default if the bundle uses that convention.

        Raises
        ------
        RemoteError, ProcessExitedError, HandshakeError, ProcessTimeoutError
            A fresh process could not be brought to the point where it has imported the entry point.
        """
        stop = stop if stop is not None else StopSignal()
        with self._process(_for_aggregates(spec), [], log) as process:
            run = AggregateRun(process, entry, stop=stop, start_timeout_s=self._start_timeout_s)
            wire = spec.wire if target is None else target
            return run.run(params=params, param=param, n=n, rows=rows, wire=wire, target_data=target_data)

    def aggregates(
        self,
        spec: RunnerSpec,
        entry: str,
        sets: Sequence[AggregateSet],
        *,
        target_data: Any = None,
        stop: StopSignal | None = None,
        log: LogSink | None = None,
    ) -> list[AggregateOutcome]:
        """Make the aggregates of many parameter sets at once, as long as they succeed.

        Returns
        -------
            The outcomes of the first sets, in order: of all of them, or up to one that is to be made by `aggregate`,
            which tells how it fails.
        """
        stop = stop if stop is not None else StopSignal()
        with self._process(_for_aggregates(spec), [], log) as process:
            return make_aggregates(
                process,
                entry,
                sets,
                target_data=target_data,
                stop=stop,
                start_timeout_s=self._start_timeout_s,
            )

    def aggregate_table(
        self,
        spec: RunnerSpec,
        entry: str,
        table: AggregateTable,
        *,
        target_data: Any = None,
        stop: StopSignal | None = None,
        log: LogSink | None = None,
    ) -> ManyMade:
        """Do as `aggregates` does, for the sets of a table; return what was returned."""
        stop = stop if stop is not None else StopSignal()
        with self._process(_for_aggregates(spec), [], log) as process:
            return make_table(
                process,
                entry,
                table,
                target_data=target_data,
                stop=stop,
                start_timeout_s=self._start_timeout_s,
            )

    def call(
        self,
        spec: RunnerSpec,
        entry: str,
        args: Sequence[Any] = (),
        *,
        cwd: str | None = None,
        timeout_s: float | None = None,
        log: LogSink | None = None,
    ) -> Any:
        """Call a function of the bundle with these values and return its value.

        Raises
        ------
        RemoteError
            It raised.
        ProcessExitedError, ProcessTimeoutError
            Its process died, or was killed after ``timeout_s`` (default: the spec's replicate timeout).
        """
        with self._process(spec, [], log) as process:
            timeout_s = timeout_s if timeout_s is not None else spec.replicate_timeout_s
            return call_function(process, entry, args, cwd=cwd, timeout_s=timeout_s)

    # --- processes ---------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _process(self, spec: RunnerSpec, preload: list[str], log: LogSink | None) -> Iterator[RunnerProcess]:
        """Lend a process, warm or fresh (with these entries imported); a broken one is not taken back."""
        process = self._take(spec)
        fresh = process is None
        if process is None:
            process = self._start(spec, log)
        else:
            process.drain.begin(log)
        healthy = False
        try:
            with process.watched():
                if fresh:
                    process.handshake(preload, timeout_s=self._start_timeout_s)
                yield process
            healthy = not process.dead and process.killed is None
        finally:
            try:
                self._give_back(process, healthy=healthy and spec.isolation != "spawn")
            finally:
                process.drain.end()

    def _take(self, spec: RunnerSpec) -> RunnerProcess | None:
        """Return an idle process of this spec, the most recently used one that is alive."""
        dead = []
        try:
            with self._lock:
                self._check_open()
                for process in reversed(self._idle[:]):
                    if process.spec == spec:
                        self._idle.remove(process)
                        if not process.dead:
                            self._busy.add(process)
                            return process
                        dead.append(process)
            return None
        finally:
            for process in dead:
                process.close()

    def _start(self, spec: RunnerSpec, log: LogSink | None) -> RunnerProcess:
        with self._lock:
            self._check_open()
            number = next(self._numbers)
            if not self._reaper.alive:
                logger.warning("the reaper process was gone and is started anew")
                self._reaper.close()
                self._reaper = Reaper(hold=(self._home.lock_fd,))
            reaper = self._reaper
        folder = self._home.of_process(number)
        count(Counted(f"{spec.isolation}_starts"))
        try:
            process = RunnerProcess(
                spec,
                reaper=reaper,
                watch=self._watch,
                cgroups=self._cgroups,
                surroundings=self._surroundings,
                folder=folder,
                log_path=self._home.log_of_process(number),
                sink=log,
            )
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            shutil.rmtree(folder, ignore_errors=True)
            raise StorageError(
                f"no process can be started in {folder} ({error.strerror}); free some space there, or set "
                "MODELOPS_HOME to a folder on another volume"
            ) from error
        with self._lock:
            self.starts += 1
            if not self._closed:
                self._busy.add(process)
                return process
        process.close()
        raise ProcessError("the process pool is closed")

    def _give_back(self, process: RunnerProcess, *, healthy: bool) -> None:
        now = time.monotonic()
        with self._lock:
            self._busy.discard(process)
            if healthy and not self._closed:
                process.idle_since = now
                self._idle.append(process)
                surplus = self._surplus(now)
            else:
                surplus = []
        if not healthy or self._closed:
            process.close()
            with self._lock:
                self._home.prune_logs(self._slots)
                last = self._closed and not self._busy
            if last:
                self._home.remove()
        for one in surplus:
            one.close(graceful=True)

    def _surplus(self, now: float) -> list[RunnerProcess]:
        old = [p for p in self._idle if now - p.idle_since > self._idle_s]
        over: list[RunnerProcess] = []
        for isolation in (
            "warm",
            "fork",
        ):  # apart, as the aggregates of a bundle with forks use a warm process
            alike = [p for p in self._idle if p.spec.isolation == isolation and p not in old]
            over += alike[: max(0, len(alike) - self._slots)]
        self._idle = [p for p in self._idle if p not in old and p not in over]
        return old + over

    def trim(self) -> None:
        """End the processes that have been idle for too long."""
        with self._lock:
            surplus = self._surplus(time.monotonic())
        for process in surplus:
            process.close(graceful=True)

    def _check_open(self) -> None:
        if self._closed:
            raise ProcessError("the process pool is closed")

    def pids(self) -> list[int]:
        """Return the pids of the runners that live now."""
        with self._lock:
            return [process.pid for process in (*self._idle, *self._busy)]

    def close(self) -> None:
        """End all processes; runs that are going on in other threads see theirs die. Nothing is left."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            idle, self._idle = self._idle, []
            busy = list(self._busy)
        for process in busy:
            process.kill(Kill("cancelled", "the process pool was closed"))
        for process in idle:
            process.close()
        self._reaper.close()
        self._watch.close()
        self._home.unlock()
        if not busy:
            self._home.remove()


def _for_aggregates(spec: RunnerSpec) -> RunnerSpec:
    """Return what aggregates run in: the process that replicates are forked from runs nothing itself."""
    return replace(spec, isolation="warm") if spec.isolation == "fork" else spec
