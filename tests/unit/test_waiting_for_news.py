"""Who waits for news of a job hears of it when it is recorded, not at the next look."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from modelops.server.http.waiting import Waiting

DEADLINE_S = 60.0


def test_what_is_recorded_here_ends_the_wait_at_once() -> None:
    state = {"value": 0}

    async def look(_job: str) -> Any:
        return dict(state)

    async def main() -> Any:
        waiting = Waiting(look, poll_s=10 * DEADLINE_S, longest_s=10 * DEADLINE_S)

        def change() -> None:
            state["value"] += 1
            waiting.poke("job")

        changes = [threading.Timer(0.01 * n, change) for n in range(3)]
        for thread in changes:
            thread.start()
        waits = [waiting.until("job", lambda view: view["value"] == 3, 10 * DEADLINE_S) for _ in range(2)]  # type: ignore[index]
        found = await asyncio.wait_for(asyncio.gather(*waits), DEADLINE_S)
        waiting.poke("job")  # nobody waits any more
        return found

    assert asyncio.run(main()) == [{"value": 3}] * 2


def test_who_waits_for_the_end_alone_causes_no_look_before_it() -> None:
    looks: list[str] = []

    async def main() -> Any:
        state, changed = "running", asyncio.Event()

        async def look(_job: str) -> Any:
            looks.append(state)
            changed.set()
            return state

        waiting = Waiting(look, poll_s=10 * DEADLINE_S, longest_s=10 * DEADLINE_S)
        ended: Any = lambda view: view == "succeeded"  # noqa: E731
        for_end = asyncio.create_task(waiting.until("job", ended, 10 * DEADLINE_S, for_end=True))
        await changed.wait()
        changed.clear()
        waiting.poke("job", False)
        different: Any = lambda view: view != "running"  # noqa: E731
        for_change: Any = asyncio.create_task(waiting.until("job", different, 10 * DEADLINE_S))
        await changed.wait()
        state = "finalizing"
        waiting.poke("job", False)
        assert await for_change == "finalizing"
        state = "succeeded"
        waiting.poke("job", True)
        return await asyncio.wait_for(for_end, DEADLINE_S)

    assert asyncio.run(main()) == "succeeded"
    assert looks == ["running", "running", "finalizing", "succeeded"]


def test_a_change_during_the_first_look_is_not_missed() -> None:
    state = {"value": 0}

    async def main() -> Any:
        waiting: Waiting

        async def look(_job: str) -> Any:
            view = dict(state)
            if not state["value"]:
                state["value"] = 1
                waiting.poke("job")
                await asyncio.sleep(0)
            return view

        waiting = Waiting(look, poll_s=10 * DEADLINE_S, longest_s=10 * DEADLINE_S)
        enough: Any = lambda view: view["value"] == 1  # noqa: E731
        return await asyncio.wait_for(waiting.until("job", enough, 10 * DEADLINE_S), DEADLINE_S)

    assert asyncio.run(main()) == {"value": 1}


def test_the_end_of_what_is_driven_here_is_waited_for_without_a_look_before_it() -> None:
    looks: list[str] = []

    async def main() -> list[Any]:
        state, asked = "running", asyncio.Event()

        async def look(_job: str) -> Any:
            looks.append(state)
            return state

        def goes_on(_job: str) -> bool:
            asked.set()
            return state == "running"

        waiting = Waiting(look, poll_s=10 * DEADLINE_S, longest_s=10 * DEADLINE_S, goes_on=goes_on)
        ended: Any = lambda view: view == "succeeded"  # noqa: E731
        for_end = asyncio.create_task(waiting.until("job", ended, 10 * DEADLINE_S, for_end=True))
        await asked.wait()
        assert looks == []
        state = "succeeded"
        waiting.poke("job", True)
        found = [await asyncio.wait_for(for_end, DEADLINE_S)]
        # Nobody pokes any more: who comes now must look itself.
        later = waiting.until("job", ended, 10 * DEADLINE_S, for_end=True)
        return [*found, await asyncio.wait_for(later, DEADLINE_S)]

    assert asyncio.run(main()) == ["succeeded", "succeeded"]
    assert looks == ["succeeded", "succeeded"]


def test_who_has_waited_for_the_end_in_vain_is_told_how_it_stands() -> None:
    async def main() -> Any:
        async def look(_job: str) -> Any:
            return "running"

        waiting = Waiting(look, poll_s=10 * DEADLINE_S, goes_on=lambda _job: True)
        return await asyncio.wait_for(
            waiting.until("job", lambda _view: False, 1e-3, for_end=True), DEADLINE_S
        )

    assert asyncio.run(main()) == "running"
