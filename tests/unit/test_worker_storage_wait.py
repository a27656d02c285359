"""An attempt whose storage is away keeps what it has, until storage is back or the attempt is stopped."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

import pytest

from modelops.errors import StorageError
from modelops.processes import StopSignal
from modelops.study.ids import JobId, attempt_id
from modelops.worker.attempts import Attempt
from modelops.worker.storage_wait import Waiting, find_room, when_storage_allows

if TYPE_CHECKING:
    from pathlib import Path


def attempt(grace_s: float = 5.0) -> Attempt:
    return Attempt(JobId("job_1"), attempt_id(1, 1), 1, ((0, 1),), stop=StopSignal(grace_s=grace_s))


def test_it_is_tried_until_storage_is_back_and_each_failure_is_told_and_the_end_of_the_wait() -> None:
    one, said, tries = attempt(), list[str](), list[bool]()

    def act() -> str:
        tries.append(one.storing)
        if len(tries) < 4:
            raise StorageError(f"full {len(tries)}")
        return "stored"

    assert when_storage_allows(act, one, said.append) == "stored"
    assert said == ["full 1", "full 2", "full 3", ""]
    assert tries == [False, True, True, True]
    assert not one.storing


def test_a_stop_ends_it_after_its_grace() -> None:
    one = attempt(grace_s=0.05)
    tried = threading.Event()

    def act() -> None:
        tried.set()
        raise StorageError("full")

    def stop() -> None:
        assert tried.wait(30)
        one.stop.stop()

    stopping = threading.Thread(target=stop)
    stopping.start()
    with pytest.raises(StorageError, match="full"):
        when_storage_allows(act, one, lambda _: None)
    stopping.join()
    assert one.stop.stopped
    assert not one.storing


def test_another_error_is_no_reason_to_wait() -> None:
    with pytest.raises(ZeroDivisionError):
        when_storage_allows(lambda: 1 / 0, attempt(), lambda _: None)


def test_the_log_says_once_that_attempts_wait_and_once_that_none_does(
    caplog: pytest.LogCaptureFixture,
) -> None:
    waiting, first, second = Waiting(), attempt(), Attempt(JobId("job_1"), attempt_id(1, 2), 1, ((1, 2),))
    with caplog.at_level(logging.INFO, logger="modelops.worker.storage_wait"):
        waiting.note(first, "")
        assert caplog.messages == []
        for one in (first, second, first):
            waiting.note(one, "the disk is full")
        waiting.note(first, "")
        assert caplog.messages == ["attempt 0001-000001 of job job_1 waits: the disk is full"]
        waiting.note(second, "")
    assert caplog.messages[1:] == ["no attempt waits for storage any more"]


def test_where_there_is_no_room_the_error_names_the_folder(tmp_path: Path) -> None:
    find_room(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StorageError, match=str(tmp_path / "gone")):
        find_room(tmp_path / "gone")
