"""Draw the state diagrams of docs/reference/states.md from the tables of `modelops.states`."""

from __future__ import annotations

from pathlib import Path

from modelops.states import JOB_NEXT, JobEvent, JobState

PAGE = Path(__file__).parent / "reference" / "states.md"
BEGIN, END = "<!-- drawn from modelops.states: begin -->", "<!-- drawn from modelops.states: end -->"


def drawing() -> str:
    """Return the job's states as a Mermaid diagram, and the table behind it."""
    edges: dict[tuple[JobState, JobState], list[JobEvent]] = {}
    for (state, event), to in JOB_NEXT.items():
        edges.setdefault((state, to), []).append(event)
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {JobState.QUEUED}"]
    lines += [f"    {state} --> {to}: {', '.join(events)}" for (state, to), events in edges.items()]
    lines += ["```", "", "| from | by | to |", "|---|---|---|"]
    lines += [f"| `{state}` | `{event}` | `{to}` |" for (state, event), to in JOB_NEXT.items()]
    return "\n".join(lines)


def redrawn(text: str) -> str:
    """Return the page with the drawing between its two marks."""
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    return f"{head}{BEGIN}\n{drawing()}\n{END}{tail}"


if __name__ == "__main__":
    PAGE.write_text(redrawn(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
