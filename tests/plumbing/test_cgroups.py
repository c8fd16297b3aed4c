"""Limits of control groups, from trees as kernels show them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from model.plumbing import cgroups
from model.plumbing.parallel import cores

HERE = len(os.sched_getaffinity(0))


def tree(folder: Path, monkeypatch: pytest.MonkeyPatch, membership: str, files: dict[str, str]) -> None:
    """A machine whose control groups are these files."""
    (folder / "membership").write_text(membership)
    for name, text in files.items():
        path = folder / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    monkeypatch.setattr(cgroups, "MEMBERSHIP", folder / "membership")
    monkeypatch.setattr(cgroups, "MOUNT", folder / "mount")


QUOTAS = [
    pytest.param("0::/\n", {"cpu.max": "250000 100000"}, 2.5, id="version 2, in its own namespace"),
    pytest.param("0::/\n", {"cpu.max": "max 100000"}, None, id="version 2, no limit"),
    pytest.param("0::/\n", {}, None, id="version 2, the machine itself"),
    pytest.param(
        "0::/kubepods/pod1/c1\n",
        {
            "kubepods/cpu.max": "9600000 100000",
            "kubepods/pod1/cpu.max": "400000 100000",
            "kubepods/pod1/c1/cpu.max": "max 100000",
        },
        4.0,
        id="version 2, the pod around it is limited",
    ),
    pytest.param("0::/../../c1\n", {"c1/cpu.max": "50000 100000"}, 0.5, id="version 2, from another root"),
    pytest.param("0::/kubepods/c1\n", {"cpu.max": "50000 100000"}, 0.5, id="version 2, only its own seen"),
    pytest.param(
        "4:memory:/pod/c1\n2:cpu,cpuacct:/pod/c1\n0::/\n",
        {
            "cpu/pod/c1/cpu.cfs_quota_us": "150000",
            "cpu/pod/c1/cpu.cfs_period_us": "100000",
            "cpu/cpu.cfs_quota_us": "-1",
            "cpu/cpu.cfs_period_us": "100000",
            "memory/pod/c1/cpu.cfs_quota_us": "1",
        },
        1.5,
        id="version 1",
    ),
    pytest.param("", {"cpu.max": "50000 100000"}, None, id="in no group"),
]  # fmt: skip


def test_memory_is_the_machines_or_what_the_group_may_have_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("none", "some", "more"):
        (tmp_path / name).mkdir()
    tree(tmp_path / "none", monkeypatch, "0::/\n", {"memory.max": "max"})
    machine = cgroups.memory()
    assert machine > 1 << 28
    tree(tmp_path / "some", monkeypatch, "0::/\n", {"memory.max": "1000000"})
    assert cgroups.memory() == 1_000_000
    tree(tmp_path / "more", monkeypatch, "0::/\n", {"memory.max": f"{machine + 1}"})
    assert cgroups.memory() == machine


@pytest.mark.parametrize(("membership", "files", "quota"), QUOTAS)
def test_a_quota_is_the_smallest_of_the_groups_around(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    membership: str,
    files: dict[str, str],
    quota: float | None,
) -> None:
    tree(tmp_path, monkeypatch, membership, files)
    assert cgroups.cpu_quota() == quota


@pytest.mark.parametrize(("allowed", "ranks", "expected"), [(96, 1, 3), (96, 2, 1), (96, 8, 1), (2, 1, 2)])
def test_cores_are_those_of_the_quota_where_it_is_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: int, ranks: int, expected: int
) -> None:
    tree(tmp_path, monkeypatch, "0::/\n", {"cpu.max": "250000 100000"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(allowed)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert cores() == expected


def test_a_machine_without_control_groups_has_no_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroups, "MEMBERSHIP", tmp_path / "none")
    monkeypatch.setattr(cgroups, "MOUNT", tmp_path / "neither")
    assert cgroups.cpu_quota() is None
    assert cgroups.memory_limit() is None
    assert cgroups.out_of_memory_kills() == 0
    assert cores() == HERE


@pytest.mark.parametrize(
    ("membership", "files", "limit", "kills"),
    [
        (
            "0::/\n",
            {"memory.max": "2147483648", "memory.events": "low 0\noom 3\noom_kill 2\noom_group_kill 0"},
            2**31,
            2,
        ),
        ("0::/\n", {"memory.max": "max", "memory.events": "oom_kill 0"}, None, 0),
        (
            "3:memory:/pod\n",
            {
                "memory/pod/memory.limit_in_bytes": "9223372036854771712",
                "memory/memory.limit_in_bytes": "1073741824",
                "memory/pod/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 1",
                "memory/memory.oom_control": "oom_kill 7",
            },
            2**30,
            1,
        ),
    ],
)
def test_memory_has_a_limit_and_kills_are_counted(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    membership: str,
    files: dict[str, str],
    limit: int | None,
    kills: int,
) -> None:
    tree(tmp_path, monkeypatch, membership, files)
    assert cgroups.memory_limit() == limit
    assert cgroups.out_of_memory_kills() == kills
