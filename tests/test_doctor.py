"""What `doctor` finds on this machine, and on others that it is told of."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_sft import doctor
from mlx_sft.cli import main
from mlx_sft.doctor import Finding, described
from mlx_sft.training.machine import GIB, Machine, mac


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Finding]]:
    """`found(machine)` → what is found on it, by name."""

    def look(machine: Machine) -> dict[str, Finding]:
        monkeypatch.setattr(doctor, "this_machine", lambda: machine)
        return {finding.name: finding for finding in doctor.findings()}

    return look


def test_this_machine_is_looked_at_and_training_works() -> None:
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 0, result.output
    for name in (
        "system",
        "packages",
        "device",
        "memory",
        "disk, here",
        "Hub",
        "gguf: llama.cpp",
        "largest model, LoRA",
    ):
        assert f"{name}: " in result.stdout


def test_every_finding_is_a_line_of_json() -> None:
    lines = CliRunner().invoke(main, ["doctor", "--json"]).stdout.splitlines()
    assert all(set(json.loads(line)) == {"name", "found", "to_do", "wrong"} for line in lines)


def test_more_memory_fits_larger_models(found: Callable[..., dict[str, Finding]]) -> None:
    largest = [found(mac("", gigabytes))["largest model, LoRA"].found for gigabytes in (8, 16, 128)]
    assert largest[0].startswith("Qwen3-1.7B (")
    assert largest[1].startswith("Qwen3-4B (")
    assert "Qwen3-32B with --quantize 4" in largest[2]
    none = found(Machine("a small one", "metal", GIB // 2, ""))["largest model, LoRA"]
    assert none.found == "none"
    assert none.to_do


@pytest.mark.parametrize(
    ("release", "machine", "wrong", "to_do"),
    [
        ("15.6", "arm64", False, ""),
        ("14.0", "arm64", False, ""),
        ("13.7", "arm64", True, "macOS 14 or later"),
        ("15.1", "x86_64", True, "Apple silicon"),
    ],
)
def test_a_mac_for_which_mlx_has_no_wheel_is_told(
    release: str,
    machine: str,
    wrong: bool,
    to_do: str,
    monkeypatch: pytest.MonkeyPatch,
    found: Callable[..., dict[str, Finding]],
) -> None:
    monkeypatch.setattr(platform, "mac_ver", lambda: (release, ("", "", ""), machine))
    monkeypatch.setattr(platform, "machine", lambda: machine)
    system = found(mac("", 16))["system"]
    assert system.wrong is wrong
    assert to_do in system.to_do
    assert release in system.found


@pytest.mark.parametrize(
    ("environment", "words"),
    [({"HF_HUB_OFFLINE": "1"}, "not asked"), ({"HF_TOKEN": "hf_secret"}, "a token is there"), ({}, "no token")],
)
def test_the_hub_is_not_asked_and_no_token_shown(
    environment: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "is_offline_mode", lambda: "HF_HUB_OFFLINE" in environment)
    monkeypatch.setattr(doctor, "get_token", lambda: environment.get("HF_TOKEN"))
    shown = "".join(described(finding) for finding in doctor.findings() if finding.name == "Hub")
    assert words in shown
    assert "secret" not in shown


def test_little_disk_and_little_memory_are_told(
    found: Callable[..., dict[str, Finding]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "free_bytes", lambda place: 10**9)
    few = found(Machine("a Mac", "metal", 3 * GIB, "for a test"))
    assert few["disk, here"].to_do
    assert few["memory"].to_do
    assert not any(finding.wrong for finding in few.values())


def test_what_to_do_stands_below_what_was_found() -> None:
    assert described(Finding("a", "well")) == "✓ a: well\n"
    assert described(Finding("a", "less well", "do this")) == "• a: less well\n    do this\n"
    assert described(Finding("a", "broken", "mend it", wrong=True)) == "✗ a: broken\n    mend it\n"
