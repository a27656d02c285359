"""What a model returns reaches `output`, the aggregate and the view: the whole way, with real libraries."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import modelops as mo
from modelops.states import JobState

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from modelops.client.job import Job
    from modelops.cluster.embedded import EmbeddedCluster

SOURCE = Path(__file__).parents[1] / "data" / "values" / "model.py"
# The same versions as here, because the test compares what came back with what it makes itself.
LIBRARIES = ", ".join(f'"{name}=={version(name)}"' for name in ("numpy", "pandas", "polars", "pyarrow"))
PYPROJECT = f"""
[project]
name = "values"
version = "1.0"
requires-python = ">=3.11"
dependencies = [{LIBRARIES}]
[tool.modelops]
model = {{ all = "model:simulate", large = "model:large" }}
aggregate = {{ check = "model:check", digests = "model:digests" }}
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "values"
    folder.mkdir()
    (folder / "pyproject.toml").write_text(PYPROJECT)
    shutil.copy(SOURCE, folder)
    return folder


@pytest.fixture(scope="module")
def model() -> ModuleType:
    """The bundle's own module, loaded here."""
    spec = importlib.util.spec_from_file_location("values_model", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def job(bundle: Path, session_cluster: EmbeddedCluster) -> Job:
    job = mo.run(
        mo.Study(bundle=bundle, replicates=3, model="all", aggregate="check"), cluster=session_cluster
    )
    assert job.status().state == JobState.SUCCEEDED, job.failures().to_pylist() or job.status().reason
    return job


def test_output_gives_every_value_as_the_model_returned_it(job: Job, model: ModuleType) -> None:
    expected = model.simulate({}, 0)
    assert len(expected) > 100
    got = job.output(0, 2)
    assert list(got) == list(expected)
    assert [name for name in expected if not model.same(got[name], expected[name])] == []
    for name in ("odd_nan", "structured", "large", "frame", "polars", "arrow"):
        assert model.same(job.output(0, 1, name), expected[name])


def test_the_comparison_of_this_test_notices_differences(model: ModuleType) -> None:
    import numpy as np
    import pandas as pd  # type: ignore[import-untyped]  # no stubs are installed

    one = np.arange(4.0)
    frame = pd.DataFrame({"x": [1.0, -0.0]})
    for a, b in [
        (float("nan"), model.plain()["odd_nan"]),
        (0.0, -0.0),
        (1, 1.0),
        (1, True),
        ((1,), [1]),
        (one, one.astype(">f8")),
        (one.reshape(2, 2), np.asfortranarray(one.reshape(2, 2))),
        (one, one.astype("f4")),
        (np.float64(1), 1.0),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        (frame, pd.DataFrame({"x": [1.0, 0.0]})),
        (frame, pd.DataFrame({"x": [1.0, -0.0]}, index=pd.Index([0, 1]))),
        (b"a", bytearray(b"a")),
    ]:
        assert not model.same(a, b), (a, b)
        assert model.same(a, a)


def test_the_aggregate_gets_every_value_as_the_model_returned_it(job: Job) -> None:
    assert job.aggregate(0) == {"n": 3, "wrong": [], "in_order": True}


def test_results_have_columns_of_exact_scalars_and_say_what_was_left_out(job: Job, model: ModuleType) -> None:
    results = job.results()
    left_out = json.loads(results.schema.metadata[b"modelops.left_out"])
    names = list(model.simulate({}, 0))
    columns = [name for name in results.column_names if name in names]
    assert sorted(columns + list(left_out)) == sorted(names)

    types = {name: str(results.schema.field(name).type) for name in columns}
    first = results.slice(0, 1).to_pylist()[0]
    assert results.num_rows == 3
    for name in ("nan", "odd_nan", "negative_nan", "special_scalar_f4f", "special_scalar_big_f8d"):
        assert types[name] == "double"
        assert math.isnan(first[name])
    assert (first["inf"], first["minus_inf"], first["tiny"]) == (math.inf, -math.inf, 5e-324)
    assert math.copysign(1, first["minus_zero"]) == -1
    assert first["most_negative"] == -(2**63)
    assert first["text"] == model.plain()["text"]
    assert (first["truth"], types["truth"], first["whole"], types["whole"]) == (True, "bool", 3, "int64")
    for dtype in model.DTYPES:
        name = "scalar_" + dtype.str.strip("|<").replace(">", "big_") + dtype.char
        if dtype.kind in "biuf" and dtype.char not in "g":
            assert types[name] == {"b": "bool", "f": "double"}.get(dtype.kind, "int64"), name
            assert first[name] == 1
    assert first["np_str"] == "nul\0 at the end\0"

    for name, why in {
        "huge": "int",
        "unsigned": "int",
        "surrogate": "Unicode",
        "nested": "lists",
        "keys": "dicts",
        "none": "None",
        "complex": "complex numbers",
        "bytes": "bytes",
        "texts": "arrays",
        "no_dimension": "arrays",
        "frame": "tables",
        "polars": "tables",
        "arrow": "tables",
        "large": "arrays",
    }.items():
        assert why in left_out[name], (name, left_out[name])


def test_200_mb_of_bytes_come_back(bundle: Path, cluster: EmbeddedCluster, model: ModuleType) -> None:
    n_bytes = 200 * 10**6
    study = mo.Study(
        bundle=bundle, model="large", aggregate="digests", parameters=[{"n_bytes": n_bytes}], replicates=1
    )
    job = mo.run(study, cluster=cluster)
    assert job.status().state == JobState.SUCCEEDED, job.status().reason
    expected = hashlib.sha256(model.large_bytes(n_bytes)).hexdigest()
    assert job.aggregate(0) == {"0": f"bytes {expected}"}
    big: Any = job.output(0, 0, "big")
    assert (type(big), len(big), hashlib.sha256(big).hexdigest()) == (bytes, n_bytes, expected)
    assert job.output(0, 0, "small") == b"s"


@pytest.mark.parametrize(
    ("code", "dependencies", "words"),
    [
        (
            "import pandas; x = pandas.DataFrame({'a': [1]})",
            ["pandas", "numpy"],
            ["pandas.DataFrame", 'add "pyarrow" to dependencies'],
        ),
        ("import numpy; x = numpy.array([1, 'a', None], object)", ["numpy"], ["numpy.ndarray", "object"]),
        (
            "import pandas; x = pandas.DataFrame({'a': pandas.Series([1, {}], dtype=object)})",
            ["pandas", "numpy", "pyarrow", "polars"],
            ["object", "'a'"],
        ),
        ("import threading; x = [threading.Lock()]", [], ["[0]", "lock"]),
        ("x = {'deep': lambda: 1}", [], [".deep", "function"]),
    ],
    ids=["pandas without pyarrow", "object array", "object column", "lock", "lambda"],
)
def test_what_cannot_cross_is_invalid_output_with_key_type_and_remedy(
    code: str,
    dependencies: list[str],
    words: list[str],
    cluster: EmbeddedCluster,
    write_bundle: Callable[..., Path],
) -> None:
    bundle = write_bundle(
        f"{code}\ndef simulate(params, seed):\n    return {{'fine': 1, 'bad': x}} if seed == 1 else {{'fine': 1}}\n",
        dependencies=", ".join(f'"{name}=={version(name)}"' for name in dependencies),
    )
    job = mo.run(mo.Study(bundle=bundle, seeds=[0, 1, 2]), cluster=cluster)
    assert job.status().counts == {"succeeded": 2, "invalid_output": 1}, job.status().reason
    (row,) = job.failures().to_pylist()
    assert (row["status"], row["seed"]) == ("invalid_output", 1)
    for word in ["bad", *words]:
        assert word in row["message"]
