"""Judge what was seen of a bundle. Pure: observations in, one line (`Check`) for each question out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from modelops.bundles.missing import line_to_add
from modelops.checks import Check, failed, ok, warning

if TYPE_CHECKING:
    from modelops.processes.outcome import Outcome

Digests = Mapping[str, str]  # name of an output -> its kind and the SHA-256 of its encoded bytes
Tried = tuple[str, int]  # a parameter set as people read it, and a seed
TWICE, FRESH, REORDERED = "twice in one process", "in a fresh process", "in another order"


def reproducible(
    reference: Mapping[int, Digests], again: Mapping[str, Mapping[int, Digests]], isolation: str
) -> Check:
    """Say whether a seed always gives the same outputs, bit for bit.

    Parameters
    ----------
    reference
        What each seed gave the first time.
    again
        What it gave in other circumstances, by `TWICE`, `FRESH`, `REORDERED`.
    """
    differing = {
        how: sorted(
            {name for seed, digests in seen.items() for name in differences(reference.get(seed, {}), digests)}
        )
        for how, seen in again.items()
    }
    details = {"seeds": list(reference), "differs": {how: names for how, names in differing.items() if names}}
    if not details["differs"]:
        return ok("reproducible", f"a seed gives the same outputs {', '.join(again)}", **details)
    what = "; ".join(f"{how}: {_listed(names)}" for how, names in differing.items() if names)
    if differing.get(FRESH) or isolation != "warm":
        advice = (
            "take all randomness from the seed (numpy.random.default_rng(seed), random.Random(seed)); look "
            "for generators that are not seeded, the clock, process ids, and threads"
        )
    else:
        advice = (
            "something of one replicate is left for the next (a module-level variable, a cache, the global "
            'random state): make it anew in each call, or write isolation = "fork" in [tool.modelops], or what the '
            'line "isolation" says if that is another'
        )
    return failed("reproducible", f"the same seed gives other outputs {what}", advice, **details)


def isolations(
    seen: Mapping[str, Sequence[Mapping[Tried, Digests]]], declared: str, not_forked: str | None = None
) -> Check:
    """Say whether a parameter set and a seed give the same outputs however much of a process they share.

    Parameters
    ----------
    seen
        What each gave with ``warm``, ``fork`` and ``spawn``; with one isolation in several orders.
    declared
        The isolation of the bundle or the study.
    not_forked
        Why the bundle cannot be forked; with ``fork`` it then runs as with ``spawn``.
    """
    alone = seen["spawn"][0]
    by_set = {how: _odd(alone, passes) for how, passes in seen.items()}
    odd = {how: sorted(set().union(*sets.values())) for how, sets in by_set.items() if sets}
    tried = dict.fromkeys(params for params, _ in alone)
    seeds = list(dict.fromkeys(seed for _, seed in alone))
    details = {"differs": odd, "not_forked": not_forked, "seeds": seeds, "parameters": list(tried)}
    forked = f"; {not_forked}" if not_forked else ""
    if not odd:
        return ok("isolation", f"the same outputs with warm, fork and spawn{forked}", **details)
    what = {
        how: " and ".join(f"{_listed(sorted(names))} with {params}" for params, names in by_set[how].items())
        if len(tried) > 1
        else _listed(names)
        for how, names in odd.items()
    }
    message = "; ".join(f"{how} gives other outputs than spawn: {text}" for how, text in what.items())
    if "fork" in odd:
        advice = "the outputs depend on the process: take all randomness from the seed, and nothing from the import"
        return warning("isolation", message + forked, advice, **details)
    if declared == "warm":
        better = "spawn" if not_forked else "fork"
        advice = (
            f'each replicate sees what others have left: write isolation = "{better}" in [tool.modelops], '
            "or make it anew in each call"
        )
        return warning("isolation", message + forked, advice, **details)
    return ok("isolation", f'{message}; isolation = "{declared}" is needed{forked}', **details)


def _odd(alone: Mapping[Tried, Digests], passes: Sequence[Mapping[Tried, Digests]]) -> dict[str, set[str]]:
    """Return the outputs that differ in any pass from those of a process of one's own, by parameter set."""
    odd: dict[str, set[str]] = {}
    for (params, seed), digests in alone.items():
        for one_pass in passes:
            names = differences(digests, one_pass.get((params, seed), digests))
            if names:
                odd.setdefault(params, set()).update(names)
    return odd


def unreliable_outputs(check: Check) -> set[str]:
    """Return the names of the outputs that `reproducible` found to differ."""
    return {name for names in check.details["differs"].values() for name in names}


def differences(one: Digests, other: Digests) -> list[str]:
    """Return the names of the outputs that are not the same in both."""
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]


