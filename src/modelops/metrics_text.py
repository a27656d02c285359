"""Prometheus' text format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from modelops.counters import EDGES, Counted, Durations, Measured

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from modelops.counters import Totals

PROMETHEUS: Final = "text/plain; version=0.0.4; charset=utf-8"


def family(name: str, kind: str, text: str, samples: Iterable[tuple[Mapping[str, str], float]]) -> str:
    """Return one metric: its name, ``gauge`` or ``counter``, what it means, and values by labels."""
    lines = [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
    for labels, value in samples:
        inside = ",".join(f'{key}="{_escaped(str(v))}"' for key, v in labels.items())
        lines.append(f"{name}{{{inside}}} {value}" if inside else f"{name} {value}")
    return "\n".join(lines) + "\n"


def histogram(name: str, text: str, what: Measured, durations: Durations) -> str:
    """Return one metric of durations: how many were at most as long as each edge, how many in all, and their sum."""
    edges = EDGES[what]
    counts = (*durations.counts, *(0 for _ in range(len(edges) + 1 - len(durations.counts))))
    lines, n = [f"# HELP {name} {text}", f"# TYPE {name} histogram"], 0
    for edge, more in zip((*edges, "+Inf"), counts, strict=True):
        n += more
        lines.append(f'{name}_bucket{{le="{edge}"}} {n}')
    lines += [f"{name}_sum {durations.total_s:.6f}", f"{name}_count {n}"]
    return "\n".join(lines) + "\n"


def of_processes(totals: Totals, whose: str) -> str:
    """Return the metrics that servers and workers both have. ``whose``: whose outcomes are measured."""
    isolations = {
        "warm": Counted.WARM_STARTS, "fork": Counted.FORK_STARTS, "spawn": Counted.SPAWN_STARTS,
    }  # fmt: skip
    return "".join(
        (
            histogram(
                "modelops_replicate_seconds",
                f"How long the model took, of replicates whose outcome {whose}.",
                Measured.REPLICATES,
                totals.durations.get(Measured.REPLICATES, Durations()),
            ),
            histogram(
                "modelops_environment_build_seconds",
                "How long environments took that were built here.",
                Measured.ENVIRONMENT_BUILDS,
                totals.durations.get(Measured.ENVIRONMENT_BUILDS, Durations()),
            ),
            family(
                "modelops_process_starts_total",
                "counter",
                "Runner processes that were started, by isolation.",
                [({"isolation": name}, totals.counts.get(which, 0)) for name, which in isolations.items()],
            ),
        )
    )


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
