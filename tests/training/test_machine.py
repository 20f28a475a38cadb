"""What a machine has: the device's word, the system's within its control groups, and Macs by name."""

from __future__ import annotations

from mmap import MAP_ANON, MAP_PRIVATE, mmap
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_sft.errors import USAGE, UserError
from mlx_sft.training.machine import (
    COMMON_MACS,
    GIB,
    Machine,
    footprint_bytes,
    free_bytes,
    hold_to,
    mac,
    memory_limits_restored,
    read_machine,
    this_machine,
    usable_bytes,
)
from mlx_sft.training.memory import Prediction

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


# What MLX is held to


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The limits that MLX was given, by name."""
    given: dict[str, int] = {}
    for name in ("memory", "cache", "wired"):
        monkeypatch.setattr(mx, f"set_{name}_limit", lambda limit, name=name: given.update({name: limit}))
    return given


def test_on_a_cpu_arrays_take_what_is_predicted(limits: dict[str, int]) -> None:
    predicted = Prediction(weights=GIB, trained=GIB, kept=GIB, passing=GIB)
    hold_to(Machine("a PC", "cpu", 64 * GIB, ""), predicted)
    assert limits == {"memory": predicted.limit}
    hold_to(Machine("a small one", "cpu", 2 * GIB, ""), predicted)
    assert limits == {"memory": 2 * GIB}


@pytest.mark.parametrize(
    ("kept", "passing", "cache"),
    [(3, 2, 5), (0, 1, 2)],
    ids=["what a step takes", "never so little that it costs speed"],
)
def test_on_a_mac_the_cache_holds_a_step_and_no_more_is_wired(
    kept: int, passing: int, cache: int, limits: dict[str, int]
) -> None:
    predicted = Prediction(weights=4 * GIB, trained=GIB, kept=kept * GIB, passing=passing * GIB)
    hold_to(mac("", 64), predicted)
    assert limits == {"cache": cache * GIB, "wired": predicted.peak + cache * GIB}
    hold_to(mac("", 8), predicted)
    assert limits["wired"] == min(mac("", 8).memory, predicted.peak + cache * GIB)


def test_on_cuda_nothing_is_wired(limits: dict[str, int]) -> None:
    hold_to(Machine("a GPU", "cuda", 64 * GIB, ""), Prediction(GIB, 0, 0, 0))
    assert set(limits) == {"cache"}


def test_limits_are_what_they_were_afterwards() -> None:
    mx.set_cache_limit(123456)
    with memory_limits_restored():
        assert mx.set_cache_limit(7) == 123456
        mx.set_memory_limit(GIB)
    assert mx.set_cache_limit(123456) == 123456
    assert mx.get_memory_limit() != GIB


def test_the_system_says_how_large_the_process_is() -> None:
    before = footprint_bytes()
    held = mmap(-1, 2**27, flags=MAP_PRIVATE | MAP_ANON)  # of no memory that was freed and kept
    for _ in range(2**7):
        held.write(b"x" * 2**20)
    after = footprint_bytes()
    assert before is not None
    assert after is not None
    assert 2**26 < after - before < 2**28
    held.close()
