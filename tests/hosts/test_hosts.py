"""What distance, lost packets and partitions do to a job: they take time, and nothing else."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from hosts_lab import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from hosts_lab import Pool

    import modelops as mo

N = 600
N_FAR = 1_000
MODEL_S = 0.1
N_SLOTS = 4
PARTITION_S = 30.0
DELAY_S, LOSS = 0.05, 0.02


def n_done(job: mo.Job) -> int:
    return job.status().counts.get("succeeded", 0)


def check(job: mo.Job, n: int) -> None:
    """Each replicate counts once, and with the value that its seed gives."""
    assert job.status().state == "succeeded", job.status()
    assert job.status().counts == {"succeeded": n}
    results = job.results()
    assert sorted(results["replicate"].to_pylist()) == list(range(n))
    assert len(set(results["seed"].to_pylist())) == n
    assert results["x"].to_pylist() == [seed * 7 % 1000 for seed in results["seed"].to_pylist()]


def per_second(job: mo.Job) -> float:
    """Return how many replicates ended a second, from the first one that began to the last one that ended."""
    attempts = job.attempts()
    began = [at.timestamp() for at in attempts["started_at"].to_pylist()]
    ended = [at + s for at, s in zip(began, attempts["seconds"].to_pylist(), strict=True)]
    return len(began) / float(max(ended) - min(began))


def test_distance_and_lost_packets_cost_less_than_a_tenth(pool: Pool, submit: Callable[..., mo.Job]) -> None:
    rates = {}
    far = [pool.hosts["worker-a"], pool.hosts["worker-b"]]
    submit(8).wait(timeout=120)  # environments are built
    for name, delay_s, loss in (("near", 0.0, 0.0), ("far", DELAY_S, LOSS)):
        for host in far:
            host.weather(delay_s, loss)
        try:
            job = submit(N_FAR)
            job.wait(timeout=300)
        finally:
            for host in far:
                host.weather(0.0, 0.0)
        check(job, N_FAR)
        rates[name] = per_second(job)
    cost = 1 - rates["far"] / rates["near"]
    ideal = N_SLOTS / MODEL_S
    print(  # noqa: T201
        f"\n{N_FAR} replicates of {MODEL_S * 1e3:.0f} ms on {N_SLOTS} slots: near {rates['near']:.1f}/s, "
        f"with {DELAY_S * 1e3:.0f} ms each way and {LOSS:.0%} lost {rates['far']:.1f}/s ({cost:.1%} less); "
        f"{ideal:.0f}/s would be all"
    )
    assert cost < 0.1


@pytest.mark.parametrize(("pools", "whose"), [(["EU"], "worker-a"), (["nowhere", "US_East"], "worker-b")])
def test_a_job_runs_on_the_hosts_of_its_pools(
    pool: Pool, submit: Callable[..., mo.Job], pools: list[str], whose: str
) -> None:
    job = submit(100, pools=pools)
    job.wait(timeout=120)
    check(job, 100)
    ran = {worker.partition("://")[2].partition(":")[0] for worker in job.attempts()["worker"].to_pylist()}
    assert ran == {pool.hosts[whose].address}
    assert {p.name: p.counts for p in job.status().pools if p.counts} == {pools[-1]: {"succeeded": 100}}
    waits = [event.text for event in job.events() if event.kind == "pool_waits"]
    assert waits == [f"no worker of the pool {name} is connected" for name in pools[:-1]]


@pytest.mark.parametrize("whom", ["worker-a", "scheduler", "database", "storage", "server"])
def test_a_partition_costs_a_job_time_and_nothing_else(
    pool: Pool, submit: Callable[..., mo.Job], whom: str
) -> None:
    job = submit(N)
    wait_for(lambda: n_done(job) >= 100, "the job is under way")
    began = time.monotonic()
    pool.hosts[whom].cut()
    try:
        time.sleep(PARTITION_S)  # that is what is tested
    finally:
        pool.hosts[whom].mend()
    status = job.wait(timeout=300)
    assert status.final
    print(  # noqa: T201
        f"\n{whom} was cut off for {PARTITION_S:.0f} s: the job ended {time.monotonic() - began:.0f} s after it"
    )
    check(job, N)
    if whom == "database":  # it knew by then, and said so
        assert "store_lost" in {event.kind for event in job.events()}
    wait_for(lambda: pool.n_workers() == N_SLOTS, "all workers are there again")


def test_a_worker_that_comes_back_late_is_fenced_off(pool: Pool, submit: Callable[..., mo.Job]) -> None:
    job = submit(400)
    wait_for(lambda: n_done(job) >= 50, "the job is under way")
    host = pool.hosts["worker-a"]
    host.cut()
    try:
        assert job.wait(timeout=300).final  # the others have done what it held
    finally:
        host.mend()
    check(job, 400)
    wait_for(lambda: pool.n_workers() == N_SLOTS, "it is there again")
    check(job, 400)
    workers = set(job.attempts()["worker"].to_pylist())
    assert len(workers) >= 2
    again = submit(40)
    again.wait(timeout=120)
    check(again, 40)
