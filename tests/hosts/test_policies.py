"""The network policies of k8s/ let through what the parts need, and nothing else; all tests here run under them."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import firewall
from hosts_lab import HTTP_PORTS, PARTS
from test_hosts import check

if TYPE_CHECKING:
    from collections.abc import Callable

    from hosts_lab import Host, Pool

    import modelops as mo

TRIES = """
import json, socket, sys, threading

def connect(address, port):
    try:
        socket.create_connection((address, port), timeout=3).close()
        reached.append((address, port))
    except OSError:
        pass

reached = []
threads = [threading.Thread(target=connect, args=place) for place in json.loads(sys.argv[1])]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps(sorted(reached)))
"""


def reached(host: Host, places: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Return which of these places a host can connect to."""
    command = host.inside(sys.executable, "-c", TRIES, json.dumps(places))
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [(address, port) for address, port in json.loads(said)]


def test_the_parts_need_what_the_policies_allow_and_try_nothing_else(
    pool: Pool, submit: Callable[..., mo.Job]
) -> None:
    job = submit(100)
    job.wait(timeout=120)
    check(job, 100)
    assert {part: firewall.refused(pool.hosts[part]) for part in PARTS} == {part: {} for part in PARTS}
    scraped = [(pool.hosts[part].address, HTTP_PORTS[part]) for part in PARTS if part != "scheduler"]
    assert reached(pool.hosts["monitoring"], scraped) == sorted(scraped)
    unused = {part: [r for r, n in firewall.used(pool.hosts[part]).items() if not n] for part in PARTS}
    assert unused == {part: [] for part in PARTS}


def test_nobody_reaches_what_is_not_for_them(pool: Pool) -> None:
    at = {name: host.address for name, host in pool.hosts.items()}
    of_parts = [
        (at["scheduler"], 8786),
        *((at[part], port) for part, port in HTTP_PORTS.items()),
        *pool.workers(),
    ]
    services = [(at["database"], 5432), (at["storage"], 443)]
    for name, may in {
        "stranger": services,  # which no policy protects
        "monitoring": [
            *services,
            *((at[part], port) for part, port in HTTP_PORTS.items() if part != "scheduler"),
        ],
        "worker-a": [(at["scheduler"], 8786), (at["storage"], 443)],
        "scheduler": [],
        "server": [(at["scheduler"], 8786), *services],
    }.items():
        places = [place for place in (*of_parts, *services) if place[0] != at[name]]
        expected = sorted(place for place in may if place[0] != at[name])
        if name == "scheduler":  # it may call any port of a worker but those below 1024
            expected = sorted(place for place in places if place[0] in {at["worker-a"], at["worker-b"]})
        assert (name, reached(pool.hosts[name], places)) == (name, expected)
