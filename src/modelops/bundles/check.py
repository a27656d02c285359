"""What ``modelops bundle check`` makes of its observations: findings, and the sentences for the author.

Pure: whoever runs the processes passes in what they returned.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

Outputs = list[list[Any]]
"""The outputs of one replicate as the runner sends them: ``[[name, kind, data], ...]``."""


class Level(StrEnum):
    """How much a finding matters."""

    OK = "ok"
    NOTE = "note"  # good to know
    WARNING = "warning"  # jobs run, but may not do what their author thinks
    PROBLEM = "problem"  # jobs fail, or their results cannot be trusted


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. ``advice``: what to change, empty when nothing needs to be."""

    level: Level
    text: str
    advice: str = ""


def differing(first: Outputs, second: Outputs) -> list[str]:
    """Name the outputs in which two runs differ, sorted; those that only one of them has, too.

    Values are compared as bytes, so NaN equals itself and 1 differs from 1.0.
    """
    one, two = _by_name(first), _by_name(second)
    return sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))


def check_same_seed(runs: Mapping[str, Outputs]) -> Finding:
    """Compare runs with one seed.

    Parameters
    ----------
    runs
        By how they were run, the first being what the others are compared with, e.g. ``"first"``,
        ``"again in the same process"``, ``"in a fresh process"``, ``"in another order"``.
    """
    (_, reference), *others = runs.items()
    for how, outputs in others:
        if names := differing(reference, outputs):
            return Finding(
                Level.PROBLEM,
                f"the same seed gives another result {how}: {_listed(names)}",
                _WHY_DIFFERENT.get(how, "take all randomness from the seed"),
            )
    return Finding(Level.OK, f"the same seed gives the same result ({', '.join(how for how, _ in others)})")


_LEFT_OVER = (
    "something is left over from the run before (a module global, a cache, a random generator "
    'made at import); make it inside the model, or set isolation = "fork"'
)
_WHY_DIFFERENT = {
    "again in the same process": _LEFT_OVER,
    "in another order": _LEFT_OVER,
    "in a fresh process": (
        "look for the order of a set or of hash(), the time, the process id, "
        "a random generator without a seed"
    ),
}


def check_other_seeds(outputs: Sequence[Outputs]) -> Finding:
    """Compare runs with different seeds and the same parameters: chance should change something."""
    if all(not differing(outputs[0], other) for other in outputs[1:]):
        return Finding(
            Level.WARNING,
            f"{len(outputs)} different seeds all give the same result",
            "pass the seed to the random generator; if the model is deterministic, one replicate is enough",
        )
    return Finding(Level.OK, "different seeds give different results")


def check_stdout(printed: str) -> Finding:
    """Judge what a replicate printed."""
    lines = printed.splitlines()
    if not lines:
        return Finding(Level.OK, "prints nothing")
    return Finding(
        Level.NOTE, f"prints {len(lines)} lines per replicate (first: {lines[0][:60]!r}); they go to the log"
    )


def check_global_random(changed: Iterable[str]) -> Finding:
    """Judge the use of global random states; ``changed`` names them, e.g. ``"random"``."""
    names = sorted(changed)
    if not names:
        return Finding(Level.OK, "leaves the global random state alone")
    return Finding(
        Level.NOTE,
        f"uses the global random state of {_listed(names)}",
        "a generator of its own, e.g. numpy.random.default_rng(seed), cannot be disturbed by a library",
    )


def check_cost(
    seconds: Sequence[float],
    peak_bytes: int | None,
    *,
    n_replicates: int,
    slots: int,
    memory_bytes: int | None,
) -> Finding:
    """Say what a replicate costs, and so how long the bundle's own study takes on this machine.

    Parameters
    ----------
    seconds
        Of each replicate that was run, the first of a process left out (it pays for caches and compilation).
    peak_bytes
        Largest resident size of the process, or None if unknown.
    n_replicates, slots
        How many the study has, and how many run at once.
    memory_bytes
        What this machine has, or None if unknown.
    """
    median = statistics.median(seconds)
    text = f"one replicate takes {duration(median)}"
    if peak_bytes is not None:
        text += f" and {peak_bytes / 2**20:.0f} MiB"
    whole = duration(n_replicates * median / slots)
    text += f"; {n_replicates} of them take about {whole} on this machine ({slots} at once)"
    if peak_bytes is not None and memory_bytes is not None and peak_bytes * slots > memory_bytes:
        fit = max(1, memory_bytes // peak_bytes)
        return Finding(Level.WARNING, text, f"memory is enough for {fit} at once; start fewer workers")
    return Finding(Level.OK, text)


def report_lines(findings: Iterable[Finding]) -> list[str]:
    """Return the report, a line per finding and one below it for what to change."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:>8}  {finding.text}")
        if finding.advice:
            lines.append(f"{'':>8}  -> {finding.advice}")
    return lines


def passed(findings: Iterable[Finding]) -> bool:
    """Say whether the bundle may be submitted: no finding is a problem."""
    return all(finding.level is not Level.PROBLEM for finding in findings)


def duration(seconds: float) -> str:
    """Return a duration as people say it: ``"0.4 ms"``, ``"12 s"``, ``"3 min 20 s"``, ``"2 h 5 min"``."""
    if seconds < 1:
        return f"{seconds * 1000:.2g} ms" if seconds < 0.0995 else f"{seconds * 1000:.0f} ms"
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    if seconds < 3599.5:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def _by_name(outputs: Outputs) -> dict[str, tuple[str, Any]]:
    # A large value travels as a file; its digest stands for it, the path differs from run to run.
    return {
        name: (kind, data["sha256"] if isinstance(data, dict) and "sha256" in data else data)
        for name, kind, data in outputs
    }


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names[:5]) + (
        f" and {len(names) - 5} more" if len(names) > 5 else ""
    )
