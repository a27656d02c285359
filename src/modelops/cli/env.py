"""``modelops env``: the environments of this machine."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path  # noqa: TC003  typer reads the annotations
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from modelops.environments import EnvironmentInfo, Environments

env_app = typer.Typer(
    help="List, build, verify and remove environments.", no_args_is_help=True, rich_markup_mode=None
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@env_app.command("list")
def list_(as_json: AsJson = False) -> None:
    """List the environments, the most recently used first.

    Exit code: 0.
    """
    from modelops.bundles.check import shown_bytes
    from modelops.cli.show import show_json

    found = _environments().list()
    if as_json:
        show_json({"environments": [_as_json(info) for info in found]})
        return
    if not found:
        typer.echo("there are no environments yet; 'modelops env build BUNDLE' builds one")
        return
    rows = [
        (info.key, info.python.partition(" ")[0] or "-", f"{len(info.packages)} packages",
         shown_bytes(info.n_bytes), f"used {_day(info.used_at)}", _state(info))
        for info in found
    ]  # fmt: skip
    # Plain columns and no frame: a key is there to be copied, so it must not be folded.
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip())


@env_app.command()
def build(
    path: Annotated[Path, typer.Argument(help="A bundle folder or .py file.")],
    upgrade: Annotated[
        bool, typer.Option("--upgrade", help="Resolve the dependencies anew, and forget remembered failures.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Resolve a bundle's dependencies and build its environment, unless it is there.

    Exit code: 0 it is there; 2 its dependencies cannot be resolved or built; 1 not now, as when no index answers.
    """
    from modelops.bundles import take_snapshot
    from modelops.bundles.check import shown_seconds
    from modelops.cli.show import progress_line, show_json

    environments = _environments()
    _, snapshot = take_snapshot(path, environments.cache_dir / "bundles")
    with progress_line() as on_progress:
        lock = environments.resolve(snapshot, upgrade=upgrade, on_progress=on_progress)
        environment = environments.ensure(
            lock, bundle_root=snapshot, retry_failed=upgrade, on_progress=on_progress
        )
    if as_json:
        show_json(
            {"key": environment.key, "path": environment.path, "python": environment.interpreter.version,
             "packages": [f"{p['name']}=={p.get('version', '?')}" for p in lock.packages],
             "built": environment.built, "seconds": environment.seconds}
        )  # fmt: skip
        return
    done = f"built in {shown_seconds(environment.seconds)}" if environment.built else "is there and whole"
    typer.echo(
        f"{environment.key} {done}: Python {environment.interpreter.version}, {len(lock.packages)} packages, "
        f"in {environment.path}"
    )


