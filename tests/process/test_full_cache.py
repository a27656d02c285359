"""A cache without room: whoever copies a bundle into it is told which volume that is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from volumes import Volume, can_mount

from modelops.bundles import snapshot_changed, take_snapshot
from modelops.errors import StorageError

if TYPE_CHECKING:
    from pathlib import Path


def test_a_cache_without_room_for_a_bundle_is_named_and_used_when_it_has(tmp_path: Path) -> None:
    if not can_mount(tmp_path):
        pytest.skip("mounting file systems in memory needs root")
    bundle = tmp_path / "model.py"
    bundle.write_text("x = 1\n")
    with Volume(tmp_path / "cache", "1m") as volume:
        volume.fill()
        with pytest.raises(StorageError, match=rf"No space left .*volume {volume.path}.*free some space"):
            take_snapshot(bundle, volume.path / "bundles")
        volume.free()
        _, snapshot = take_snapshot(bundle, volume.path / "bundles")
        assert snapshot_changed(snapshot) == []
