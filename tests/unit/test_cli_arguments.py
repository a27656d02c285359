"""Words of the command line become values with the types that they look like."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from modelops.cli.app import app
from modelops.cli.job_views import show_list
from modelops.cli.jobs import extend
from modelops.cli.run import default_folder, expected_folder, refuse_unwritable
from modelops.cli.show import utc_text
from modelops.client.served import Summary
from modelops.client.status import JobStatus
from modelops.client.study_arguments import (
    axes_of_texts,
    axis_of_text,
    existing,
    min_success_of_text,
    seeds_of_text,
    sets_beside,
    with_axes,
)
from modelops.client.study_files import load_study
from modelops.errors import NotFoundError, RequestError
from modelops.states import JobState
from modelops.study.parameter_sets import ParameterSets
from modelops.study.sampling import grid
from modelops.study.wording import shown_name

if TYPE_CHECKING:
    from collections.abc import Iterator

MODELOPS = (sys.executable, "-c", "from modelops.cli import main; main()")


def modelops(*words: str, home: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, with a home."""
    return subprocess.run(
        [*MODELOPS, *words], capture_output=True, text=True, check=False, cwd=cwd,
        env={**os.environ, "MODELOPS_HOME": str(home)},
    )  # fmt: skip


VALUES: list[tuple[str, list[Any]]] = [
    ("beta=0.1,0.2", [0.1, 0.2]),
    ("n=1,2", [1, 2]),
    ("n=1,1.0", [1, 1.0]),
    ("on=true,false", [True, False]),
    ("name=fast,slow", ["fast", "slow"]),
    ('name="1","a,b"', ["1", "a,b"]),
    ('name=""', [""]),
    ("ages=[1,2],[3]", [[1, 2], [3]]),
    ('nested={"a":[1,2],"b":","}', [{"a": [1, 2], "b": ","}]),
    ("x=1e3, -2", [1000.0, -2]),
    ("x=0.1:0.5:5", [0.1, 0.2, 0.3, 0.4, 0.5]),
    ("x=0:10:6", [0, 2, 4, 6, 8, 10]),
    ("x=0:1:3", [0.0, 0.5, 1.0]),
    ("time=12:30:00x", ["12:30:00x"]),
]


@pytest.mark.parametrize(("text", "values"), VALUES)
def test_values_have_the_type_that_they_look_like(text: str, values: list[Any]) -> None:
    _, found = axis_of_text(text)
    assert found == values
    assert [type(v) for v in found] == [type(v) for v in values]


@given(
    st.lists(
        st.text() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.booleans(),
        min_size=1,
    )
)
def test_what_is_written_as_json_is_read_as_it_was(values: list[Any]) -> None:
    text = "x=" + ",".join(json.dumps(v) for v in values)
    assert axis_of_text(text) == ("x", values)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["beta"], "NAME=VALUE"),
        (["=1"], "NAME=VALUE"),
        (["beta="], "a value is missing"),
        (["beta=1,,2"], "a value is missing"),
        (['beta="a'], "a quote is not closed"),
        (["beta=[1,2"], "a bracket is not closed"),
        (["beta=[1 2]"], "not valid JSON"),
        (["beta=1", "beta=2"], "names 'beta' twice"),
        (["beta=1:0:3"], "LO < HI"),
        (["beta=0:1:1"], "LO < HI"),
        (["beta=0:1:1000000000000"], "N of 2 to 1,000,000"),
        (["beta=0:1:" + "9" * 5000], "N of 2 to 1,000,000"),
        (["beta=0:1e999:3"], "finite LO < HI"),
        (["beta=0:1" + "0" * 400 + ":3"], "finite LO < HI"),
    ],
)
def test_what_cannot_be_read_is_refused_with_what_to_write(texts: list[str], said: str) -> None:
    with pytest.raises(RequestError, match=said.replace("<", "<")):
        axes_of_texts(texts)


def test_a_named_parameter_takes_its_values_and_the_others_keep_theirs() -> None:
    sets = with_axes(grid(beta=[0.1, 0.2], gamma=[1, 2]), {"beta": [0.9]})
    assert [dict(row) for row in sets] == [{"gamma": 1, "beta": 0.9}, {"gamma": 2, "beta": 0.9}]


