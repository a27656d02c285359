"""An attempt whose storage is away keeps what it has, until storage is back or the attempt is stopped."""

from __future__ import annotations

import threading

import pytest

from modelops.errors import StorageError
from modelops.processes import StopSignal
from modelops.study.ids import JobId, attempt_id
from modelops.worker.attempts import Attempt
from modelops.worker.storage_wait import when_storage_allows


def attempt(grace_s: float = 5.0) -> Attempt:
    return Attempt(JobId("job_1"), attempt_id(1, 1), 1, ((0, 1),), stop=StopSignal(grace_s=grace_s))


def test_it_is_tried_until_storage_is_back_and_what_it_said_is_told_once() -> None:
    one, said, tries = attempt(), list[str](), list[bool]()

    def act() -> str:
        tries.append(one.storing)
        if len(tries) < 4:
            raise StorageError(f"full {len(tries)}")
        return "stored"

    assert when_storage_allows(act, one, said.append) == "stored"
    assert said == ["full 1"]
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
