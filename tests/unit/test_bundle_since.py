"""Whether a bundle has changed is said after what was asked for is done, so it must not look like a failure of that."""

from __future__ import annotations

from datetime import UTC, datetime
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from modelops.bundles import bundle_digest
from modelops.client import bundle_since
from modelops.client.status import JobEventRecord
from modelops.who import whoami

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def job_of(bundle: Path, digest: str) -> Any:
    created = JobEventRecord(datetime.now(UTC), whoami(), "created", f"submitted from {bundle}", 1)
    return SimpleNamespace(events=lambda: [created], spec=SimpleNamespace(bundle=digest))


def test_a_bundle_is_compared_with_what_was_submitted(tmp_path: Path) -> None:
    bundle = tmp_path / "b"
    bundle.mkdir()
    (bundle / "model.py").write_text("def run(params, seed): return {}\n")
    job = job_of(bundle, bundle_digest(bundle))
    assert bundle_since.bundle_changed_since(job) == ""
    (bundle / "model.py").write_text("def run(params, seed): return {'x': 1}\n")
    assert "has changed since this job was submitted" in bundle_since.bundle_changed_since(job)
    (bundle / "model.py").rename(tmp_path / "model.py")
    bundle.rmdir()
    assert bundle_since.bundle_changed_since(job) == ""


def test_a_bundle_that_cannot_be_read_any_more_is_a_note_and_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(bundle: Path) -> str:
        raise PermissionError(13, "Permission denied", str(bundle / "data"))

    monkeypatch.setattr(bundle_since, "bundle_digest", refused)
    note = bundle_since.bundle_changed_since(job_of(tmp_path, "0" * 64))
    assert note.startswith(
        f"whether the bundle {tmp_path} has changed since this job was submitted cannot be seen"
    )
    assert "Permission denied" in note
