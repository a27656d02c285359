"""The machine under random faults, and proof that the simulator would see it if it were wrong."""

from __future__ import annotations

import os
from itertools import islice
from typing import TYPE_CHECKING

import pytest
from planted_bugs import BUGS, OF_UNTIL, drops_retries
from simulate import play_many, shrunk
from simulator import BrokenRule, World, simulate
from simulator_scenario import draw_scenario

if TYPE_CHECKING:
    from collections.abc import Iterable

    from planted_bugs import Plant

N_SCHEDULES = int(os.environ.get("MODELOPS_SCHEDULES", "4000"))
ENOUGH_TO_FIND_A_BUG = 2_000


def test_no_rule_is_broken_in_thousands_of_random_schedules() -> None:
    figures = play_many(N_SCHEDULES)
    assert len(figures.n_events) == N_SCHEDULES
    assert not figures.shortfall()


def test_the_same_seed_plays_the_same_schedule() -> None:
    worlds = [World(draw_scenario(17), 17, traced=traced) for traced in (False, True, True)]
    for world in worlds:
        world.run()
    plain, first, second = worlds
    for other in (first, second):
        assert (plain.n_events, plain.now, plain.outcomes) == (other.n_events, other.now, other.outcomes)
    assert first.trace
    assert first.trace == second.trace


@pytest.mark.parametrize("plant", BUGS, ids=lambda plant: plant.__name__)
def test_the_simulator_finds_a_planted_bug(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: Iterable[int] = range(ENOUGH_TO_FIND_A_BUG)
    if plant in OF_UNTIL:  # of those that can show it, there are fewer
        seeds = (seed for seed in range(10 * ENOUGH_TO_FIND_A_BUG) if draw_scenario(seed).spec.until)
    plant(monkeypatch)
    for seed in islice(seeds, ENOUGH_TO_FIND_A_BUG):
        try:
            simulate(seed)
        except BrokenRule:
            return
    pytest.fail(f"{plant.__name__} was not found in {ENOUGH_TO_FIND_A_BUG} schedules")


def test_a_failing_schedule_is_printed_with_its_seed_and_only_the_faults_it_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drops_retries(monkeypatch)
    for seed in range(ENOUGH_TO_FIND_A_BUG):
        try:
            simulate(seed)
        except BrokenRule:
            small = shrunk(seed)
            assert small.startswith(f"seed {seed}, ")
            assert f"simulate.py 1 --first {seed}" in small
            assert "crashes" in small or "failing" in small  # without one there is nothing to retry
            assert "faults" not in small  # and it needs no other
            return
    pytest.fail("no schedule failed")
