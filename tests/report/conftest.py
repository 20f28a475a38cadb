"""Run folders made by hand, of any course, without training."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"><!-- {{data}} \u202e"
)

Record = dict[str, Any]
MakeFolder = Callable[..., Path]


def step(number: int, loss: float | None, *, epoch: float = 0.0, **further: Any) -> Record:
    """A line of an optimizer step."""
    return {
        "kind": "train",
        "step": number,
        "epoch": epoch,
        "loss": loss,
        "learning_rate": 1e-4,
        "grad_norm": None if loss is None else 1.0,
        "tokens": 400,
        "supervised_tokens": 100,
        "tokens_per_second": 200.0,
        "peak_memory_bytes": 3_000_000,
        "active_memory_bytes": 1_000_000,
        "cache_memory_bytes": 2_000_000,
        "seconds": 2.0,
        **further,
    }


def evaluation(number: int, loss: float | None, *, epoch: float = 0.0) -> Record:
    """A line of an evaluation."""
    return {"kind": "evaluation", "step": number, "epoch": epoch, "loss": loss, "token_accuracy": 0.5, "seconds": 1.0}


def sample(
    at: int, prompt: str, answer: str, *, wanted: str | None = None, number: int = 1, cut: bool = False
) -> Record:
    """A line of samples.jsonl; that of step 0 is the base's."""
    named = {"origin": "chats.jsonl:1", "prompt": prompt, "wanted": wanted}
    return {"step": at, "base": at == 0, "number": number, **named, "answer": answer, "cut": cut}


def write_samples(run: Path, records: Iterable[Record]) -> None:
    with (run / "samples.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """`make_folder(records, name=, planned=, finished=, settings={...}, data={...})` → a run folder."""

    def make(
        records: Iterable[Record],
        name: str = "run",
        *,
        planned: int = 100,
        finished: bool = True,
        settings: Record | None = None,
        data: Record | None = None,
    ) -> Path:
        run = tmp_path / name
        run.mkdir(parents=True)
        chosen = {
            "data": ["/data/chats.jsonl"],
            "model": "tiny",
            "method": "lora",
            "rank": 16,
            "epochs": 3,
            "for": None,
        }
        (run / "config.yaml").write_text(yaml.safe_dump(chosen | (settings or {}), sort_keys=False))
        environment = {"total_steps": planned, "memory": {"predicted_peak_bytes": 4_000_000}}
        (run / "environment.json").write_text(json.dumps(environment))
        train = {"rows": 90, "tokens": 9000, "supervised_tokens": 3000, "lengths": {"p50": 80, "p95": 120, "max": 200}}
        report = {"totals": {"rows": 100}, "train": train, "valid": {"rows": 10}, "warnings": ["5 rows are odd"]}
        (run / "data_report.json").write_text(json.dumps(report | (data or {})))
        (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        if finished:
            (run / "README.md").touch()
        return run

    return make