@env_app.command()
def verify(
    keys: Annotated[list[str] | None, typer.Argument(help="Keys, or their beginnings; default: all.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare every file with what was installed; set damaged environments aside.

    The next job that needs one builds it anew.

    Exit code: 0 all whole, 1 some damaged.
    """
    from modelops.cli.exits import Exit
    from modelops.cli.show import show_json

    environments = _environments()
    verified = [environments.verify(info.key) for info in _chosen(environments, keys or [])]
    if as_json:
        show_json(
            {"environments": [
                {"key": v.key, "ok": not v.damages, "in_use": v.in_use, "set_aside": v.set_aside,
                 "damages": [str(d) for d in v.damages]} for v in verified]}
        )  # fmt: skip
    else:
        for v in verified:
            typer.echo(f"{v.key}: {'damaged' if v.damages else 'ok'}")
            for damage in v.damages[:10]:
                typer.echo(f"  {damage}")
            if len(v.damages) > 10:
                typer.echo(f"  and {len(v.damages) - 10} more")
            if v.damages:
                typer.echo(
                    "  set aside; the next job that needs it builds it anew" if v.set_aside
                    else "  a process uses it, so it stays until that ends; then verify again"
                )  # fmt: skip
        typer.echo(f"{len(verified)} verified, {sum(bool(v.damages) for v in verified)} damaged")
    raise typer.Exit(Exit.FAILED if any(v.damages for v in verified) else Exit.SUCCEEDED)


@env_app.command()
def gc(
    max_age: Annotated[str | None, typer.Option(help="Remove what was not used for so long, as 30d.")] = None,
    max_size: Annotated[
        str | None, typer.Option(help="Keep at most this much, the most recently used, as 10GiB.")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Remove every environment that no process uses.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove environments. Damaged and half-built ones always go; one that a process uses never does.

    Exit code: 0 whether or not some were removed, 2 the request was wrong.
    """
    import time

    from modelops.bundles.check import shown_bytes
    from modelops.cli.show import show_json
    from modelops.environments.collect import choose
    from modelops.study.quantities import n_bytes, seconds

    environments = _environments()
    max_age_s, max_bytes = seconds(max_age, "--max-age"), n_bytes(max_size, "--max-size")
    skipped: tuple[tuple[str, str], ...] = ()
    if dry_run:
        chosen = choose(
            environments.list(),
            now=time.time(),
            max_age_s=max_age_s,
            max_bytes=max_bytes,
            everything=everything,
        )
        removed = [info for info in chosen if not info.in_use]
        skipped = tuple((info.key, "a process uses it") for info in chosen if info.in_use)
    else:
        collected = environments.gc(max_age_s=max_age_s, max_bytes=max_bytes, everything=everything)
        removed, skipped = list(collected.removed), collected.skipped
    freed = sum(info.n_bytes for info in removed)
    if as_json:
        show_json(
            {"dry_run": dry_run, "removed": [_as_json(info) for info in removed], "bytes": freed,
             "kept": [{"key": key, "reason": reason} for key, reason in skipped]}
        )  # fmt: skip
        return
    verb = "would remove" if dry_run else "removed"
    for info in removed:
        typer.echo(f"{verb} {info.key} ({shown_bytes(info.n_bytes)}, last used {_day(info.used_at)})")
    for key, reason in skipped:
        typer.echo(f"kept {key}: {reason}")
    typer.echo(f"{verb} {len(removed)} environments, {shown_bytes(freed)}")


def _environments() -> Environments:
    import os

    from modelops.environments import Environments
    from modelops.home import Home

    return Environments(Home.from_environ(os.environ).cache)


def _chosen(environments: Environments, keys: list[str]) -> list[EnvironmentInfo]:
    """Return the environments with these keys or beginnings of keys. Raises NotFoundError, RequestError."""
    from modelops.errors import NotFoundError, RequestError
    from modelops.study.wording import did_you_mean

    found = {info.key: info for info in environments.list()}
    if not keys:
        return list(found.values())
    chosen = {}
    for key in keys:
        fitting = [k for k in found if k == key] or [k for k in found if k.startswith(key)]
        if not fitting:
            raise NotFoundError(
                f"there is no environment {key!r}"
                + (did_you_mean(key, found) or "; 'modelops env list' shows them")
            )
        if len(fitting) > 1:
            raise RequestError(
                f"{key!r} is the beginning of {len(fitting)} keys: {', '.join(fitting)}; write more of it"
            )
        chosen[fitting[0]] = found[fitting[0]]
    return list(chosen.values())


def _as_json(info: EnvironmentInfo) -> dict[str, Any]:
    return {
        "key": info.key, "path": str(info.path), "python": info.python, "packages": list(info.packages),
        "bytes": info.n_bytes, "built_at": _utc(info.built_at), "used_at": _utc(info.used_at),
        "in_use": info.in_use, "damages": [str(d) for d in info.damages],
    }  # fmt: skip


def _utc(stamp: float) -> datetime | None:
    return datetime.fromtimestamp(stamp, UTC).replace(microsecond=0) if stamp else None


def _day(stamp: float) -> str:
    return datetime.fromtimestamp(stamp, UTC).strftime("%Y-%m-%d %H:%M")


def _state(info: EnvironmentInfo) -> str:
    if info.damages:
        return f"damaged: {info.damages[0]}"
    return "in use" if info.in_use else "whole"
