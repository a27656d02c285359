"""Every error ModelOps raises, cut by what the caller can do about it.

`RequestError`: change the request. `RetryableError`: try again later. `ClusterError`: mend the machine,
the pool or the storage. `BundleError`: mend the bundle. `InternalError`: report a bug.
The CLI maps this tree to exit codes in one place, ``modelops.cli.exits``.
Arguments reach ``super().__init__`` unchanged, so every error survives pickling.
"""

from __future__ import annotations

import signal
from typing import Final

OUT_OF_MEMORY: Final = "out of memory: "  # how the last lines of a process begin that exceeded its limit


class ModelOpsError(Exception):
    """Base of all errors of ModelOps."""


class RequestError(ModelOpsError):
    """The request itself is wrong; ``str`` says what to change."""


class NotFoundError(RequestError):
    """What was named does not exist."""


class ConflictError(RequestError):
    """What is recorded does not allow it: the job is in another state, or the key was used for something else."""


class BundleMissingError(RequestError):
    """The server does not have the bundle that a submission names; upload it, then submit again."""


class ParametersMissingError(RequestError):
    """The server does not have the parameter file that a submission names; upload it, then submit again."""


class RetryableError(ModelOpsError):
    """Nothing is wrong with the request; the same call may succeed later."""


class ClusterError(ModelOpsError):
    """The machine, the worker pool, the database or the storage needs mending."""


class StorageError(ClusterError):
    """Bytes could not be stored or read; ``str`` names the volume or server."""


class IntegrityError(ClusterError):
    """Stored bytes do not have the digest that was recorded for them."""


class StudyDamagedError(IntegrityError):
    """What the database has recorded of a job's study cannot be read; nothing but a backup repairs that."""


class ServerUnreachableError(ClusterError):
    """The server does not answer, so nothing is known now; jobs are none the worse for it.

    Parameters
    ----------
    server
        Its URL, or in words which one was looked for.
    why
        What happened when it was asked.
    advice
        What to do.
    answers
        It is there and says ``why`` itself: something that it needs is away.
    """

    def __init__(self, server: str, why: str, advice: str, answers: bool = False) -> None:
        super().__init__(server, why, advice, answers)
        self.server, self.why, self.advice, self.answers = server, why, advice, answers

    @property
    def what(self) -> str:
        """What is the matter, without what to do."""
        return (
            f"{self.server} {'cannot do its work now' if self.answers else 'cannot be reached'}: {self.why}"
        )

    def __str__(self) -> str:
        return f"{self.what}; {self.advice}"


class QueueFullError(RetryableError):
    """The server holds as many unfinished jobs as it may; nothing was recorded."""


class WaitTimeoutError(RetryableError, TimeoutError):
    """The job had not ended when the time to wait for it was over; it goes on."""


class InternalError(ModelOpsError):
    """A rule of ModelOps itself was broken: a bug worth reporting."""


class BundleError(ModelOpsError):
    """The bundle needs mending; ``str`` names the file or the line to add."""


class BundleEnvironmentError(ModelOpsError):
    """Base of errors about a bundle's environment."""


class ResolutionError(BundleEnvironmentError, BundleError):
    """The dependencies cannot be resolved or built: final. Carries uv's own words.

    Parameters
    ----------
    what
        Name of the bundle or input file.
    uv_output
        What uv printed.
    """

    def __init__(self, what: str, uv_output: str) -> None:
        super().__init__(what, uv_output)
        self.what, self.uv_output = what, uv_output

    def __str__(self) -> str:
        return f"the dependencies of {self.what} cannot be installed:\n{self.uv_output}"


class IndexUnreachableError(BundleEnvironmentError, RetryableError):
    """The package index did not answer; nothing is known about the dependencies."""

    def __init__(self, what: str, uv_output: str) -> None:
        super().__init__(what, uv_output)
        self.what, self.uv_output = what, uv_output

    def __str__(self) -> str:
        return f"the package index was not reachable while preparing {self.what}:\n{self.uv_output}"


