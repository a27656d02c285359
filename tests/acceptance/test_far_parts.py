"""What CI says of the tests that need hosts and a cluster: that they passed, failed, or were not run, and why."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What `make` does here: says that it was called, and then what the test says it does.
MAKE = '#!/bin/sh\necho "$1" >> called\nif [ "$1" = hosts-test ]; then {0}; else {1}; fi\n'
PASSES, FAILS = "exit 0", "exit 2"
NO_LAB = 'echo "no kubelet today" > "$MODELOPS_LAB_NOT_RUN"; exit 2'
PYTEST = (sys.executable, "-m", "pytest")
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith("MODELOPS_")}
BARE = {**CLEAN, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
INTERRUPTED = 'echo "time was over" > "$MODELOPS_UNFINISHED"; exit 2'


def far_parts(
    folder: Path, make: str, *, on_hosts: str = PASSES, hosts: str = "", **environ: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run `.ci/far-parts` where hosts can be made, or not for this reason; what it says, and what it called."""
    (folder / ".ci").mkdir()
    for name in ("far-parts", "within"):
        shutil.copy(ROOT / ".ci" / name, folder / ".ci")
    programs = {
        ".venv/bin/python": f"#!/bin/sh\necho '{hosts}'\n",
        "bin/make": MAKE.format(on_hosts, make),
        "tests/hosts/install.sh": "#!/bin/sh\nexit 1\n",  # what lacks then is said by who looks for it
    }
    for name, text in programs.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    command = [str(folder / ".ci/far-parts")]
    done = subprocess.run(
        command, env={**CLEAN, "PATH": path, **environ}, capture_output=True, text=True, check=False
    )
    called = folder / "called"
    return done, called.read_text().split() if called.exists() else []


def test_what_passes_is_said_to_have_passed(tmp_path: Path) -> None:
    done, called = far_parts(tmp_path, PASSES)
    assert (done.returncode, called) == (0, ["hosts-test", "k8s-test"])
    assert "NOT RUN" not in done.stdout


def test_a_test_that_fails_on_the_cluster_fails_all(tmp_path: Path) -> None:
    done, _ = far_parts(tmp_path, FAILS)
    assert done.returncode == 1
    assert "passed: make k8s-test" not in done.stdout


def test_without_a_cluster_its_tests_are_not_run_and_the_reason_is_said(tmp_path: Path) -> None:
    done, _ = far_parts(tmp_path, NO_LAB)
    assert done.returncode == 0
    assert "NOT RUN: make k8s-test" in done.stdout
    assert "no kubelet today" in done.stdout
    assert "passed: make k8s-test" not in done.stdout
    assert "passed: make hosts-test" in done.stdout


def test_who_insists_on_a_cluster_is_told_by_a_failure_that_there_is_none(tmp_path: Path) -> None:
    done, _ = far_parts(tmp_path, "exit 77", MODELOPS_CI_CLUSTER="1")
    assert done.returncode != 0


def test_what_is_left_out_is_not_run_either(tmp_path: Path) -> None:
    done, called = far_parts(tmp_path, PASSES, MODELOPS_CI_CLUSTER="0")
    assert (done.returncode, called) == (0, [])
    assert done.stdout.count("NOT RUN") == 2


def test_without_hosts_their_tests_are_not_run(tmp_path: Path) -> None:
    done, called = far_parts(tmp_path, PASSES, hosts="network namespaces need Linux and root")
    assert (done.returncode, called) == (0, ["k8s-test"])
    assert "need Linux and root" in done.stdout


def test_hosts_for_which_there_is_no_time_are_not_begun(tmp_path: Path) -> None:
    done, called = far_parts(tmp_path, PASSES, MODELOPS_CI_ENDS=str(int(time.time()) + 600))
    assert (done.returncode, called) == (0, ["k8s-test"])
    assert "NOT RUN: make hosts-test" in done.stdout


@pytest.mark.parametrize(("on_hosts", "make"), [(PASSES, INTERRUPTED), (INTERRUPTED, PASSES)])
def test_what_the_end_of_ci_interrupts_is_not_finished_and_does_not_count_as_passed(
    tmp_path: Path, on_hosts: str, make: str
) -> None:
    done, called = far_parts(tmp_path, make, on_hosts=on_hosts)
    assert (done.returncode, called) == (0, ["hosts-test", "k8s-test"])
    (whole,) = (line for line in done.stdout.splitlines() if line.startswith("passed: "))
    assert f"NOT FINISHED: make {'k8s' if 'hosts' in whole else 'hosts'}-test" in done.stdout


def test_a_test_that_fails_on_hosts_fails_all(tmp_path: Path) -> None:
    done, called = far_parts(tmp_path, PASSES, on_hosts=FAILS)
    assert (done.returncode, called) == (1, ["hosts-test"])


