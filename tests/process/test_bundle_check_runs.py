"""`modelops bundle check` on bundles that are wrong in one way each: real environments, real processes."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING

import pytest

from modelops.checks import Check, CheckStatus
from modelops.client.bundle_check import check_bundle
from modelops.errors import NotFoundError
from modelops.study.study import Study

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from modelops.home import Home

pytestmark = pytest.mark.usefixtures("no_process_left")
OK, WARNING, FAILED = CheckStatus
BOTH = 'model = "model:simulate"\naggregate = "model:summarize"'
GOOD = """
import random
def simulate(params, seed):
    return {"x": random.Random(seed).random(), "beta": params.get("beta", 0)}
def summarize(replicates):
    return {"mean": sum(r["x"] for r in replicates) / len(replicates)}
"""


def checked(bundle: Path, home: Home, **options: object) -> dict[str, Check]:
    study = Study(bundle=bundle, **options)  # type: ignore[arg-type]  # the tests write what a user would
    return {check.name: check for check in check_bundle(study, home)}


def test_a_good_bundle_passes_every_check(home: Home, write_bundle: Callable[..., Path]) -> None:
    found = checked(
        write_bundle(GOOD, table=BOTH), home, parameters=[{"beta": b} for b in (1, 2, 3)], replicates=50
    )
    assert {name: c.message for name, c in found.items() if c.status is not OK} == {}
    assert list(found) == [
        "bundle", "environment", "imports", "runs", "reproducible", "seeds", "aggregate", "isolation", "stdout",
        "random state", "leaves behind", "time", "memory", "job",
    ]  # fmt: skip
    assert found["isolation"].message == "the same outputs with warm, fork and spawn"
    assert found["job"].details["replicates"] == 150
    assert found["memory"].details["peak_bytes"] > 1_000_000


@dataclass(frozen=True)
class Fault:
    what: str
    code: str
    check: str
    status: CheckStatus
    words: tuple[str, ...]


FAULTS = [
    Fault(
        "unseeded",
        "import random\ndef simulate(params, seed):\n    return {'x': random.SystemRandom().random(), 'fine': 1}",
        "reproducible", FAILED, ("twice in one process: x", "in a fresh process: x"),
    ),
    Fault(
        "left over",
        "n = [0]\ndef simulate(params, seed):\n    n[0] += 1\n    return {'count': n[0], 'seed': seed}",
        "reproducible", FAILED, ("twice in one process: count", 'isolation = "fork"'),
    ),
    Fault(
        "in another order only",
        "seen = []\ndef simulate(params, seed):\n    if seed not in seen: seen.append(seed)\n"
        "    return {'position': seen.index(seed), 'seed': seed}",
        "reproducible", FAILED, ("in another order: position", 'isolation = "fork"'),
    ),
    Fault(
        "seed ignored", "def simulate(params, seed):\n    return {'x': 1}", "seeds", WARNING, ("same outputs", "seed"),
    ),
    Fault(
        "prints",
        "import os, subprocess\nprint('import')\ndef simulate(params, seed):\n    print('a' * 99)\n"
        "    os.write(1, b'b' * 100)\n    subprocess.run(['echo', 'c' * 99])\n    return {'x': seed}",
        "stdout", WARNING, ("300 B in each replicate", "7 B when imported"),
    ),
    Fault(
        "random",
        "import random\ndef simulate(params, seed):\n    random.seed(seed)\n    return {'x': random.random()}",
        "random state", WARNING, ("a replicate changes that of random", "random.Random(seed)"),
    ),
    Fault(
        "random at import",
        "import random\nrandom.seed(1)\ndef simulate(params, seed):\n    return {'x': seed}",
        "random state", WARNING, ("the import changes that of random",),
    ),
    Fault(
        "missing import", "import no_such_module\ndef simulate(params, seed):\n    return {}",
        "imports", FAILED, ("No module named 'no_such_module'", "model.py:1", '"no-such-module" to dependencies'),
    ),
    Fault(
        "missing import later", "def simulate(params, seed):\n    import no_such_module\n    return {}",
        "runs", FAILED, ("No module named 'no_such_module'", "model.py:2", '"no-such-module" to dependencies'),
    ),
    Fault(
        "no such function", "def simulat(params, seed):\n    return {}",
        "imports", FAILED, ("model:simulate", "simulate", "[tool.modelops]"),
    ),
    Fault(
        "dies at import", "import os\nos._exit(3)\ndef simulate(params, seed):\n    return {}",
        "imports", FAILED, ("exit code 3",),
    ),
    Fault(
        "raises", "def simulate(params, seed):\n    raise ValueError('beta is negative')",
        "runs", FAILED, ("ValueError: beta is negative", "model.py:2"),
    ),
    Fault(
        "dies", "import os\ndef simulate(params, seed):\n    os.kill(os.getpid(), 9)",
        "runs", FAILED, ("crashed", "signal 9 (Killed)"),
    ),
    Fault(
        "returns a set", "def simulate(params, seed):\n    return {'x': {1, 2}}",
        "runs", FAILED, ("invalid_output", "set"),
    ),
    Fault(
        "leaves files", "import os\ndef simulate(params, seed):\n    open('out.csv', 'w').write('1')\n"
        "    os.environ['FOO'] = '1'\n    os.chdir('/')\n    return {'x': seed}",
        "leaves behind", OK, ("out.csv", "FOO", "changes the working directory"),
    ),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=attrgetter("what"))
def test_each_fault_is_found_with_what_to_do(
    fault: Fault, home: Home, write_bundle: Callable[..., Path]
) -> None:
    found = checked(write_bundle(fault.code), home)
    check = found[fault.check]
    assert check.status is fault.status, check
    for words in fault.words:
        assert words in f"{check.message} {check.advice}"
    others = [c for c in found.values() if c.status is FAILED and c.name != fault.check]
    assert not others


def test_numpy_used_by_its_global_functions_is_seen(home: Home, write_bundle: Callable[..., Path]) -> None:
    source = """
        import numpy
        def simulate(params, seed):
            numpy.random.seed(seed)
            return {"x": numpy.random.random()}
    """
    found = checked(write_bundle(source, dependencies='"numpy>=2"'), home)
    assert found["reproducible"].status is OK
    assert found["random state"].details["in_replicate"] == ["numpy.random"]


def test_an_aggregate_that_fails_is_named_with_its_line(
    home: Home, write_bundle: Callable[..., Path]
) -> None:
    source = GOOD.replace('r["x"]', 'r["y"]')
    check = checked(write_bundle(source, table=BOTH), home)["aggregate"]
    assert check.status is FAILED
    assert "KeyError: 'y'" in check.message
    assert "model.py:6" in check.message


def test_a_dependency_that_does_not_exist_ends_the_checks_with_the_words_of_uv(
    home: Home, write_bundle: Callable[..., Path]
) -> None:
    found = checked(write_bundle(GOOD, dependencies='"no-such-package-modelops-test==9.9"'), home)
    assert list(found) == ["bundle", "environment"]
    assert found["environment"].status is FAILED
    assert "no-such-package-modelops-test" in found["environment"].message


def test_a_manifest_with_a_wrong_key_is_a_failure_of_the_bundle(
    home: Home, write_bundle: Callable[..., Path]
) -> None:
    found = checked(write_bundle(GOOD, table='modle = "model:simulate"'), home)
    assert list(found) == ["bundle"]
    assert "did you mean 'model'" in found["bundle"].message


def test_a_leak_is_no_fault_where_every_replicate_has_a_process_of_its_own(
    home: Home, write_bundle: Callable[..., Path]
) -> None:
    source = "n = [0]\ndef simulate(params, seed):\n    n[0] += 1\n    return {'count': n[0], 'seed': seed}"
    found = checked(write_bundle(source), home, isolation="spawn")
    assert found["reproducible"].status is OK


COUNTS = "n = [0]\ndef simulate(params, seed):\n    n[0] += 1\n    return {'count': n[0], 'seed': seed}"
THREAD = "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"


@pytest.mark.parametrize(
    ("code", "isolation", "status", "words"),
    [
        (COUNTS, "warm", WARNING, 'warm gives other outputs than spawn: count write isolation = "fork"'),
        (THREAD + COUNTS, "warm", WARNING, 'warm gives other outputs 1 other thread write isolation = "spawn"'),
        (COUNTS, "fork", OK, 'warm gives other outputs than spawn: count; isolation = "fork" is needed'),
    ],
    ids=["counts", "counts, not forked", "counts in forks"],
)  # fmt: skip
def test_an_author_is_told_whether_the_isolations_agree_and_which_one_to_take(
    code: str, isolation: str, status: CheckStatus, words: str, home: Home, write_bundle: Callable[..., Path]
) -> None:
    check = checked(write_bundle(code), home, isolation=isolation)["isolation"]
    assert check.status is status
    said = f"{check.message} {check.advice}"
    assert all(word in said for word in words.split()), said


@pytest.mark.parametrize(
    ("code", "sets", "isolation", "said"),
    [
        ("C = {}\ndef simulate(params, seed):\n    return {'x': C.setdefault(params['n'], params['b']), 's': seed}",
         [{"n": 1, "b": 1}, {"n": 1, "b": 9}], "warm", ("x with b=1, n=1", "x with b=9, n=1", 'isolation = "fork"')),
        ("C = {}\ndef simulate(params, seed):\n    return {'x': C.setdefault(params['n'], params['b']), 's': seed}",
         [{"n": 1, "b": 1}, {"n": 1, "b": 9}], "spawn", ("x with b=1, n=1", "x with b=9, n=1", "is needed")),
        ("n = [0]\ndef simulate(params, seed):\n    n[0] += 1\n    return {'x': n[0] < 4, 's': seed}",
         [{}], "warm", ("warm gives other outputs than spawn: x", 'isolation = "fork"')),
    ],
    ids=["a cache that forgets a parameter", "the same, alone", "from the fourth call"],
)  # fmt: skip
def test_what_one_parameter_set_leaves_for_another_is_never_called_the_same(
    code: str, sets: list[dict[str, int]], isolation: str, said: tuple[str, ...], home: Home,
    write_bundle: Callable[..., Path],
) -> None:  # fmt: skip
    found = checked(write_bundle(code), home, parameters=sets, isolation=isolation)
    check = found["isolation"]
    assert check.status is (WARNING if isolation == "warm" else OK)
    assert [word for word in said if word not in f"{check.message} {check.advice}"] == [], check
    assert found["reproducible"].status is (FAILED if isolation == "warm" else OK)


def test_a_parameter_set_that_fails_is_found_although_the_first_one_works(
    home: Home, write_bundle: Callable[..., Path]
) -> None:
    source = "def simulate(params, seed):\n    return {'x': 1 / params['n'], 'seed': seed}"
    check = checked(write_bundle(source), home, parameters=[{"n": 2}, {"n": 1}, {"n": 0}])["runs"]
    assert check.status is FAILED
    assert "n=0, seed" in check.message
    assert "ZeroDivisionError" in check.message


def test_explicit_seeds_are_the_ones_that_are_tried(home: Home, write_bundle: Callable[..., Path]) -> None:
    found = checked(write_bundle(GOOD, table=BOTH), home, seeds=[11, 977])
    assert found["reproducible"].details["seeds"] == [11, 977, 0]
    assert found["job"].details["replicates"] == 2


def test_a_bundle_that_is_not_there_is_a_wrong_request(home: Home, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nothere"):
        checked(tmp_path / "nothere", home)


def test_a_model_with_a_context_and_large_outputs_is_checked_like_any_other(
    home: Home, write_bundle: Callable[..., Path]
) -> None:
    source = """
        import os
        def simulate(params, seed, context):
            context.report(0.5)
            entropy = context.entropy
            return {"large": entropy.to_bytes(16, "little") * 20_000, "dir": os.path.isdir(context.checkpoint_dir)}
        def summarize(replicates):
            return {"n": sum(len(r["large"]) for r in replicates)}
    """
    found = checked(write_bundle(source, table=BOTH), home)
    assert [c for c in found.values() if c.status is FAILED] == []
    assert "large" in found["seeds"].message


def test_a_slow_model_is_run_half_as_often(
    home: Home, write_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelops.client.bundle_check.SLOW_S", -1.0)
    found = checked(write_bundle(GOOD, table=BOTH), home)
    assert found["runs"].details["n"] == 6
    assert found["reproducible"].status is OK


def test_a_replicate_that_never_ends_is_stopped_by_its_timeout(
    home: Home, write_bundle: Callable[..., Path]
) -> None:
    source = "import threading\ndef simulate(params, seed):\n    threading.Event().wait()"
    check = checked(write_bundle(source), home, replicate_timeout="1s")["runs"]
    assert check.status is FAILED
    assert "timed_out" in check.message
