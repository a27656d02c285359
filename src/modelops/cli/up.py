"""``modelops up``, ``down`` and ``status``: the pool of this user on this machine."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from modelops.client.http import Http
    from modelops.cluster.status import PoolStatus, RoleStatus
    from modelops.home import Home
    from modelops.states import JobState
    from modelops.store import JobRow, Records

T = TypeVar("T")
ANSWER_S: Final = 3.0  # for what the server says of itself; a status is wanted within five
MAX_SHOWN: Final = 10
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def up(
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers", "-w", min=1, max=10_000, help="Worker processes, one replicate at a time each."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Start server, scheduler and workers in the background, to stay until `modelops down`.

    Run again it changes the number of workers, or starts what is missing.

    Exit code: 0 they run, 1 they cannot be started here, 2 the request was wrong.
    """
    from modelops.cli.show import progress_line, show_json
    from modelops.cluster.launch import start_pool
    from modelops.cluster.status import pool_status
    from modelops.home import Home

    home = Home.from_environ(os.environ)
    with progress_line() as on_progress:
        on_progress("starting the server")
        address = start_pool(home, n_workers=workers)
    if as_json:
        show_json({"url": address.url, **_shown(pool_status(home))})
        return
    typer.echo(f"the server listens at {address.url}; 'modelops status' shows it, 'modelops down' ends it")
    if trouble := _trouble(home):
        typer.echo(f"it waits: {trouble}", err=True)


def down(as_json: AsJson = False) -> None:
    """End the pool of this home and everything it has started; say which jobs are unfinished.

    They go on where they were when the pool is started again.

    Exit code: 0, also if nothing ran.
    """
    from modelops.cli.show import progress_line, show_json
    from modelops.cluster.launch import stop_pool
    from modelops.home import Home, refuse_no_folder

    home = Home.from_environ(os.environ)
    refuse_no_folder(home)
    with progress_line() as on_progress:
        on_progress("ending workers, server and scheduler")
        ran = stop_pool(home)
    unfinished, unknown = _unfinished(home)
    if as_json:
        show_json({"ran": ran, "unfinished": unfinished, "unfinished_unknown": unknown})
        return
    typer.echo("the pool has ended" if ran else "nothing ran")
    if unknown:
        typer.echo(f"which jobs are unfinished cannot be said: {unknown}")
    for line in _unfinished_lines(unfinished):
        typer.echo(line)
    if n_left := sum(bool(job["unreadable"]) for job in unfinished):
        typer.echo(
            f"it cannot go on with {n_left} of them, whose study cannot be read; 'modelops jobs list' says why"
        )
    if len(unfinished) > n_left:
        them = "the others" if n_left else "them"
        typer.echo(f"'modelops up' starts the pool again, and it goes on with {them}")


def status(as_json: AsJson = False) -> None:
    """Show server, scheduler, workers, jobs by state, and where the logs are.

    Exit code: 0 the server runs, 5 it does not.
    """
    from modelops.cli.exits import Exit
    from modelops.cli.show import show_json
    from modelops.cluster.status import pool_status
    from modelops.home import Home, refuse_no_folder
    from modelops.settings import Settings

    settings = Settings.read(os.environ)
    home = Home.of(settings)
    refuse_no_folder(home)
    found = pool_status(home)
    told = _told(home) if found.answers else {}
    jobs, unknown = _jobs_by_state(home, told)
    waiting = {} if unknown else {str(job): str(text) for job, text in told.get("waiting", {}).items()}
    if as_json:
        show_json(
            {
                **_shown(found),
                "jobs": jobs,
                "jobs_unknown": unknown,
                "waiting": waiting,
                "refused": told.get("refused", {}),
                "scheduler": told.get("scheduler", "unknown"),
                "logs": str(home.logs),
            }
        )
    else:
        _print_status(found, told)
        listed = ", ".join(f"{n:,} {state}" for state, n in jobs.items()) or "none"
        typer.echo(f"{'jobs':<11}{unknown or listed}")
        for text in dict.fromkeys(waiting.values()):
            n = list(waiting.values()).count(text)
            typer.echo(f"{'waiting':<11}{n} job{'s' if n > 1 else ''}: {text}")
        refused = {str(worker): str(versions) for worker, versions in told.get("refused", {}).items()}
        for versions in dict.fromkeys(refused.values()):
            n = list(refused.values()).count(versions)
            typer.echo(
                f"{'refused':<11}{n} worker{'s' if n > 1 else ''} whose versions do not fit:\n{versions}"
            )
        typer.echo(f"{'data':<11}{home.data}")
        typer.echo(f"{'logs':<11}{home.logs}")
    if settings.server is not None:
        typer.echo(
            f"this is what runs on this machine; jobs go to {settings.server}, which 'modelops jobs list' asks",
            err=True,
        )
    raise typer.Exit(Exit.SUCCEEDED if found.answers else Exit.UNREACHABLE)