def test_the_cluster_of_somebodys_kubeconfig_is_left_alone(tmp_path: Path) -> None:
    named = '[ -z "${KUBECONFIG:-}" ]'
    done, _ = far_parts(tmp_path, named, KUBECONFIG="/home/ada/.kube/production")
    assert done.returncode == 0


def without_a_cluster(folder: Path) -> tuple[subprocess.CompletedProcess[str], str]:
    """Have the lab run a command, with the programs of this folder first; return why it does not."""
    reason = folder / "reason"
    ours = {"MODELOPS_LAB_NOT_RUN": str(reason), "K8S_LAB": str(folder / "lab")}
    done = subprocess.run(
        [str(ROOT / "tests/kubernetes/lab/run.sh"), "touch", str(folder / "ran")],
        env={**CLEAN, **ours, "PATH": f"{folder}:{os.environ['PATH']}"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 77
    return done, reason.read_text()


def test_a_cluster_that_cannot_be_made_runs_nothing_and_says_why(tmp_path: Path) -> None:
    (tmp_path / "id").write_text("#!/bin/sh\necho 1000\n")  # not root, says this one
    (tmp_path / "id").chmod(0o755)
    done, reason = without_a_cluster(tmp_path)
    assert reason.startswith("only root can make a cluster")
    assert reason in done.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_without_room_no_cluster_is_begun(tmp_path: Path) -> None:
    (tmp_path / "df").write_text("#!/bin/sh\necho Avail; echo 4G; echo 900G\n")
    (tmp_path / "grep").write_text("#!/bin/sh\nexit 0\n")  # this is Debian 12
    for name in ("df", "grep"):
        (tmp_path / name).chmod(0o755)
    _, reason = without_a_cluster(tmp_path)
    assert reason == "there are 4 GB free on disk, and a cluster takes 12\n"
    assert not (tmp_path / "lab/lock").exists()


def test_what_could_not_end_in_time_is_not_begun(tmp_path: Path) -> None:
    reason = tmp_path / "reason"
    ours = {"MODELOPS_LAB_NOT_RUN": str(reason), "K8S_LAB": str(tmp_path / "lab"), "MODELOPS_CI_ENDS": "1"}
    done = subprocess.run(
        [str(ROOT / "tests/kubernetes/lab/run.sh"), "touch", str(tmp_path / "ran")],
        env={**CLEAN, **ours}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 77
    assert "less than half an hour" in reason.read_text()
    assert not (tmp_path / "ran").exists()


def test_what_takes_too_long_is_interrupted_and_told_apart() -> None:
    done = subprocess.run([str(ROOT / ".ci/within"), "1", "sleep", "600"], check=False)
    assert done.returncode == 124


HOOKS = "from unfinished import pytest_runtest_logfinish, pytest_sessionfinish\n"
WAITS = """\
import pathlib, time

def test_good(): pass

def test_other(): assert {0}

def test_that_takes_long():
    pathlib.Path("began").touch()
    time.sleep(600)
"""


@pytest.mark.parametrize(("holds", "text"), [("True", "time was over after 2 of 3 tests"), ("False", None)])
def test_tests_that_are_interrupted_say_how_far_they_got_unless_one_has_failed(
    tmp_path: Path, holds: str, text: str | None
) -> None:
    (tmp_path / "conftest.py").write_text(HOOKS)
    (tmp_path / "test_it.py").write_text(WAITS.format(holds))
    where = tmp_path / "unfinished"
    ours = {"MODELOPS_UNFINISHED": str(where), "PYTHONPATH": str(ROOT / "tests/servers")}
    command = [str(ROOT / ".ci/within"), "600", str(ROOT / ".ci/twice"), *PYTEST, "test_it.py"]
    running = subprocess.Popen(command, cwd=tmp_path, env={**BARE, **ours}, stdout=subprocess.DEVNULL)
    while not (tmp_path / "began").exists():
        assert running.poll() is None
        time.sleep(0.05)
    running.terminate()
    assert running.wait() == 2
    assert (where.read_text().partition(",")[0] if where.exists() else None) == text


TESTS = """\
import os

def test_good(): pass

def test_bad():
    with open("runs", "a") as runs: runs.write("x")
    assert {0}
"""


@pytest.mark.parametrize(
    ("holds", "code", "runs"), [("False", 1, 2), ("os.path.getsize('runs') > 1", 0, 2), ("True", 0, 1)]
)
def test_what_fails_runs_once_more_and_is_said_to_have_failed(
    tmp_path: Path, holds: str, code: int, runs: int
) -> None:
    (tmp_path / "test_it.py").write_text(TESTS.format(holds))
    command = [str(ROOT / ".ci/twice"), *PYTEST, "test_it.py"]
    done = subprocess.run(command, cwd=tmp_path, env=BARE, capture_output=True, text=True, check=False)
    assert (done.returncode, (tmp_path / "runs").read_text()) == (code, "x" * runs), done.stdout
    assert ("They are run a second time" in done.stdout) == (runs == 2)
    assert ("FLAKY" in done.stdout) == (runs == 2 and code == 0)
