"""What two runs must have in common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_sft.run_folder import RunFolder

TIMINGS = {"time", "seconds", "data_wait_seconds", "tokens_per_second", "peak_memory_bytes"}
TIMINGS |= {"active_memory_bytes", "cache_memory_bytes", "footprint_bytes"}
"""What a line of metrics says of the machine."""


def outcome(run: Path) -> dict[str, Any]:
    """Every file of a run but its page, by its path, without what tells the time, was free when it began, or is shown."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in run.rglob("*") if path.is_file() and path != run / "report.html"):
        content: Any = path.read_bytes()
        if path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in content.decode().splitlines()]
            content = [{key: line[key] for key in line if key not in TIMINGS} for line in lines]
        elif path.name == "state.json":
            content = json.loads(content)
            del content["callbacks"]["metrics-file"]  # the digits of a time
        elif path.name == "config.yaml":
            content = [line for line in content.splitlines() if not line.startswith((b"quiet:", b"json:"))]
        elif path.name == "environment.json":
            content = json.loads(content)
            del content["memory"]
        elif path.name == "SHA256SUMS":
            content = content.splitlines()[:-1]  # the last is state.json's
        found[str(path.relative_to(run))] = content
    return found


def records(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of its metrics, all or those of a kind."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if kind in (None, line["kind"])]


def trained(run: Path) -> dict[str, mx.array]:
    """Its adapter."""
    return mx.load(str(RunFolder(run).adapter / "adapter_model.safetensors"))  # type: ignore[return-value]


def assert_agree(run: Path, other: Path) -> None:
    """Losses, norms of gradients and accuracies of two runs, and what they trained, to 1e-5."""
    of_run, of_other = records(run), records(other)
    assert [record["step"] for record in of_other] == [record["step"] for record in of_run]
    for record, found in zip(of_run, of_other, strict=True):
        for name in ("loss", "grad_norm", "exact_match", "token_accuracy"):
            if record.get(name) is not None:
                assert found[name] == pytest.approx(record[name], rel=1e-5), name
    expected, arrays = trained(run), trained(other)
    assert expected.keys() == arrays.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(arrays[name], value, atol=1e-5 * float(mx.abs(value).max()), err_msg=name)
