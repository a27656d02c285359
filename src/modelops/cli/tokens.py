"""``modelops tokens``: who may use the server. The secret of a token is printed once, alone on stdout."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelops.cli.study_options import AsJson  # noqa: TC001  typer reads annotations

if TYPE_CHECKING:
    from modelops.client.tokens import Token

tokens_app = typer.Typer(
    name="tokens", help="Say who may use the server.", no_args_is_help=True, rich_markup_mode=None
)
Which = Annotated[str, typer.Argument(metavar="NAME", help="Name or id of a token.")]
_NAME = re.compile("[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SCOPES = ("read", "submit", "admin")


@tokens_app.command()
def create(
    name: Annotated[str, typer.Argument(help="Whom or what the token is for.")],
    scope: Annotated[
        list[str] | None,
        typer.Option("--scope", "-s", help="read, submit (and read) or admin (all). Repeat for more."),
    ] = None,
    expires: Annotated[
        str | None,
        typer.Option(help="How long it lets in, such as 90d or 12h; default: until it is revoked."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a token and print it. It is shown this once: the server keeps only a digest of it.

    Exit code: 0 it is made, 2 the request was wrong, 5 the server cannot be reached.
    """
    from modelops.cli.show import show_json
    from modelops.client import tokens
    from modelops.client.server import connect
    from modelops.errors import RequestError
    from modelops.study.quantities import seconds

    scopes = scope or ["submit"]
    if wrong := [s for s in scopes if s not in _SCOPES]:
        raise RequestError(f"there is no scope {wrong[0]!r}; there are {', '.join(_SCOPES)}")
    if not _NAME.fullmatch(name):
        raise RequestError(f"the name of a token is letters, digits, '.', '_' and '-', not {name!r}")
    made = tokens.create(connect().http, name, scopes, seconds(expires, "--expires"))
    if as_json:
        show_json({"secret": made.secret, **_json(made.token)})
        return
    typer.echo(made.secret)
    typer.echo(f"the token {name} may {_said(made.token)}; set MODELOPS_TOKEN to it", err=True)


@tokens_app.command("list")
def list_tokens(
    every: Annotated[bool, typer.Option("--all", help="Also those that are revoked or expired.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the tokens that let somebody in, the newest first.

    Exit code: 0, or 5 the server cannot be reached.
    """
    from modelops.cli.show import show_json
    from modelops.client import tokens
    from modelops.client.server import connect

    found = [t for t in tokens.every(connect().http) if every or t.state == "valid"]
    if as_json:
        show_json({"tokens": [_json(t) for t in found]})
    elif not found:
        typer.echo("no tokens but the server's own")
    for token in () if as_json else found:
        typer.echo(f"{token.name:<24} {token.state:<8} {_said(token)}, made by {token.created_by}")


@tokens_app.command()
def revoke(name: Which, as_json: AsJson = False) -> None:
    """Let a token let nobody in any more; other servers of the same database notice within two seconds.

    Exit code: 0, 2 there is no such token, 5 the server cannot be reached.
    """
    from modelops.cli.show import show_json
    from modelops.client import tokens
    from modelops.client.server import connect
    from modelops.errors import NotFoundError

    if not _NAME.fullmatch(name):
        raise NotFoundError(f"there is no token {name!r}; 'modelops tokens list' shows all")
    gone = tokens.revoke(connect().http, name)
    if as_json:
        show_json(_json(gone))
        return
    at = "now" if gone.revoked_at is None else f"{gone.revoked_at:%Y-%m-%d %H:%M} UTC"
    typer.echo(f"the token {gone.name} ({gone.token}) lets nobody in since {at}")


def _said(token: Token) -> str:
    until = f"until {token.expires_at:%Y-%m-%d %H:%M} UTC" if token.expires_at else "until it is revoked"
    return f"{' and '.join(token.scopes)} {until}"


def _json(token: Token) -> dict[str, Any]:
    import msgspec

    shown: dict[str, Any] = msgspec.to_builtins(token)
    return shown
