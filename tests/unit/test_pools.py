"""Names of pools, their aliases, and the workers that a job may use."""

from __future__ import annotations

import string
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import modelops as mo
from modelops.client.status import PoolStatus
from modelops.driver import commands as c
from modelops.driver import events as e
from modelops.driver.machine import Machine
from modelops.driver.pools import PATIENCE_S, PoolView
from modelops.errors import RequestError
from modelops.study.ids import JobId
from modelops.study.index_line import IndexLine
from modelops.study.pools import (
    NO_ALIASES,
    Aliases,
    Membership,
    checked_labels,
    checked_name,
    checked_pools,
    normal_form,
)
from modelops.study.spec import JobSpec, decode_spec

if TYPE_CHECKING:
    from collections.abc import Callable

NAMES = st.from_regex(r"\A[A-Za-z0-9]([A-Za-z0-9._-]{0,20}[A-Za-z0-9])?\Z")
WORDS = st.lists(
    st.text(string.ascii_lowercase + string.digits, min_size=1, max_size=6), min_size=1, max_size=4
)
SEPARATORS = st.text("-_.", min_size=1, max_size=3)
ALIASES = Aliases.of_table({"eu": ["eu-west", "eu_west_1"], "US": ["us-east"]}, "aliases")


@given(NAMES)
def test_the_normal_form_of_a_normal_form_is_itself_and_is_a_name(name: str) -> None:
    form = normal_form(name)
    assert normal_form(form) == form
    assert checked_name("pool", form) == form


@given(WORDS, st.data())
def test_case_and_separators_do_not_tell_names_apart(words: list[str], data: st.DataObject) -> None:
    spelt = words[0]
    for word in words[1:]:
        spelt += data.draw(SEPARATORS) + data.draw(st.sampled_from([word, word.upper(), word.title()]))
    assert normal_form(spelt) == "-".join(words)


@given(WORDS, WORDS)
def test_other_words_are_another_name(one: list[str], other: list[str]) -> None:
    assert (normal_form("_".join(one)) == normal_form(".".join(other))) == (one == other)


@given(st.dictionaries(NAMES, st.lists(NAMES, min_size=1, max_size=3), max_size=4), NAMES, NAMES)
def test_with_any_table_of_aliases_what_is_meant_is_its_own_meaning(
    table: dict[str, list[str]], one: str, other: str
) -> None:
    try:
        aliases = Aliases.of_table(table, "aliases")
    except RequestError:
        return
    for name in (one, other, *table, *(alias for names in table.values() for alias in names)):
        meant = aliases.canonical(name)
        assert aliases.canonical(meant) == meant
        assert aliases.canonical(name.upper().replace("-", "_")) == meant
    for main, names in table.items():
        assert {aliases.canonical(name) for name in names} == {normal_form(main)}
    if normal_form(one) == normal_form(other):
        assert aliases.canonical(one) == aliases.canonical(other)