def seeds_differ(by_seed: Mapping[int, Digests], unreliable: Collection[str] = ()) -> Check:
    """Say whether seeds matter; outputs that differ for one seed already are ``unreliable``."""
    first, *rest = by_seed.values()
    differing = sorted({name for other in rest for name in differences(first, other)} - set(unreliable))
    if not differing and unreliable:
        return warning(
            "seeds", f"cannot be told: {_listed(sorted(unreliable))} differ for one seed already", outputs=[]
        )
    if not differing:
        return warning(
            "seeds",
            f"{len(by_seed)} seeds give the same outputs",
            "if the model is stochastic, it does not use its argument seed",
            outputs=[],
        )
    return ok("seeds", f"different seeds give different outputs ({_listed(differing)})", outputs=differing)


def imports(
    entries: Sequence[tuple[str, str]],
    errors: Sequence[Mapping[str, Any]],
    listed_in: str = "pyproject.toml",
) -> Check:
    """Say whether all entry points, ``(kind, entry)``, can be imported.

    Parameters
    ----------
    listed_in
        Name of the file that lists the bundle's dependencies, as `line_to_add` has it.
    """
    bad = [(kind, entry, e) for (kind, entry), e in zip(entries, errors, strict=True) if e]
    if not bad:
        names = ", ".join(dict.fromkeys(f"{entry} ({kind})" for kind, entry in entries))
        return ok("imports", names, entries=[entry for _, entry in entries])
    kind, entry, error = bad[0]
    # Only a path below the bundle is the author's; ModelOps' own are absolute.
    place = (
        f" at {error['file']}:{error['line']}" if error["file"] and not error["file"].startswith("/") else ""
    )
    what = (
        error["message"] if error["type"].startswith("modelops") else f"{error['type']}: {error['message']}"
    )
    others = f" (and {len(bad) - 1} more entry points)" if len(bad) > 1 else ""
    message = f"{kind} {entry}: {what}{place}{others}"
    details = {"errors": [{"kind": k, "entry": n, **e} for k, n, e in bad]}
    if missing := error.get("missing_module"):
        return failed("imports", message, line_to_add(missing, listed_in), **details)
    advice = (
        f"mend {error['file']}"
        if place
        else "correct the entry point in [tool.modelops], or the module's name"
    )
    return failed("imports", message, advice, **details)


def runs(
    outcomes: Sequence[Outcome], tried: Mapping[int, str], listed_in: str = "pyproject.toml"
) -> Check:
    """Say whether replicates succeed. ``tried``: index -> which parameter set and seed that was."""
    bad = [o for o in outcomes if o.error is not None]
    if not bad:
        return ok("runs", f"{len(outcomes)} replicates succeeded", n=len(outcomes), failures=[])
    first = bad[0]
    error = first.error
    assert error is not None  # bad holds those with an error
    place = f" at {error.file}:{error.line}" if error.file else ""
    message = (
        f"{len(bad)} of {len(outcomes)} replicates did not succeed; {tried[first.index]}: {first.status}: "
        f"{error.type}: {error.message}{place}"
    )
    advice = line_to_add(error.missing_module, listed_in) if error.missing_module else _advice_of(first)
    failures = [
        {"what": tried[o.index], "status": str(o.status), "type": o.error.type, "message": o.error.message,
         "traceback": o.error.traceback, "stderr": o.error.stderr}
        for o in bad if o.error
    ]  # fmt: skip
    return failed("runs", message, advice, n=len(outcomes), failures=failures)


def _advice_of(outcome: Outcome) -> str:
    match str(outcome.status):
        case "invalid_output":
            return (
                "return numbers, text, lists, dicts, numpy arrays, tables or bytes: docs/reference/values.md"
            )
        case "timed_out":
            return "raise replicate_timeout, or find what it waits for"
        case "crashed":
            return "it took its process down; the last lines it wrote are in --json under stderr"
        case _:
            pass
    return "mend the model; run it again with 'modelops bundle run'"


def prints(seen: Mapping[str, Any], n_replicates: int) -> Check:
    """Say whether the model writes to stdout, and what that makes of a job."""
    at_import, each = seen["stdout_import_bytes"], seen["stdout_bytes"]
    details = {"import_bytes": at_import, "replicate_bytes": each, "begins": seen["stdout_text"]}
    if not at_import and not each:
        return ok("stdout", "writes nothing to stdout", **details)
    where = " and ".join(
        ([f"{shown_bytes(each)} in each replicate"] if each else [])
        + ([f"{shown_bytes(at_import)} when imported"] if at_import else [])
    )
    job = f", {shown_bytes(each * n_replicates)} in a job of {n_replicates:,}" if each else ""
    first = seen["stdout_text"].strip().splitlines()
    quoted = f" ({first[0][:60]!r}...)" if first else ""
    return warning(
        "stdout", f"writes {where}{job}{quoted}", "it goes to the job's log and costs time; return it, or "
        "write it with the module logging", **details,
    )  # fmt: skip


