"""What a bundle says of itself, and what its author is told when it says it wrongly."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from modelops.bundles import Manifest, load_manifest
from modelops.bundles.target_data import MAX_BYTES
from modelops.errors import BundleError, NotFoundError, RequestError


def bundle_with(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_toml", ".toml").replace("_txt", ".txt").replace(
            "_py", ".py"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def manifest_of(folder: Path, table: str) -> Manifest:
    return load_manifest(
        bundle_with(folder, pyproject_toml=f'[project]\nname = "b"\n[tool.modelops]\n{table}')
    )


def test_one_model_and_one_aggregate_are_named_after_their_functions(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, 'model = "seir:simulate"\naggregate = "seir:summarize"')
    assert manifest.name == "b"
    assert manifest.models == {"simulate": "seir:simulate"}
    assert manifest.aggregates == {"summarize": "seir:summarize"}
    assert manifest.isolation == "warm"
    assert manifest.objective == "loss"
    assert not manifest.wire
    assert not manifest.install


def test_the_first_of_several_models_is_the_default_and_others_are_found_by_name(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, 'model = { fast = "m:fast", slow = "m:slow" }')
    assert manifest.model() == "m:fast"
    assert manifest.model("slow") == "m:slow"
    assert manifest.model("other.mod:fn") == "other.mod:fn"


def test_two_aggregates_of_one_function_name_stay_apart(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, 'model = "m:f"\naggregate = ["a:fit", "b:fit", "c:plot"]')
    assert manifest.aggregates == {"a:fit": "a:fit", "b:fit": "b:fit", "plot": "c:plot"}


def test_a_model_that_is_not_there_is_answered_with_those_that_are(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, 'model = "seir:simulate"')
    with pytest.raises(RequestError, match=r"simulate \(seir:simulate\); did you mean 'simulate'\?"):
        manifest.model("simulat")


@pytest.mark.parametrize(
    ("written", "given"),
    [
        ("target_data = { mean = 1.5, days = [1, 2] }", {"mean": 1.5, "days": [1, 2]}),
        ('target_data = "data/seen.json"', {"boys": [3, 8]}),
        ('target_data = "data/seen.csv"', b"day,boys\n1,3\n"),
        ("", None),
    ],
)
def test_target_data_is_a_value_or_what_a_file_of_the_bundle_holds(
    written: str, given: object, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "seen.json").write_text('{"boys": [3, 8]}')
    (tmp_path / "data" / "seen.csv").write_text("day,boys\n1,3\n")
    assert manifest_of(tmp_path, f'model = "m:f"\n{written}').target_data == given


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.json", None, "line 5: target_data = 'gone.json' is no file of the bundle"),
        ("../seen.csv", "1", "line 5: target_data = '../seen.csv' is no file of the bundle"),
        ("bad.json", "{", "line 5: target_data = 'bad.json' is not valid JSON"),
        ("large.csv", "x" * (MAX_BYTES + 1), "let the target read it: its working directory"),
    ],
)
def test_target_data_that_cannot_be_handed_on_is_refused_with_its_line(
    name: str, content: str | None, message: str, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    if content is not None:
        (bundle / name).write_text(content)
    with pytest.raises(BundleError, match=message):
        manifest_of(bundle, f'model = "m:f"\ntarget_data = "{name}"')


def test_target_data_that_no_target_could_be_given_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="target_data cannot be handed to a target: since: "):
        manifest_of(tmp_path, 'model = "m:f"\ntarget_data = { since = 1978-01-22 }')


WRONG = [
    # what the author wrote                                        what the message must say
    ('modle = "m:f"', r"pyproject.toml, line 4: unknown key 'modle'.*did you mean 'model'"),
    ('models = "m:f"', r"line 4: .*did you mean 'model'"),
    ('aggregate = "m:f"', "names no model; add the line model ="),
    ('model = "m.f"', r"line 4: model = 'm.f' is no entry point; write 'module:function'"),
    ('model = "m/f"', r"is no entry point"),
    ("model = 3", r"line 4: model must be 'module:function'"),
    ('model = "m:f"\nisolation = "hot"', r"line 5: isolation = 'hot' is none of warm, fork, spawn"),
    ('model = "m:f"\nstudy = 3', r"line 5: \[tool.modelops.study\] must be a table"),
    ('model = "m:f"\ninstall = "yes"', r"line 5: install must be true or false"),
    ('model = "m:f"\nobjective = 3', r"line 5: objective must be text"),
    ('model = "m:f"\nname =\n', r"pyproject.toml is not valid TOML: .*line 5"),
]


@pytest.mark.parametrize(("table", "says"), WRONG, ids=[w[0][:20] for w in WRONG])
def test_a_wrong_manifest_is_refused_with_file_line_and_what_to_write(
    tmp_path: Path, table: str, says: str
) -> None:
    with pytest.raises(BundleError, match=says):
        manifest_of(tmp_path, table)


def test_a_line_number_belongs_to_the_table_and_not_to_a_key_of_that_name_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="line 4: name must be text"):
        manifest_of(tmp_path, 'name = 7\nmodel = "m:f"')


def test_a_path_without_a_bundle_says_what_a_bundle_is(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such file or folder"):
        load_manifest(tmp_path / "nothing")
    with pytest.raises(BundleError, match=r"it has no pyproject\.toml"):
        load_manifest(tmp_path)
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    with pytest.raises(BundleError, match=r"has no \[tool.modelops\] table; add one"):
        load_manifest(tmp_path).model()


SCRIPT = """\
# /// script
# dependencies = ["numpy"]
# [tool.modelops.study]
# replicates = 7
# ///
import a_module_that_does_not_exist
def simulate(params, seed): ...
def summarize(replicates): ...
"""


def test_a_script_is_read_without_being_imported(tmp_path: Path) -> None:
    script = tmp_path / "coin.py"
    script.write_text(SCRIPT)
    manifest = load_manifest(script)
    assert manifest.name == "coin"
    assert manifest.source == "coin.py"
    assert manifest.model() == "coin:simulate"
    assert manifest.aggregates == {"summarize": "coin:summarize"}
    assert manifest.study == {"replicates": 7}
    assert load_manifest(tmp_path) == manifest  # its snapshot is a folder with that file


def test_a_script_with_windows_line_ends_keeps_its_metadata(tmp_path: Path) -> None:
    script = tmp_path / "coin.py"
    script.write_bytes(SCRIPT.replace("\n", "\r\n").encode())
    assert load_manifest(script).study == {"replicates": 7}


def test_a_script_may_name_other_functions(tmp_path: Path) -> None:
    script = tmp_path / "toss.py"
    script.write_text(
        '# /// script\n# [tool.modelops]\n# model = "toss:throw"\n# ///\ndef throw(p, s): ...\n'
    )
    manifest = load_manifest(script)
    assert manifest.models == {"throw": "toss:throw"}
    assert manifest.aggregates == {}


WRONG_SCRIPTS = [
    ("x = 1\n", "has no model: define 'def simulate"),
    ("def simulate(:\n", "line 1: not valid Python"),
    ("# /// script\n# a = \n# ///\ndef simulate(p, s): ...\n", "block \\(from line 1\\) is not valid TOML"),
    (SCRIPT + "\n# /// script\n# a = 1\n# ///\n", "has 2 blocks"),
    (
        SCRIPT.replace("# [tool.modelops.study]", "# [tool.modelops]\n# modle = 1"),
        "line 4: unknown key 'modle'",
    ),
]


@pytest.mark.parametrize(("text", "says"), WRONG_SCRIPTS, ids=[w[1][:20] for w in WRONG_SCRIPTS])
def test_a_wrong_script_is_refused_with_what_to_change(tmp_path: Path, text: str, says: str) -> None:
    script = tmp_path / "s.py"
    script.write_text(text)
    with pytest.raises(BundleError, match=says):
        load_manifest(script)


def test_wire_is_found_in_its_three_places_and_in_their_order(tmp_path: Path) -> None:
    bundle_with(tmp_path, wire_py="raise RuntimeError('imported')\ndef wire(e, p, s): ...\n")
    manifest = load_manifest(tmp_path)
    assert manifest.wire == ("wire.py:wire", "wire.py")
    assert manifest.name == tmp_path.name

    bundle_with(tmp_path, **{".modelops__manifest.json": '{"wire": "sub/file.py:run"}'})
    manifest = load_manifest(tmp_path)
    assert manifest.wire
    assert manifest.wire.function == "sub/file.py:run"
    assert not manifest.install

    group = '[project]\nname = "w"\n[project.entry-points."modelops.wire"]\nmain = "pkg.mod:fn"\n'
    bundle_with(tmp_path, pyproject_toml=group)
    manifest = load_manifest(tmp_path)
    assert manifest.wire
    assert manifest.wire.function == "pkg.mod:fn"
    assert manifest.install  # entry points exist only when it is installed


@pytest.mark.parametrize("file", ["pyproject_toml", "requirements_txt"])
def test_a_framework_that_the_bundle_depends_on_may_bring_the_wire_function(
    tmp_path: Path, file: str
) -> None:
    text = (
        '[project]\nname = "w"\ndependencies = ["framework"]\n' if file == "pyproject_toml" else "framework\n"
    )
    bundle_with(tmp_path, **{file: text})
    manifest = load_manifest(tmp_path)
    assert manifest.wire == ("", "an entry point of a dependency")
    assert manifest.model("models.seir:Seir") == "models.seir:Seir"
    with pytest.raises(BundleError, match=r"has no \[tool.modelops\] table; add one"):
        manifest.model()  # more likely forgotten than meant


def test_a_wire_bundle_runs_any_entry_point_and_its_aggregates_are_targets(tmp_path: Path) -> None:
    bundle_with(tmp_path, wire_py="def wire(e, p, s): ...\n")
    manifest = load_manifest(tmp_path)
    assert manifest.model("pkg.mod/scenario-2") == "pkg.mod/scenario-2"
    assert manifest.model("pkg.mod:name") == "pkg.mod:name"
    assert manifest.is_target(manifest.aggregate("pkg.targets:fit"))
    with pytest.raises(RequestError, match="names no model"):
        manifest.model()
    with pytest.raises(RequestError, match="has no model 'busy'"):
        manifest.model("busy")


WRONG_WIRES = [
    ("{", "is not valid JSON"),
    ('{"wire": 3}', "3 is no function"),
    ('{"wire": "no function"}', "write 'pkg.mod:fn' or 'path/file.py:fn'"),
]


@pytest.mark.parametrize(("text", "says"), WRONG_WIRES, ids=[w[1][:20] for w in WRONG_WIRES])
def test_a_wrong_wire_manifest_is_refused(tmp_path: Path, text: str, says: str) -> None:
    bundle_with(tmp_path, **{".modelops__manifest.json": text})
    with pytest.raises(BundleError, match=says):
        load_manifest(tmp_path)


def test_a_manifest_is_read_from_a_relative_path_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle_with(tmp_path / "here", pyproject_toml='[tool.modelops]\nmodel = "m:f"\n')
    monkeypatch.chdir(tmp_path / "here")
    assert load_manifest(Path()).name == "here"
    assert load_manifest(Path(os.curdir)).models == {"f": "m:f"}


DECLARED = {
    "group": ("farm.entry:run", True),
    "manifest_module": ("farm.entry:call", False),
    "manifest_file": ("tools/entry.py:call", False),
    "wire_file": ("wire.py:wire", False),
}


@pytest.mark.parametrize("name", DECLARED)
def test_the_wire_bundles_of_the_test_data_declare_it_each_in_its_way(name: str) -> None:
    manifest = load_manifest(Path(__file__).parents[1] / "data" / "wire" / name)
    assert manifest.wire
    assert (manifest.wire.function, manifest.install) == DECLARED[name]
