"""Topics are heard by whoever listens, and the scheduler is told of each once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modelops.cluster.listeners import Listeners

if TYPE_CHECKING:
    from collections.abc import Callable


class Subscribed:
    """A client that writes down what it was told to hear."""

    def __init__(self) -> None:
        self.topics: list[str] = []
        self.hear: dict[str, Callable[[tuple[float, Any]], None]] = {}

    def subscribe_topic(self, topic: str, handler: Callable[[tuple[float, Any]], None]) -> None:
        self.topics.append(topic)
        self.hear[topic] = handler


def test_a_topic_is_subscribed_to_once_by_each_client_however_many_jobs_follow_each_other() -> None:
    listeners, first, second = Listeners(), Subscribed(), Subscribed()
    heard: list[str] = []
    listeners.listen_to(first)  # type: ignore[arg-type]  # all that is used of a client
    for job in ("a", "b"):
        with listeners.on_topic("receipts", lambda message, job=job: heard.append(f"{job} {message}")):  # type: ignore[misc]
            first.hear["receipts"]((0.0, "x"))
    first.hear["receipts"]((0.0, "nobody listens"))

    listeners.listen_to(second)  # type: ignore[arg-type]
    with listeners.on_topic("receipts", heard.append), listeners.on_topic("receipts", heard.append):
        second.hear["receipts"]((0.0, "y"))

    assert (first.topics, second.topics) == (["receipts"], ["receipts"])
    assert heard == ["a x", "b x", "y", "y"]
