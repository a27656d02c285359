"""The keeper's decisions: who is started when, what happens to those that die, and in which order all end."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelops.cluster.run_folder import SCHEDULER, SERVER
from modelops.cluster.upkeep import (
    FAILING_AFTER,
    HEAD_START_S,
    LONGEST_PAUSE_S,
    LONGEST_SEARCH_PAUSE_S,
    STEADY_S,
    STOPPED_S,
    STRANGER_PAUSE_S,
    ExitCode,
    Finish,
    Kill,
    Start,
    Tell,
    Upkeep,
)


def running(n_workers: int = 2, now: float = 0.0) -> Upkeep:
    mind = Upkeep(n_workers, began=now)
    for role in list(mind.lives):
        mind.started(role, now)
        mind.is_ready(role)
    return mind


def test_the_server_has_a_head_start_that_ends_when_it_is_ready() -> None:
    mind = Upkeep(1, began=100.0)
    assert mind.actions(100.0) == [Start(SERVER)]
    mind.started(SERVER, 100.0)
    assert mind.actions(100.1) == []
    mind.is_ready(SERVER)
    assert mind.actions(100.2) == [Start(SCHEDULER), Start("worker-0")]


def test_a_server_that_does_not_get_ready_keeps_the_others_waiting_only_for_a_while() -> None:
    mind = Upkeep(1, began=100.0)
    mind.started(SERVER, 100.0)
    assert mind.actions(100.0 + HEAD_START_S) == [Start(SCHEDULER), Start("worker-0")]


def test_whoever_had_lived_for_a_while_is_started_again_at_once() -> None:
    mind = running()
    mind.ended("worker-1", -9, "signal 9", STEADY_S)
    assert mind.actions(STEADY_S) == [Start("worker-1")]
    assert mind.lives["worker-1"].last_end == "signal 9"


def test_whoever_dies_at_once_waits_twice_as_long_each_time_and_is_called_failing() -> None:
    mind, now, pauses = running(), 0.0, []
    for _ in range(12):
        mind.ended("worker-0", 1, "exit code 1", now)
        pause = mind.lives["worker-0"].not_before - now
        pauses.append(pause)
        assert mind.actions(now + 0.99 * pause) == []
        now += pause
        assert mind.actions(now) == [Start("worker-0")]
        mind.started("worker-0", now)
        assert mind.lives["worker-0"].failing == (len(pauses) >= FAILING_AFTER)
    assert pauses[:3] == [0.25, 0.5, 1.0]
    assert pauses[-1] == LONGEST_PAUSE_S
    mind.ended("worker-0", 1, "exit code 1", now + STEADY_S)
    assert not mind.lives["worker-0"].failing


def test_a_worker_whose_scheduler_went_away_is_not_to_blame() -> None:
    mind = running()
    mind.ended("worker-0", ExitCode.SCHEDULER_GONE, "exit code 75", 0.1)
    assert mind.actions(0.1) == [Start("worker-0")]
    assert mind.lives["worker-0"].n_quick == 0


def test_a_worker_that_never_found_its_scheduler_is_soon_back_and_not_at_once() -> None:
    mind, now, pauses = Upkeep(1, began=0.0, only_workers=True), 0.0, []
    for _ in range(100):
        assert mind.actions(now) == [Start("worker-0")]
        mind.started("worker-0", now)
        mind.ended("worker-0", ExitCode.SCHEDULER_GONE, "exit code 75", now)
        pauses.append(mind.lives["worker-0"].not_before - now)
        now = mind.lives["worker-0"].not_before
    assert pauses[:3] == [0.25, 0.5, 1.0]
    assert max(pauses) == pytest.approx(LONGEST_SEARCH_PAUSE_S)
    assert not mind.lives["worker-0"].failing
    mind.actions(now)
    mind.started("worker-0", now)
    mind.is_ready("worker-0")
    mind.ended("worker-0", ExitCode.SCHEDULER_GONE, "exit code 75", now + 0.1)
    assert mind.actions(now + 0.1) == [Start("worker-0")], "it had found it, and looks for the next one"


def test_a_worker_that_is_refused_waits_until_somebody_can_have_replaced_certificates() -> None:
    mind = running()
    mind.ended("worker-0", ExitCode.STRANGER, "exit code 77", 100.0)
    assert mind.actions(100.0 + STRANGER_PAUSE_S - 0.1) == []
    assert mind.actions(100.0 + STRANGER_PAUSE_S) == [Start("worker-0")]


def test_an_idle_server_ends_the_pool() -> None:
    mind = running()
    mind.ended(SERVER, ExitCode.IDLE, "exit code 76", 9.0)
    assert mind.actions(9.0) == [Tell("worker-0"), Tell("worker-1")]


def test_all_end_in_order_and_who_does_not_is_killed_once() -> None:
    mind = running()
    mind.stop("told", 10.0)
    assert mind.actions(10.0) == [Tell("worker-0"), Tell("worker-1")]
    mind.ended("worker-0", 0, "exit code 0", 11.0)
    assert mind.actions(11.0) == []
    (kill,) = mind.actions(10.0 + mind.grace_s)
    assert isinstance(kill, Kill)
    assert kill.role == "worker-1"
    assert mind.actions(11.0 + mind.grace_s) == []
    mind.ended("worker-1", -9, "signal 9", 30.0)
    assert mind.actions(30.0) == [Tell(SERVER)]
    mind.ended(SERVER, 0, "exit code 0", 31.0)
    assert mind.actions(31.0) == [Tell(SCHEDULER)]
    mind.ended(SCHEDULER, 0, "exit code 0", 31.0)
    assert mind.actions(31.0) == [Finish()]


def test_fewer_workers_end_gracefully_and_are_forgotten() -> None:
    mind = running(3)
    mind.resize(1)
    assert mind.actions(20.0) == [Tell("worker-1"), Tell("worker-2")]
    mind.ended("worker-2", 0, "exit code 0", 20.5)
    assert "worker-2" not in mind.lives
    mind.resize(3)
    assert mind.actions(21.0) == [Start("worker-2")]


def test_a_stopped_process_is_killed_after_a_while_unless_it_goes_on() -> None:
    mind = running()
    mind.looked("worker-0", stopped=True, now=100.0)
    mind.looked("worker-1", stopped=True, now=100.0)
    mind.looked("worker-1", stopped=False, now=110.0)
    assert mind.actions(100.0 + STOPPED_S - 1) == []
    (kill,) = mind.actions(100.0 + STOPPED_S)
    assert isinstance(kill, Kill)
    assert kill.role == "worker-0"
    assert mind.actions(101.0 + STOPPED_S) == []


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0, 1, -9, 75, 76, None]), st.floats(0, 40))))
def test_whatever_ends_the_keeper_never_starts_what_runs_and_always_finishes(
    ends: list[tuple[int, int | None, float]],
) -> None:
    mind, now = Upkeep(2, began=0.0), 0.0

    def act() -> bool:
        for action in mind.actions(now):
            match action:
                case Start(role):
                    assert not mind.lives[role].alive
                    assert not mind.stopping
                    mind.started(role, now)
                case Tell(role) | Kill(role, _):
                    assert mind.lives[role].alive
                case Finish():
                    return True
        return False

    for which, code, later in ends:
        act()
        now += later
        alive = sorted(role for role, life in mind.lives.items() if life.alive)
        if alive:
            mind.ended(alive[which % len(alive)], code, str(code), now)
    mind.stop("told", now)
    for _ in itertools.count():
        if act():
            break
        now += 1.0
        for role in [r for r, life in mind.lives.items() if life.alive and life.killed]:
            mind.ended(role, -9, "signal 9", now)
        assert now < 1e6
    assert not any(life.alive for life in mind.lives.values())
