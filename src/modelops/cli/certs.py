"""``modelops certs``: a private authority and the certificates of a pool of several machines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modelops.cli.folders import folder_of_text
from modelops.cli.study_options import AsJson  # noqa: TC001  typer reads annotations

certs_app = typer.Typer(
    name="certs",
    help="Make the certificates of a pool of several machines.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
SOON_DAYS = 30

Folder = Annotated[
    Path,
    typer.Argument(
        metavar="DIR", help="Folder of the authority and of a folder for each role.", parser=folder_of_text
    ),
]
Hosts = Annotated[
    list[str] | None,
    typer.Option("--host", help="Name or address of server or scheduler. Repeat for more."),
]
Days = Annotated[int, typer.Option(min=1, max=3650, help="How long the certificates are valid.")]
At = Annotated[
    Path | None,
    typer.Option(
        help="Where the folder of a role lies on its machines, for its dask.yaml; default: below DIR."
    ),
]


@certs_app.command()
def create(
    folder: Folder, host: Hosts = None, days: Days = 365, at: At = None, as_json: AsJson = False
) -> None:
    """Make a private authority, and certificates for scheduler, worker, server and client.

    Exit code: 0 they are there, 2 the request was wrong.
    """
    from modelops.cluster.certificates import create_certificates

    create_certificates(folder, host or (), days=days, at=at)
    _show(folder, as_json=as_json)


@certs_app.command()
def renew(
    folder: Folder,
    host: Hosts = None,
    days: Days = 365,
    at: At = None,
    authority: Annotated[
        bool, typer.Option("--authority", help="Make a new authority that is trusted as well; nothing else.")
    ] = False,
    forget_old: Annotated[
        bool, typer.Option("--forget-old", help="Trust the newest authority only; nothing else.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make new certificates of the same authority for all roles; or go a step towards another authority.

    Exit code: 0 they are there, 2 the request was wrong.
    """
    from modelops.cluster.certificates import begin_authority, forget_old_authorities, renew_certificates
    from modelops.errors import RequestError

    if authority and forget_old:
        raise RequestError("--authority and --forget-old are two steps, with new certificates between them")
    if authority:
        begin_authority(folder)
    elif forget_old:
        forget_old_authorities(folder)
    else:
        renew_certificates(folder, host or (), days=days, at=at)
    _show(folder, as_json=as_json)


@certs_app.command()
def show(folder: Folder, as_json: AsJson = False) -> None:
    """Show the certificates and until when they are valid.

    Exit code: 0, 1 one ends within 30 days, 2 the request was wrong.
    """
    from modelops.cli.exits import Exit

    if _show(folder, as_json=as_json):
        raise typer.Exit(Exit.FAILED)


def _show(folder: Path, *, as_json: bool) -> bool:
    """Show all certificates; say whether one ends soon."""
    import datetime

    from modelops.cli.show import show_json
    from modelops.cluster.certificates import AUTHORITY, list_certificates

    now = datetime.datetime.now(datetime.UTC)
    found = [(kept, (kept.not_after - now).days) for kept in list_certificates(folder)]
    if as_json:
        rows = [
            {
                "role": kept.role, "serial": kept.serial, "hosts": list(kept.hosts), "days": days,
                "not_after": kept.not_after, "signed_by": kept.signed_by,
            }
            for kept, days in found
        ]  # fmt: skip
        show_json({"folder": str(folder), "certificates": rows})
    else:
        for kept, days in found:
            ends = f"until {kept.not_after:%Y-%m-%d}, {days} days"
            typer.echo(f"{kept.role:<10} {ends}" + (f"  {', '.join(kept.hosts)}" if kept.hosts else ""))
            if days < SOON_DAYS:
                ends = "has ended" if kept.not_after <= now else "ends soon"
                option = " --authority" if kept.role == AUTHORITY else ""
                typer.echo(
                    f"warning: the certificate of {kept.role} {ends}; 'modelops certs renew{option}' makes another",
                    err=True,
                )
    return any(days < SOON_DAYS for _, days in found)
