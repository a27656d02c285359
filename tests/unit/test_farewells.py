"""Workers hear of each job that has ended, and those that end about the same time take one message."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from modelops.driver import farewells
from modelops.driver.farewells import say_farewell
from modelops.study.ids import JobId
from modelops.worker import tasks
from modelops.worker.plugin import ModelOpsWorker


class Asked:
    """Takes the place of a client of Dask, and of its loop."""

    def __init__(self) -> None:
        self.loop = self
        self.scheduler: object | None = object()
        self.told: list[tuple[dict[str, int], list[str]]] = []
        self.begun: list[asyncio.Task[None]] = []

    def add_callback(self, callback: Any, *args: object, **more: object) -> None:
        self.begun.append(asyncio.ensure_future(callback(*args, **more)))

    async def run(self, _function: object, ended: dict[str, int], *, workers: list[str], **_: object) -> None:
        self.told.append((dict(ended), workers))
        if "gone" in workers:
            raise OSError("refused")


def told(monkeypatch: Any, *farewell: tuple[list[str], str, int, bool], closed: bool = False) -> list[Any]:
    monkeypatch.setattr(farewells, "GATHER_S", 0.0)

    async def say() -> list[Any]:
        client: Any = Asked()
        for workers, job, epoch, in_a_moment in farewell:
            say_farewell(client, workers, JobId(job), epoch, in_a_moment=in_a_moment)
        if closed:
            client.scheduler = None
        await asyncio.gather(*client.begun)
        assert client not in farewells._gathered
        return list(client.told)

    return asyncio.run(say())


def test_jobs_that_end_together_take_one_message_to_all_workers_of_any(monkeypatch: Any) -> None:
    said = told(monkeypatch, (["b"], "x", 3, True), (["a"], "y", 4, True), (["b"], "x", 1, True))
    assert said == [({"x": 3, "y": 4}, ["a", "b"])]


def test_a_job_that_may_begin_again_waits_for_no_other(monkeypatch: Any) -> None:
    said = told(monkeypatch, (["a"], "x", 1, True), (["a"], "y", 2, False))
    assert said == [({"y": 2}, ["a"]), ({"x": 1}, ["a"])]


def test_nobody_is_told_without_workers_or_after_the_client_was_closed(monkeypatch: Any) -> None:
    assert told(monkeypatch, ([], "x", 1, True), ([], "y", 1, False)) == []
    assert told(monkeypatch, (["a"], "x", 1, True), closed=True) == []


def test_a_worker_that_cannot_be_reached_costs_nobody_else_anything(monkeypatch: Any) -> None:
    assert len(told(monkeypatch, (["gone"], "x", 1, False), (["a"], "y", 1, True))) == 2


@pytest.mark.parametrize("plugins", [{}, {"modelops": ModelOpsWorker(settings=None)}])  # type: ignore[arg-type]
def test_a_worker_that_is_starting_or_ending_has_nothing_to_forget_and_says_so_to_whoever_asks(
    plugins: dict[str, Any],
) -> None:
    worker: Any = SimpleNamespace(plugins=plugins, address="tls://here:1")
    asyncio.run(tasks.forget({JobId("job_1"): 1}, worker))
    with pytest.raises(OSError, match="tls://here:1 runs nothing"):  # as of one that is gone, for `Hands`
        asyncio.run(tasks.attempts(JobId("job_1"), 1, worker))
