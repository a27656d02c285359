"""What result files need of the parameter sets, made while replicates run.

To parse a million sets and to derive their seeds takes a second of one core, and is a function of the study only. The
job would wait for it at its end; a little before, it costs half of that, and workers on other machines nothing. Of a
few sets it takes a millisecond, which a job of one replicate would notice.
"""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING, Final

from modelops.errors import ModelOpsError
from modelops.store.parameters import ROW_GROUP

if TYPE_CHECKING:
    from modelops.store import Objects
    from modelops.store.parameter_view import ParameterView
    from modelops.study.ids import JobId
    from modelops.study.spec import JobSpec

BEFORE_END_S: Final = 10.0  # not sooner: it takes 30 bytes and more of memory for each set
FEW: Final = 256  # sets, of which that is nothing
FEW_BYTES: Final = 1 << 20  # if they take no more than this, as long as the job runs


class Ahead:
    """Makes the view of a job's parameters once, in a thread of its own. `consider` and `view` are for one thread."""

    def __init__(self, objects: Objects, job: JobId, spec: JobSpec) -> None:
        self._objects, self._job, self._spec = objects, job, spec
        self._thread: threading.Thread | None = None
        self._made: ParameterView | None = None

    def begin_with_few(self) -> None:
        """Begin if the job has few and small sets only."""
        if self._thread is None and self._spec.line.n_params <= FEW:
            self._begin(most_bytes=FEW_BYTES)

    def consider(self, left_s: float | None) -> None:
        """Begin if the job is expected to take so many seconds only, and has very many sets."""
        if (
            self._thread is None
            and left_s is not None
            and left_s <= BEFORE_END_S
            and self._spec.line.n_params > ROW_GROUP
        ):
            self._begin()

    def view(self) -> ParameterView | None:
        """Return it, once; None if it was not made, or could not be: who makes it then hears why."""
        if self._thread is not None:
            self._thread.join()
        made, self._made = self._made, None
        return made

    def _begin(self, most_bytes: float = math.inf) -> None:
        self._thread = threading.Thread(
            target=self._make, args=(most_bytes,), name="modelops-ahead", daemon=True
        )
        self._thread.start()

    def _make(self, most_bytes: float) -> None:
        from modelops.store.parameter_view import ParameterView
        from modelops.store.parameters import Parameters

        try:
            parameters = Parameters(self._objects, self._job, self._spec.parameters)
            if parameters.n_bytes > most_bytes:
                return
            made = ParameterView(parameters)
        except ModelOpsError:  # damage and storage that is away are met again, and then dealt with
            return
        made.derive_keys(self._spec)
        self._made = made