def test_one_and_one_point_zero_stay_apart_when_other_parameters_are_named() -> None:
    sets = with_axes(ParameterSets.of_rows([{"a": 1, "b": 5}, {"a": 1.0, "b": 5}]), {"b": [6]})
    assert [type(row["a"]) for row in sets] == [int, float]


def test_sets_that_are_added_have_the_values_of_the_first_where_none_are_named() -> None:
    sets = sets_beside({"a": 1, "b": "x"}, ["a=2,3"])
    assert [dict(row) for row in sets] == [{"a": 2, "b": "x"}, {"a": 3, "b": "x"}]


@pytest.mark.parametrize(
    ("first", "says"),
    [({"beta": 0.1, "gamma": 2}, "there are beta, gamma; did you mean 'beta'"), ({}, "it has none")],
)
def test_a_job_is_not_extended_by_a_parameter_that_it_does_not_have(first: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=rf"-p names 'betta', .*: {says}.* Nothing was added"):
        sets_beside(first, ["gamma=1", "betta=0.3"] if first else ["betta=0.3"])


def test_seeds_and_min_success_are_read_from_text() -> None:
    assert seeds_of_text("11,977,35") == [11, 977, 35]
    assert seeds_of_text(None) is None
    assert (min_success_of_text("0.9"), min_success_of_text("180")) == (0.9, 180)
    assert isinstance(min_success_of_text("1"), int)
    with pytest.raises(RequestError, match="11,977"):
        seeds_of_text("a")
    with pytest.raises(RequestError, match="fraction"):
        min_success_of_text("most")


def test_a_path_that_is_not_there_comes_with_the_one_that_was_meant(tmp_path: Path) -> None:
    (tmp_path / "seir").mkdir()
    with pytest.raises(NotFoundError, match="did you mean 'seir'"):
        existing(str(tmp_path / "sier"))
    with pytest.raises(NotFoundError, match="bundle init"):
        existing(str(tmp_path / "something_else"))


def test_result_files_that_could_not_be_written_are_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper" / "still"):
        with pytest.raises(RequestError, match=r"cannot be written to .*--out\. Nothing was run"):
            refuse_unwritable(folder)
    refuse_unwritable(tmp_path / "not" / "yet")
    assert not (tmp_path / "not").exists()


@pytest.mark.parametrize(
    ("said", "folder"),
    [("", "results/coin"), ('name = "mine"\n', "results/mine"), ('name = "a/b"\n', "results")],
)
def test_what_is_looked_at_before_a_run_is_the_folder_that_it_writes_to(
    said: str, folder: str, tmp_path: Path
) -> None:
    (tmp_path / "coin.py").write_text("def simulate(params, seed):\n    return {'x': seed}\n")
    (tmp_path / "study.toml").write_text(f'bundle = "coin.py"\n{said}')
    assert expected_folder(load_study(tmp_path / "study.toml")) == Path(folder)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("größe 2.5", "größe 2.5"),
        ("a\u202eb", r"a\u202eb"),
        ("a\x1b[2Jb\n", r"a\x1b[2Jb\n"),
        ("\udc80", r"\x80"),
        ("\u2028", r"\u2028"),
        ("a\u00a0b", "a\u00a0b"),
    ],
)
def test_a_name_is_shown_as_one_line_that_turns_nothing_around(name: str, shown: str) -> None:
    assert shown_name(name) == shown
    row = Summary(job="job_1", name=name, state="succeeded")
    assert show_list([row])[1].endswith(shown)


def test_times_in_json_have_one_form() -> None:
    at = datetime(2026, 1, 1, 13, tzinfo=timezone(timedelta(hours=1)))
    assert utc_text(at) == "2026-01-01T12:00:00Z" == msgspec.to_builtins(at.astimezone(UTC))


def test_extending_by_nothing_is_refused_in_the_words_of_the_shell() -> None:
    with pytest.raises(RequestError, match=r"-n 400 .*-p a=1,2 .*--seeds") as refused:
        extend("job_1")
    assert "=[" not in str(refused.value)


