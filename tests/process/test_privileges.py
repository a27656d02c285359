"""A runner obeys file modes whoever it runs as, so a read-only snapshot is read-only for root too."""

from __future__ import annotations

import os
import sys
import textwrap
from pathlib import Path

import msgspec
import pytest

from modelops.processes import Outcome, ProcessPool, ReplicateSet, RunnerSpec
from modelops.states import ReplicateStatus as Status

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    (folder / "tables").mkdir(parents=True)
    (folder / "data.csv").write_text("1,2\n")
    (folder / "tables" / "t.csv").write_text("3,4\n")
    return folder


def run(tmp_path: Path, snapshot: Path, code: str, *, isolation: str = "warm", n: int = 3) -> list[Outcome]:
    (snapshot / "m.py").write_text(textwrap.dedent(code))
    for path in [*snapshot.rglob("*"), snapshot]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    spec = RunnerSpec(
        python=sys.executable,
        environment_key="k",
        environment_dir=None,
        bundle_digest="0" * 64,
        snapshot=str(snapshot),
        isolation=isolation,
        memory_bytes=None,
        replicate_timeout_s=60.0,
    )
    one = ReplicateSet(
        params=msgspec.Raw(b"{}"), param=0, index=0, replicate=0, seeds=tuple(range(n)), entropy_key="00" * 16
    )
    outcomes: list[Outcome] = []
    with ProcessPool(tmp_path / "pool", slots=1) as pool:
        pool.run(spec, "m:model", [one], on_outcome=outcomes.append)
    return outcomes


@pytest.mark.parametrize("isolation", ["warm", "fork", "spawn"])
@pytest.mark.parametrize(
    "act",
    [
        "open('data.csv', 'w')",
        "open('tables/t.csv', 'a')",
        "os.truncate(os.path.realpath('data.csv'), 0)",
        "os.unlink(os.path.realpath('data.csv'))",
        "open(os.path.join(os.path.dirname(os.path.realpath('data.csv')), 'new'), 'w')",
        "subprocess.run(['sh', '-c', 'echo x > data.csv'], check=True)",
    ],
)
def test_writing_through_the_working_directory_into_the_bundle_is_refused(
    tmp_path: Path, snapshot: Path, act: str, isolation: str
) -> None:
    code = f"import os, subprocess\ndef model(params, seed):\n    {act}\n    return {{}}\n"

    outcomes = run(tmp_path, snapshot, code, isolation=isolation, n=1)

    (error,) = [o.error for o in outcomes]
    assert outcomes[0].status is Status.FAILED
    assert error is not None
    assert error.type == ("subprocess.CalledProcessError" if "subprocess.run" in act else "PermissionError")
    assert (snapshot / "data.csv").read_text() == "1,2\n"
    assert (snapshot / "tables" / "t.csv").read_text() == "3,4\n"
    assert sorted(p.name for p in snapshot.iterdir()) == ["data.csv", "m.py", "tables"]


def test_folders_without_permissions_that_a_replicate_leaves_are_gone_for_the_next(
    tmp_path: Path, snapshot: Path
) -> None:
    code = """
    import os
    def model(params, seed):
        seen = sorted(os.listdir()) + sorted(os.listdir(os.environ["TMPDIR"]))
        for root in (".", os.environ["TMPDIR"], "tables"):
            os.makedirs(os.path.join(root, "d", "inner"))
            with open(os.path.join(root, "d", "inner", "x"), "w") as f:
                f.write("x")
            os.chmod(os.path.join(root, "d", "inner"), 0)
            os.chmod(os.path.join(root, "d"), 0)
        os.chmod("tables", 0)
        return {"seen": seen, "pid": os.getpid()}
    """

    outcomes = run(tmp_path, snapshot, code)

    assert [o.status for o in outcomes] == [Status.SUCCEEDED] * 3
    by_name = [{name: data for name, _, data in o.outputs} for o in outcomes]
    seen = [outputs["seen"] for outputs in by_name]
    assert seen == [b'["data.csv","m.py","tables"]'] * 3
    assert len({outputs["pid"] for outputs in by_name}) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give folders to another user")
def test_root_that_works_in_the_folders_of_another_user_still_works(tmp_path: Path, snapshot: Path) -> None:
    for folder in (snapshot, snapshot / "tables"):
        os.chown(folder, 65534, 65534)
    code = "import os\ndef model(params, seed):\n    return {'n': len(os.listdir('tables'))}\n"
    (snapshot / "m.py").write_text(code)
    for folder in (snapshot / "tables", snapshot):
        folder.chmod(0o700)
    spec = RunnerSpec(
        python=sys.executable, environment_key="k", environment_dir=None, bundle_digest="0" * 64,
        snapshot=str(snapshot), isolation="warm", memory_bytes=None, replicate_timeout_s=60.0,
    )  # fmt: skip
    one = ReplicateSet(
        params=msgspec.Raw(b"{}"), param=0, index=0, replicate=0, seeds=(1,), entropy_key="00" * 16
    )
    outcomes: list[Outcome] = []
    with ProcessPool(tmp_path / "pool", slots=1) as pool:
        pool.run(spec, "m:model", [one], on_outcome=outcomes.append)
    assert [o.status for o in outcomes] == [Status.SUCCEEDED]
