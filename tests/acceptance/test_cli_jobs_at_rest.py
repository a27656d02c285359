"""``modelops jobs`` while no server runs: what has ended is shown, of what has not nothing is claimed."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from typing import TYPE_CHECKING

import pytest
from tests.conftest import descendants

from modelops.states import JobEvent
from modelops.store import Records
from modelops.study.ids import JobId, new_job_id

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.acceptance.conftest import Said

    from modelops.home import Home

    Modelops = Callable[..., Said]

MODEL = """
def simulate(params, seed):
    print("seed", seed)
    if seed % 2:
        raise ValueError("odd")
    return {"x": seed}
"""


@pytest.fixture
def ended(modelops: Modelops, write_bundle: Callable[..., Path]) -> str:
    """Return the id of a job that ran without a server: three succeeded, one failed."""
    said = modelops("run", write_bundle(MODEL), "--seeds", "2,3,4,6", "-w", "1", "--json", "--quiet")
    assert said.code == 3, said.err
    return str(said.json["job"])


def unfinished(home: Home, like: str) -> str:
    """Record a job like another one, that somebody had begun to run when all went dark."""
    records, job = Records.open(home.database_url), new_job_id()
    records.create_job(job, records.job(JobId(like)).spec, name="dark")
    records.change_state(job, JobEvent.STARTED, who="nobody")
    records.close()
    return job


def test_a_job_that_has_ended_is_shown_without_a_server(
    modelops: Modelops, ended: str, tmp_path: Path
) -> None:
    before = descendants(os.getpid())
    said = modelops("jobs", "show", ended[-9:], "--json")  # the end of an id will do
    assert (said.code, said.json["state"]) == (0, "partial"), said.err
    assert said.json["counts"] == {"succeeded": 3, "failed": 1}
    assert said.json["events"][0]["kind"] == "created"
    (failure,) = modelops("jobs", "failures", ended, "--json").json["failures"]
    assert (failure["count"], failure["error_type"], failure["message"]) == (1, "ValueError", "odd")
    assert "raise ValueError" in failure["traceback"]
    again = modelops(*failure["command"].split()[1:], "--json")
    assert again.json["replicates"][0]["error"]["message"] == "odd"
    assert "seed 4" in modelops("jobs", "logs", ended).out
    assert modelops("jobs", "logs", ended, "--param", "0", "--replicate", "1").out == "seed 3\n"
    assert modelops("jobs", "watch", ended, "--quiet").code == 3
    first = modelops("jobs", "sync", ended, tmp_path / "to", "--json").json
    assert first["final"] is True
    assert "results/replicates.parquet" in first["copied"]
    second = modelops("jobs", "sync", ended, tmp_path / "to", "--json").json
    assert (second["copied"], second["unchanged"]) == ([], len(first["copied"]))
    assert descendants(os.getpid()) == before  # a look starts nothing


def test_without_a_server_the_same_files_are_copied_as_with_one(
    modelops: Modelops, write_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    source = MODEL + "\ndef summarize(replicates): return {'n': len(replicates)}\n"
    table = 'model = "model:simulate"\naggregate = "model:summarize"'
    bundle = write_bundle(source, table=table)
    job = modelops("run", bundle, "--seeds", "2,4", "--json", "--quiet").json["job"]
    served = modelops("jobs", "sync", job, tmp_path / "to", "--json").json
    assert {name.partition("/")[0] for name in served["copied"]} == {"segments", "aggregates", "results"}
    modelops("down")
    again = modelops("jobs", "sync", job, tmp_path / "to", "--json").json
    assert (again["copied"], again["removed"], again["unchanged"]) == ([], [], len(served["copied"]))


def test_without_a_server_a_damaged_result_file_is_not_copied(
    modelops: Modelops, ended: str, home: Home, tmp_path: Path
) -> None:
    (stored,) = home.objects.rglob("results/replicates.parquet")
    whole = stored.read_bytes()
    stored.write_bytes(whole[:-1] + b"?")
    said = modelops("jobs", "sync", ended, tmp_path / "to")
    assert (said.code, "replicates.parquet" in said.err, "reconcile" in said.err) == (1, True, True), said.err
    assert not (tmp_path / "to" / "results" / "replicates.parquet").exists()


def test_of_a_job_that_has_not_ended_nothing_is_claimed(modelops: Modelops, ended: str, home: Home) -> None:
    dark = unfinished(home, ended)
    said = modelops("jobs", "show", dark, "--json")
    assert said.code == 5
    assert (said.json["state"], said.json["last_known"]) == ("unknown", "preparing")
    assert said.json["unknown_since"]
    plain = modelops("jobs", "show", dark)
    assert "unknown since" in plain.out
    assert "modelops up" in plain.out
    assert "failed" not in plain.out
    for what in ("watch", "failures", "logs"):
        refused = modelops("jobs", what, dark)
        assert (refused.code, "modelops up" in refused.err) == (5, True), refused.err
    listed = modelops("jobs", "list", "--json")
    assert listed.code == 5
    assert {j["job"]: j["state"] for j in listed.json["jobs"]} == {ended: "partial", dark: "unknown"}
    assert "no server runs" in listed.json["unreachable"]
    (counts,) = [j["counts"] for j in listed.json["jobs"] if j["job"] == ended]
    assert counts == {"succeeded": 3, "failed": 1}
    lines = modelops("jobs", "list", "--state", "partial").out
    assert (lines.count("job_"), "4/4" in lines) == (1, True)


def test_a_server_that_lets_nobody_connect_is_waited_for_aloud_and_given_up(modelops: Modelops) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and nobody listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        said = modelops("jobs", "list", MODELOPS_SERVER=url, MODELOPS_TOKEN="t")
    assert said.code == 5
    waiting, end = said.err.splitlines()
    assert re.search(rf"the server {url} cannot be reached: .*; trying until \d\d:\d\d:\d\d$", waiting)
    assert "check the address in MODELOPS_SERVER" in end


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("show", "job_" + "0" * 32), "'modelops jobs list --all' shows all"),
        (("show", "nonsense"), "there is no job 'nonsense'"),
        (("list", "--state", "runing"), "did you mean 'running'"),
        (("logs", "x", "--replicate", "1"), "--param"),
        (("extend", "x", "-p", "a=1", "--parameters", "f.csv"), "either -p or --parameters"),
    ],
    ids=["unknown id", "nonsense", "unknown state", "half a place", "two tables"],
)
def test_a_wrong_request_ends_with_2_and_a_sentence(
    modelops: Modelops, words: tuple[str, ...], says: str
) -> None:
    said = modelops("jobs", *words)
    assert said.code == 2, said.err
    assert says in said.err
    assert said.out == ""


def test_what_a_model_looks_for_in_vain_is_said_to_be_no_parameter_of_the_study(
    modelops: Modelops, write_bundle: Callable[..., Path]
) -> None:
    bundle = write_bundle('def simulate(params, seed):\n    return {"x": params["beta"] * params["gamma"]}\n')
    said = modelops("run", bundle, "-p", "beta=0.5", "--quiet")
    assert said.code == 1, said.err
    assert "if 'gamma' is a parameter of the model: this study does not give it (it gives beta)" in said.out
    job = modelops("jobs", "list", "--json").json["jobs"][0]["job"]
    assert "does not give it (it gives beta)" in modelops("jobs", "failures", job).out


def test_a_key_that_is_a_parameter_is_not_said_to_be_missing(
    modelops: Modelops, write_bundle: Callable[..., Path]
) -> None:
    bundle = write_bundle('def simulate(params, seed):\n    return {"x": {}["beta"]}\n')
    said = modelops("run", bundle, "-p", "beta=0.5", "--quiet")
    assert "KeyError: 'beta'" in said.out
    assert "does not give" not in said.out


def test_the_status_of_this_machine_says_when_jobs_go_elsewhere(
    modelops: Modelops, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "jobs go to" not in modelops("status").err
    monkeypatch.setenv("MODELOPS_SERVER", "https://models.example")
    assert "jobs go to https://models.example" in modelops("status").err


@pytest.mark.parametrize("command", ["submit", "run"])
def test_for_a_study_that_is_wrong_no_server_is_started(
    modelops: Modelops, write_bundle: Callable[..., Path], home: Home, command: str
) -> None:
    bundle = write_bundle(MODEL)
    for words in (("nowhere",), (bundle, "--model", "no_such"), (bundle, "-p", "a=1,1")):
        said = modelops(command, *words)
        assert said.code == 2, said.err
        assert said.out == ""
    assert not home.run.exists()


def test_nothing_was_ever_submitted_here(modelops: Modelops, home: Home) -> None:
    said = modelops("jobs", "list")
    assert (said.code, said.out) == (5, "")
    assert "modelops up" in said.err
    assert not (home.data / "modelops.db").exists()  # looking makes nothing


def test_a_server_elsewhere_that_is_away_is_named(modelops: Modelops) -> None:
    said = modelops("jobs", "list", MODELOPS_SERVER="http://127.0.0.1:9", MODELOPS_TOKEN="t")
    assert said.code == 5
    assert "http://127.0.0.1:9 cannot be reached" in said.err
    unknown = modelops(
        "jobs", "show", "job_" + "0" * 32, "--json", MODELOPS_SERVER="http://127.0.0.1:9", MODELOPS_TOKEN="t"
    )
    assert (unknown.code, unknown.json["state"], unknown.json["last_known"]) == (5, "unknown", None)
    assert modelops("jobs", "list", MODELOPS_SERVER="nonsense", MODELOPS_TOKEN="t").code == 2
    assert "MODELOPS_TOKEN" in modelops("jobs", "list", MODELOPS_SERVER="http://127.0.0.1:9").err


def test_of_many_jobs_the_newest_are_listed_and_how_many_more_there_are(
    modelops: Modelops, home: Home
) -> None:
    with contextlib.closing(Records.open(home.database_url)) as records:
        jobs = [new_job_id() for _ in range(35)]
        for job in jobs:
            records.create_job(job, b"{}", name="one of many")
    listed = modelops("jobs", "list").out.splitlines()
    assert [line.split()[0] for line in listed[1:-1]] == jobs[:4:-1]
    assert listed[-1] == "and 5 older ones: -n 60 lists 60, --all lists all"
    assert modelops("jobs", "list", "--all").out.count("job_") == 35
    assert len(modelops("jobs", "list", "--json").json["jobs"]) == 35
    assert modelops("jobs", "list", "-n", "2").out.count("\n") == 3
    assert "either -n or --all" in modelops("jobs", "list", "-n", "2", "--all").err
    for command in ("logs", "failures"):
        assert "leaves this job alone" in modelops("jobs", command, jobs[0]).err
    ended = modelops("down").out.splitlines()
    assert ended[1] == "35 jobs are unfinished: 35 queued; the newest of them:"
    assert [line.split()[1] for line in ended[2:12]] == jobs[:24:-1]
    assert ended[12] == "and 25 more; 'modelops jobs list --all -s queued' lists them"
    assert (
        ended[13]
        == "it cannot go on with 35 of them, whose study cannot be read; 'modelops jobs list' says why"
    )
    assert len(ended) == 14
