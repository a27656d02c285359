"""Checkpoints and reports of replicates that run here, without a worker."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from modelops.processes import StopSignal
from modelops.store.objects import FolderObjects
from modelops.study.ids import attempt_id
from modelops.worker.desk import Desk

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from modelops.worker.desk import Report

_ATTEMPT = re.compile(r"/(\d+)-\d+/")


class LocalCheckpoints:
    """Checkpoints in a folder; a replicate that did not succeed goes on from its own when it is run again.

    Parameters
    ----------
    folder
        Where they are kept.
    scratch
        Where models find them while they run.
    name_of
        What is kept together, by the index of a replicate: the same for the same parameters and seed.
    """

    def __init__(
        self,
        folder: Path,
        scratch: Path,
        name_of: Callable[[int], str],
        on_report: Callable[[Report], None],
    ) -> None:
        self._objects = FolderObjects(folder)
        earlier = [int(found[1]) for name in self._objects.list("") if (found := _ATTEMPT.search(name))]
        self.desk = Desk(
            self._objects,
            name_of,
            attempt_id(max(earlier, default=0) + 1, 1),
            scratch,
            may_resume=bool(earlier),
            stop=StopSignal(),
            on_report=on_report,
        )

    def ended(self, index: int, *, succeeded: bool) -> None:
        """Remove the checkpoints of a replicate that has succeeded."""
        if self.desk.current == index:
            self.desk.ended(succeeded=succeeded)
        while self.desk.settled:
            self._objects.remove_folder(self.desk.settled.pop())
