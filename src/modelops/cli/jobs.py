"""``modelops jobs``: look at jobs and steer them. Looking starts nothing; steering starts the server if need be."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from modelops.cli.folders import folder_of_text
from modelops.cli.study_options import AsJson  # noqa: TC001  typer reads annotations

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from modelops.client import Job
    from modelops.client.following import Following
    from modelops.client.status import JobStatus
    from modelops.client.sync import Synced

MAX_LISTED: Final = 30
jobs_app = typer.Typer(
    name="jobs", help="Look at jobs and steer them.", no_args_is_help=True, rich_markup_mode=None
)


def complete_job(incomplete: str) -> list[str]:
    """Return the ids that the shell may complete to; none when no server runs."""
    from modelops.client.client import Client
    from modelops.client.server import running
    from modelops.errors import ModelOpsError

    try:
        source = running()
        if source is None:
            return []
        found = [s.job for s in Client(source=source).summaries(limit=100)]
    except ModelOpsError:
        return []  # the user is typing: no place for a sentence
    return [job for job in found if job.startswith(incomplete)]


JobArgument = Annotated[
    str,
    typer.Argument(
        metavar="JOB", help="A job id, or a beginning or end of one.", autocompletion=complete_job
    ),
]
Param = Annotated[str | None, typer.Option(help="Number or param_id of the parameter set.")]
Folder = Annotated[
    Path,
    typer.Argument(metavar="DIR", help="Folder to copy to; made if it is not there.", parser=folder_of_text),
]
ParametersFile = Annotated[
    Path | None, typer.Option("--parameters", help="A table of sets to add: .csv, .parquet, .json or .jsonl.")
]
Replicate = Annotated[int | None, typer.Option(help="Number of the replicate.")]


@jobs_app.command("list")
def list_jobs(
    state: Annotated[
        list[str] | None, typer.Option("--state", "-s", help="Only jobs in this state. Repeat for more.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", "-n", min=1, help=f"At most so many, the newest; {MAX_LISTED} by default."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", "-a", help="All of them, however many.")] = False,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first; with --json all of them, unless -n says how many.

    Exit code: 0, or 5 when the server of this machine does not run or answer; then the list is what was recorded last.
    """
    from modelops.cli.exits import Exit
    from modelops.cli.job_views import show_list, summary_json
    from modelops.cli.show import show_json
    from modelops.client.client import Client
    from modelops.client.server import is_elsewhere, recorded_by_state, recorded_jobs, running
    from modelops.errors import RequestError, ServerUnreachableError

    states = _states(state or ())
    if everything and limit is not None:
        raise RequestError(
            "give either -n or --all: the first lists no more than that many jobs, the other all"
        )
    shown = limit or (None if everything or as_json else MAX_LISTED)
    asked = None if shown is None else shown + (limit is None)  # one more, to know whether there are more
    source, found, said = running(), [], ""
    client = None if source is None else Client(source=source)
    if client is None:
        said = "no server runs here: the list is what was recorded last; 'modelops up' starts it"
    else:
        try:
            found = list(client.summaries(states, limit=asked))
        except ServerUnreachableError as error:
            if is_elsewhere() or error.answers:
                raise
            said = f"{error.what}: the list is what was recorded last; {error.advice}"
    if said:
        found = recorded_jobs(os.environ, states, asked)
    if as_json:
        show_json({"jobs": [summary_json(s) for s in found], "unreachable": said or None})
    elif found:
        typer.echo("\n".join(show_list(found[:shown])))
        if shown is not None and len(found) > shown:
            counts = recorded_by_state(os.environ) if client is None or said else client.jobs_by_state()
            n = sum(n for name, n in counts.items() if not states or name in states)
            typer.echo(f"and {n - shown:,} older ones: -n {2 * shown} lists {2 * shown}, --all lists all")
    elif not said:
        typer.echo("no jobs" + (f" that are {' or '.join(states)}" if states else ""))
    if said:
        typer.echo(said, err=True)
        raise typer.Exit(Exit.UNREACHABLE)


