"""A user looks after a machine: doctor, and the environments on it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from tests.acceptance.conftest import command

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.acceptance.conftest import Said

    from modelops.home import Home

    Modelops = Callable[..., Said]

GOOD = "def simulate(params, seed):\n    return {'x': seed}\n"


def test_doctor_finds_nothing_wrong_here(modelops: Modelops) -> None:
    said = modelops("doctor", "--json")
    answer = said.json
    assert (said.code, answer["ok"]) == (0, True), [c for c in answer["checks"] if c["status"] == "FAILED"]
    assert {c["name"] for c in answer["checks"]} >= {
        "Python", "packages", "uv", "interpreters", "data folder", "cache folder", "state folder", "file system",
        "database",
        "temporary folder", "package index", "open files", "user processes", "memory limits", "processes", "clock",
        "pool",
    }  # fmt: skip


def test_doctor_names_the_folder_that_cannot_be_written_and_ends_with_1(
    modelops: Modelops, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    said = modelops("doctor", MODELOPS_HOME=str(tmp_path / "file" / "home"))
    assert said.code == 1
    (line,) = [x for x in said.out.splitlines() if "data folder" in x]
    assert line.startswith("FAILED")
    assert str(tmp_path / "file" / "home") in line
    assert "set MODELOPS_HOME" in said.out


def test_doctor_only_warns_when_the_index_does_not_answer(modelops: Modelops) -> None:
    said = modelops("doctor", UV_DEFAULT_INDEX="http://127.0.0.1:9/simple")
    assert said.code == 0, said.out
    assert any(x.startswith("warning  package index") for x in said.out.splitlines())


@pytest.mark.parametrize("words", [("doctor",), ("bundle", "run"), ("env", "build")])
def test_what_a_command_is_the_first_to_make_is_for_its_user_only_whatever_the_umask(
    home: Home, tmp_path: Path, write_bundle: Callable[..., Path], words: tuple[str, ...]
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    environ = {f"XDG_{name.upper()}_HOME": str(own / name) for name in ("data", "cache", "state")}
    bundle = [] if words == ("doctor",) else [write_bundle(GOOD)]
    before = os.umask(0)  # as some shared machines have it, or nearly so
    try:
        said = command(home, tmp_path)(*words, *bundle, MODELOPS_HOME="", **environ)
    finally:
        os.umask(before)
    assert said.code == 0, said.out + said.err
    made = list(own.glob("*/modelops"))
    assert made
    assert {oct(folder.stat().st_mode & 0o777) for folder in made} == {"0o700"}


def test_an_environment_is_built_listed_verified_and_removed(
    modelops: Modelops, write_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    own = {"MODELOPS_HOME": str(tmp_path / "own")}
    bundle = write_bundle(GOOD, dependencies='"iniconfig==2.0.0"')
    built = modelops("env", "build", bundle, "--json", **own)
    assert built.code == 0, built.err
    key = built.json["key"]
    assert built.json["built"] is True
    assert built.json["packages"] == ["iniconfig==2.0.0"]
    assert modelops("env", "build", bundle, "--json", **own).json["built"] is False

    (row,) = modelops("env", "list", "--json", **own).json["environments"]
    assert (row["key"], row["packages"], row["damages"]) == (key, ["iniconfig==2.0.0"], [])
    assert key in modelops("env", "list", **own).out
    assert modelops("env", "verify", key[:8], **own).code == 0

    said = modelops("env", "gc", "--max-age", "30d", **own)
    assert (said.code, "removed 0 environments" in said.out) == (0, True)
    dry = modelops("env", "gc", "--all", "--dry-run", "--json", **own).json
    assert [r["key"] for r in dry["removed"]] == [key]
    assert len(modelops("env", "list", "--json", **own).json["environments"]) == 1
    assert modelops("env", "gc", "--all", **own).code == 0
    assert modelops("env", "list", "--json", **own).json == {"environments": []}


def test_a_damaged_environment_is_found_by_verify_and_built_again(
    modelops: Modelops, write_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    own = {"MODELOPS_HOME": str(tmp_path / "own")}
    bundle = write_bundle(GOOD, dependencies='"iniconfig==2.0.0"')
    built = modelops("env", "build", bundle, "--json", **own).json
    (module,) = (tmp_path / "own" / "cache" / "envs" / built["key"]).glob(
        "lib/python*/site-packages/iniconfig/__init__.py"
    )
    module.unlink()
    module.write_text("# not what was installed\n")
    said = modelops("env", "verify", "--json", **own)
    assert said.code == 1
    (row,) = said.json["environments"]
    assert (row["ok"], row["set_aside"]) == (False, True)
    assert any("iniconfig/__init__.py" in d for d in row["damages"])
    assert modelops("env", "build", bundle, "--json", **own).json["built"] is True
    assert modelops("env", "verify", **own).code == 0


def test_dependencies_that_do_not_exist_are_an_error_with_the_words_of_uv(
    modelops: Modelops, write_bundle: Callable[..., Path], home: Home
) -> None:
    bundle = write_bundle(GOOD, dependencies='"no-such-package-modelops-test==9.9"')
    said = modelops("env", "build", bundle)
    assert said.code == 2
    assert "no-such-package-modelops-test" in said.err
    assert "Traceback" not in said.err
