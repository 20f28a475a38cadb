"""Medians, ratios, tables and plots of results made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import plots, report
from benchmarks.summary import derived, summarize

TASK = {"steps": 2, "rows_per_step": 4, "rank": 16, "dtype": "float32"}


def run(seconds: float, peak: int, **others: Any) -> dict[str, Any]:
    result = {
        "tokens": 1000,
        "supervised_tokens": 400,
        "needed_tokens": 990,
        "padded_tokens": 1100,
        "seconds": seconds,
        "seconds_to_first_step": 3.0,
        "loss": 9.5,
        "step_losses": [9.6, 9.4],
        "weight_bytes": 10,
        "peak_bytes": peak,
        "peak_resident_bytes": peak + 10,
        "memory_is": "counted",
        "notes": {},
    }
    return derived(result | others)


def limit(seconds: float) -> dict[str, Any]:
    return {"seconds": seconds, "flops": 10**12, "flops_per_second": 10**12 / seconds, "parts": {"body": seconds}}


ROUNDS = [
    {"ours": run(10, 100), "mlx-lm": run(30, 1000), "limit": limit(7)},
    {"ours": run(20, 100), "mlx-lm": run(30, 2000), "limit": limit(8)},
    {"ours": run(12, 100), "mlx-lm": run(60, 1000), "limit": limit(9)},
]
FAILED = {"failed": "out of memory", "highest_bytes": 22 * 10**9}


def point(rounds: list[dict[str, Any]], x: float = 6, *, in_order: bool = False) -> dict[str, Any]:
    return {
        "point": {"label": f"{x:,} tokens", "x": x, "in_order": in_order},
        "task": TASK,
        "rounds": rounds,
        "did_not_fit": [],
        "not_here": {"unsloth": "no Metal"},
        "summary": summarize(rounds),
    }


def result(*points: dict[str, Any], axis: str = "", case: str = "pairs", **others: Any) -> dict[str, Any]:
    about = {"time": "2026-01-02T03:04:05+00:00", "cores": 2, "platform": "Linux-6-with-glibc", "memory_bytes": 2**34}
    return {
        "case": case,
        "title": "Pairs",
        "quick": False,
        "axis": axis,
        "environment": about,
        "points": points,
    } | others


def test_speeds_and_padding_follow_from_what_was_recorded() -> None:
    one = run(10, 100)
    assert one["tokens_per_second"] == 100
    assert one["supervised_tokens_per_second"] == 40
    assert one["padding_share"] == pytest.approx(0.1)
    assert derived(one | {"padded_tokens": None})["padding_share"] is None


def test_medians_are_of_each_trainer_and_ratios_of_each_pair() -> None:
    summary = summarize(ROUNDS)
    assert summary["trainers"]["ours"]["seconds"] == 12
    assert summary["trainers"]["mlx-lm"]["peak_bytes"] == 1000
    ratio = summary["ratios"]["mlx-lm"]
    assert ratio["tokens_per_second"]["pairs"] == pytest.approx([3.0, 1.5, 5.0])
    assert ratio["tokens_per_second"]["median"] == pytest.approx(3.0)
    assert ratio["peak_bytes"]["median"] == pytest.approx(0.1)
    assert summary["limit"]["share"]["pairs"] == pytest.approx([0.7, 0.4, 0.75])
    assert summary["limit"]["share"]["median"] == pytest.approx(0.7)


def test_a_peer_that_failed_is_a_result() -> None:
    summary = summarize([{"ours": run(10, 100), "trl": FAILED}, {"ours": run(12, 100)}])
    assert summary["trainers"]["trl"] == FAILED
    assert summary["ratios"] == {}
    assert summary["limit"] == {}
    text = report.section(result(point([{"ours": run(10, 100), "trl": FAILED}])))
    assert "out of memory" in text
    assert "over 22.0" in text


def test_a_case_shows_its_metrics_ratios_and_share_of_the_limit() -> None:
    text = report.section(result(point(ROUNDS)), source="x.json")
    assert "| real tokens a second | 83.3 | 33.3 |" in text
    assert "3.00 times mlx-lm's speed (pair by pair 3.00, 1.50, 5.00) and 0.100 times its memory" in text
    assert "our share of it 70 % (pair by pair 70, 40, 75)" in text
    assert "Unsloth was not measured: no Metal" in text
    assert "2026-01-02, 2 cores, 16 GB, Linux-6" in text


def test_steps_of_the_same_rows_show_their_losses() -> None:
    assert "losses of the steps, mlx-sft: 9.60000, 9.40000" in report.section(result(point(ROUNDS, in_order=True)))


def test_a_sweep_shows_a_row_a_point_with_seconds_a_step() -> None:
    text = report.section(
        result(point(ROUNDS, 256), point([{"ours": run(40, 400), "trl": FAILED}], 512), axis="tokens")
    )
    first = next(line for line in text.splitlines() if line.startswith("| 256 tokens"))
    assert first.split("|")[2:4] == [" 6.00 ", " 15.00 "]
    second = next(line for line in text.splitlines() if line.startswith("| 512 tokens"))
    assert "out of memory" in second


def test_the_newest_whole_run_of_a_case_is_taken(tmp_path: Path) -> None:
    def write(name: str, time: str, *, quick: bool) -> None:
        (tmp_path / name).write_text(json.dumps({"case": "pairs", "quick": quick, "environment": {"time": time}}))

    write("pairs-full-1.json", "2026-01-01", quick=False)
    write("pairs-full-2.json", "2026-01-02", quick=False)
    write("pairs-quick-3.json", "2026-01-03", quick=True)
    (tmp_path / "data-1.json").write_text("{}")
    found = report.newest(tmp_path)
    assert {name: file.name for name, (file, _) in found.items()} == {"pairs": "pairs-full-2.json"}


def test_only_what_is_between_the_markers_is_written() -> None:
    page = f"by hand\n\n{report.BEGIN}\nold\n{report.END}\n\nmore by hand\n"
    written = report.between_markers(page, "new")
    assert written == f"by hand\n\n{report.BEGIN}\n\nnew\n\n{report.END}\n\nmore by hand\n"
    assert report.between_markers(written, "new") == written
    with pytest.raises(SystemExit, match="has no"):
        report.between_markers("no markers", "new")


def test_a_plot_is_well_formed_the_same_each_time_and_readable_on_any_background(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sweep = result(
        point(ROUNDS, 256),
        point([{"ours": run(40, 400), "mlx-lm": FAILED}], 512),
        axis="tokens of the row",
    )
    text = plots.draw(sweep, tmp_path / "a.svg").read_text(encoding="utf-8")
    assert text == plots.draw(sweep, tmp_path / "b.svg").read_text(encoding="utf-8")
    assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
    for words in ("tokens of the row", "seconds a step", "GB above the weights", "mlx-sft", "limit", "out of memory"):
        assert words in text
    assert "#ffffff" not in text.lower()
    assert "#000000" not in text.lower()


def test_lines_are_seconds_a_step_and_gigabytes() -> None:
    sweep = result(point(ROUNDS, 256), axis="tokens")
    assert plots.lines(sweep, "seconds") == {"ours": [(256, 6)], "mlx-lm": [(256, 15)], "limit": [(256, 4)]}
    assert plots.lines(sweep, "peak_bytes")["ours"][0] == (256, pytest.approx(1e-7))
    failed = result(point([{"ours": run(40, 400), "trl": FAILED}], 512), axis="tokens")
    assert plots.failures(failed) == {"trl": [(512, pytest.approx(22.0, abs=1e-6))]}


def test_a_merge_is_told_beside_a_copy() -> None:
    result = {
        "layers": 28, "checkpoint_bytes": 2.4e9, "largest_tensor_bytes": 6e8, "rounds": [{}, {}, {}],
        "copy_seconds": 6.0, "merge_seconds": 8.0, "above_bytes": 7e7,
    }  # fmt: skip
    text = "\n".join(report.merge_lines(result))
    assert "2.40 GB (28 layers" in text
    assert "75% of the speed" in text
    assert "| merged | 8.0 | 0.07 |" in text