@jobs_app.command()
def show(
    job: JobArgument,
    n_events: Annotated[int, typer.Option("--events", min=0, help="So many of its last events.")] = 8,
    as_json: AsJson = False,
) -> None:
    """Show what is known of a job: state, counts, what it is, its last events (with --json all of them).

    Exit code: 0 whatever the state is; 5 when the server cannot be reached: then the state is unknown.
    """
    from modelops.cli.exits import Exit
    from modelops.cli.job_views import STUDY_LOST, show_record, show_status, status_json
    from modelops.cli.show import show_json
    from modelops.client.server import is_elsewhere, last_recorded, look_at
    from modelops.errors import ServerUnreachableError

    found, events = None, []
    try:
        found = look_at(job)
        name, status = str(found.id), found.status()
        if status.unknown_since is None:
            events = found.events()
    except ServerUnreachableError as error:
        if is_elsewhere() or error.answers:
            raise
        name, status = last_recorded(job, error)
    if as_json:
        shown: list[dict[str, Any]] = [
            {"at": e.at, "who": e.who, "kind": e.kind, "text": e.text} for e in events
        ]
        show_json({**status_json(name, status), "events": shown})
    else:
        lines = show_status(name, status)
        if found is not None and status.unknown_since is None:
            lines += show_record(found, events, n_events)
            if STUDY_LOST not in lines and any(status.counts.get(s) for s in _failed_words()):
                lines.append(f"'modelops jobs failures {name}' shows what failed")
        typer.echo("\n".join(lines))
    if status.unknown_since is not None:
        raise typer.Exit(Exit.UNREACHABLE)


