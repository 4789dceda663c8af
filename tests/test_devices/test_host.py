"""Memory limits and cores, read from made-up /proc and /sys trees."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from devices import host

FREE_BYTES = 8 * 10**9


@pytest.fixture(autouse=True)
def _memory_of_eight_gigabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available = FREE_BYTES

    monkeypatch.setattr(psutil, "virtual_memory", Memory)


def write(root: Path, **files: str) -> None:
    """Write files; `__` in a name is a slash, `_dot_` a dot."""
    for name, content in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def group_v2(root: Path, path: str, limit: str, used: int, cached: int = 0) -> None:
    folder = root / "sys/fs/cgroup" / path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    stat = (
        f"anon {used - cached}\nactive_file {cached // 2}\ninactive_file {cached - cached // 2}\n"
    )
    (folder / "memory.stat").write_text(stat)
    (root / "sys/fs/cgroup/cgroup.controllers").write_text("memory")


def group_v1(root: Path, path: str, limit: int, used: int, cached: int = 0) -> None:
    folder = root / "sys/fs/cgroup/memory" / path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    stat = f"cache 5\ntotal_active_file {cached}\ntotal_inactive_file 0\n"
    (folder / "memory.stat").write_text(stat)


def test_without_groups_the_machine_bounds(tmp_path: Path) -> None:
    assert host.available_bytes(tmp_path) == (FREE_BYTES, "memory available on this machine")


def test_v2_limit_bounds_and_page_cache_is_room(tmp_path: Path) -> None:
    write(tmp_path, proc__self__cgroup="0::/app\n")
    group_v2(tmp_path, "app", "2000000000", 1_500_000_000, cached=1_000_000_000)
    room, reason = host.available_bytes(tmp_path)
    assert room == 1_500_000_000
    assert "2,000,000,000" in reason


def test_v2_limit_that_throttles_counts_like_a_hard_one(tmp_path: Path) -> None:
    write(tmp_path, proc__self__cgroup="0::/app\n")
    group_v2(tmp_path, "app", "max", 500_000_000)
    (tmp_path / "sys/fs/cgroup/app/memory.high").write_text("2000000000\n")
    assert host.available_bytes(tmp_path)[0] == 1_500_000_000


def test_the_tightest_group_up_to_the_root_bounds(tmp_path: Path) -> None:
    write(tmp_path, proc__self__cgroup="0::/outer/inner\n")
    group_v2(tmp_path, "outer/inner", "max", 10)
    group_v2(tmp_path, "outer", "1000000000", 400_000_000)
    assert host.available_bytes(tmp_path)[0] == 600_000_000


def test_group_path_of_the_host_seen_from_a_container_still_finds_the_mount(tmp_path: Path) -> None:
    write(tmp_path, proc__self__cgroup="0::/docker/0123/not/visible\n")
    group_v2(tmp_path, "", "3000000000", 0)
    assert host.available_bytes(tmp_path)[0] == 3_000_000_000


def test_parent_references_do_not_leave_the_mount(tmp_path: Path) -> None:
    write(tmp_path, proc__self__cgroup="0::/../../secret\n", secret__memory_dot_max="1")
    group_v2(tmp_path, "", "max", 0)
    assert host.memory_groups(tmp_path) == []


def test_v1_limit_bounds(tmp_path: Path) -> None:
    write(tmp_path, proc__self__cgroup="4:cpu,cpuacct:/\n7:memory:/job\n")
    group_v1(tmp_path, "job", 2_000_000_000, 700_000_000, cached=200_000_000)
    assert host.available_bytes(tmp_path)[0] == 1_500_000_000


def test_v1_unlimited_is_no_limit(tmp_path: Path) -> None:
    write(tmp_path, proc__self__cgroup="7:memory:/\n")
    group_v1(tmp_path, "", 9223372036854771712, 5)
    assert host.memory_groups(tmp_path) == []


def test_hybrid_hierarchy_reads_both_versions(tmp_path: Path) -> None:
    write(tmp_path, proc__self__cgroup="7:memory:/job\n0::/job\n")
    group_v1(tmp_path, "job", 10**9, 0)
    write(tmp_path, sys__fs__cgroup__unified__job__memory_dot_max="max")
    assert [group.limit_bytes for group in host.memory_groups(tmp_path)] == [10**9]


@pytest.mark.parametrize("content", ["", "garbage", "0::", ":::::\n7:memory", "\x00\n"])
def test_malformed_cgroup_file_is_no_limit(tmp_path: Path, content: str) -> None:
    write(tmp_path, proc__self__cgroup=content)
    assert host.available_bytes(tmp_path)[0] == FREE_BYTES


def test_used_more_than_the_limit_is_no_room(tmp_path: Path) -> None:
    write(tmp_path, proc__self__cgroup="0::/app\n")
    group_v2(tmp_path, "app", "1000", 2000)
    assert host.available_bytes(tmp_path)[0] == 0
    assert host.default_memory_budget(tmp_path).budget_bytes >= 1


def test_default_budget_stays_below_the_room_plus_what_is_held(tmp_path: Path) -> None:
    write(tmp_path, proc__self__cgroup="0::/app\n")
    group_v2(tmp_path, "app", "4000000000", 0)
    budget = host.default_memory_budget(tmp_path)
    held = psutil.Process().memory_info().rss
    assert budget.available_bytes == 4_000_000_000
    assert 4_000_000_000 * 0.85 < budget.budget_bytes < 4_000_000_000 + held
    assert budget.margin_bytes >= 128 * 10**6


def test_group_peak_is_read_from_either_version(tmp_path: Path) -> None:
    assert host.peak_group_bytes(tmp_path) is None
    write(tmp_path, proc__self__cgroup="0::/app\n")
    group_v2(tmp_path, "app", "1000", 5)
    write(tmp_path, sys__fs__cgroup__app__memory_dot_peak="900\n")
    assert host.peak_group_bytes(tmp_path) == 900


def test_peak_resident_is_in_bytes(tmp_path: Path) -> None:
    write(tmp_path, proc__self__status="Name:\tx\nVmHWM:\t   68304 kB\n")
    assert host.peak_resident_bytes(tmp_path) == 68304 * 1024


def test_hyperthreads_of_one_core_count_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})
    for cpu, core in enumerate((0, 0, 1, 1)):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "core_id").write_text(f"{core}\n")
        (folder / "physical_package_id").write_text("0\n")
    assert host.n_physical_cores(tmp_path) == 2
    assert host.n_usable_cpus(tmp_path) == 4


def test_cores_of_clusters_that_number_theirs_alike_are_all_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})
    for cpu, core in enumerate((0, 1, 0, 1)):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "core_id").write_text(f"{core}\n")
        (folder / "physical_package_id").write_text("0\n")
        (folder / "core_cpus_list").write_text(f"{cpu}\n")
    assert host.n_physical_cores(tmp_path) == 4


@pytest.mark.parametrize(
    ("quota", "n_cpus"),
    [("max 100000", 8), ("150000 100000", 2), ("1000 100000", 1), ("9900000 100000", 8),
     ("", 8), ("0 0", 8), ("nonsense 1", 8)],
)  # fmt: skip
def test_v2_quota_of_processor_time_bounds_the_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, n_cpus: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    write(
        tmp_path,
        proc__self__cgroup="0::/outer/inner\n",
        sys__fs__cgroup__cgroup_dot_controllers="cpu",
        sys__fs__cgroup__outer__cpu_dot_max=f"{quota}\n",
        sys__fs__cgroup__outer__inner__cpu_dot_max="max 100000\n",
    )
    assert host.n_usable_cpus(tmp_path) == n_cpus


@pytest.mark.parametrize("mount", ["cpu", "cpu,cpuacct"])
def test_v1_quota_of_processor_time_bounds_the_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mount: str
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    write(tmp_path, proc__self__cgroup="4:cpu,cpuacct:/job\n")
    for group, quota in (("", -1), ("job", 250000)):
        folder = tmp_path / "sys/fs/cgroup" / mount / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (folder / "cpu.cfs_period_us").write_text("100000\n")
    assert host.n_usable_cpus(tmp_path) == 3


ARM_CORES = "".join(
    f"processor\t: {index}\nFeatures\t: asimd\nCPU implementer\t: 0x41\nCPU architecture: 8\n"
    f"CPU variant\t: 0x1\nCPU part\t: {part}\nCPU revision\t: 0\n\n"
    for index, part in enumerate(("0xd05", "0xd05", "0xd0b"))
)


def test_processor_without_a_name_is_known_by_its_parts_and_its_board(tmp_path: Path) -> None:
    write(tmp_path, proc__cpuinfo=ARM_CORES)
    (tmp_path / "proc/device-tree").mkdir()
    (tmp_path / "proc/device-tree/model").write_bytes(b"Some Board Rev 1.0\0")
    assert host.cpu_name(tmp_path) == "Some Board Rev 1.0"
    assert host.cpu_parts(tmp_path) == [
        "0x41 0x1 0xd05 0", "0x41 0x1 0xd0b 0", "Some Board Rev 1.0"
    ]  # fmt: skip
    assert host.cpu_parts(tmp_path / "nothing") == []


def test_cores_without_topology_count_one_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {4, 5, 6})
    assert host.n_physical_cores(tmp_path) == 3


def test_fingerprint_depends_on_features_and_system_info_but_not_on_their_order(
    tmp_path: Path,
) -> None:
    write(tmp_path, a__proc__cpuinfo="processor: 0\nflags\t: avx2 fma\nflags : never\n")
    write(tmp_path, b__proc__cpuinfo="flags\t\t: fma avx2\nmodel name\t: Some CPU\n")
    write(tmp_path, c__proc__cpuinfo="Features\t: asimd\nHardware\t: Board\n")
    a, b, c = (host.cpu_fingerprint("AVX2 = 1", tmp_path / name) for name in "abc")
    assert a == b != c
    assert a != host.cpu_fingerprint("AVX2 = 0", tmp_path / "a")
    assert host.cpu_name(tmp_path / "b") == "Some CPU"
    assert host.cpu_name(tmp_path / "c") == "Board"
    assert host.cpu_features(tmp_path / "nothing") == []
