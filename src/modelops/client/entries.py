"""Refuse a study whose model or aggregate is not in its bundle, before anything is stored or sent."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modelops.bundles.entries import what_is_missing
from modelops.environments.inputs import dependency_inputs
from modelops.errors import RequestError

if TYPE_CHECKING:
    from pathlib import Path

    from modelops.bundles import Manifest
    from modelops.study.spec import JobSpec


def refuse_missing_entries(spec: JobSpec, manifest: Manifest, snapshot: Path) -> None:
    """Refuse entry points that the bundle's source rules out. Nothing is imported; a doubt is no refusal.

    Raises
    ------
    RequestError
        Names the entry point, what lacks, and where it is written.
    """

    def alone() -> bool:
        return dependency_inputs(snapshot).kind == "none"

    chosen = [("aggregate", entry) for entry in spec.aggregates]
    if manifest.wire is None:  # the wire function reads its entry point itself
        chosen.insert(0, ("model", spec.model))
    for kind, entry in chosen:
        module_and_name = entry if ":" in entry else entry.replace("/", ":")
        if missing := what_is_missing(snapshot, module_and_name, alone=alone):
            raise RequestError(
                f"{kind} {entry!r}: {missing}; correct it where it is written: the study, or {manifest.source}"
            )
