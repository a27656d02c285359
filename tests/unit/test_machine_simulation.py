"""The machine under random faults, and proof that the simulator would see it if it were wrong."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import pytest
from planted_bugs import BUGS
from simulator import BrokenRule, simulate

from modelops.states import FINAL_JOB_STATES

if TYPE_CHECKING:
    from planted_bugs import Plant

N_SCHEDULES = 2_000


def test_no_rule_is_broken_in_thousands_of_random_schedules() -> None:
    worlds = [simulate(seed) for seed in range(N_SCHEDULES)]
    ends = {world.finished.state for world in worlds if world.finished is not None}
    assert ends == FINAL_JOB_STATES  # every way to end was met
    assert statistics.median(world.n_events for world in worlds) >= 50
    assert sum(world.n_faults for world in worlds) >= 5 * N_SCHEDULES


def test_the_same_seed_plays_the_same_schedule() -> None:
    first, second = simulate(17), simulate(17)
    assert (first.n_events, first.now, first.outcomes) == (second.n_events, second.now, second.outcomes)
    assert list(first.trace) == list(second.trace)


@pytest.mark.parametrize("plant", BUGS, ids=lambda plant: plant.__name__)
def test_the_simulator_finds_a_planted_bug(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    for seed in range(N_SCHEDULES):
        try:
            simulate(seed)
        except BrokenRule:
            return
    pytest.fail(f"{plant.__name__} was not found in {N_SCHEDULES} schedules")