def test_the_names_of_the_operators_table_mean_one_pool_however_they_are_spelt() -> None:
    assert {ALIASES.canonical(n) for n in ("EU", "eu", "eu-west", "EU_West", "eu_west_1", "eu.west.1")} == {
        "eu"
    }
    assert ALIASES.canonical("us_east") == ALIASES.canonical("US") == "us"
    assert ALIASES.canonical("eu-west-2") == "eu-west-2"


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"eu": ["eu-west"], "europe": ["EU_WEST"]}, "'EU_WEST' would mean both eu and europe"),
        ({"eu": ["europe"], "europe": ["eu-west"]}, "'europe' means eu, and has aliases of its own"),
        ({"eu": ["a"], "EU": ["b"]}, "'eu' and 'EU' are one name"),
        ({"eu": []}, "eu must have a list of names"),
        ({"eu": 7}, "eu must have a list of names"),
        ({"eu": ["eu west"]}, "'eu west' is no name of a pool"),
        ({"-eu": ["x"]}, "'-eu' is no name of a pool"),
        ({"eu": [7]}, "7 is no name of a pool"),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused_with_where_and_why(table: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=r"pools\.toml") as refused:
        Aliases.of_table(table, "pools.toml")
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["region"], "KEY=VALUE"),
        (["region=eu", "region=us"], "given twice"),
        (["region=e u"], "no name of a pool"),
    ],
)
def test_a_wrong_label_is_refused(texts: list[str], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        checked_labels(texts)


@pytest.mark.parametrize("pools", [["eu", "EU"], ["eu-west", "eu_west"], ["e u"], [7], 7, [""], {"eu": 1}])
def test_a_study_refuses_pools_that_cannot_be(pools: Any) -> None:
    with pytest.raises(RequestError, match="pool"):
        mo.Study(bundle="b", pools=pools)


def test_a_worker_is_asked_for_by_its_pool_and_by_the_values_of_its_labels() -> None:
    assert Membership("eu-west", {"region": "eu", "kind": "gpu", "twin": "eu"}).names == (
        "eu-west",
        "eu",
        "gpu",
    )
    assert checked_pools("pools", "eu") == ("eu",)


# The record of a job.


def spec(pools: tuple[str, ...] = ()) -> JobSpec:
    return JobSpec(
        format=4 if pools else 1, name="j", bundle="b", bundle_name="b", model="m:f",
        line=IndexLine.of(1, 4), fail_fast=False, pools=pools or msgspec.UNSET,
    )  # fmt: skip


def test_the_record_of_a_job_that_runs_everywhere_has_no_word_of_pools() -> None:
    assert b"pools" not in msgspec.json.encode(spec())
    assert decode_spec(msgspec.json.encode(spec())).asked_pools == ()
    assert decode_spec(msgspec.json.encode(spec(("eu", "us")))).asked_pools == ("eu", "us")


# The driver's machine.


def running(pools: tuple[str, ...] = ("eu-west", "us"), **options: Any) -> Machine:
    machine = Machine(spec(pools), JobId("job_pools"), **options)
    machine.start(0.0)
    machine.handle(e.EnvironmentReady(), 0.0)
    return machine


def submitted(commands: list[c.Command]) -> set[str]:
    return {command.worker for command in commands if isinstance(command, c.SubmitChunk)}


def notes(commands: list[c.Command]) -> list[tuple[str, str]]:
    return [(command.kind, command.text) for command in commands if isinstance(command, c.Note)]


JOINS: list[tuple[str, Callable[[], e.WorkerJoined], bool]] = [
    ("by its pool", lambda: e.WorkerJoined("w", 1, "eu-west"), True),
    ("in another spelling", lambda: e.WorkerJoined("w", 1, "EU_WEST"), True),
    ("by an alias", lambda: e.WorkerJoined("w", 1, "EU"), True),
    ("by a label", lambda: e.WorkerJoined("w", 1, "cluster-7", ("gpu", "us-east")), True),
    ("of another pool", lambda: e.WorkerJoined("w", 1, "asia", ("gpu",)), False),
    ("of no pool", lambda: e.WorkerJoined("w", 1), False),
]


@pytest.mark.parametrize(("join", "may"), [j[1:] for j in JOINS], ids=[j[0] for j in JOINS])
def test_work_goes_to_workers_of_the_asked_pools_only(join: Callable[[], e.WorkerJoined], may: bool) -> None:
    assert submitted(running(aliases=ALIASES).handle(join(), 1.0)) == ({"w"} if may else set())


def test_a_job_without_pools_runs_everywhere_and_shows_where() -> None:
    machine = running(())
    assert submitted(machine.handle(e.WorkerJoined("w1", 1), 1.0)) == {"w1"}
    assert machine.pools() == ()
    assert submitted(machine.handle(e.WorkerJoined("w2", 1, "EU_West"), 1.0)) == {"w2"}
    assert machine.pools() == (PoolView("eu-west", 1, 1, 1),)


def test_a_pool_without_a_worker_is_seen_at_once_and_told_once_until_one_comes() -> None:
    machine = running()
    machine.handle(e.WorkerJoined("w1", 2, "us"), 1.0)
    assert machine.pools() == (PoolView("eu-west", waiting_since=0.0), PoolView("us", 1, 2, 2))
    told = [("pool_waits", "no worker of the pool eu-west is connected")]
    assert notes(machine.handle(e.TimerRang("pools"), PATIENCE_S)) == told
    assert notes(machine.handle(e.TimerRang("pools"), 60.0)) == []
    commands = machine.handle(e.WorkerJoined("w2", 1, "eu-west"), 70.0)
    assert notes(commands) == [("pool_joined", "a worker of the pool eu-west is connected")]
    assert submitted(commands) == {"w2"}
    assert all(pool.waiting_since is None for pool in machine.pools())
    machine.handle(e.WorkerLeft("w1", died=True), 80.0)
    assert machine.pools()[1] == PoolView("us", waiting_since=80.0)
    assert notes(machine.handle(e.TimerRang("pools"), 82.0)) == [
        ("pool_waits", "no worker of the pool us is connected")
    ]


def test_a_pool_that_has_only_workers_of_other_versions_is_not_said_to_be_empty() -> None:
    machine = running(aliases=ALIASES)
    machine.handle(e.WorkersRefused((("EU_West", "gpu"), ("cluster-7", "eu"), ("asia",), ())), 1.0)
    why = "2 workers are connected with versions that do not fit"
    assert notes(machine.handle(e.TimerRang("pools"), PATIENCE_S)) == [
        ("pool_waits", f"no worker of the pool eu-west can be given work: {why}"),
        ("pool_waits", "no worker of the pool us is connected"),
    ]
    machine.handle(e.WorkersRefused(()), 60.0)
    commands = machine.handle(e.WorkerJoined("w", 1, "eu-west"), 70.0)
    assert notes(commands) == [("pool_joined", "a worker of the pool eu-west is connected")]


def test_a_pool_whose_worker_is_back_in_a_moment_is_no_event() -> None:
    machine = running(("us",))
    machine.handle(e.WorkerJoined("w1", 1, "us"), 1.0)
    machine.handle(e.TimerRang("pools"), PATIENCE_S)
    machine.handle(e.WorkerLeft("w1", died=False), 10.0)
    machine.handle(e.WorkerJoined("w2", 1, "us"), 11.0)
    assert notes(machine.handle(e.TimerRang("pools"), 12.0)) == []


def test_the_next_driver_knows_since_when_a_pool_has_been_waited_for_and_does_not_say_it_again() -> None:
    machine = running(("us",), pools_waited={"us": 100.0})
    assert machine.pools() == (PoolView("us", waiting_since=-100.0),)
    assert notes(machine.handle(e.TimerRang("pools"), 10.0)) == []
    assert notes(machine.handle(e.WorkerJoined("w1", 1, "us"), 11.0))[0][0] == "pool_joined"


def test_what_a_worker_outside_holds_is_not_asked_for_and_lost_work_stays_inside() -> None:
    machine = running(("us",), epoch=2, adopt=True)
    assert machine.handle(e.WorkerJoined("outside", 9, "asia"), 1.0) == []
    commands = machine.handle(e.WorkerJoined("inside", 1, "us"), 1.0)
    assert c.AskForAttempts("inside") in commands
    commands = machine.handle(e.AttemptsFound("inside", ()), 1.0)
    (chunk,) = [command for command in commands if isinstance(command, c.SubmitChunk)]
    commands = machine.handle(e.WorkerLeft("inside", died=True), 2.0)
    assert submitted(commands) == set()  # it waits for a worker of its pool, whoever else is free
    machine.handle(e.WorkerJoined("other", 1, "us"), 3.0)
    assert submitted(machine.handle(e.AttemptsFound("other", ()), 3.0)) == {"other"}
    assert chunk.worker == "inside"


def test_without_a_table_only_spelling_is_evened_out() -> None:
    assert NO_ALIASES.canonical("EU_West.1") == "eu-west-1"


def test_a_line_says_of_a_pool_what_is_known_of_it() -> None:
    since = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    waits = f"waits for a worker since {since.astimezone():%Y-%m-%d %H:%M:%S}"
    assert str(PoolStatus("eu", True, 1, 4, {"running": 4})) == "eu: 1 worker; 4 running"
    assert (
        str(PoolStatus("eu", True, counts={"succeeded": 7}, waiting_since=since))
        == f"eu: {waits}; 7 succeeded"
    )
    assert (
        str(PoolStatus("eu", True, counts={"succeeded": 1_000})) == "eu: 1,000 succeeded"
    )  # the job has ended
    assert str(PoolStatus("us", True)) == "us: nothing has run there"
