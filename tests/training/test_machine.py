"""What a machine has: the device's word, the system's within its control groups, and Macs by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_sft.errors import USAGE, UserError
from mlx_sft.training.machine import COMMON_MACS, GIB, free_bytes, mac, read_machine, this_machine, usable_bytes

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("device", "free", "active", "usable"),
    [
        ({"max_recommended_working_set_size": 10 * GIB, "memory_size": 16 * GIB}, 1, 2 * GIB, 10 * GIB),
        ({"free_memory": 70 * GIB, "total_memory": 80 * GIB}, 1, 2 * GIB, 65 * GIB),
        ({}, 10 * GIB, 2 * GIB, 11 * GIB),
        ({"device_name": "cpu", "free_memory": "unknown"}, 10 * GIB, 0, 9 * GIB),
    ],
    ids=["Metal", "CUDA", "CPU", "no figure"],
)
def test_the_device_says_what_may_be_taken_or_else_the_system(
    device: dict[str, object], free: int, active: int, usable: int
) -> None:
    assert usable_bytes(device, free, active)[0] == usable


def test_this_machine_has_memory() -> None:
    machine = this_machine()
    assert 2**26 < machine.memory < 2**50
    assert machine.name
    assert machine.basis


@pytest.mark.parametrize(
    ("text", "name", "share"),
    [
        ("M2 16GB", "M2 16GB", 2 / 3),
        ("m3 max 64 gb", "M3 Max 64GB", 3 / 4),
        ("Apple M1 Ultra, 128GB", "M1 Ultra 128GB", 3 / 4),
        ("M3Max 48G", "M3 Max 48GB", 3 / 4),
        ("36GB", "36GB", 2 / 3),
    ],
)
def test_a_mac_is_known_by_chip_and_memory(text: str, name: str, share: float) -> None:
    machine = read_machine(text)
    assert (machine.name, machine.backend, machine.dtype) == (name, "metal", "bfloat16")
    gigabytes = int("".join(c for c in name.split()[-1] if c.isdigit()))
    assert machine.memory == int(share * gigabytes * GIB)
    assert (machine.teraflops is None) == (text == "36GB")


def test_faster_chips_are_faster() -> None:
    speeds = [read_machine(f"{chip} 64GB").teraflops or 0 for chip in ("M2", "M2 Pro", "M2 Max", "M2 Ultra")]
    assert speeds == sorted(speeds)
    assert 0 < speeds[0] < speeds[-1] < 30


@pytest.mark.parametrize("text", ["", "M2", "a lot", "M2 16MB", "0GB", "M9 16GB", "M2 Tiny 16GB", "M1 Ultra"])
def test_another_machine_is_an_error_that_shows_how_to_write_one(text: str) -> None:
    with pytest.raises(UserError) as caught:
        read_machine(text)
    assert caught.value.exit_code == USAGE
    assert "GB" in caught.value.hint


def test_a_macs_share_does_not_fall_with_its_memory() -> None:
    working_sets = [mac("", gigabytes).memory for gigabytes in COMMON_MACS]
    assert working_sets == sorted(working_sets)
    assert working_sets[1] == 11453246122  # 10,922.67 MiB, as Metal reports on 16 GB


def linux(root: Path, *, available: int, groups: dict[str, str], lines: str) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable:   {available // 1024} kB\n")
    (root / "proc/self/cgroup").write_text(lines)
    for path, text in groups.items():
        file = root / "sys/fs/cgroup" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def test_what_linux_says_is_available(tmp_path: Path) -> None:
    assert free_bytes(linux(tmp_path, available=3 * GIB, groups={}, lines="0::/\n")) == 3 * GIB


@pytest.mark.parametrize(
    ("groups", "lines", "free"),
    [
        ({"a/b/memory.max": f"{2 * GIB}\n", "a/b/memory.current": f"{GIB}\n"}, "0::/a/b\n", GIB),
        ({"a/b/memory.max": "max\n", "a/b/memory.current": f"{GIB}\n"}, "0::/a/b\n", 8 * GIB),
        ({"a/memory.max": f"{3 * GIB}\n", "a/memory.current": f"{GIB}\n"}, "0::/a/b\n", 2 * GIB),
        (
            {
                "a/memory.max": f"{3 * GIB}",
                "a/memory.current": f"{2 * GIB}",
                "a/memory.stat": f"anon 1\ninactive_file {GIB}\n",
            },
            "0::/a\n",
            2 * GIB,
        ),
        (
            {"memory/a/memory.limit_in_bytes": f"{GIB}", "memory/a/memory.usage_in_bytes": "0"},
            "5:cpu:/x\n4:memory:/a\n0::/\n",
            GIB,
        ),
        ({"memory.max": f"{4 * GIB}", "memory.current": "0"}, "0::/\n", 4 * GIB),
        ({"a/memory.max": f"{GIB}", "a/memory.current": f"{2 * GIB}"}, "0::/a\n", 0),
    ],
    ids=["limit", "no limit", "parent's", "cache", "version 1", "container", "over"],
)
def test_a_control_group_may_leave_less(tmp_path: Path, groups: dict[str, str], lines: str, free: int) -> None:
    assert free_bytes(linux(tmp_path, available=8 * GIB, groups=groups, lines=lines)) == free


def test_without_linux_files_half_of_the_memory_counts(tmp_path: Path) -> None:
    assert 2**26 < free_bytes(tmp_path) < 2**50