@pytest.mark.parametrize("name", ["../../etc/x", "/abs", "a/b", "..", ".", "", "a\u202eb"])
def test_a_study_whose_name_is_no_folder_s_name_writes_below_results(name: str) -> None:
    assert default_folder(name, "job_1") == Path("results/job_1")


def test_a_study_writes_into_a_folder_of_its_name_otherwise() -> None:
    assert default_folder("größe 2.5", "job_1") == Path("results/größe 2.5")


@pytest.mark.parametrize("words", [["--help"], ["doctor"], ["jobs", "list", "--json"]])
def test_a_full_output_is_one_sentence(words: list[str], tmp_path: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        said = subprocess.run(
            [*MODELOPS, *words], stdout=full, stderr=subprocess.PIPE, text=True, check=False,
            env={**os.environ, "MODELOPS_HOME": str(tmp_path)},
        )  # fmt: skip
    assert said.returncode == 1
    assert "Traceback" not in said.stderr
    assert "No space left on device" in said.stderr


@pytest.mark.parametrize("words", [["jobs", "list"], ["status"], ["down"]])
def test_who_only_looks_hears_that_the_home_is_a_file(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "home").touch()
    said = modelops(*words, home=tmp_path / "home", cwd=tmp_path)
    assert said.returncode == 2
    assert said.stdout == ""
    assert said.stderr.startswith(
        f"error: {tmp_path}/home can hold no data of ModelOps: {tmp_path}/home is a file"
    )


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["jobs", "show", "nope"], "NotFoundError"),
        (["jobs", "list", "--state", "runing"], "RequestError"),
        (["jobs", "show"], "UsageError"),
        (["--nope"], "UsageError"),
        (["env", "verify", "nope"], "NotFoundError"),
        (["run", "nope.toml"], "NotFoundError"),
    ],
    ids=" ".join,
)
def test_a_command_that_fails_says_so_as_json_when_it_was_asked_for_json(
    words: list[str], error: str, tmp_path: Path
) -> None:
    plain, said = (modelops(*words, *more, home=tmp_path / "home", cwd=tmp_path) for more in ([], ["--json"]))
    assert (plain.returncode, plain.stdout) == (2, "")
    answer = json.loads(said.stdout)
    assert (answer["error"], answer["exit_code"], said.returncode) == (error, 2, 2)
    assert said.stderr == plain.stderr  # the sentence is there for who reads the terminal
    assert answer["message"] in said.stderr


def _switches(group: Any) -> Iterator[tuple[str, list[str]]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _switches(command)
        else:
            yield from ((name, parameter.secondary_opts) for parameter in command.params)


def test_a_switch_has_no_opposite_that_does_nothing() -> None:
    found = dict(_switches(typer.main.get_command(app)))
    assert "gc" in found
    assert [name for name, opposites in _switches(typer.main.get_command(app)) if opposites] == []


@pytest.mark.parametrize("words", [["submit", "coin.py"], ["up"]])
def test_a_home_that_is_a_file_is_one_sentence(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "home").touch()
    (tmp_path / "coin.py").write_text("def simulate(params, seed):\n    return {'x': seed}\n")
    said = subprocess.run(
        [*MODELOPS, *words], capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "MODELOPS_HOME": str(tmp_path / "home")},
    )  # fmt: skip
    assert said.returncode != 0
    assert "Traceback" not in said.stderr
    assert said.stderr.startswith("error: "), said.stderr


@pytest.mark.parametrize(
    ("state", "said"), [("running", "the cancel is recorded"), ("cancelling", ""), ("cancelled", "")]
)
def test_a_job_that_still_runs_after_a_cancel_is_said_to_be_going_to_end(
    state: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when no server drives it just then: *running* alone would look as if nothing had been asked."""
    status = JobStatus(JobState(state), {"pending": 3}, {}, "")
    job = SimpleNamespace(id="job_1", cancel=lambda *, at_once: None, status=lambda: status)
    monkeypatch.setattr("modelops.cli.jobs._steerable", lambda _: job)
    done = CliRunner().invoke(app, ["jobs", "cancel", "job_1"])
    assert done.exit_code == 0
    assert done.stdout.startswith(f"job_1: {state}")
    assert done.stderr.partition(";")[0].strip() == said
