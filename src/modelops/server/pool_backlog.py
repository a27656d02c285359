"""What each pool of workers has before it: the number by which an autoscaler sizes that pool and no other. Pure."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Final

from modelops.study.pools import normal_form

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from modelops.study.pools import Aliases, Membership

NO_POOL_ASKED: Final = "no_pool"  # no pool is called so: in the normal form of a name there is no "_"


def backlog_by_pool(
    pending: Mapping[tuple[str, ...], int], members: Iterable[Membership], aliases: Aliases
) -> dict[str, int]:
    """Return how many replicates ask for each pool, by the normal form of its name.

    A job that asks for several pools counts for each of them, as each could do all of it. One that asks for none counts
    for `NO_POOL_ASKED` only: it runs in named pools as well, and they are not made larger for it.

    Parameters
    ----------
    pending
        Replicates without an outcome, by the names that their jobs ask for.
    members
        Of the workers that are connected: by their labels they are asked for, too.
    aliases
        Every name in it is a key of what is returned, so that it is 0 and not unknown when nothing waits.
    """
    meanings: defaultdict[str, set[str]] = defaultdict(set, {NO_POOL_ASKED: set()})
    for member in members:
        name = normal_form(member.pool) if member.pool else NO_POOL_ASKED
        meanings[name].update(map(aliases.canonical, member.names))
    asked_for = {normal_form(name) for asked in pending for name in asked}
    for name in (*meanings, *asked_for, *aliases.meant, *aliases.meant.values()):
        if name != NO_POOL_ASKED:
            meanings[name].add(aliases.canonical(name))
    asked = [({aliases.canonical(name) for name in names}, n) for names, n in pending.items() if names]
    found = {name: sum(n for names, n in asked if names & meant) for name, meant in meanings.items()}
    found[NO_POOL_ASKED] += pending.get((), 0)
    return found


def unserved_by_pool(
    pending: Mapping[tuple[str, ...], int], members: Iterable[Membership], aliases: Aliases
) -> dict[str, int]:
    """Return how many replicates ask for each pool in which no worker is, by the name that its aliases stand for.

    A job that asks for several pools may run in another of them meanwhile.

    Parameters
    ----------
    pending, members, aliases
        As of `backlog_by_pool`.
    """
    served = {aliases.canonical(name) for member in members for name in member.names}
    found: defaultdict[str, int] = defaultdict(int)
    for names, n in pending.items():
        for name in {aliases.canonical(name) for name in names} - served:
            found[name] += n
    return {name: n for name, n in found.items() if n}
