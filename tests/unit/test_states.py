"""The transition table, and the page that draws it."""

from __future__ import annotations

import pytest
from doc_tables import REFERENCE, rows_below

from modelops.errors import InternalError
from modelops.states import (
    FINAL_JOB_STATES,
    JOB_NEXT,
    STORED,
    AggregateStatus,
    JobEvent,
    JobState,
    ReplicateStatus,
    next_state,
)


def reachable(start: JobState) -> set[JobState]:
    found, todo = {start}, [start]
    while todo:
        state = todo.pop()
        for new in {to for (source, _), to in JOB_NEXT.items() if source is state} - found:
            found.add(new)
            todo.append(new)
    return found


def test_the_final_states_are_those_that_only_a_new_run_leaves() -> None:
    begin_again = {JobEvent.RESUMED, JobEvent.EXTENDED, JobEvent.REPAIRED}
    for state in JobState:
        events = {event for (source, event) in JOB_NEXT if source is state}
        assert (state in FINAL_JOB_STATES) == (events == begin_again)
    assert {"succeeded", "partial", "failed", "cancelled"} == FINAL_JOB_STATES


def test_every_state_is_reached_and_can_still_end() -> None:
    assert reachable(JobState.QUEUED) == set(JobState)
    for state in JobState:
        assert reachable(state) & FINAL_JOB_STATES


def test_every_event_is_used() -> None:
    assert {event for _, event in JOB_NEXT} == set(JobEvent)


def test_only_the_table_changes_a_state() -> None:
    for state in JobState:
        for event in JobEvent:
            if (state, event) in JOB_NEXT:
                assert next_state(state, event) is JOB_NEXT[state, event]
            else:
                with pytest.raises(InternalError, match=f"{state} cannot go on by {event}"):
                    next_state(state, event)


def test_the_page_lists_and_draws_exactly_the_table() -> None:
    listed = {(source, event): to for source, event, to in rows_below("states.md", "| from |")}
    assert listed == dict(JOB_NEXT)
    drawn = set()
    for line in (REFERENCE / "states.md").read_text().splitlines():
        if " --> " in line and "[*]" not in line:
            arrow, events = line.split(": ")
            source, to = arrow.split("-->")
            drawn |= {(source.strip(), event, to.strip()) for event in events.split(", ")}
    assert drawn == {(source, event, to) for (source, event), to in JOB_NEXT.items()}


def test_the_page_lists_the_codes_of_segments() -> None:
    codes = {int(code): status for code, status, _ in rows_below("states.md", "| code ")}
    assert codes == dict(enumerate(STORED))
    page = (REFERENCE / "states.md").read_text()
    assert all(f"`{status}`" in page for status in (*ReplicateStatus, *AggregateStatus))
