"""A bundle author at a shell: write a bundle, check it, try it; every answer has its exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Modelops = Callable[..., "Said"]
    from tests.acceptance.conftest import Said

    from modelops.home import Home

HALF = """
def simulate(params, seed):
    print("hello from", seed)
    if seed % 2:
        raise ValueError(f"odd seed {seed}")
    return {"x": seed, "beta": params.get("beta", 0), "nan": float("nan")}
"""
GOOD = "def simulate(params, seed):\n    return {'x': seed, 'beta': params.get('beta')}\n"


def test_a_new_bundle_passes_its_check_and_runs(modelops: Modelops, tmp_path: Path) -> None:
    said = modelops("bundle", "init", "mymodel")
    assert said.code == 0
    assert "wrote mymodel/pyproject.toml" in said.out
    folder = tmp_path / "here" / "mymodel"
    said = modelops("bundle", "check", cwd=folder)
    assert said.code == 0, said.out + said.err
    assert "FAILED" not in said.out
    assert "warning" not in said.out
    said = modelops("bundle", "run", ".", "-p", "beta=0.3", "-n", "2", cwd=folder)
    assert said.code == 0, said.err
    assert said.out.count("succeeded") == 2
    assert "array of int64" in said.out


def test_nothing_is_overwritten_by_a_new_bundle(modelops: Modelops, tmp_path: Path) -> None:
    folder = tmp_path / "here" / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    said = modelops("bundle", "init", "mine")
    assert said.code == 2
    assert "nothing was written" in said.err
    assert [p.name for p in folder.iterdir()] == ["thesis.txt"]


def test_a_check_that_fails_ends_with_1_and_as_json_says_which(
    modelops: Modelops, write_bundle: Callable[..., Path]
) -> None:
    bundle = write_bundle(
        "import time\ndef simulate(params, seed):\n    return {'t': time.time_ns(), 'seed': seed}\n"
    )
    said = modelops("bundle", "check", bundle, "--json")
    assert said.code == 1
    answer = said.json
    assert answer["ok"] is False
    (bad,) = [c for c in answer["checks"] if c["status"] == "FAILED"]
    assert bad["name"] == "reproducible"
    assert bad["details"]["differs"]["in a fresh process"] == ["t"]


def test_replicates_are_printed_with_outputs_prints_and_errors(
    modelops: Modelops, write_bundle: Callable[..., Path]
) -> None:
    bundle = write_bundle(HALF)
    said = modelops("bundle", "run", bundle, "--seeds", "10,11", "-p", "beta=0.3")
    assert said.code == 3
    assert "hello from 10" in said.out
    assert "ValueError: odd seed 11" in said.out
    assert 'File "model.py", line 5' in said.out
    said = modelops("bundle", "run", bundle, "--seeds", "10,12", "-p", "beta=0.3,0.5", "--json")
    assert said.code == 0
    rows = said.json["replicates"]
    assert [(r["param"], r["replicate"], r["seed"], r["params"]) for r in rows] == [
        (0, 0, 10, {"beta": 0.3}), (0, 1, 12, {"beta": 0.3}), (1, 0, 10, {"beta": 0.5}), (1, 1, 12, {"beta": 0.5}),
    ]  # fmt: skip
    assert rows[0]["outputs"]["x"]["value"] == 10
    assert rows[0]["outputs"]["nan"]["value"] == "nan"
    assert rows[0]["printed"] == "hello from 10\n"
    assert modelops("bundle", "run", bundle, "--seeds", "11,13").code == 1


def test_the_same_study_seed_gives_the_same_seeds(
    modelops: Modelops, write_bundle: Callable[..., Path]
) -> None:
    bundle = write_bundle(GOOD)

    def seeds(*options: str) -> list[int]:
        answer = modelops("bundle", "run", bundle, "-n", "3", "--json", *options).json
        return [row["seed"] for row in answer["replicates"]]

    assert seeds("--seed", "7") == seeds("--seed", "7")
    assert seeds("--seed", "7") != seeds("--seed", "8")


WRONG = [
    (("bundle", "check", "nothere"), "nothere"),
    (("bundle", "run", "nothere"), "nothere"),
    (("bundle", "run", "BUNDLE", "-p", "beta"), "NAME=VALUE"),
    (("bundle", "run", "BUNDLE", "--seeds", "a"), "11,977"),
    (("bundle", "run", "BUNDLE", "--model", "simulat"), "did you mean"),
    (("bundle", "run", "BUNDLE", "--replicate-timeout", "soon"), "10m"),
    (("bundle", "run", "--job", "job_x"), "--param"),
    (("bundle", "run", "BUNDLE", "--param", "0"), "--job"),
    (("bundle", "run", "--job", "job_x", "--param", "0", "--replicate", "0"), "job_x"),
    (
        (
            "bundle",
            "chekc",
        ),
        "Did you mean 'check'",
    ),
    (("run", "BUNDLE", "-p", "=1"), "NAME=VALUE"),
    (("run", "BUNDLE", "--min-success", "most"), "fraction"),
    (("run", "nothere.toml"), "nothere.toml"),
    (("run", "BUNDLE", "--parameters", "nothere.csv"), "nothere.csv"),
    (("env", "build", "nothere"), "nothere"),
    (("env", "verify", "nothere"), "env list"),
    (("env", "gc", "--max-age", "long"), "10m"),
]


@pytest.mark.parametrize(
    ("arguments", "words"), WRONG, ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_a_wrong_request_ends_with_2_and_a_sentence(
    arguments: tuple[str, ...], words: str, modelops: Modelops, write_bundle: Callable[..., Path]
) -> None:
    bundle = write_bundle(GOOD)
    said = modelops(*(bundle if a == "BUNDLE" else a for a in arguments))
    assert said.code == 2, said.out + said.err
    assert words in said.err
    assert "Traceback" not in said.err
    assert said.out == ""


def test_a_bundle_that_cannot_be_imported_is_a_sentence_and_no_traceback_of_ours(
    modelops: Modelops, write_bundle: Callable[..., Path]
) -> None:
    said = modelops(
        "bundle", "run", write_bundle("import no_such_module\ndef simulate(params, seed):\n    pass\n")
    )
    assert said.code == 1
    assert "No module named 'no_such_module'" in said.err
    assert "modelops/cli" not in said.err


def test_help_and_import_load_nothing_heavy() -> None:
    """What makes a start slow is what is imported, so that is what is tested, not the seconds of this machine."""
    heavy = {
        "numpy",
        "pyarrow",
        "dask",
        "distributed",
        "sqlalchemy",
        "rich.console",
        "rich.markdown",
        "alembic",
    }
    for code in ("import modelops", "import modelops.cli.app as a; a.typer.main.get_command(a.app)"):
        script = f"{code}\nimport sys\nprint(*sys.modules)"
        loaded = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
        )
        assert heavy.isdisjoint(loaded.stdout.split()), code


@pytest.mark.parametrize(
    "command", [(), ("run",), ("bundle",), ("bundle", "check"), ("env", "gc"), ("doctor",)]
)
def test_every_command_has_help(command: tuple[str, ...], modelops: Modelops) -> None:
    said = modelops(*command, "--help")
    assert said.code == 0
    assert "Usage: modelops" in said.out
    assert "--help" in said.out


def test_the_shell_can_complete_commands(modelops: Modelops) -> None:
    said = modelops("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert said.code == 0, said.err
    assert "modelops" in said.out
    said = modelops(_MODELOPS_COMPLETE="complete_bash", COMP_WORDS="modelops bundle ", COMP_CWORD="2")
    assert {"init", "check", "run"} <= set(said.out.split())


def test_large_outputs_are_shown_as_json_too(modelops: Modelops, write_bundle: Callable[..., Path]) -> None:
    bundle = write_bundle("def simulate(params, seed):\n    return {'large': bytes(100_000)}\n")
    said = modelops("bundle", "run", bundle, "-n", "2", "--json")
    assert said.code == 0, said.err
    shown = [one["outputs"]["large"] for one in said.json["replicates"]]
    assert [output["bytes"] for output in shown] == [100_000] * 2


@pytest.mark.parametrize("words", ["submit", "run", "run -w 1", "bundle check", "bundle run"])
def test_a_folder_that_is_no_bundle_is_named_and_not_copied(
    words: str, modelops: Modelops, home: Home, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "large.raw").write_bytes(os.urandom(99))
    cached = home.cache / "bundles"
    before = set(cached.glob("*"))
    said = modelops(*words.split(), photos)
    assert said.code in (1, 2)
    assert f"{photos} is no bundle: it has no pyproject.toml" in said.out + said.err
    assert set(cached.glob("*")) == before
