"""Server and workers of different versions: what matters is refused, with a table; all else goes on."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from modelops.cluster.connected import ConnectedCluster
from modelops.cluster.versions import MATTERS, VERSIONS, Versions, misfits, ours, table
from modelops.driver.idle_workers import IdleWorkers

if TYPE_CHECKING:
    from pathlib import Path


def other(name: str) -> Versions:
    """Return the versions of here, but for one."""
    return msgspec.structs.replace(ours(), **{name: "0.0.1"})


@pytest.mark.parametrize("name", Versions.__struct_fields__)
def test_protocol_and_dask_must_be_the_same_and_all_else_may_differ(name: str) -> None:
    assert misfits(ours(), ours(), ours()) == ()
    assert misfits(ours(), ours(), other(name)) == ((name,) if name in MATTERS else ())


@pytest.mark.parametrize("name", Versions.__struct_fields__)
def test_of_a_scheduler_only_its_dask_must_be_the_same_and_one_that_does_not_tell_is_taken(name: str) -> None:
    assert misfits(ours(), other(name), ours()) == (("distributed",) if name == "distributed" else ())
    assert misfits(ours(), Versions(), ours()) == ()


def test_the_table_has_all_parts_and_marks_what_does_not_fit() -> None:
    server = Versions("2", "2026.7.0", "0.2.0", "3.12.1", "0.21.0", "22.0.0")
    scheduler = Versions("2", "2026.6.1", "0.2.0", "3.12.1", "0.21.0", "22.0.0")
    worker = Versions("1", "2026.7.0", "0.1.0", "3.11.2", "0.21.0", "22.0.0")
    assert table(server, scheduler, worker).splitlines() == [
        "             server    scheduler  worker",
        "protocol     2         2          1         must be the same",
        "distributed  2026.7.0  2026.6.1   2026.7.0  must be the same",
        "modelops     0.2.0     0.2.0      0.1.0",
        "python       3.12.1    3.12.1     3.11.2",
        "msgspec      0.21.0    0.21.0     0.21.0",
        "pyarrow      22.0.0    22.0.0     22.0.0",
    ]


@dataclass
class Listener:
    heard: list[Any] = field(default_factory=list)

    def joined(self, worker: str, slots: int) -> None:
        self.heard.append(("joined", worker, slots))

    def left(self, worker: str, died: bool) -> None:
        self.heard.append(("left", worker, died))


def said(event: str, worker: str, **more: object) -> tuple[float, dict[str, Any]]:
    return (0.0, {"event": event, "worker": worker, **more})


def joins(worker: str, versions: object) -> tuple[float, dict[str, Any]]:
    return said("joined", worker, slots=1, **{VERSIONS: versions})


def test_a_worker_that_does_not_fit_is_nobodys_and_one_that_replaces_it_is(tmp_path: Path) -> None:
    pool, listener = ConnectedCluster(lambda: None, tmp_path), Listener()
    with pool.on_workers(joined=listener.joined, left=listener.left):
        pool._heard(joins("old", msgspec.to_builtins(other("protocol"))))
        pool._heard(joins("older", None))  # it does not tell
        pool._heard(joins("odd", {"protocol": 7}))  # nor can this be read
        pool._heard(joins("new", msgspec.to_builtins(other("modelops"))))
        assert pool.workers() == {"new": 1}
        assert set(pool.refused()) == {"old", "older", "odd"}
        assert "must be the same" in pool.refused()["old"]
        pool._heard(said("joined", "old", slots=0))  # its last word
        for worker in ("old", "older", "odd"):
            pool._heard(said("left", worker, died=False))
        assert pool.refused() == {}
        assert listener.heard == [("joined", "new", 1)]


def test_the_story_of_a_job_has_each_table_once() -> None:
    idle = IdleWorkers()
    assert idle.skewed({}) == []
    assert len(idle.skewed({"a": "table 1", "b": "table 1", "c": "table 2"})) == 2
    assert idle.skewed({"b": "table 1", "d": "table 2"}) == []
    (note,) = idle.skewed({"e": "table 3"})
    assert note.kind == "version_skew"
    assert note.text == "e, and others like it, get no work: their versions do not fit\ntable 3"


def test_a_worker_that_takes_long_is_told_of_once_though_it_has_many_processes() -> None:
    idle, told = IdleWorkers(), deque(["pod-1 has needed 30 s"] * 3)
    (note,) = idle.slow(told)
    assert (note.kind, note.text, len(told)) == ("environment_slow", "pod-1 has needed 30 s", 0)
    assert idle.slow(deque(["pod-1 has needed 30 s"])) == []
