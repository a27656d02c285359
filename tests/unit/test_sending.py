from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from distributed.batched import BatchedSend
from distributed.comm.core import connect, listen
from distributed.metrics import time as time_of_day
from tornado.ioloop import IOLoop

from modelops.worker.sending import send_whatever_the_clock_says

if TYPE_CHECKING:
    import pytest

AN_HOUR_S = 3600.0
FAILS_AFTER_S = 60


def test_messages_go_on_when_the_clock_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    send_whatever_the_clock_says()
    offset = [0.0]

    def clock() -> float:
        return time_of_day() + offset[0]

    monkeypatch.setattr("distributed.batched.time", clock)
    monkeypatch.setattr("modelops.worker.sending.time_of_day", clock)
    monkeypatch.setattr(IOLoop, "time", lambda _: clock())  # the same clock, as in a process

    async def converse() -> None:
        got: asyncio.Queue[Any] = asyncio.Queue()

        async def receive(comm: Any) -> None:
            while True:
                for message in await comm.read():
                    got.put_nowait(message)
                    if message == "last":
                        return

        async with listen("inproc://", receive, deserialize=False) as listener:
            sender = BatchedSend(interval="2 ms")
            sender.start(await connect(listener.contact_address))
            for number, message in enumerate(("first", "second", "last")):
                sender.send(message)
                offset[0] = -AN_HOUR_S * number  # while the next one may not go yet
                assert await asyncio.wait_for(got.get(), FAILS_AFTER_S) == message
            await sender.close()

    asyncio.run(converse())
