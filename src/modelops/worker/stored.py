"""From what the processes room gives to what the store takes: two rooms that do not know each other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from modelops.processes import MadeCells, SpooledFile
from modelops.store import Cells, Listed, StoredError
from modelops.store import SpooledFile as StoredFile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from modelops.processes import ManyMade, Output, ReplicateError
    from modelops.store.segment_body import Output as StoredOutput


def stored_outputs(outputs: Sequence[Output]) -> Sequence[StoredOutput]:
    """Return outputs as a writer takes them. Costs nothing for those that are inline."""
    for output in outputs:
        if isinstance(output[2], SpooledFile):
            return [
                (name, kind, StoredFile(Path(data.path), data.bytes, data.sha256, data.stamp))
                if isinstance(data, SpooledFile)
                else (name, kind, data)
                for name, kind, data in outputs
            ]
    return outputs  # type: ignore[return-value]  # no SpooledFile is left in it


def stored_aggregates(made: ManyMade) -> list[Listed | Cells]:
    """Return what many aggregates returned as a writer takes it. Costs nothing for values that came as cells."""
    return [
        Cells(len(part), part.names, part.data, part.sizes)
        if isinstance(part, MadeCells)
        else Listed(
            [returned_dict for returned_dict, _ in part],
            [stored_outputs(outputs) for _, outputs in part],
            [None] * len(part),
        )
        for part in made.parts
    ]


def stored_error(error: ReplicateError | None) -> StoredError | None:
    """Return an error as a writer takes it."""
    if error is None:
        return None
    return StoredError(
        error.type, error.message, error.traceback, error.stderr, error.fingerprint, error.exit
    )
