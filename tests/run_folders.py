"""What two runs must have in common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
