"""Studies and parameter sets in files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelops.bundles import Manifest, load_manifest
from modelops.client.parameter_files import read_parameters, value_of_text
from modelops.client.study_files import bundle_defaults, completed, load_study, with_parameters_read
from modelops.errors import NotFoundError, RequestError
from modelops.study.parameter_sets import parameter_table
from modelops.study.sampling import ints, latin_hypercube, log_range, sobol
from modelops.study.study import Retry, Study

BUNDLES = Path(__file__).parents[2] / "bundles"


def study_of(folder: Path, text: str) -> Study:
    file = folder / "study.toml"
    file.write_text('bundle = "../b"\n' + text)
    return load_study(file)


def test_the_keys_are_those_of_a_study(tmp_path: Path) -> None:
    study = study_of(
        tmp_path,
        """
        model = "slow"
        replicates = 200
        seed = 7
        aggregate = ["summarize"]
        isolation = "fork"
        min_success = 0.9
        timeout = "12h"
        memory = "2GiB"
        fail_fast = false
        retry = { max_retries = 2, on = ["crashed", "timed_out"] }
        [parameters]
        beta = [0.2, 0.3]
        gamma = [1]
        """,
    )
    assert study.bundle == tmp_path / "../b"
    assert (study.model, study.replicates, study.seed, study.aggregate) == ("slow", 200, 7, ["summarize"])
    assert (study.isolation, study.min_success, study.fail_fast) == ("fork", 0.9, False)
    assert study.limits.memory_bytes == 2**31
    assert study.retry == Retry(max_retries=2, on=["crashed", "timed_out"])
    assert list(study.sets()) == [{"beta": 0.2, "gamma": 1}, {"beta": 0.3, "gamma": 1}]


DESIGNS: list[tuple[str, Any]] = [
    ("parameters = [{ a = 1 }, { a = 1.0 }]", [{"a": 1}, {"a": 1.0}]),
    ("[[parameters]]\na = 1\n[[parameters]]\na = 2", [{"a": 1}, {"a": 2}]),
    ("parameters.sobol = { n = 8, seed = 3, a = [0, 1] }", sobol(8, seed=3, a=(0, 1))),
    (
        "[parameters.latin_hypercube]\nn = 5\na = { log = [0.1, 1] }\nk = { ints = [1, 9] }",
        latin_hypercube(5, a=log_range(0.1, 1), k=ints(1, 9)),
    ),
    ("parameters = { sobol = [1, 2] }", [{"sobol": 1}, {"sobol": 2}]),  # a parameter of that name
]


@pytest.mark.parametrize(("text", "expected"), DESIGNS, ids=[d[0][:25] for d in DESIGNS])
def test_parameters_can_be_listed_or_sampled(tmp_path: Path, text: str, expected: Any) -> None:
    assert list(study_of(tmp_path, text).sets()) == list(expected)


@pytest.mark.parametrize("text", ['parameters = "sets.csv"', 'parameters.file = "sets.csv"'])
def test_a_parameter_file_is_relative_to_the_study_file(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sets.csv").write_text("a\n1\n")
    study = study_of(tmp_path, text)
    monkeypatch.chdir("/")
    assert list(with_parameters_read(study).sets()) == [{"a": 1}]


WRONG = [
    ("reps = 3", "unknown key 'reps'; there are bundle, .*replicates, "),
    ("replicats = 3", "unknown key 'replicats'; did you mean 'replicates'"),
    ("replicates = 0", "replicates must be"),
    ("parameters.beta = 0.3", r"beta = 0.3 is one value"),
    ("parameters.sobol = { seed = 3, a = [0, 1] }", "None is no number of parameter sets"),
    ("parameters.sobol = { n = 8, a = { logg = [0, 1] } }", "a = {'logg'.* is no range"),
    ('parameters = { file = "x.csv", a = [1] }', "has file, so it cannot have a as well"),
    ("parameters = { sobol = { n = 8, a = [0, 1] }, b = [1] }", "it cannot have b as well"),
    ("parameters.seed = [1]", "cannot have the name 'seed'"),
    ("retry = 3", "retry = 3 must be a table"),
    ("retry = { retries = 3 }", "unknown key 'retries' in retry; did you mean 'max_retries'"),
    ("= 3", "is not valid TOML: .*line 2"),
    (f"seed = {'9' * 5_000}", "is not valid TOML: .*digits"),
]


@pytest.mark.parametrize(("text", "says"), WRONG, ids=[w[0][:25] for w in WRONG])
def test_a_wrong_study_file_is_refused_with_its_name_and_key(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(RequestError, match=f"study.toml.*{says}"):
        study_of(tmp_path, text)


def test_a_study_file_without_a_bundle_or_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no study file"):
        load_study(tmp_path / "none.toml")
    (tmp_path / "s.toml").write_text("seed = 1\n")
    with pytest.raises(RequestError, match="bundle is missing"):
        load_study(tmp_path / "s.toml")


def test_a_bundle_proposes_a_study_and_the_modeler_has_the_last_word(tmp_path: Path) -> None:
    (tmp_path / "sets.csv").write_text("a\n1\n2\n")
    manifest = Manifest(
        "b", "pyproject.toml", {"f": "m:f"}, study={"replicates": 9, "parameters": "sets.csv"}
    )
    study = completed(Study(bundle=tmp_path, seed=5), manifest, tmp_path)
    assert (study.replicates, study.seed, len(study.sets())) == (9, 5, 2)
    study = completed(Study(bundle=tmp_path, parameters=[{"a": 7}]), manifest, tmp_path)
    assert list(study.sets()) == [{"a": 7}]


def test_a_wrong_study_of_a_bundle_names_the_bundles_file(tmp_path: Path) -> None:
    manifest = Manifest("b", "coin.py", {"f": "m:f"}, study={"replicats": 9})
    with pytest.raises(RequestError, match=r"coin.py, \[tool.modelops.study\]: unknown key 'replicats'"):
        bundle_defaults(manifest, tmp_path)
    with pytest.raises(RequestError, match="bundle cannot be set here"):
        bundle_defaults(Manifest("b", "coin.py", {"f": "m:f"}, study={"bundle": "x"}), tmp_path)


SHIPPED = {
    "boarding_school_flu": (20, 200),
    "starsim_sir": (4, 6),
    "coin.py": (3, 100),
    "wire_example": (4, 20),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_bundle_has_a_study_that_runs_as_it_is(name: str) -> None:
    path = BUNDLES / name
    study = completed(Study(bundle=path), load_manifest(path), path)
    assert (len(study.sets()), study.n_replicates) == SHIPPED[name]
    assert parameter_table(study.sets()).num_rows == SHIPPED[name][0]


WRITTEN: list[tuple[str, Any]] = [
    ("1", 1), ("-3", -3), ("0", 0), ("1.0", 1.0), ("1e3", 1000.0), (".5", 0.5), ("1.", 1.0),
    ("inf", float("inf")),
    ("true", True), ("False", False), ("007", "007"), ("1_000", "1_000"), ("abc", "abc"), ("0x10", "0x10"),
    ("12345678901234567890123", 12345678901234567890123),
    ("-inf", float("-inf")), ("", ""),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), WRITTEN)
def test_a_value_is_what_it_is_written_as(text: str, expected: Any) -> None:
    value = value_of_text(text)
    assert value == expected
    assert type(value) is type(expected)


@given(st.floats(allow_nan=False) | st.integers() | st.booleans())
def test_what_python_prints_is_read_back_as_it_was(value: Any) -> None:
    read = value_of_text(str(value))
    assert read == value
    assert type(read) is type(value)


def test_csv_keeps_types_leaves_out_what_is_empty_and_bears_spreadsheets(tmp_path: Path) -> None:
    file = tmp_path / "sets.csv"
    file.write_bytes('\ufeffbeta,n, who\r\n0.5,1,"a, b"\r\n\r\n1.0,,c\r\n'.encode())
    assert list(read_parameters(file)) == [{"beta": 0.5, "n": 1, "who": "a, b"}, {"beta": 1.0, "who": "c"}]
    (tmp_path / "sets.tsv").write_text("a\tb\n1\t2.0\n")
    assert read_parameters(tmp_path / "sets.tsv").canonical() == [b'{"a":1,"b":2.0}']


def test_parquet_and_json_keep_their_types(tmp_path: Path) -> None:
    rows = [{"n": 1, "x": 1.0, "who": "é"}, {"n": 2, "x": 0.1, "who": ""}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "sets.parquet")
    (tmp_path / "sets.json").write_text(json.dumps(rows))
    (tmp_path / "sets.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    for name in ("sets.parquet", "sets.json", "sets.jsonl"):
        assert list(read_parameters(tmp_path / name)) == rows


WRONG_FILES = [
    ("a.csv", "a,b\n1,2\n3\n", "a.csv, line 3: 1 values, but the first line names 2"),
    ("a.csv", "", "is empty; its first line must name"),
    ("a.csv", "a,a\n1,2\n", "line 1: a parameter is named twice"),
    ("a.csv", 'a\n"1\n', "a.csv, line"),
    ("a.csv", "seed\n1\n", "cannot have the name 'seed'"),
    ("a.json", '[{"a": 1},\n{"a": }]', "a.json, line 2: not valid JSON"),
    ("a.json", '{"a": 1}', "must hold a list"),
    ("a.jsonl", '{"a": 1}\n{"a": }\n', "a.jsonl, line 2: not valid JSON"),
    ("a.jsonl", '{"a": 1}\n3\n', "parameter set 1 is a int"),
    ("a.json", '[{"a": ' + "[" * 100_000, "a.json, line 1: not valid JSON"),
    ("a.csv", "a\n" + "9" * 5_000, "999... is an integer of 5,000 digits"),
    ("a.parquet", "no parquet", "cannot be read as a Parquet file"),
    ("a.xlsx", "", "can be read from .csv"),
]


@pytest.mark.parametrize(("name", "text", "says"), WRONG_FILES, ids=[w[2][:25] for w in WRONG_FILES])
def test_a_wrong_parameter_file_is_refused_with_its_line(
    tmp_path: Path, name: str, text: str, says: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(RequestError, match=says):
        read_parameters(tmp_path / name)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
def test_a_parameter_file_that_is_not_utf8_is_refused_by_name(tmp_path: Path, name: str) -> None:
    text = "place\nKöln\n" if name == "a.csv" else '{"place": "Köln"}'
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(RequestError, match=f"{name}.*utf-8"):
        read_parameters(tmp_path / name)


def test_a_byte_order_mark_is_no_part_of_a_json_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('\ufeff[{"a": 1}]')
    assert list(read_parameters(tmp_path / "a.json")) == [{"a": 1}]


def test_a_parameter_file_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"sets\.csv"):
        read_parameters(tmp_path / "sets.csv")
