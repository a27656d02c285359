"""What is run in a simulation, and what goes wrong, as plain data: the same seed draws the same schedule.

A fault has a kind and a number: the n-th time that it could happen, it does. So a schedule can be printed, and a
failing one made smaller by leaving faults out.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import msgspec

from modelops.states import ReplicateStatus
from modelops.study.index_line import Block, IndexLine
from modelops.study.spec import JobSpec, RetryPolicy
from modelops.study.stopping import Until

if TYPE_CHECKING:
    from collections.abc import Iterator

CRASHED, FAILED, SUCCEEDED = ReplicateStatus.CRASHED, ReplicateStatus.FAILED, ReplicateStatus.SUCCEEDED

# Occasion -> kind -> how often it is drawn at most, per occasion.
FAULTS = {
    "submit": {  # an attempt reaches its worker
        "busy": 0.06,  # a slot there belongs to another job for a while
    },
    "wait": {  # an attempt has to wait on its worker
        "waits": 0.5,  # the driver is told
    },
    "begin": {  # a worker begins an attempt
        "death": 0.08,  # its process dies meanwhile
        "partition": 0.05,  # it is said to be gone, and its receipts come later
        "checkpoint": 0.1,  # one of its replicates keeps a checkpoint
    },
    "many": {  # a worker begins an attempt at more than one replicate
        "part": 0.2,  # it hands in a part, and goes on with one of them
    },
    "gone": {  # a worker is said to be gone
        "back": 0.5,  # it is back, under its name
    },
    "end": {  # an attempt ends
        "err": 0.05,  # the task raises
        "unfit": 0.02,  # likewise, as its worker cannot
        "fatal": 0.002,  # likewise, without hope
        "given_back": 0.06,  # nothing was done, unasked
    },
    "receipt": {
        "late": 0.08,  # its attempt is said to be lost before it comes
        "twice": 0.10,  # it comes again
        "never": 0.03,  # it does not come, the attempt is said to be lost
    },
    "commit": {
        "refusal": 0.02,  # the store says that it is covered
        "outage": 0.06,  # the store goes away, before or after it was written
    },
    "command": {
        "crash": 0.02,  # the driver dies before it; the commands that follow it are lost
        "pause": 0.015,  # it is stopped, and wakes when another has its lease, or before
        "rival": 0.015,  # another driver takes the lease, and this one does not know
    },
    "ask": {  # a worker is asked for its attempts
        "mute": 0.2,  # it answers too late, or never
    },
    "stop": {  # an attempt is asked to stop
        "deaf": 0.1,  # it hangs for ever
    },
}
OCCASION = {kind: occasion for occasion, kinds in FAULTS.items() for kind in kinds}
OCCASIONS = 600  # later ones go well, so every schedule ends
# Mean seconds of a replicate -> how many make 200 events: what takes longer says more, what is short goes together.
LONG = {1e-3: range(30, 45), 1.0: range(35, 40), 3.0: range(33, 38), 60.0: range(29, 33)}
MOST_OF_A_KIND = 4  # a few schedules full of faults would take the time of many


@dataclass
class Scenario:
    """What is run, and the faults: kind -> the numbers of the occasions at which it happens."""

    spec: JobSpec
    n_workers: int
    slots: int
    seconds: list[float]  # of each replicate
    crashes: dict[int, int] = field(default_factory=dict)  # index -> how many attempts crash first
    failing: frozenset[int] = frozenset()  # indices whose model raises
    fingerprints: int = 1  # how many different errors they raise
    poison: frozenset[int] = frozenset()  # indices that take the worker down
    poison_params: frozenset[int] = frozenset()  # parameter sets whose aggregate does
    environment_fails: bool = False
    missing_import_at: int = -1
    jitter: float = 0.0  # seconds by which news is delayed
    cancels: tuple[float, ...] = ()
    resumes: int = 0
    repairs: frozenset[int] = frozenset()  # which of these runs only repair: a segment is found damaged
    faults: dict[str, frozenset[int]] = field(default_factory=dict)
    real_store: bool = False
    homes: tuple[str, ...] = (
        "",
    )  # the pools of workers, in the order in which they come; the job may use the first

    def occasions(self) -> dict[str, dict[int, tuple[str, ...]]]:
        """Return for each occasion the numbers at which something goes wrong, and what."""
        found: dict[str, dict[int, tuple[str, ...]]] = {occasion: {} for occasion in FAULTS}
        for kind, numbers in self.faults.items():
            of = found[OCCASION[kind]]
            for n in numbers:
                of[n] = (*of.get(n, ()), kind)
        return found

    def outcome(self, k: int, number: int) -> ReplicateStatus:
        """Return how a replicate ends in its attempt of this number."""
        if number <= self.crashes.get(k, 0):
            return CRASHED
        return FAILED if k in self.failing else SUCCEEDED

    def simpler(self) -> Iterator[Scenario]:
        """Yield this scenario with one thing less that goes wrong, each in turn."""
        for kind, numbers in self.faults.items():
            if numbers:
                yield replace(self, faults={**self.faults, kind: frozenset()})
            if len(numbers) > 1:
                for n in sorted(numbers, reverse=True):
                    yield replace(self, faults={**self.faults, kind: numbers - {n}})
        if self.crashes:
            yield replace(self, crashes={})
        if self.failing:
            yield replace(self, failing=frozenset())
        if self.poison:
            yield replace(self, poison=frozenset())
        if self.poison_params:
            yield replace(self, poison_params=frozenset())
        if self.cancels:
            yield replace(self, cancels=self.cancels[1:])
        if self.resumes:
            yield replace(self, resumes=self.resumes - 1)
        if self.repairs:
            yield replace(self, repairs=frozenset())
        if self.missing_import_at >= 0:
            yield replace(self, missing_import_at=-1)
        if self.jitter:
            yield replace(self, jitter=0.0)

    def __str__(self) -> str:
        s, spec = self, self.spec
        faults = {kind: sorted(numbers) for kind, numbers in s.faults.items() if numbers}
        fields = {
            "crashes": s.crashes,
            "failing": sorted(s.failing),
            "poison": sorted(s.poison),
            "poison_params": sorted(s.poison_params),
            "cancels": s.cancels,
            "repairs": sorted(s.repairs),
            "environment_fails": s.environment_fails,
            "pools": spec.asked_pools and (spec.asked_pools, s.homes),
            "missing_import_at": max(0, s.missing_import_at),
            "faults": faults,
        }
        said = "".join(f"\n  {name}: {value}" for name, value in fields.items() if value)
        return (
            f"{spec.line.blocks}, {len(spec.aggregates)} aggregates, {s.n_workers} workers x {s.slots} slots, "
            f"{spec.retry}, {spec.until}, {s.resumes} resumes{said}"
        )


def draw_scenario(seed: int) -> Scenario:
    """Make a random scenario. The same seed makes the same one. Every tenth uses the real store, and is small."""
    rng = random.Random(seed)
    chance = rng.random
    real_store = seed % 10 == 9
    mean = rng.choice([1e-3, 1.0, 1.0, 3.0, 60.0])
    line = _draw_line(rng, LONG[mean], small=real_store)
    until = _draw_until(random.Random(~seed), line)
    pools, homes = _draw_pools(random.Random(seed ^ 0x9001))
    size = line.size
    retry = RetryPolicy(max_retries=0)
    if chance() < 0.6:
        retry = RetryPolicy(
            max_retries=rng.randint(1, 4),
            initial_delay=rng.choice([0.0, 0.5, 30.0]),
            backoff=rng.choice([1.0, 2.0]),
            max_delay=rng.choice([None, 40.0]),
            on=frozenset({CRASHED} if chance() < 0.7 else {CRASHED, FAILED}),
        )
    seconds = [mean * (0.1 + 2 * chance() ** 2) for _ in range(size)]
    failing: frozenset[int] = frozenset()
    if chance() < 0.03:
        failing = frozenset(range(size))
    elif chance() < 0.4:
        failing = frozenset(k for k in range(size) if chance() < 0.1)
    total = sum(seconds)
    return Scenario(
        spec=JobSpec(
            name="simulated",
            bundle="b",
            bundle_name="b",
            model="m:f",
            aggregates=tuple("mn"[: rng.choice([0, 1, 1, 2])]),
            line=line,
            retry=retry,
            fail_fast=chance() < 0.7,
            max_failures=rng.randint(0, size) if chance() < 0.05 else None,
            timeout_s=total * chance() * 2 if chance() < 0.05 else None,
            until=until,
            pools=pools or msgspec.UNSET,
        ),
        n_workers=rng.randint(1, 4),
        slots=rng.choice([1, 1, 2, 3]),
        seconds=seconds,
        crashes={k: rng.randint(1, 7) for k in range(size) if chance() < 0.1} if chance() < 0.5 else {},
        failing=failing,
        fingerprints=rng.choice([1, 1, 3]),
        poison=_draw_some(rng, size) if chance() < 0.12 else frozenset(),
        poison_params=frozenset({rng.randrange(line.n_params)}) if size and chance() < 0.05 else frozenset(),
        environment_fails=chance() < 0.01,
        missing_import_at=rng.randrange(size) if size and chance() < 0.02 else -1,
        jitter=rng.choice([0.0, 0.0, 0.01, mean]),
        cancels=tuple(sorted(total * chance() for _ in range(rng.choice([1, 1, 2]))))
        if chance() < 0.1
        else (),
        resumes=rng.choice([0, 0, 0, 1] if real_store else [0, 0, 1, 2]),
        repairs=frozenset(n for n in (1, 2) if chance() < 0.3),
        faults={} if chance() < 0.1 else _draw_faults(rng),
        real_store=real_store,
        homes=homes,
    )


def _draw_pools(rng: random.Random) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Draw, for one schedule in six, which pools the job asks for, and those of its workers, however they are spelt."""
    if rng.random() > 1 / 6:
        return (), ("",)
    pools = rng.choice([("eu-west",), ("eu-west", "us"), ("us", "eu-west", "none")])
    return pools, ("EU_West", *rng.sample(["us", "", "asia", "eu.west", "eu-west-1"], rng.randint(1, 3)))