def random_state(seen: Mapping[str, Any]) -> Check:
    """Say whether the model draws from, or seeds, a generator that all code of the process shares."""
    at_import, each = seen["random_at_import"], seen["random_state"]
    details = {"at_import": at_import, "in_replicate": each}
    if not at_import and not each:
        return ok("random state", "leaves the global random state alone", **details)
    what = " and ".join(
        ([f"a replicate changes that of {' and '.join(each)}"] if each else [])
        + ([f"the import changes that of {' and '.join(at_import)}"] if at_import else [])
    )
    advice = (
        "use a generator of your own, rng = numpy.random.default_rng(seed) or random.Random(seed), and pass "
        "it on: a library that draws from the global one would change your results"
    )
    return warning("random state", f"global random state: {what}", advice, **details)


def leaves(seen: Mapping[str, Any]) -> Check:
    """Say what a replicate leaves behind; the runner undoes it, so this is for information."""
    said = []
    for key, place in (("workdir_files", "its working directory"), ("tmpdir_files", "TMPDIR")):
        if n := seen["n_" + key]:
            said.append(f"writes {n} file{'s' if n > 1 else ''} to {place} ({_listed(seen[key])})")
    if seen["cwd_changed"]:
        said.append("changes the working directory")
    if seen["environ"]:
        said.append(f"changes the environment variables {_listed(seen['environ'])}")
    keys = ("workdir_files", "tmpdir_files", "cwd_changed", "environ")
    details = {key: seen[key] for key in keys}
    if not said:
        return ok("leaves behind", "nothing", **details)
    return ok("leaves behind", f"{'; '.join(said)}: undone after each replicate", **details)


def cost(
    *,
    first_s: float,
    seconds: Sequence[float],
    peak_bytes: int,
    n_replicates: int,
    cores: int,
    available_bytes: int | None,
) -> list[Check]:
    """Say how long and how much memory a replicate takes, and so how long the job takes on this machine.

    Parameters
    ----------
    first_s
        From asking for a process to its first outcome: interpreter, imports, first replicate.
    seconds
        Of the replicates behind the first.
    available_bytes
        Memory that processes can still get here; None: unknown.
    """
    typical, first = median(seconds), shown_seconds(first_s)
    on = f"{cores} core{'s' if cores > 1 else ''}"
    each = ok(
        "time",
        f"{shown_seconds(typical)} per replicate; the first {first}, starting and importing included",
        median_seconds=typical, first_seconds=first_s, n=len(seconds),
    )  # fmt: skip
    total_s = first_s + n_replicates * typical / min(cores, n_replicates)
    job = ok(
        "job",
        f"{n_replicates:,} replicate{'s' if n_replicates > 1 else ''} on {on}: about {shown_seconds(total_s)} "
        "once the workers have started",
        replicates=n_replicates, cores=cores, seconds=total_s,
    )  # fmt: skip
    return [each, _memory(peak_bytes, min(cores, n_replicates), available_bytes), job]


def _memory(peak_bytes: int, processes: int, available_bytes: int | None) -> Check:
    message = f"{shown_bytes(peak_bytes)} in a process"
    details = {"peak_bytes": peak_bytes, "processes": processes, "available_bytes": available_bytes}
    if available_bytes is not None and peak_bytes * processes > available_bytes:
        return warning(
            "memory",
            f"{message}, {shown_bytes(peak_bytes * processes)} in {processes} at once, but only "
            f"{shown_bytes(available_bytes)} are free here",
            f"run with fewer workers: --workers {max(1, available_bytes // peak_bytes)}",
            **details,
        )
    return ok("memory", message, **details)


def shown_bytes(n: float) -> str:
    """Return an amount as people read it: ``512 B``, ``1.5 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" or n >= 100 else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


def shown_seconds(s: float) -> str:
    """Return a duration as people read it: ``12 us``, ``1.5 s``, ``3.2 h``."""
    for limit, unit, name in (
        (1e-3, 1e-6, "us"),
        (1.0, 1e-3, "ms"),
        (120.0, 1.0, "s"),
        (7200.0, 60.0, "min"),
    ):
        if s < limit:
            return f"{s / unit:.2g} {name}" if s / unit < 10 else f"{s / unit:.0f} {name}"
    return f"{s / 3600:.1f} h" if s < 48 * 3600 else f"{s / 86400:.1f} days"


def _listed(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
