"""Play many schedules on every core; make the first that breaks a rule as small as it goes.

``make simulate`` plays 100,000. ``python tests/unit/simulate.py 1 --first 178`` plays the one of that seed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import multiprocessing
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from simulator import BrokenRule, World, play, simulate, story
from simulator_scenario import OCCASION, Scenario, draw_scenario

from modelops.states import FINAL_JOB_STATES

if TYPE_CHECKING:
    from modelops.states import JobState

BATCH = 100
ENOUGH_TO_JUDGE = 3_000  # schedules; what fewer have met says little
MOST_PLAYS = 3_000  # to shrink one schedule


@dataclass
class Figures:
    """What was met in some schedules."""

    n_events: list[int] = field(default_factory=list)
    n_faults: list[int] = field(default_factory=list)
    n_drivers: list[int] = field(default_factory=list)
    n_real: int = 0  # that used the real store
    ends: set[JobState] = field(default_factory=set)
    seconds: float = 0.0  # of a processor
    broken: str = ""

    def add(self, other: Figures) -> None:
        """Take in those of other schedules."""
        self.n_events += other.n_events
        self.n_faults += other.n_faults
        self.n_drivers += other.n_drivers
        self.n_real += other.n_real
        self.ends |= other.ends
        self.seconds += other.seconds
        self.broken = self.broken or other.broken

    def shortfall(self) -> str:
        """Say in what the schedules were too tame to prove anything; empty if they were not."""
        n = len(self.n_events)
        wanted = {
            "the median schedule has fewer than 200 events": statistics.median(self.n_events) >= 200,
            "the median schedule has fewer than 5 faults": statistics.median(self.n_faults) >= 5,
            "fewer than a tenth used real records": 10 * self.n_real >= n,
            "drivers were hardly replaced": sum(self.n_drivers) >= 1.5 * n,
            "some way to end was not met": self.ends == FINAL_JOB_STATES,
        }
        return "; ".join(text for text, holds in wanted.items() if not holds)

    def __str__(self) -> str:
        n = len(self.n_events)
        return (
            f"{n} schedules: median {statistics.median(self.n_events):.0f} events and "
            f"{statistics.median(self.n_faults):.0f} faults, {sum(self.n_drivers)} drivers, "
            f"{self.n_real} on real records, {1e3 * self.seconds / n:.2f} ms each"
        )


def play_batch(seeds: range) -> Figures:
    """Play these, up to the first that breaks a rule."""
    figures = Figures()
    began = time.process_time()
    gc.disable()  # a world that was forgotten leaves no circle
    try:
        for seed in seeds:
            try:
                world = simulate(seed)
            except BrokenRule:
                figures.broken = shrunk(seed)
                break
            figures.n_events.append(world.n_events)
            figures.n_faults.append(world.n_faults)
            figures.n_drivers.append(world.store.epoch)
            figures.n_real += world.s.real_store
            figures.ends.add(world.store.state)
            world.forget()
    finally:
        gc.enable()
    figures.seconds = time.process_time() - began
    return figures


def play_many(n: int, *, first: int = 0, processes: int | None = None) -> Figures:
    """Play the schedules of ``n`` seeds in a pool of processes. Raises BrokenRule with the smallest that fails."""
    batches = [range(lo, min(lo + BATCH, first + n)) for lo in range(first, first + n, BATCH)]
    context = multiprocessing.get_context("spawn")
    total = Figures()
    with ProcessPoolExecutor(processes or os.cpu_count(), context, initializer=_warm_up) as pool:
        for figures in pool.map(play_batch, batches):
            total.add(figures)
            if total.broken:
                pool.shutdown(cancel_futures=True)
                raise BrokenRule(total.broken)
    return total


def _warm_up() -> None:
    """Load all that schedules need, and keep the collector from looking through it again and again."""
    with contextlib.suppress(BrokenRule):  # it is found again among the schedules, and made smaller there
        simulate(9)  # on the real store
    gc.collect()
    gc.freeze()


def shrunk(seed: int) -> str:
    """Leave out of a failing schedule whatever is not needed to fail; return what is left, and its story."""
    scenario = draw_scenario(seed)
    world = World(scenario, seed)
    _breaks(scenario, seed, world)
    scenario = replace(scenario, faults=_reached(scenario, world))
    plays, smaller = 0, True
    while smaller and plays < MOST_PLAYS:
        smaller = False
        for simpler in scenario.simpler():
            plays += 1
            if _breaks(simpler, seed):
                scenario, smaller = simpler, True
                break
    return (
        f"{story(scenario, seed)}\n(shrunk in {plays} plays; python tests/unit/simulate.py 1 --first {seed})"
    )


def _breaks(scenario: Scenario, seed: int, world: World | None = None) -> bool:
    try:
        play(scenario, seed, world)
    except BrokenRule:
        return True
    return False


def _reached(scenario: Scenario, world: World) -> dict[str, frozenset[int]]:
    """Return the faults without those whose occasion never came."""
    last = {**world.occasions, "command": world.n_commands}
    return {
        kind: frozenset(n for n in ns if n <= last[OCCASION[kind]]) for kind, ns in scenario.faults.items()
    }


def main() -> None:
    """Read the arguments, play, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("n", type=int, help="how many schedules")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--processes", type=int, default=None)
    arguments = parser.parse_args()
    began = time.monotonic()
    try:
        figures = play_many(arguments.n, first=arguments.first, processes=arguments.processes)
    except BrokenRule as broken:
        sys.exit(str(broken))
    sys.stdout.write(f"{figures}; {time.monotonic() - began:.1f} s in all\n")
    if arguments.n >= ENOUGH_TO_JUDGE and (text := figures.shortfall()):
        sys.exit(text)


if __name__ == "__main__":
    main()
