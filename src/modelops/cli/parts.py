"""``modelops server``, ``scheduler`` and ``worker``: the parts of a pool in the foreground, for other machines."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from modelops.cluster.run_folder import RunFolder
    from modelops.home import Home
    from modelops.settings import Settings

DEFAULT_SCHEDULER_PORT = 8786
DEFAULT_SERVER_PORT = 8785

Host = Annotated[str | None, typer.Option(help="Host name or address to listen on; default: 127.0.0.1.")]
Port = Annotated[int | None, typer.Option(help="Port to listen on.")]
HttpPort = Annotated[
    int | None, typer.Option(help="Port where it says over plain HTTP how it is, for those who watch it.")
]
Tls = Annotated[
    Path | None, typer.Option(help="Folder of ca.pem, cert.pem and key.pem; default: that of this home.")
]
Database = Annotated[
    str | None, typer.Option(help="SQLAlchemy URL of the database; default: the one of this home.")
]
Storage = Annotated[
    str | None, typer.Option(help="Folder or URL of object storage; default: the one of this home.")
]
PoolAliases = Annotated[
    Path | None, typer.Option(help="TOML file that says which names of pools mean the same.")
]
Scheduler = Annotated[
    str | None,
    typer.Option(help="Address of the Dask scheduler, tls://host:port; default: that of this home."),
]


def server(
    host: Host = None,
    port: Port = None,
    database: Database = None,
    storage: Storage = None,
    scheduler: Scheduler = None,
    tls: Tls = None,
    tls_cert: Annotated[
        Path | None, typer.Option(help="Certificate with which it speaks HTTPS; with --tls-key.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="The key of that certificate.")] = None,
    pool_aliases: PoolAliases = None,
) -> None:
    """Run the server in the foreground: HTTP, and the drivers of all jobs.

    It asks for the token MODELOPS_TOKEN, or else for the one of this home.
    """
    from modelops.cluster.run_folder import SERVER, RunFolder
    from modelops.errors import ClusterError

    settings, home = _begin(
        host=host,
        port=port,
        database=database,
        storage=storage,
        scheduler=scheduler,
        tls=tls and str(tls),
        pool_aliases=pool_aliases and str(pool_aliases),
        tls_cert=tls_cert and str(tls_cert),
        tls_key=tls_key and str(tls_key),
    )
    run = RunFolder(home)
    hold = run.hold(SERVER, by_hand=True)
    if hold is None:
        raise ClusterError(
            f"a server of this home runs already, as process {run.holder(SERVER)}; 'modelops down' ends it, or set "
            "another MODELOPS_HOME"
        )
    if settings.token is not None:
        run.keep_token(settings.token)

    from modelops.garbage import give_back_at_once, look_seldom
    from modelops.server.serve import LOCAL_HOSTS, Server, bound, url_of

    listener = bound(settings.host, DEFAULT_SERVER_PORT if settings.port is None else settings.port)
    where = settings.scheduler
    look_seldom()
    give_back_at_once()
    served = Server(
        home=home, run=run, token=run.token(),
        allowed_hosts=(*LOCAL_HOSTS, settings.host, *settings.allowed_hosts), tls=_certificates(settings, run),
        find_scheduler=lambda: where or run.scheduler_address(), kept=False, aliases=settings.pool_aliases,
        https=settings.https,
    )  # fmt: skip
    try:
        code = served.serve(
            listener, url_of(listener, settings.host, "http" if settings.https is None else "https")
        )
    finally:
        run.remove("server.json")
        hold.release()
    raise typer.Exit(code)


def scheduler(host: Host = None, port: Port = None, tls: Tls = None, http_port: HttpPort = None) -> None:
    """Run a Dask scheduler in the foreground. It talks TLS only, to those who have the certificates."""
    import logging

    from modelops.cluster.run_folder import RunFolder
    from modelops.cluster.scheduler import run_scheduler

    settings, home = _begin(host=host, port=port, tls=tls and str(tls), http_port=http_port)
    folder = _certificates(settings, RunFolder(home))
    log = logging.getLogger(__name__)
    run_scheduler(
        settings.host,
        DEFAULT_SCHEDULER_PORT if settings.port is None else settings.port,
        folder,
        lambda address: log.info(
            "workers join with: modelops worker --scheduler %s%s",
            address,
            f" --tls {folder}" if folder else "",
        ),
        http_port=settings.http_port or 0,
    )


def worker(
    scheduler: Scheduler = None,
    slots: Annotated[
        int | None,
        typer.Option(
            min=1, max=10_000, help="Replicates at a time, a process for each; default: one for each core."
        ),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; default: the one that leads to the scheduler.")
    ] = None,
    storage: Storage = None,
    tls: Tls = None,
    http_port: HttpPort = None,
    pool: Annotated[
        str | None, typer.Option(help="Name of the pool that the workers are in, as eu-west.")
    ] = None,
    pool_label: Annotated[
        list[str] | None,
        typer.Option(
            help="KEY=VALUE, as region=eu: studies find the workers by its value, too. Repeat for more."
        ),
    ] = None,
) -> None:
    """Run workers in the foreground, and again when they end, until told to stop.

    When the scheduler goes away they look for it until it is back.
    """
    from modelops.cluster.crew import Crew
    from modelops.cluster.crew_http import answering
    from modelops.cluster.place import Place
    from modelops.cluster.run_folder import RunFolder
    from modelops.errors import RequestError

    settings, home = _begin(
        host=host,
        storage=storage,
        scheduler=scheduler,
        tls=tls and str(tls),
        workers=slots,
        http_port=http_port,
        pool=pool,
        pool_labels=pool_label or None,
    )
    run = RunFolder(home)
    address = settings.scheduler or run.scheduler_address()
    if address is None:
        raise RequestError("no scheduler is known: use --scheduler tls://host:8786, or MODELOPS_SCHEDULER")
    if home.objects_at is None and not _is_here(address):
        raise RequestError(
            f"the scheduler {address} is on another machine, and the results of this worker would stay in "
            f"{home.objects}: set MODELOPS_STORAGE, or --storage, to the storage that the server uses"
        )
    listen = settings.found("host")
    place = Place(
        address, _certificates(settings, run), settings.workers, settings.host if listen else None,
        settings.membership,
    )  # fmt: skip
    environ = dict(os.environ)
    if storage is not None:
        environ["MODELOPS_STORAGE"] = home.storage
    crew = Crew(place, environ=environ)
    with contextlib.ExitStack() as stack:
        if settings.http_port is not None:
            stack.enter_context(answering(crew, settings.host if listen else "", settings.http_port))
        crew.work()


def _begin(**flags: object) -> tuple[Settings, Home]:
    """Read the settings, and log as a process does that runs for long."""
    import logging

    from modelops.home import Home
    from modelops.logs import set_up_logging
    from modelops.settings import Settings

    set_up_logging()
    logging.getLogger("modelops.cli.app").setLevel(logging.WARNING)  # an error is a sentence here, too
    settings = Settings.read(os.environ, **flags)
    return settings, Home.of(settings)


def _certificates(settings: Settings, run: RunFolder) -> Path | None:
    """Return the folder of the certificates, None if Dask's configuration names them.

    Those of this home are made when they are needed first.
    """
    from modelops.cluster.tls import dask_names_certificates, ensure_certificates

    if settings.tls is not None:
        return settings.tls
    if dask_names_certificates():
        return None
    folder = run.path / "tls"
    with run.alone():
        ensure_certificates(folder)
    return folder


def _is_here(address: str) -> bool:
    """Whether an address is one of this machine: only such a one can be bound."""
    import socket
    from urllib.parse import urlsplit

    try:
        family, kind, _, _, name = socket.getaddrinfo(urlsplit(address).hostname, 0, type=socket.SOCK_STREAM)[
            0
        ]
        with socket.socket(family, kind) as trial:
            trial.bind(name)
    except OSError:
        return False
    return True
