"""Watch a job of a server to its end; Ctrl-C cancels it, or only ends the watching."""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Final, Self

from modelops.client.beside import Beside
from modelops.client.following import Following
from modelops.errors import ModelOpsError

if TYPE_CHECKING:
    from collections.abc import Callable

    from modelops.client.job import Job
    from modelops.client.run import Watcher
    from modelops.client.status import JobStatus
    from modelops.study import Study

LOOK_S: Final = 5.0  # also how old what is shown may be
CANCELLING_LOOK_S: Final = 1.0
AWAY_S: Final = 60.0  # how long a run puts up with a server that is away
AT_ONCE_S: Final = 2.0  # how long the second Ctrl-C waits for the server to say that all has stopped


def watch(
    job: Job, watcher: Watcher, *, patience_s: float | None = None, cancels: Cancels | None = None
) -> JobStatus:
    """Tell a watcher what is known of a job until it has ended; connects again by itself.

    Parameters
    ----------
    patience_s
        How long the server may be away; None: for ever.
    cancels
        Turns Ctrl-C into a cancel of the job.

    Returns
    -------
        The last status: final, unless Ctrl-C was pressed twice and the server is still stopping things.

    Raises
    ------
    ServerUnreachableError
        The server has been away for longer.
    """
    following = Following(job, watcher.seen, patience_s=patience_s)
    while True:
        status = following.look(CANCELLING_LOOK_S if cancels is not None and cancels.pressed else LOOK_S)
        if status.final or (cancels is not None and cancels.leave()):
            return status


def run_on_server(study: Study, watcher: Watcher) -> Job:
    """Submit a study and watch the job to its end.

    Returns
    -------
        The job, final unless Ctrl-C was pressed twice.
    """
    from modelops.client.client import SUBMITTING, submit

    def on_stage(text: str) -> None:
        watcher.stage(text)
        cancels.holding = text == SUBMITTING

    with Cancels(watcher) as cancels:
        job = submit(study, on_stage=on_stage)
        cancels.of(job)
        watcher.prepared(job, job.spec.line.size)
        watch(job, watcher, patience_s=AWAY_S, cancels=cancels)
    return job


class Cancels:
    """Ctrl-C once: cancel the job and keep what is finished; twice: at once; a third time: leave.

    Only the main thread gets signals; in any other thread this does nothing. Before there is a job, Ctrl-C is a
    KeyboardInterrupt as everywhere else. Telling and cancelling happen in threads: the one that was interrupted may be
    in the middle of a request, or of writing to the terminal.
    """

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._job: Job | None = None
        self._threads: list[threading.Thread] = []
        self._beside = Beside(self._pressed)
        self._at_once = 0.0
        self._failed: ModelOpsError | None = None
        self.pressed = 0
        self.holding = (
            False  # a first Ctrl-C waits until it is known which job there is: it may be recorded already
        )

    def __enter__(self) -> Self:
        self._beside.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._beside.__exit__(*error)
        for thread in self._threads:
            thread.join(AT_ONCE_S)

    def of(self, job: Job) -> None:
        """Cancel this job from now on; also if Ctrl-C was pressed while it was submitted."""
        self._job = job
        if self.pressed:
            self._cancel(job, at_once=self.pressed > 1)

    def leave(self) -> bool:
        """Say whether Ctrl-C was pressed twice, and it is time to go. Raises what kept the job from being cancelled."""
        if self._failed is not None:
            raise self._failed
        return self.pressed > 1 and time.monotonic() > self._at_once

    def _pressed(self, _signum: int, _frame: object) -> None:
        if self.pressed > 1 or (self._job is None and (self.pressed or not self.holding)):
            raise KeyboardInterrupt
        self.pressed += 1
        at_once = self.pressed > 1
        self._beside.do(partial(self._watcher.cancelling, hard=at_once))
        self._at_once = time.monotonic() + AT_ONCE_S
        if self._job is not None:
            self._beside.do(partial(self._cancel, self._job, at_once=at_once))

    def _cancel(self, job: Job, *, at_once: bool) -> None:
        cancel = partial(job.cancel, at_once=at_once)
        thread = threading.Thread(target=_into(cancel, self._fail), name="modelops-cancel", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _fail(self, error: ModelOpsError) -> None:
        self._failed = error


def _into(call: Callable[[], None], fail: Callable[[ModelOpsError], None]) -> Callable[[], None]:
    """Return a function that hands on what the call raises instead of raising it."""
    from modelops.errors import RequestError

    def run() -> None:
        try:
            call()
        except RequestError:
            return  # it has ended already, which is what was asked for
        except ModelOpsError as error:
            fail(error)

    return run
