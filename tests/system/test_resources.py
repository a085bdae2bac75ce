from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmbuild.runtime import host
from llmbuild.system import resources

GIB = 1 << 30
V1_NONE = "9223372036854771712"
"""What cgroup v1 writes where there is no limit."""


class Tree:
    """A file system with what the kernel shows of control groups."""

    def __init__(self, root: Path, total_kb: int = 16 << 20, available_kb: int = 12 << 20) -> None:
        self.root = root
        self.write("proc/meminfo", f"MemTotal:       {total_kb} kB\nMemAvailable:   {available_kb} kB\n")
        self.write("sys/devices/system/cpu/online", "0-7\n")

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def v2(self, own: str, begin: str = "/") -> Tree:
        self.write("proc/self/cgroup", f"0::{own}\n")
        self.write("proc/self/mountinfo", f"30 23 0:26 {begin} /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")
        return self

    def v1(self, own: str, begin: str = "/") -> Tree:
        lines = []
        for n, names in enumerate(("cpu,cpuacct", "memory", "cpuset")):
            lines.append(f"{30 + n} 23 0:{n} {begin} /sys/fs/cgroup/{names} rw - cgroup cgroup rw,{names}\n")
        self.write("proc/self/mountinfo", "".join(lines))
        self.write("proc/self/cgroup", f"5:cpu,cpuacct:{own}\n4:memory:{own}\n3:cpuset:{own}\n0::/\n")
        return self


def test_a_host_without_groups_has_the_memory_it_tells_of(tmp_path: Path) -> None:
    root = Tree(tmp_path).root
    assert resources.memory_limit(root) == resources.Bound(16 * GIB, root / "proc/meminfo")
    assert resources.memory_available(root) == resources.Bound(12 * GIB, root / "proc/meminfo")
    assert (resources.group_memory_limit(root), resources.cpu_quota(root), resources.group_cpus(root)) == (None,) * 3


def test_a_host_that_tells_nothing_bounds_nothing(tmp_path: Path) -> None:
    assert resources.memory_limit(tmp_path) is None
    assert resources.memory_available(tmp_path) is None
    assert (host.available_memory_bytes(tmp_path), host.machine_cores(tmp_path) > 0) == (None, True)