def _draw_until(rng: random.Random, line: IndexLine) -> Until | None:
    """Draw, for one schedule in sixteen whose sets are alike, when a parameter set has enough replicates."""
    most = {n for _, _, n in line.replicates()}
    if rng.random() > 1 / 16 or len(most) != 1 or min(most) < 2:
        return None
    half_width = rng.choice([0.4, 0.7, 1.0, 2.0, 4.0])
    return Until(half_width=half_width, of="x", level=0.8, min=rng.randint(2, min(6, *most)), max=most.pop())


def _draw_faults(rng: random.Random) -> dict[str, frozenset[int]]:
    """Choose some kinds, a rate for each, and the occasions."""
    faults = {}
    for kind, most in ((kind, most) for kinds in FAULTS.values() for kind, most in kinds.items()):
        if rng.random() < 0.5:
            rate = most * (0.01 + rng.random())
            numbers: list[int] = []
            n = rng.expovariate(rate)
            while n < OCCASIONS and len(numbers) < MOST_OF_A_KIND:
                numbers.append(int(n))
                n += 1 + rng.expovariate(rate)
            faults[kind] = frozenset(numbers)
    return faults


def _draw_some(rng: random.Random, size: int) -> frozenset[int]:
    return frozenset(rng.randrange(size) for _ in range(rng.randint(1, 2))) if size else frozenset()


def _draw_line(rng: random.Random, long: range, *, small: bool) -> IndexLine:
    """Draw a line that is long enough for a story, but not longer; one in eight is short."""
    if small:
        return _draw_blocks(rng, rng.randint(1, 3))
    if rng.random() < 1 / 16:
        return _draw_blocks(rng, rng.randint(1, 16))
    while True:
        line = _draw_blocks(rng, rng.randint(18, 44))
        if line.size in long:
            return line


def _draw_blocks(rng: random.Random, size: int) -> IndexLine:
    n_params = min(size, rng.choice([1, 2, 5, 10, 20]))
    blocks = [Block(0, 0, n_params, 0, max(1, size // n_params))]
    if rng.random() < 0.3:  # more replicates, then more parameter sets
        b = blocks[0]
        more = rng.randint(0, 2)
        blocks.append(Block(b.end, 0, b.n_params, b.n_replicates, more))
        blocks.append(Block(blocks[-1].end, b.n_params, rng.randint(0, 2), 0, b.n_replicates + more))
    return IndexLine(tuple(blocks))
