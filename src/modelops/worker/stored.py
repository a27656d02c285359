"""From what the processes room gives to what the store takes: two rooms that do not know each other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from modelops.processes import SpooledFile
from modelops.store import SpooledFile as StoredFile
from modelops.store import StoredError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from modelops.processes import Output, ReplicateError
    from modelops.processes.aggregates import Made
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


def stored_aggregates(made: Sequence[Made]) -> Sequence[tuple[bool, Sequence[StoredOutput]]]:
    """Return what many aggregates returned as a writer takes it. Costs little if no output is in a file."""
    if SpooledFile not in {type(data) for _, outputs in made for _, _, data in outputs}:
        return made  # type: ignore[return-value]  # no SpooledFile is in it
    return [(returned_dict, stored_outputs(outputs)) for returned_dict, outputs in made]


def stored_error(error: ReplicateError | None) -> StoredError | None:
    """Return an error as a writer takes it."""
    if error is None:
        return None
    return StoredError(
        error.type, error.message, error.traceback, error.stderr, error.fingerprint, error.exit
    )
