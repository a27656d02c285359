"""The models of the shipped bundles that need no environment of their own."""

from __future__ import annotations

import base64
import importlib.util
import json
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from modelops.bundles import load_manifest
from modelops.client.study_files import completed
from modelops.study.canonical import canonical_json, param_id
from modelops.study.seeds import seed_key, seeds_of
from modelops.study.study import Study

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

BUNDLES = Path(__file__).parents[2] / "bundles"


def module_at(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bundle_{path.stem}", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_fair_coin_shows_heads_half_of_the_time() -> None:
    coin = module_at(BUNDLES / "coin.py")
    params = {"heads": 0.5, "tosses": 1000}
    replicates = [coin.simulate(params, seed) for seed in range(200)]
    summary = coin.summarize(replicates)
    # 200,000 tosses: the standard error of the mean is 0.0011.
    assert abs(summary["mean_share"] - 0.5) < 0.006
    assert summary["lowest_share"] < summary["mean_share"] < summary["highest_share"]
    # The longest run of heads in n tosses is about log2(n) - 2/3 (Schilling 1990).
    assert 8 < summary["mean_longest_run"] < 10.5
    assert coin.simulate(params, 7) == coin.simulate(params, 7)
    assert coin.simulate({"heads": 1.0, "tosses": 9}, 1) == {"share_of_heads": 1.0, "longest_run": 9}


@pytest.fixture(scope="module")
def flu() -> ModuleType:
    return module_at(BUNDLES / "boarding_school_flu" / "flu.py")


@pytest.fixture(scope="module")
def fits(flu: ModuleType) -> list[dict[str, Any]]:
    """The aggregates of the bundle's own study, with the seeds that a job gives it, best first."""
    path = BUNDLES / "boarding_school_flu"
    study = completed(Study(bundle=path), load_manifest(path), path)
    fits = []
    for params in study.sets():
        key = seed_key(study.seed or 0, param_id(canonical_json(params)))
        seeds = seeds_of(key, 0, study.n_replicates).tolist()
        replicates = [flu.simulate(dict(params), seed) for seed in seeds]
        fits.append({**params, **flu.summarize(replicates)})
    return sorted(fits, key=lambda fit: float(fit["loss"]))


def test_the_best_fit_beats_always_saying_the_mean_and_covers_the_data(fits: list[dict[str, Any]]) -> None:
    best = fits[0]
    assert best["loss"] < best["loss_of_mean"] / 5
    assert best["days_covered"] >= 11
    # The prediction errs by less than a tenth of the peak, and the bands say something:
    assert best["loss"] < 29.8
    assert np.mean(best["high95"] - best["low95"]) < 200


def test_the_grid_brackets_the_best_fit(fits: list[dict[str, Any]]) -> None:
    for name in ("transmission", "recovery"):
        values = sorted({fit[name] for fit in fits})
        assert values[0] < fits[0][name] < values[-1]


def test_an_outbreak_keeps_its_boys_and_follows_its_seed(flu: ModuleType) -> None:
    params = {"transmission": 1.8, "recovery": 0.45}
    first, again, other = (flu.simulate(params, seed) for seed in (1, 1, 2))
    assert np.array_equal(first["infected"], again["infected"])
    assert np.array_equal(first["confined"], again["confined"])
    assert not np.array_equal(first["infected"], other["infected"])
    assert first["infected"].shape == first["confined"].shape == (14,)
    assert first["infected"][0] == 3
    assert 0 <= first["infected"].min() <= first["infected"].max() <= 763
    assert 0 < first["attack_rate"] <= 1


def test_without_transmission_nobody_is_infected_and_without_recovery_nobody_gets_up(flu: ModuleType) -> None:
    still = flu.simulate({"transmission": 0.0, "recovery": 0.5}, 1)
    assert still["attack_rate"] == pytest.approx(3 / 763)
    assert (np.diff(still["infected"]) <= 0).all()
    growing = flu.simulate({"transmission": 2.0, "recovery": 0.0}, 1)
    assert (np.diff(growing["infected"]) >= 0).all()
    assert growing["infected"][-1] == 763


def test_on_average_an_outbreak_begins_exponentially_with_the_rate_of_its_parameters(flu: ModuleType) -> None:
    runs = np.array([flu.simulate({"transmission": 1.0, "recovery": 0.2}, s)["infected"] for s in range(400)])
    growth = np.log(runs[:, :4].mean(axis=0) / 3)
    # While nearly all are susceptible the mean grows as exp((transmission - recovery) * days).
    assert growth[3] == pytest.approx(3 * 0.8, rel=0.08)


def test_the_score_is_the_one_of_its_source(flu: ModuleType) -> None:
    random = np.random.default_rng(1)
    ensemble, observed = random.normal(size=(30, 2)), np.array([0.3, -2.0])
    pairs = np.abs(ensemble[:, np.newaxis] - ensemble[np.newaxis]).mean(axis=(0, 1))
    expected = np.abs(ensemble - observed).mean(axis=0) - pairs / 2
    assert flu.crps(ensemble, observed) == pytest.approx(expected)
    # Of the standard normal at 0 it is (sqrt(2) - 1) / sqrt(pi), Gneiting & Raftery (2007), equation 20.
    large = flu.crps(random.normal(size=(200_000, 1)), np.array([0.0]))
    assert large == pytest.approx((np.sqrt(2) - 1) / np.sqrt(np.pi), abs=0.005)
    assert flu.crps(np.full((1, 1), 3.0), np.array([5.0])) == 2.0


@pytest.fixture
def in_wire_example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = BUNDLES / "wire_example"
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == "queueing"]:
        del sys.modules[name]


def test_the_wire_example_waits_as_the_theory_of_queues_says(in_wire_example: Path) -> None:
    wire = module_at(in_wire_example / "wire.py").wire
    params = {"service_rate": 1.25, "customers": 4000}
    outputs = [wire("queueing.model/quiet", params, seed) for seed in range(40)]
    mean = statistics.mean(output["summary"]["mean_wait"] for output in outputs)
    # M/M/1: rho / (mu - lambda) = 0.4 / 0.75
    assert mean == pytest.approx(0.4 / 0.75, rel=0.1)
    assert outputs[0]["waits.csv"] == wire("queueing.model:quiet", params, 0)["waits.csv"]
    assert isinstance(outputs[0]["waits.csv"], bytes)
    busy = wire("queueing.model/busy", params, 0)["summary"]["mean_wait"]
    assert busy > outputs[0]["summary"]["mean_wait"]


def test_the_target_of_the_wire_example_is_the_squared_distance(in_wire_example: Path) -> None:
    target = module_at(in_wire_example / "queueing" / "targets.py").mean_wait

    def returned(task: str, wait: float) -> dict[str, Any]:
        inline = base64.b64encode(json.dumps({"mean_wait": wait}).encode()).decode()
        return {"task_id": task, "outputs": {"summary": {"size": 0, "checksum": "", "inline": inline}}}

    result = target([returned("a", 2.0), returned("b", 4.0)], {"mean_wait": 1.0})
    assert result["loss"] == 4.0
    assert result["diagnostics"] == {"mean_wait": 3.0, "wanted": 1.0, "n": 2}
    assert target([returned("a", 1.0)])["loss"] == 0.0
