"""What is run in a simulation, and what goes wrong, as plain data: the same seed draws the same schedule.

A fault has a kind and a number: the n-th time that it could happen, it does. So a schedule can be printed, and a
failing one made smaller by leaving faults out.

What is drawn: a good half of the schedules make `ENOUGH` events or a few more, in several runs if one makes fewer. A
tenth use the real records; most of these have one or two replicates. The others are small: up to three replicates of
any length, or up to `MOST_SHORT` that go together. They cost little, and what is rare in a long schedule is at times
the only thing that happens in a short one.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from math import inf, log
from typing import TYPE_CHECKING, TypeVar

import msgspec

from modelops.states import ReplicateStatus
from modelops.study.index_line import Block, IndexLine
from modelops.study.spec import JobSpec, RetryPolicy
from modelops.study.stopping import Until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from _typeshed import SupportsLenAndGetItem

_T = TypeVar("_T")
CRASHED, FAILED, SUCCEEDED = ReplicateStatus.CRASHED, ReplicateStatus.FAILED, ReplicateStatus.SUCCEEDED

# Occasion -> kind -> how often it is drawn at most, per occasion.
FAULTS = {
    "again": {  # a worker is there as a job is run again
        "left": 0.4,  # it still runs what an earlier run began and has not recorded
    },
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
        "part": 0.4,  # it hands in a part, and goes on with one of them
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
OFTEN = {kind: most for kinds in FAULTS.values() for kind, most in kinds.items()}
OCCASION = {kind: occasion for occasion, kinds in FAULTS.items() for kind in kinds}
OCCASIONS = 600  # later ones go well, so every schedule ends
# What makes events, and about how many. A schedule with much of that gets fewer replicates, and a job that has ended
# with fewer events than wanted is extended: most are about as long, as a few twice as long would take the time of many.
EVENTS = {1.0: 232, 3.0: 238, 60.0: 246}  # with nothing of what follows; by mean seconds of a replicate
EVENTS_OF_ONE = 6.0  # replicate
EVENTS_OF_ADDED = 7.5  # one by which a job is extended
EVENTS_OF_RUN_MORE = 28  # and of the run that has these
EVENTS_OF_PARAM = 3.8  # parameter set that is aggregated
EVENTS_OF_RETRY = 2.0
EVENTS_OF_POISON = 45
EVENTS_OF_POISON_PARAM = 31
EVENTS_OF_RUN = 21
EVENTS_OF_SLOTS = 7.0  # a worker more, or a slot more on each
EVENTS_OF_FAULT = {"pause": 7.0, "rival": 7.0, "crash": 5.0, "death": 3.8, "partition": 2.0}  # others: 0.6
SECONDS = [
    1e-3,
    1e-3,
    1.0,
    3.0,
    *[60.0] * 8,
]  # means; workers say of those that take long that they have begun
FEWEST, MOST = 8, 48  # replicates
FEWEST_SHORT, MOST_SHORT = 8, 20  # that take a millisecond, and go together
NEAR = 10  # events
TRIES = 8  # to come near
ENOUGH = 203  # events
ENOUGH_ON_RECORDS = 40  # for one in eight of the schedules that use real records
SMALL = 0.28  # of the schedules
MOST_OF_A_KIND = 4  # a few schedules full of faults would take the time of many


class Chance(random.Random):
    """Draws in a fifth of the time: a bias of one in 2 ** 50 is none."""

    def choice(self, seq: SupportsLenAndGetItem[_T]) -> _T:
        """Draw one of these."""
        return seq[int(self.random() * len(seq))]

    def randint(self, a: int, b: int) -> int:
        """Draw one of ``a`` to ``b``."""
        return a + int(self.random() * (b + 1 - a))

    def randrange(self, n: int) -> int:  # type: ignore[override]  # nobody needs more
        """Draw one of 0 to ``n`` - 1."""
        return int(self.random() * n)


@dataclass
class Scenario:
    """What is run, and the faults: kind -> the numbers of the occasions at which it happens."""

    spec: JobSpec
    n_workers: int
    slots: int
    seconds: list[float]  # of each replicate
    output_bytes: int = 0  # of each replicate's large outputs
    crashes: dict[int, int] = field(default_factory=dict)  # index -> how many attempts crash first
    failing: frozenset[int] = frozenset()  # indices whose model raises
    fingerprints: int = 1  # how many different errors they raise
    poison: frozenset[int] = frozenset()  # indices that take the worker down
    poison_params: frozenset[int] = frozenset()  # parameter sets whose aggregate does
    cursed: int = -1  # an index at which the machinery around the model fails, each time
    environment_fails: bool = False
    missing_import_at: int = -1
    jitter: float = 0.0  # seconds by which news is delayed
    cancels: tuple[float, ...] = ()
    resumes: int = 0
    enough: int = 0  # events; a job that has ended with fewer is extended
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
        if self.cursed >= 0:
            yield replace(self, cursed=-1)
        if self.cancels:
            yield replace(self, cancels=self.cancels[1:])
        if self.resumes:
            yield replace(self, resumes=self.resumes - 1)
        if self.enough:
            yield replace(self, enough=0)
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
            "cursed": s.cursed + 1 and [s.cursed],
            "timeout": spec.timeout_s,
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
            f"{spec.retry}, {spec.until}, {s.resumes} resumes, extended to {s.enough} events{said}"
        )


def draw_scenario(seed: int) -> Scenario:
    """Make a random scenario. The same seed makes the same one. Every tenth uses the real store, and is small.

    First what goes wrong, then how many replicates there are.
    """
    rng = Chance(seed)
    chance, choice = rng.random, rng.choice
    real_store = seed % 10 == 9
    is_small = not real_store and chance() < SMALL
    mean = choice(SECONDS)
    retry = RetryPolicy(max_retries=0)
    if chance() < 0.6:
        retry = RetryPolicy(
            max_retries=rng.randint(1, 4),
            initial_delay=choice([0.0, 0.5, 30.0]),
            backoff=choice([1.0, 2.0]),
            max_delay=choice([None, 40.0]),
            on=frozenset({CRASHED} if chance() < 0.7 else {CRASHED, FAILED}),
        )
    failing: frozenset[int] = frozenset()
    if chance() < 0.03:
        failing = frozenset(range(MOST))
    elif chance() < 0.4:
        failing = frozenset(k for k in range(MOST) if chance() < 0.1)
    crashes = {k: rng.randint(1, 7) for k in range(MOST) if chance() < 0.1} if chance() < 0.5 else {}
    n_poison = rng.randint(1, 2) if chance() < 0.12 else 0
    has_poison_param = chance() < 0.05
    n_workers, slots = rng.randint(1, 4), choice([1, 1, 2, 3])
    aggregates = tuple("mn"[: choice([0, 0, 1, 2])])
    resumes = choice(
        [0, 0, 0, 1] if mean in EVENTS and not (real_store or is_small) else [0, 0, 0, 0, 0, 0, 0, 1]
    )
    faults = {} if chance() < 0.1 else _draw_faults(rng)
    enough = 0
    if real_store:
        line = _draw_blocks(rng, choice([1, 1, 2]))
        enough = ENOUGH_ON_RECORDS if chance() < 1 / 8 else 0
    elif is_small:
        line = _draw_blocks(rng, rng.randint(1, 3))
    elif mean not in EVENTS:
        line = _draw_line(rng, EVENTS_OF_ONE * rng.randint(FEWEST_SHORT, MOST_SHORT), 0.0)
    else:
        n_again = sum(min(n, retry.max_retries) for n in crashes.values())
        if FAILED in retry.on:
            n_again += len(failing) * retry.max_retries
        wanted = EVENTS[mean] - n_again * EVENTS_OF_RETRY - resumes * EVENTS_OF_RUN
        wanted -= n_poison * EVENTS_OF_POISON + has_poison_param * EVENTS_OF_POISON_PARAM
        wanted -= (n_workers + slots) * EVENTS_OF_SLOTS
        wanted -= sum(len(numbers) * EVENTS_OF_FAULT.get(kind, 0.6) for kind, numbers in faults.items())
        line = _draw_line(rng, wanted, EVENTS_OF_PARAM if aggregates else 0.0)
        enough = ENOUGH
    size = line.size
    seconds = [mean * (0.1 + 2 * chance() ** 2) for _ in range(size)]
    total = sum(seconds)
    pools, homes = _draw_pools(rng)
    timeout_s = None
    if chance() < 0.05:  # of about what it takes
        timeout_s = total / (n_workers * slots) * chance() * 2
    return Scenario(
        spec=JobSpec(
            name="simulated",
            bundle="b",
            bundle_name="b",
            model="m:f",
            aggregates=aggregates,
            line=line,
            retry=retry,
            fail_fast=chance() < 0.7,
            max_failures=rng.randint(0, size) if chance() < 0.05 else None,
            timeout_s=timeout_s,
            until=_draw_until(rng, line) if chance() < 1 / 40 else None,
            pools=pools or msgspec.UNSET,
        ),
        n_workers=n_workers,
        slots=slots,
        seconds=seconds,
        crashes={k: n for k, n in crashes.items() if enough or k < size},
        failing=frozenset(k for k in failing if enough or k < size),
        fingerprints=choice([1, 1, 3]),
        poison=frozenset(rng.randrange(size) for _ in range(n_poison)),
        poison_params=frozenset({rng.randrange(line.n_params)} if has_poison_param else ()),
        cursed=rng.randrange(size) if chance() < 0.01 else -1,
        environment_fails=chance() < 0.01,
        missing_import_at=rng.randrange(size) if chance() < 0.02 else -1,
        jitter=choice([0.0, 0.0, 0.01, mean]),
        cancels=tuple(sorted(total * chance() for _ in range(choice([1, 1, 2])))) if chance() < 0.1 else (),
        resumes=resumes,
        enough=enough,
        repairs=frozenset(n for n in (1, 2) if chance() < 0.3),
        faults=faults,
        real_store=real_store,
        homes=homes,
        output_bytes=50_000_000 if mean not in EVENTS and seed % 4 == 1 else 0,
    )


def _draw_pools(rng: Chance) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Draw, for one schedule in six, which pools the job asks for, and those of its workers, however they are spelt."""
    if rng.random() > 1 / 6:
        return (), ("",)
    pools = rng.choice([("eu-west",), ("eu-west", "us"), ("us", "eu-west", "none")])
    return pools, ("EU_West", *rng.sample(["us", "", "asia", "eu.west", "eu-west-1"], rng.randint(1, 3)))


