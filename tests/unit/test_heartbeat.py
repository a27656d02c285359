from __future__ import annotations

from types import SimpleNamespace

from tornado.ioloop import PeriodicCallback

from modelops.worker.heartbeat import AT_LEAST_S, beat_seldom


def test_heartbeats_are_rare_whatever_the_scheduler_asks_for_unless_it_wants_fewer() -> None:
    worker = SimpleNamespace(periodic_callbacks={"heartbeat": PeriodicCallback(lambda: None, 1000)})
    beat_seldom(worker)  # type: ignore[arg-type]
    timer = worker.periodic_callbacks["heartbeat"]
    assert timer.callback_time == AT_LEAST_S * 1000
    timer.callback_time = 500
    assert timer.callback_time == AT_LEAST_S * 1000
    timer.callback_time = 50_000
    assert timer.callback_time == 50_000
