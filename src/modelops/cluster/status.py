"""What can be said of the pool of a home from outside, whether or not its server answers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from modelops.cluster import spawn
from modelops.cluster.handles import is_stopped
from modelops.cluster.launch import is_healthy
from modelops.cluster.run_folder import KEEPER, SCHEDULER, SERVER, RunFolder

if TYPE_CHECKING:
    from modelops.home import Home


@dataclass(frozen=True)
class RoleStatus:
    """One process of the pool.

    ``state``: ``running``, ``stopped`` (somebody sent it SIGSTOP, and it does nothing), ``starting``, ``failing`` (it
    dies at once, again and again) or ``not running``.
    ``starts``: how often the keeper has started it. ``last_end``: how it ended the last time.
    """

    role: str
    state: str
    pid: int | None
    address: str
    starts: int
    last_end: str
    log: str


@dataclass(frozen=True)
class PoolStatus:
    """The processes of a home, the keeper first. ``answers``: whether the server answers now."""

    running: bool
    answers: bool
    url: str
    version: str
    stays: bool
    roles: tuple[RoleStatus, ...]

    def as_json(self) -> dict[str, Any]:
        """Return it as ``--json`` shows it."""
        return asdict(self)


def pool_status(home: Home) -> PoolStatus:
    """Look at the pool of a home; starts nothing and makes no folder.

    Raises
    ------
    ClusterError
        The run folder belongs to another user.
    """
    run = RunFolder.if_there(home)
    if run is None:
        return PoolStatus(False, False, "", "", False, ())
    kept = run.read("keeper.json") if run.holder(KEEPER) is not None else {}
    known: dict[str, Any] = kept.get("roles", {})
    names = dict.fromkeys([KEEPER, SERVER, SCHEDULER, *known, *(r for r in run.roles() if run.holder(r))])
    roles = tuple(_role(run, name, known.get(name, {})) for name in names)
    said = run.read("server.json")
    url = said.get("url", "") if run.holder(SERVER) is not None else ""
    return PoolStatus(
        running=any(role.pid is not None for role in roles),
        answers=bool(url) and is_healthy(url),
        url=url,
        version=said.get("version", "") if url else "",
        stays=run.read("wanted.json").get("idle_s") is None,
        roles=roles,
    )


def _role(run: RunFolder, role: str, known: dict[str, Any]) -> RoleStatus:
    pid = run.holder(role)
    said = run.read(f"{role}.json") if pid is not None else {}
    told = said.get("pid") == pid
    if pid is None:
        state = "not running"
    elif is_stopped(pid):
        state = "stopped"
    elif not told:
        state = "starting"
    else:
        state = "running"
    if known.get("failing") and state != "running":
        state = "failing"
    return RoleStatus(
        role=role,
        state=state,
        pid=pid,
        address=(said.get("url") or said.get("address") or "") if told else "",
        starts=known.get("starts", 0),
        last_end=known.get("last_end", ""),
        log=str(spawn.log_of(run.home, role)),
    )