def _print_status(found: PoolStatus, told: dict[str, Any]) -> None:
    from modelops.study.wording import counted

    if not found.running:
        typer.echo("nothing runs; 'modelops up' starts server and workers")
        return
    kept = any(role.role == "keeper" and role.state != "not running" for role in found.roles)
    for role in found.roles:
        if role.role == "scheduler" and not kept and told:  # it may run elsewhere
            typer.echo(f"{role.role:<11}{told['scheduler']}, {counted(len(told['workers']), 'worker')}")
        else:
            typer.echo(_line(role, found))
    if not found.stays:
        typer.echo("it ends by itself when nobody has needed it for a while; 'modelops up' lets it stay")
    for role in found.roles:
        if role.state == "failing":
            typer.echo(f"{role.role} dies at once, again and again ({role.last_end}); see {role.log}")


def _line(role: RoleStatus, found: PoolStatus) -> str:
    state = role.state
    if role.role == "server" and state == "running" and not found.answers:
        state = "running, does not answer"
    if state == "stopped":
        state = f"stopped (SIGSTOP), does nothing until 'kill -CONT {role.pid}'"
    parts = [state]
    if role.pid is not None:
        parts.append(f"process {role.pid}")
    if role.address:
        parts.append(role.address)
    if role.starts > 1:
        from modelops.cluster.upkeep import UNSEEN

        how = role.last_end if role.last_end == UNSEEN else f"the last one ended with {role.last_end}"
        parts.append(f"started {role.starts} times, {how}")
    return f"{role.role:<11}{', '.join(parts)}"


def _shown(found: PoolStatus) -> dict[str, Any]:
    shown = found.as_json()
    return {**shown, "roles": list(shown["roles"])}


def _unfinished_lines(unfinished: list[dict[str, Any]]) -> list[str]:
    """Say which jobs are unfinished; of many how many are in each state, and the newest."""
    from collections import Counter

    from modelops.study.wording import shown_name

    lines = [
        f"unfinished: {job['job']} {shown_name(job['name'])} ({job['state']}"
        f"{', study cannot be read' if job['unreadable'] else ''})"
        for job in unfinished[:MAX_SHOWN]
    ]
    if len(unfinished) <= MAX_SHOWN:
        return lines
    states = Counter(job["state"] for job in unfinished)
    counts = ", ".join(f"{n:,} {state}" for state, n in states.items())
    wanted = " ".join(f"-s {state}" for state in states)
    return [
        f"{len(unfinished):,} jobs are unfinished: {counts}; the newest of them:",
        *lines,
        f"and {len(unfinished) - MAX_SHOWN:,} more; 'modelops jobs list --all {wanted}' lists them",
    ]


def _unfinished(home: Home) -> tuple[list[dict[str, Any]], str]:
    """Return the jobs that are not final, and why that cannot be said."""
    from modelops.states import OPEN_JOB_STATES
    from modelops.study.spec import unreadable

    none: list[JobRow] = []
    rows, unknown = _recorded(home, lambda records: records.jobs(states=OPEN_JOB_STATES), none)
    unfinished = [
        {"job": row.job, "name": row.name, "state": str(row.state), "unreadable": unreadable(row.spec)}
        for row in rows
    ]
    return unfinished, unknown


def _jobs_by_state(home: Home, told: dict[str, Any]) -> tuple[dict[str, int], str]:
    """Return how many jobs are in each state, and why that cannot be said: as the server says, or else as recorded."""
    if told:  # what is wrong with the database it has found out already, which takes seconds
        unknown = "" if told["database"] == "ok" else str(told["database"])
        return dict(told["jobs"]), unknown
    from modelops.store.overview import jobs_by_state

    none: dict[JobState, int] = {}
    counts, unknown = _recorded(home, jobs_by_state, none)
    return {str(state): n for state, n in counts.items()}, unknown


def _trouble(home: Home) -> str:
    """Return why the server of this home cannot do its work now, as it says itself; empty: it can."""
    from modelops.errors import ModelOpsError, ServerUnreachableError

    try:
        _asking(home).get("/server")
    except ServerUnreachableError as error:
        return error.why if error.answers else ""
    except ModelOpsError as error:
        return str(error)
    return ""


def _told(home: Home) -> dict[str, Any]:
    """Return what the server of this home says of itself and of what it needs."""
    from modelops.errors import ModelOpsError

    try:
        return _asking(home).get("/server", read_s=ANSWER_S).as_type(dict)
    except ModelOpsError:  # it does not say now; what it says of its jobs is only a part of what is asked
        return {}


def _asking(home: Home) -> Http:
    """Return what asks the server of this home, once and not again."""
    from modelops.client.http import Http
    from modelops.client.server import Local
    from modelops.settings import Settings

    return Http(Local(home), patience_s=0, ca=Settings.read(os.environ).ca)


def _recorded(home: Home, look: Callable[[Records], T], nothing: T) -> tuple[T, str]:
    """Return what is recorded in this home's database, and why that cannot be said; ``nothing``: if there is none."""
    import contextlib

    from modelops.errors import ModelOpsError
    from modelops.store import Records

    if (file := home.database_file) is not None and not file.exists():
        return nothing, ""  # looking makes no database
    try:
        with contextlib.closing(Records.open(home.database_url)) as records:
            return look(records), ""
    except ModelOpsError as error:
        return nothing, str(error)