@pytest.mark.parametrize("name", ["memory.max", "memory.high"])
def test_v2_limits_of_the_own_group_count(tmp_path: Path, name: str) -> None:
    tree = Tree(tmp_path).v2("/pod/main")
    tree.write(f"sys/fs/cgroup/pod/main/{name}", f"{2 * GIB}\n")
    tree.write("sys/fs/cgroup/pod/main/memory.current", f"{GIB}\n")
    tree.write("sys/fs/cgroup/pod/main/memory.stat", f"anon 1\ninactive_file {GIB // 4}\n")
    bound = resources.group_memory_limit(tree.root)
    assert bound == resources.Bound(2 * GIB, tree.root / "sys/fs/cgroup/pod/main" / name)
    assert host.available_memory_bytes(tree.root) == 2 * GIB - (GIB - GIB // 4)


def test_v2_limits_of_a_parent_count_where_the_own_group_has_none(tmp_path: Path) -> None:
    tree = Tree(tmp_path).v2("/user.slice/user-7.slice/run-1.scope")
    tree.write("sys/fs/cgroup/user.slice/user-7.slice/run-1.scope/memory.max", "max\n")
    tree.write("sys/fs/cgroup/user.slice/memory.max", f"{3 * GIB}\n")
    tree.write("sys/fs/cgroup/user.slice/memory.current", f"{2 * GIB}\n")
    tree.write("sys/fs/cgroup/user.slice/cpu.max", "150000 100000\n")
    assert resources.memory_limit(tree.root) == resources.Bound(
        3 * GIB, tree.root / "sys/fs/cgroup/user.slice/memory.max"
    )
    assert host.available_memory_bytes(tree.root) == GIB
    assert resources.cpu_quota(tree.root) == 1.5


def test_v1_limits_count_with_their_parents(tmp_path: Path) -> None:
    tree = Tree(tmp_path).v1("/docker/abc")
    tree.write("sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes", f"{V1_NONE}\n")
    tree.write("sys/fs/cgroup/memory/docker/memory.limit_in_bytes", f"{GIB}\n")
    tree.write("sys/fs/cgroup/memory/docker/memory.usage_in_bytes", f"{GIB // 2}\n")
    tree.write("sys/fs/cgroup/memory/docker/memory.stat", f"inactive_file 5\ntotal_inactive_file {GIB // 8}\n")
    tree.write("sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us", "200000\n")
    tree.write("sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_period_us", "100000\n")
    tree.write("sys/fs/cgroup/cpu,cpuacct/docker/cpu.cfs_quota_us", "-1\n")
    tree.write("sys/fs/cgroup/cpuset/docker/abc/cpuset.effective_cpus", "2-4,7\n")
    assert resources.group_memory_limit(tree.root) == resources.Bound(
        GIB, tree.root / "sys/fs/cgroup/memory/docker/memory.limit_in_bytes"
    )
    assert host.available_memory_bytes(tree.root) == GIB - GIB // 2 + GIB // 8
    assert (resources.cpu_quota(tree.root), resources.group_cpus(tree.root)) == (2.0, frozenset({2, 3, 4, 7}))
    assert host.machine_cores(tree.root) == 2


def test_a_v1_parent_without_hierarchy_binds_no_child(tmp_path: Path) -> None:
    tree = Tree(tmp_path).v1("/a/b")
    tree.write("sys/fs/cgroup/memory/a/b/memory.limit_in_bytes", f"{8 * GIB}\n")
    tree.write("sys/fs/cgroup/memory/a/memory.limit_in_bytes", f"{GIB}\n")
    tree.write("sys/fs/cgroup/memory/a/memory.use_hierarchy", "0\n")
    bound = resources.memory_limit(tree.root)
    assert bound is not None and bound.bytes == 8 * GIB


def test_a_container_that_shows_its_group_as_the_root_is_read_at_the_mount(tmp_path: Path) -> None:
    tree = Tree(tmp_path).v1("/docker/abc", begin="/docker/abc")
    tree.write("sys/fs/cgroup/memory/memory.limit_in_bytes", f"{GIB}\n")
    assert host.available_memory_bytes(tree.root) == GIB


def test_a_group_outside_of_what_is_mounted_is_read_at_the_mount(tmp_path: Path) -> None:
    tree = Tree(tmp_path).v2("/../other", begin="/mine")
    tree.write("sys/fs/cgroup/memory.max", f"{GIB}\n")
    assert host.available_memory_bytes(tree.root) == GIB


def test_groups_are_found_where_the_process_files_cannot_be_read(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    tree.write("sys/fs/cgroup/memory.max", f"{GIB}\n")
    tree.write("sys/fs/cgroup/cpu.max", "50000 100000\n")
    assert (host.available_memory_bytes(tree.root), host.cores(tree.root), host.machine_cores(tree.root)) == (GIB, 1, 1)


def test_both_versions_side_by_side_count(tmp_path: Path) -> None:
    tree = Tree(tmp_path).v1("/a")
    more = (tmp_path / "proc/self/mountinfo").read_text() + "40 23 0:9 / /sys/fs/cgroup/unified rw - cgroup2 none rw\n"
    tree.write("proc/self/mountinfo", more)
    tree.write("sys/fs/cgroup/unified/memory.max", f"{2 * GIB}\n")
    tree.write("sys/fs/cgroup/memory/a/memory.limit_in_bytes", f"{3 * GIB}\n")
    assert host.available_memory_bytes(tree.root) == 2 * GIB


@given(st.lists(st.one_of(st.none(), st.integers(1 << 20, 32 * GIB)), min_size=1, max_size=5))
def test_the_least_limit_of_all_parents_counts(
    tmp_path_factory: pytest.TempPathFactory, limits: list[int | None]
) -> None:
    tree = Tree(tmp_path_factory.mktemp("root")).v2("/" + "/".join(f"g{i}" for i in range(len(limits))))
    folder = "sys/fs/cgroup"
    for i, limit in enumerate(limits):
        folder += f"/g{i}"
        tree.write(f"{folder}/memory.max", "max\n" if limit is None else f"{limit}\n")
    bound = resources.memory_limit(tree.root)
    assert bound is not None
    assert bound.bytes == min(16 * GIB, *(limit for limit in limits if limit is not None), 16 * GIB)


@given(st.sets(st.integers(0, 300), min_size=1))
def test_a_list_of_cpus_is_read_as_it_is_written(cpus: set[int]) -> None:
    assert resources.cpu_list(",".join(str(n) for n in sorted(cpus))) == cpus
    assert resources.cpu_list(f"{min(cpus)}-{max(cpus)}\n") == set(range(min(cpus), max(cpus) + 1))


@pytest.mark.parametrize("text", ["", "\n", "x", "3-", "-2"])
def test_what_is_no_list_of_cpus_is_none(text: str) -> None:
    assert resources.cpu_list(text) == frozenset()
