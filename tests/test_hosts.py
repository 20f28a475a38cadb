"""What `doctor --hosts` finds of several machines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_sft import hosts
from mlx_sft.cli import main


def test_processes_of_this_machine_measure_the_line_between_them() -> None:
    command = [sys.executable, "-m", "mlx_sft", "doctor", "--json", "--hosts", "127.0.0.1,localhost"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, stdin=subprocess.DEVNULL)
    assert found.returncode == 0, found.stderr
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    said = {line["name"]: line["found"] for line in lines}
    assert list(said) == ["127.0.0.1", "localhost", "process 0", "process 1", "line", "gain"]
    assert not any(line["wrong"] for line in lines)
    assert "ms for a word" in said["line"]
    assert "some of these are one machine" in said["gain"]


@pytest.mark.parametrize(
    ("ssh", "expected"),
    [
        ("echo 'mlx-sft, version 9'", "✓ other: 10.0.0.7 answers, mlx-sft, version 9"),
        ("echo 'Permission denied (publickey).' >&2; exit 255", "✗ other: 10.0.0.7: Permission denied (publickey)."),
        ("echo 'No module named mlx_sft' >&2; exit 1", "✗ other: 10.0.0.7 answers, but has no mlx-sft at"),
        (None, "✗ other: there is no ssh here"),
    ],
)
def test_each_machine_is_asked_by_ssh(
    ssh: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "_address", lambda host: "10.0.0.7")
    monkeypatch.setattr(hosts, "launcher", lambda: "true")
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path), "/bin"] if ssh else [str(tmp_path)]))
    if ssh is not None:
        (tmp_path / "ssh").write_text(f"#!/bin/sh\n{ssh}\n")
        (tmp_path / "ssh").chmod(0o755)
    else:
        monkeypatch.setattr(hosts, "launcher", lambda: "/bin/true")
    result = CliRunner().invoke(main, ["doctor", "--hosts", "localhost,other"])
    assert expected in result.stdout
    assert result.exit_code == (0 if expected.startswith("✓") else 1)
    assert hosts.as_hostfile(["localhost", "other"]) == [
        {"ssh": "127.0.0.1", "ips": ["10.0.0.7"]},
        {"ssh": "other", "ips": ["10.0.0.7"]},
    ]


def test_a_slow_line_or_a_slow_machine_gains_nothing() -> None:
    assert hosts._gain([10.0, 10.0], 1e-3, 1e9).found.startswith("1.9 times the fastest alone (estimated")
    assert hosts._gain([10.0, 5.0], 1e-3, 1e9).found.startswith("1.5 times")
    assert hosts._gain([10.0, 0.1], 1e-3, 1e7).found.startswith("nothing: the fastest alone is faster")


def test_a_name_that_nobody_has_and_a_lone_machine() -> None:
    result = CliRunner().invoke(main, ["doctor", "--hosts", "localhost,nobody.invalid"])
    assert result.exit_code == 1
    assert "✗ nobody.invalid: no such machine" in result.stdout
    alone = CliRunner().invoke(main, ["doctor", "--hosts", "localhost"])
    assert alone.exit_code == 2
    assert "several, with commas: mac1,mac2" in alone.output
