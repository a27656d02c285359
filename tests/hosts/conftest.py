"""ModelOps on many hosts: scheduler, server, PostgreSQL, S3, two workers, each at an address of its own, all by TLS.

Each part is behind a firewall: the network policies of k8s/ (`firewall`)."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import firewall
import hosts_lab
import pytest
from firewall import Peer
from hosts_lab import HTTP_PORTS, PARTS, S3, Host, Lab, Part, Pool, Postgres, wait_for
from unfinished import pytest_runtest_logfinish, pytest_sessionfinish  # noqa: F401  # hooks

import modelops as mo
from modelops.cluster.certificates import create_certificates

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

TOKEN = "the-token-of-many-hosts"
SLOTS = 2


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    if reason := hosts_lab.why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("hosts")
    hosts: dict[str, Host] = {}
    parts: dict[str, Part] = {}
    with contextlib.ExitStack() as stack:
        net = stack.enter_context(Lab())
        for name in ("scheduler", "server", "database", "storage", "monitoring", "stranger"):
            hosts[name] = net.host()
        for name in ("worker-a", "worker-b"):
            hosts[name] = net.host(far=True)
        at = {name: host.address for name, host in hosts.items()}
        certs = folder / "certs"
        create_certificates(certs, list(at.values()))
        database = stack.enter_context(Postgres(hosts["database"], certs / "server", 5432))
        storage = stack.enter_context(S3(hosts["storage"], certs / "server", 443))
        us = f"{net.net}.254"
        peers = [
            *(Peer(at[part], part.partition("-")[0]) for part in PARTS),
            *(Peer(at[name]) for name in ("database", "storage", "stranger")),
            Peer(at["monitoring"], namespace={"modelops.dev/metrics": "true"}),
            Peer(us, namespace={"modelops.dev/clients": "true"}),
        ]
        for name, pod in zip(PARTS, peers, strict=False):
            firewall.close(hosts[name], pod, peers, at["database"])
        scheduler = f"tls://{at['scheduler']}:8786"
        url = f"https://{at['server']}:8785"
        served = (certs / "server" / "cert.pem", certs / "server" / "key.pem")
        commands = {
            "scheduler": ("scheduler", "--host", at["scheduler"]),
            "server": (
                "server", "--host", at["server"], "--scheduler", scheduler, "--tls-cert", str(served[0]),
                "--tls-key", str(served[1]),
            ),
            "worker-a": ("worker", "--scheduler", scheduler, "--slots", str(SLOTS), "--pool", "eu-west",
                         "--pool-label", "region=eu"),
            "worker-b": ("worker", "--scheduler", scheduler, "--slots", str(SLOTS), "--pool", "us-east"),
        }  # fmt: skip
        environ = {**storage.environ, "MODELOPS_STORAGE": storage.url}
        for name, arguments in commands.items():
            if name != "server":
                arguments = (*arguments, "--http-port", str(HTTP_PORTS[name]))
            role = name.partition("-")[0]
            more = {"MODELOPS_TLS": str(certs / role), **environ}
            if role == "server":
                more |= {
                    "MODELOPS_DATABASE": database.url(certs / "server" / "ca.pem"),
                    "MODELOPS_TOKEN": TOKEN,
                }
            part = Part(hosts[name], folder / name, more, *arguments)
            parts[name] = stack.enter_context(part)
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("MODELOPS_CA", str(certs / "client" / "ca.pem"))
        patch.setenv("MODELOPS_HOME", str(folder / "client"))
        pool = Pool(stack.enter_context(mo.Client(url, TOKEN)), hosts, parts)

        def ready() -> bool:
            try:
                return pool.n_workers() == 2 * SLOTS
            except mo.ModelOpsError:
                return False

        try:
            wait_for(ready, "all workers have joined")
        except AssertionError:
            print({name: part.log.read_text()[-2000:] for name, part in parts.items()})  # noqa: T201
            raise
        yield pool


@pytest.fixture
def submit(pool: Pool, tmp_path: Path) -> Callable[..., mo.Job]:
    """Submit replicates that take 100 ms each and return what can be told from their seed."""
    bundle = tmp_path / "model.py"
    bundle.write_text(
        '# /// script\n# [tool.modelops]\n# model = "model:simulate"\n# ///\nimport time\n\n'
        'def simulate(params, seed):\n    time.sleep(0.1)\n    return {"x": seed * 7 % 1000}\n'
    )

    def submit(replicates: int, **study: Any) -> mo.Job:
        job: mo.Job = pool.client.submit(mo.Study(bundle=bundle, replicates=replicates, seed=3, **study))
        return job

    return submit