@jobs_app.command()
def watch(
    job: JobArgument,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Watch a job to its end; connects again by itself when the server was away. Ctrl-C ends only the watching.

    Exit code: as the job ends: 0 succeeded, 1 failed, 3 partial, 4 cancelled; 4 also when Ctrl-C was pressed.
    """
    from modelops.cli.exits import Exit, exit_of_state
    from modelops.cli.job_views import show_status, status_json
    from modelops.cli.show import show_error, show_json
    from modelops.client.progress import ProgressBar
    from modelops.client.run import Watcher
    from modelops.client.watch import watch as watch_job

    found = _followed(job, quiet=quiet).job
    try:
        if quiet:
            status = watch_job(found, Watcher())
        else:
            with ProgressBar() as bar:
                status = watch_job(found, bar)
    except KeyboardInterrupt:
        show_error("Cancelled", f"no longer watching; job {found.id} goes on", Exit.CANCELLED, kind="")
        raise typer.Exit(Exit.CANCELLED) from None
    if as_json:
        show_json(status_json(found.id, status))
    else:
        typer.echo("\n".join(show_status(found.id, status)))
    raise typer.Exit(exit_of_state(status.state))


@jobs_app.command()
def cancel(
    job: JobArgument,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until everything has stopped.")] = False,
    at_once: Annotated[
        bool, typer.Option("--at-once", help="Do not wait for what workers could still hand in.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Cancel a job; what is finished is kept.

    Exit code: 0 it is being cancelled, 2 it has ended already, 5 the server cannot be reached.
    """
    from modelops.states import JobState

    found = _steerable(job)
    found.cancel(at_once=at_once)
    status = _told(found, wait=wait, as_json=as_json)
    if not status.final and status.state != JobState.CANCELLING:
        typer.echo("the cancel is recorded; whoever drives the job hears of it within seconds", err=True)


@jobs_app.command()
def resume(
    job: JobArgument,
    failed: Annotated[bool, typer.Option("--failed", help="Try those that failed again, too.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it has ended again.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run what is missing of a job that has ended, and only that.

    Exit code: 0, or with --wait as the job ends; 2 it has not ended or misses nothing, 5 the server cannot be reached.
    """
    found = _steerable(job)
    found.resume(failed=failed)
    _begun(found, wait=wait, as_json=as_json)


@jobs_app.command()
def extend(
    job: JobArgument,
    replicates: Annotated[
        int | None,
        typer.Option(
            "--replicates", "-n", min=1, help="How many replicates each parameter set is to have in all."
        ),
    ] = None,
    parameter: Annotated[
        list[str] | None,
        typer.Option("--parameter", "-p", help="As in run; others have the values of the job's first set."),
    ] = None,
    parameters: ParametersFile = None,
    seeds: Annotated[
        str | None, typer.Option(help="For a job with explicit seeds: the further seeds, as 11,977.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it has ended again.")] = False,
    as_json: AsJson = False,
) -> None:
    """Add replicates or parameter sets to a job that has ended; only the new ones run.

    Exit code: 0, or with --wait as the job ends; 2 the request was wrong, 5 the server cannot be reached.
    """
    from modelops.client.study_arguments import seeds_of_text, sets_beside
    from modelops.errors import RequestError

    if parameter and parameters:
        raise RequestError("give either -p or --parameters: both say which parameter sets to add")
    if not (parameter or parameters or seeds) and replicates is None:
        raise RequestError(
            "say what to add: -n 400 (how many replicates each parameter set is to have in all), -p a=1,2 or "
            "--parameters FILE (more parameter sets), --seeds 11,977 (for a job with explicit seeds)"
        )
    found = _steerable(job)
    added = sets_beside(found.params(0), parameter) if parameter else parameters
    found.extend(replicates, added, seeds_of_text(seeds))
    _begun(found, wait=wait, as_json=as_json)


@jobs_app.command()
def failures(
    job: JobArgument,
    limit: Annotated[int, typer.Option("--limit", min=1, help="At most so many kinds of failure.")] = 20,
    each: Annotated[bool, typer.Option("--each", help="With --json: also one object per replicate.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show each kind of failure once: how often, one full example, and the command that runs it again here.

    Exit code: 0 whether or not there are any; 5 when the job has not ended and its server cannot be reached.
    """
    from rich.console import Console

    from modelops.cli.show import show_json
    from modelops.cli.tables import show_failures
    from modelops.client.server import look_at

    found = look_at(job)
    summary = found.failure_summary().to_pylist()
    if as_json:
        answer: dict[str, Any] = {"job": found.id, "failures": summary}
        show_json({**answer, "replicates": found.failures().to_pylist()} if each else answer)
    elif summary:
        show_failures(Console(soft_wrap=True), found, summary, limit=limit)
    else:
        typer.echo(f"no replicate of job {found.id} has failed")


@jobs_app.command()
def logs(
    job: JobArgument,
    param: Param = None,
    replicate: Replicate = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print what the bundle printed: of a replicate, a parameter set, or the whole job.

    Exit code: 0 whatever the state of the job is; 5 when it has not ended and its server cannot be reached.
    """
    from modelops.cli.show import show_json
    from modelops.client.logs import new_text
    from modelops.errors import RequestError

    if replicate is not None and param is None:
        raise RequestError("--replicate needs --param as well: a replicate of which parameter set")
    if follow and as_json:
        raise RequestError("--follow has no end to print as one JSON object; leave one of the two out")
    following = _followed(job, follow=follow)
    which = int(param) if param is not None and param.isdecimal() and len(param) < 20 else param
    if as_json:
        show_json({"job": following.job.id, "log": following.job.log(which, replicate)})
        return
    for text in new_text(following, which, replicate, follow=follow):
        typer.echo(text, nl=False)


@jobs_app.command()
def sync(
    job: JobArgument,
    folder: Folder,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on copying until the job has ended.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Copy the files of a job that are not there yet; only whole, verified ones appear.

    Works during and after the job. Run again, it copies what is new.

    Exit code: 0 whatever the state of the job is; 1 a file cannot be written or arrives damaged, 5 when the job has not
    ended and its server cannot be reached.
    """
    from modelops.cli.show import show_json
    from modelops.client.logs import LOOK_S

    following = _followed(job, follow=follow)
    found = following.job
    synced = whole = following.ask(lambda: found.sync(folder)) if follow else found.sync(folder)
    while follow and not synced.final:
        if following.look(LOOK_S).unknown_since is not None:
            continue
        if not as_json and synced.copied:
            typer.echo(_synced_text(synced))
        synced = following.ask(lambda: found.sync(folder))
        whole = whole.then(synced)
    if as_json:
        show_json(
            {
                "job": found.id, "folder": str(folder), "copied": whole.copied, "removed": whole.removed,
                "unchanged": len(whole.unchanged), "bytes": whole.n_bytes, "final": whole.final,
            }
        )  # fmt: skip
        return
    typer.echo(_synced_text(synced))
    if not synced.final:
        typer.echo(f"job {found.id} has not ended: the same command copies what is new", err=True)


@jobs_app.command()
def reconcile(
    job: Annotated[
        str | None, typer.Argument(metavar="[JOB]", help="A job; default: all.", autocompletion=complete_job)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare records, stored bytes and what runs, and repair what disagrees.

    Exit code: 0 whether or not something was found; 5 the server cannot be reached.
    """
    from modelops.cli.show import show_json
    from modelops.client.client import Client

    client = Client()
    report = client.source.reconcile(None if job is None else client.job(job).id)
    if as_json:
        show_json(report)
        return
    typer.echo(f"findings: {len(report['findings'])}")
    for found in report["findings"]:
        typer.echo(f"  {found['job']}, {found['kind']}: {found['text']}")
    if before := report.get("before"):  # not of an older server
        typer.echo(f"found and dealt with in the ten minutes before: {len(before)}")
        for found in before[-MAX_LISTED:]:
            typer.echo(f"  {found['job']}, {found['kind']}: {found['text']}")


def _followed(text: str, *, follow: bool = True, quiet: bool = False) -> Following:
    """Return a job to be looked at until it has ended; says on stderr when its server is away, and when it is back."""
    from modelops.client.following import job_to_follow
    from modelops.client.server import look_at

    say = _silent if quiet else _say
    return _following(job_to_follow(text, say) if follow else look_at(text), say)


def _following(job: Job, say: Callable[[str], None]) -> Following:
    from modelops.client.following import Following, Outages

    outages = Outages()
    return Following(job, lambda status: say(outages.line(status)))


def _say(line: str) -> None:
    if line:
        typer.echo(line, err=True)


def _silent(_line: str) -> None:
    pass


def _steerable(text: str) -> Job:
    from modelops.client.client import Client

    return Client().job(text)


def _begun(job: Job, *, wait: bool, as_json: bool) -> None:
    """Say what became of a job that begins again, and that the bundle is the one it was."""
    from modelops.cli.exits import exit_of_state
    from modelops.client.bundle_since import bundle_changed_since

    if note := bundle_changed_since(job):
        typer.echo(f"note: {note}", err=True)
    status = _told(job, wait=wait, as_json=as_json)
    if wait:
        raise typer.Exit(exit_of_state(status.state))


def _told(job: Job, *, wait: bool, as_json: bool) -> JobStatus:
    """Show the status after a request."""
    from modelops.cli.job_views import show_status, status_json
    from modelops.cli.show import show_json

    status = _following(job, _say).to_the_end() if wait else job.status()
    if as_json:
        show_json(status_json(job.id, status))
    else:
        typer.echo("\n".join(show_status(job.id, status)))
    return status


def _states(given: Sequence[str]) -> list[str]:
    from modelops.errors import RequestError
    from modelops.states import JobState
    from modelops.study.wording import known_words

    known = [str(state) for state in JobState]
    for state in given:
        if state not in known:
            raise RequestError(f"--state {state}: no job can be that{known_words(state, known)}")
    return list(given)


def _failed_words() -> frozenset[str]:
    from modelops.states import FAILURES

    return frozenset(str(status) for status in FAILURES)


def _synced_text(synced: Synced) -> str:
    copied = (
        f"{len(synced.copied)} files copied ({synced.n_bytes:,} bytes), {len(synced.unchanged)} there already"
    )
    removed = f", {len(synced.removed)} removed that no longer count" if synced.removed else ""
    return f"{synced.folder}: {copied}{removed}"
