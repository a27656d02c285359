"""The shipped bundles in real environments, built from what they declare: starsim and matplotlib included.

The environments are made with uv by hand, so that a fault here is one of the bundle and not of ModelOps.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from uv import find_uv_bin

from modelops.bundles import load_manifest, snapshot_changed, take_snapshot
from modelops.bundles.script import script_metadata
from modelops.bundles.template import init_bundle
from modelops.client.study_files import completed
from modelops.study.study import Study

if TYPE_CHECKING:
    from collections.abc import Callable

BUNDLES = Path(__file__).parents[2] / "bundles"
PATIENCE_S = 900  # a cold cache, a slow network


def run(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def dependencies(bundle: Path) -> list[str]:
    if bundle.is_file():
        metadata = script_metadata(bundle.read_text("utf-8"), bundle.name) or {}
        return list(metadata.get("dependencies", []))
    return list(tomllib.loads((bundle / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"])


def environment(folder: Path, packages: list[str]) -> Path:
    """Make a virtual environment; return its interpreter."""
    uv = find_uv_bin()
    run(uv, "venv", "--quiet", "--python", sys.executable, folder)
    python = folder / "bin" / "python"
    if packages:
        run(uv, "pip", "install", "--quiet", "--python", python, *packages)
    return python


@pytest.fixture(scope="module")
def python_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give the interpreter of a shipped bundle's environment, built when it is first asked for."""

    @cache
    def python(name: str) -> Path:
        return environment(tmp_path_factory.mktemp("env") / "venv", dependencies(BUNDLES / name))

    return python


def in_bundle(python: Path, snapshot: Path, code: str, *arguments: object) -> Any:
    """Run code in a bundle's environment, away from the bundle, as a job does; return what it prints."""
    program = f"import json, sys; sys.path.insert(0, {str(snapshot)!r})\n{code}"
    workdir = python.parent.parent.parent / "work"
    workdir.mkdir(exist_ok=True)
    # Compiled modules are kept, outside the snapshot: most of importing starsim is compiling.
    prefix = f"pycache_prefix={workdir.parent / 'pycache'}"
    printed = run(python, "-X", prefix, "-c", program, *map(json.dumps, arguments), cwd=workdir)
    return json.loads(printed.splitlines()[-1])


SIMULATE = """
import importlib, hashlib
entry, params, seeds = map(json.loads, sys.argv[1:])
module, function = entry.split(":")
simulate = getattr(importlib.import_module(module), function)
print(json.dumps([repr(simulate(params, seed)) for seed in seeds]))
"""


@pytest.mark.parametrize("name", ["coin.py", "boarding_school_flu", "starsim_sir", "digits_training"])
def test_a_shipped_bundle_runs_in_its_environment_and_is_reproducible(
    name: str, tmp_path: Path, python_of: Callable[[str], Path]
) -> None:
    bundle = BUNDLES / name
    manifest = load_manifest(bundle)
    _, snapshot = take_snapshot(bundle, tmp_path / "cache")
    python = python_of(name)
    params = dict(completed(Study(bundle=bundle), manifest, bundle).sets()[0])

    first = in_bundle(python, snapshot, SIMULATE, manifest.model(), params, [1, 2, 2**32 - 1, 1])
    assert len(set(first)) == 3
    assert first[0] == first[3]
    # In another process, in another order: nothing but the seed decides.
    assert in_bundle(python, snapshot, SIMULATE, manifest.model(), params, [2, 1]) == [first[1], first[0]]
    assert snapshot_changed(snapshot) == []


STARSIM = """
import numpy as np, sir
few = [sir.simulate({"beta": 0.02}, seed) for seed in range(3)]
many = [sir.simulate({"beta": 0.15}, seed) for seed in range(3)]
low, high = sir.summarize(few), sir.summarize(many)
print(json.dumps({
    "low": low["mean_attack_rate"], "high": high["mean_attack_rate"],
    "weeks": many[0]["prevalence"].shape[0], "peak": many[0]["peak"] == float(many[0]["prevalence"].max()),
}))
"""


def test_starsim_infects_more_agents_when_transmission_is_likelier(python_of: Callable[[str], Path]) -> None:
    found = in_bundle(python_of("starsim_sir"), BUNDLES / "starsim_sir", STARSIM)
    assert found["low"] < 0.1 < 0.5 < found["high"] < 1
    assert found["weeks"] == 53
    assert found["peak"]


REPORT = """
import flu, flu_report
(out_dir,) = map(json.loads, sys.argv[1:])
rows = []
rates = [(1.8, 0.45), (1.8, 0.5), (2.0, 0.5), (1.4, 0.55), (2.2, 0.4)]
for param, (transmission, recovery) in enumerate(rates):
    params = {"transmission": transmission, "recovery": recovery}
    fit = flu.summarize([flu.simulate(params, seed) for seed in range(200)])
    rows.append({"param": param, "params": params, "aggregates": fit})
rows.sort(key=lambda row: row["aggregates"]["loss"])
lines = flu_report.report(rows[:1], out_dir) and flu_report.report(rows, out_dir)
best = rows[0]["aggregates"]
print(json.dumps({"lines": lines, "best": best["loss"], "days": best["days_covered"]}))
"""


def test_the_flu_report_draws_a_picture_and_tells_how_good_the_fit_is(
    tmp_path: Path, python_of: Callable[[str], Path]
) -> None:
    (tmp_path / "out").mkdir()
    bundle = BUNDLES / "boarding_school_flu"
    found = in_bundle(python_of("boarding_school_flu"), bundle, REPORT, str(tmp_path / "out"))
    picture = (tmp_path / "out" / "boarding_school_flu.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n")
    width, height = (int.from_bytes(picture[i : i + 4], "big") for i in (16, 20))
    assert (width, height) == (1760, 992)
    text = "\n".join(found["lines"])
    loss = re.search(r"loss \(CRPS, boys\): ([0-9.]+); always predicting the observed mean: ([0-9.]+)", text)
    assert loss
    assert float(loss[1]) == pytest.approx(found["best"], abs=0.05)
    assert float(loss[2]) == pytest.approx(94.7)
    assert f"in the 95% band: {found['days']} of 14" in text
    assert found["days"] >= 11


def test_a_bundle_from_the_template_passes_its_own_tests(tmp_path: Path) -> None:
    init_bundle(tmp_path / "my-model")
    manifest = load_manifest(tmp_path / "my-model")
    python = environment(tmp_path / "env", [*dependencies(tmp_path / "my-model"), "pytest"])
    printed = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", cwd=tmp_path / "my-model")
    assert "3 passed" in printed
    _, snapshot = take_snapshot(tmp_path / "my-model", tmp_path / "cache")
    params = dict(completed(Study(bundle="."), manifest, tmp_path / "my-model").sets()[0])
    assert len(set(in_bundle(python, snapshot, SIMULATE, manifest.model(), params, [1, 2, 3]))) == 3
    assert sorted(path.name for path in snapshot.iterdir()) == [
        ".modelopsignore",
        "my_model.py",
        "pyproject.toml",
    ]