def _draw_until(rng: Chance, line: IndexLine) -> Until | None:
    """Draw when a parameter set has enough replicates, if all have as many."""
    most = {n for _, _, n in line.replicates()}
    if len(most) != 1 or min(most) < 2:
        return None
    half_width = rng.choice([0.4, 0.7, 1.0, 2.0, 4.0])
    return Until(half_width=half_width, of="x", level=0.8, min=rng.randint(2, min(6, *most)), max=most.pop())


def _draw_faults(rng: Chance) -> dict[str, frozenset[int]]:
    """Choose some kinds, a rate for each, and the occasions."""
    faults = {}
    chance = rng.random
    for kind, most in OFTEN.items():
        if chance() < 0.69:
            rate = most * (0.01 + chance())
            numbers: list[int] = []
            n = -log(1.0 - chance()) / rate
            while n < OCCASIONS and len(numbers) < MOST_OF_A_KIND:
                numbers.append(int(n))
                n += 1 - log(1.0 - chance()) / rate
            faults[kind] = frozenset(numbers)
    return faults


def _draw_line(rng: Chance, wanted: float, of_param: float) -> IndexLine:
    """Draw a line that makes about as many events as wanted, a parameter set ``of_param`` of them."""
    best, least = (1, FEWEST, 0, 0), inf
    for _ in range(TRIES):
        n_params, _, more, n_new = _draw_shape(rng, MOST)
        n = n_params + n_new
        of_all = (wanted / n - of_param) / EVENTS_OF_ONE
        n_replicates = max(1, min(round(of_all), MOST // n) - more)
        size = n * (n_replicates + more)
        if FEWEST <= size <= MOST:
            missing = abs(wanted - size * EVENTS_OF_ONE - n * of_param)
            if missing < least:
                best, least = (n_params, n_replicates, more, n_new), missing
                if missing <= NEAR:
                    break
    return _blocks(best)


def _draw_blocks(rng: Chance, size: int) -> IndexLine:
    return _blocks(_draw_shape(rng, size))


def _draw_shape(rng: Chance, size: int) -> tuple[int, int, int, int]:
    """Draw parameter sets, replicates of each, more replicates that came later, and new parameter sets after that."""
    n_params = min(size, rng.choice([1, 2, 5, 10, 20]))
    more, n_new = (rng.randint(0, 2), rng.randint(0, 2)) if rng.random() < 0.3 else (0, 0)
    return n_params, max(1, size // n_params), more, n_new


def _blocks(shape: tuple[int, int, int, int]) -> IndexLine:
    n_params, n_replicates, more, n_new = shape
    blocks = [Block(0, 0, n_params, 0, n_replicates)]
    if more or n_new:
        blocks.append(Block(blocks[-1].end, 0, n_params, n_replicates, more))
        blocks.append(Block(blocks[-1].end, n_params, n_new, 0, n_replicates + more))
    return IndexLine(tuple(blocks))