class NoInterpreterError(BundleEnvironmentError, ClusterError):
    """No Python that the bundle accepts was found; lists those that were."""

    def __init__(self, wanted: str, found: tuple[str, ...]) -> None:
        super().__init__(wanted, found)
        self.wanted, self.found = wanted, found

    def __str__(self) -> str:
        found = ", ".join(self.found) or "none"
        return (
            f"the bundle needs Python {self.wanted}, and none of the interpreters found here fits: {found}. "
            "Install one that does, or change requires-python in the bundle."
        )


class EnvironmentDamagedError(BundleEnvironmentError, ClusterError):
    """An environment was damaged and a rebuild did not mend it."""


class ProcessError(ModelOpsError):
    """Base of errors about a runner process."""


class ProcessExitedError(ProcessError):
    """A runner process ended before it answered.

    Parameters
    ----------
    doing
        What it had been asked to do, e.g. ``"initialize"``.
    returncode
        As ``Popen`` reports it: exit code, or -N for signal N.
    stderr_tail
        The last lines the process wrote.
    """

    def __init__(self, doing: str, returncode: int, stderr_tail: str) -> None:
        super().__init__(doing, returncode, stderr_tail)
        self.doing, self.returncode, self.stderr_tail = doing, returncode, stderr_tail

    def __str__(self) -> str:
        tail = f"\n{self.stderr_tail}" if self.stderr_tail else " (it wrote nothing to stderr)"
        return f"the runner process ended while doing {self.doing}: {describe_exit(self.returncode)}{tail}"


class StartFailedError(ProcessExitedError):
    """Fresh runner processes ended by themselves, one after another, before any could begin: final.

    Most likely the bundle ends the process that imports it, or needs more memory for that than it may have. The
    arguments are those of the last one.
    """

    def __str__(self) -> str:
        advice = (
            "find what ends the process when the bundle is imported ('modelops bundle check' imports it, too)"
        )
        if self.stderr_tail.startswith(OUT_OF_MEMORY):
            advice = "the bundle needs more than that to be imported, so give its replicates more `memory`"
        return f"{super().__str__().rstrip()}\nSo did every other process that was tried; {advice}"


class HandshakeError(ProcessError):
    """A runner process answered the handshake wrongly: another Python, bundle or protocol version."""


class ProcessTimeoutError(ProcessError):
    """A runner process did not answer in time and was killed."""


class SetAsideError(ProcessError):
    """Environment or bundle were set aside or made anew under a runner; what it met is no fault of the bundle.

    ``met``: what went wrong because of that.
    """

    def __init__(self, met: str) -> None:
        super().__init__(met)
        self.met = met

    def __str__(self) -> str:
        return f"its environment, or bundle, was set aside or made anew while it ran: {self.met}"


class ProtocolError(ProcessError):
    """The other side broke the rules of the protocol."""


class RemoteError(ProcessError):
    """The runner answered a request with an error; attributes say what the bundle's code raised.

    ``missing_module``: the module that nobody could import, if that is what it comes down to.
    ``file``, ``line``: the innermost frame that lies in the bundle.
    """

    def __init__(
        self,
        error_type: str,
        message: str,
        traceback: str,
        stderr_tail: str = "",
        missing_module: str | None = None,
        file: str = "",
        line: int = 0,
    ) -> None:
        super().__init__(error_type, message, traceback, stderr_tail, missing_module, file, line)
        self.error_type, self.message = error_type, message
        self.traceback, self.stderr_tail = traceback, stderr_tail
        self.missing_module, self.file, self.line = missing_module, file, line

    def __str__(self) -> str:
        return f"{self.error_type}: {self.message}\n{self.traceback}"


def describe_exit(returncode: int) -> str:
    """Say how a process ended: ``exit code 3`` or ``signal 9 (Killed)``.

    ``Popen`` reports death by signal N as -N; 128+N is the shell's habit.
    """
    if returncode >= 0:
        return f"exit code {returncode}"
    return f"signal {-returncode} ({signal.strsignal(-returncode) or 'unknown'})"
