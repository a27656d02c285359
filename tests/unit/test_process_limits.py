"""Where memory cgroups may be made, which variables a runner gets, what idles too long: pure decisions."""

from __future__ import annotations

from pathlib import Path

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from modelops.processes.cgroup import CgroupHome, MemoryCgroup, candidate_homes, flat_keyed
from modelops.processes.environ import THREAD_LIMITS, runner_environ
from modelops.processes.frames import first_frame
from modelops.processes.memory import Surroundings
from modelops.processes.outcome import AnySet, after, indices, one_by_one
from modelops.rpc import ReplicateSet

V1_SELF = "4:memory:/jobs/a\n2:cpu:/\n0::/\n"
V1_MOUNTS = (
    "30 25 0:26 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory\n"
    "31 25 0:27 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
    "32 25 0:28 / /proc rw - proc proc rw\n"
)


def test_v1_cgroups_are_made_below_the_workers_own() -> None:
    homes = candidate_homes(V1_SELF, V1_MOUNTS)
    assert homes[0] == CgroupHome(Path("/sys/fs/cgroup/memory/jobs/a"), 1)
    assert CgroupHome(Path("/sys/fs/cgroup/unified"), 2) in homes


def test_each_kill_for_memory_beside_a_runner_explains_one_end_by_sigkill(tmp_path: Path) -> None:
    events = tmp_path / "memory.events"
    events.write_text("oom 1\noom_kill 3\n")
    around = Surroundings(MemoryCgroup(tmp_path, 2, 1 << 30))
    assert not around.has_killed(-9), "what was before does not count"
    events.write_text("oom 2\noom_kill 4\n")
    assert not around.has_killed(-11)
    assert [around.has_killed(-9), around.has_killed(-9)] == [True, False]
    events.unlink()
    events.mkdir()  # cannot be read
    assert not around.has_killed(-9)
    assert not Surroundings(None).has_killed(-9)


def test_v2_cgroups_are_made_below_or_beside_the_workers_own() -> None:
    mount = "30 25 0:26 / /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw,nsdelegate\n"
    paths = [home.path for home in candidate_homes("0::/user.slice/app.service\n", mount)]
    assert paths == [
        Path("/sys/fs/cgroup/user.slice/app.service"),
        Path("/sys/fs/cgroup/user.slice"),
        Path("/sys/fs/cgroup"),
    ]


def test_a_container_that_sees_only_its_own_part_of_the_tree_is_understood() -> None:
    mount = "30 25 0:26 /docker/abc /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    homes = candidate_homes("4:memory:/docker/abc\n", mount)
    assert homes == [CgroupHome(Path("/sys/fs/cgroup/memory"), 1)]


def test_the_kernels_counters_are_read() -> None:
    assert flat_keyed("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n")["oom_kill"] == 3
    assert flat_keyed("low 0\nhigh 0\nmax 12\noom 2\noom_kill 1\noom_group_kill 0\n")["oom_kill"] == 1


def test_a_runner_gets_an_allow_list_and_the_bundles_own_variables() -> None:
    env = runner_environ(
        {
            "PATH": "/bin",
            "HOME": "/home/u",
            "LC_ALL": "C",
            "AWS_SECRET": "x",
            "PYTHONPATH": "/x",
            "DASK_TOKEN": "x",
        },
        environment_dir="/env",
        threads=2,
        tmpdir=Path("/t"),
        cache_dir=Path("/c"),
        pycache=None,
        extra=(("OPTION", "1"), ("MPLBACKEND", "svg")),
    )
    assert env["PATH"] == "/env/bin:/bin"
    assert not {"AWS_SECRET", "PYTHONPATH", "DASK_TOKEN"} & set(env)
    assert {env[name] for name in THREAD_LIMITS} == {"2"}
    assert (env["OPTION"], env["MPLBACKEND"], env["TMPDIR"], env["PYTHONHASHSEED"]) == ("1", "svg", "/t", "0")


def sets_of(sizes: list[tuple[int, int]]) -> list[ReplicateSet]:
    sets, index = [], 7
    for param, (n_seeds, n_bytes) in enumerate(sizes):
        params = msgspec.Raw(msgspec.json.encode({"x": "y" * n_bytes}))
        sets.append(
            ReplicateSet(
                params=params,
                param=param,
                index=index,
                replicate=3,
                seeds=tuple(range(n_seeds)),
                entropy_key="",
            )
        )
        index += n_seeds
    return sets


SIZES = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3000)), min_size=1, max_size=8)


@settings(deadline=None)
@given(sizes=SIZES, n=st.integers(0, 400))
def test_the_rest_of_a_chunk_is_what_lies_behind_the_finished_ones(
    sizes: list[tuple[int, int]], n: int
) -> None:
    sets = sets_of(sizes)
    rest = one_by_one(after([*sets], n))
    assert indices(rest) == indices(sets)[n:]
    for one in rest:
        whole = sets[one.param]
        assert one.replicate - whole.replicate == one.index - whole.index
        assert one.seeds == whole.seeds[one.index - whole.index :]


@settings(deadline=None)
@given(sizes=SIZES, limit=st.integers(1, 5000))
def test_requests_of_bounded_size_cover_a_chunk_in_order(sizes: list[tuple[int, int]], limit: int) -> None:
    left: list[AnySet] = [*sets_of(sizes)]
    wanted, got = indices(left), []
    while left:
        batch = first_frame(left, limit)
        assert len(indices(batch)) == 1 or len(msgspec.json.encode(batch)) <= limit
        got += indices(batch)
        left = after(left, len(indices(batch)))
    assert got == wanted
