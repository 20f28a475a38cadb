"""`mlx-sft report` and `mlx-sft runs`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from mlx_sft.run_folder import RunFolder
from tests.pages import Parts
from tests.report.conftest import HOSTILE, MakeFolder, evaluation, sample, step, write_samples

pytestmark = pytest.mark.fast

Cli = Callable[..., Result]


@pytest.fixture
def runs(make_folder: MakeFolder, tmp_path: Path) -> Path:
    records = [step(n, 2.0 - n / 100) for n in range(1, 101)]
    make_folder([*records, evaluation(50, 1.5), evaluation(100, 1.25)], "runs/good")
    make_folder(records[:40], "runs/part", finished=False, settings={"rank": 8, "model": "/models/Qwen3-0.6B"})
    make_folder([], "runs/broken")
    (tmp_path / "runs/broken/environment.json").write_text("{")
    (tmp_path / "runs/other").mkdir()
    for order, name in enumerate(("good", "part", "broken")):
        os.utime(tmp_path / "runs" / name / "config.yaml", (order, order))
    return tmp_path / "runs"


def test_runs_are_listed(runs: Path, cli: Cli) -> None:
    result = cli("runs", runs)
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0] == ["name", "model", "method", "rows", "steps", "loss", "best", "time", "state", "size"]
    assert lines[1][:9] == ["good", "tiny", "lora", "90", "100", "of", "100", "1.0200", "1.2500"]
    assert lines[1][10] == "finished"
    assert lines[2][:9] == ["part", "Qwen3-0.6B", "lora", "90", "40", "of", "100", "1.6200", "-"]
    assert lines[2][10] == "stopped"
    assert (lines[3][0], lines[3][8]) == ("broken", "unreadable")
    assert "environment.json" in result.stderr or "not JSON" in result.stderr
    assert len(lines) == 4
    with RunFolder(runs / "part").locked():
        found = [json.loads(line) for line in cli("runs", "list", runs, "--json").stdout.splitlines()]
    assert [run["state"] for run in found] == ["finished", "running", "unreadable"]
    assert (found[0]["best_loss"], found[0]["best_step"], found[0]["step"]) == (1.25, 100, 100)
    assert found[0]["bytes"] == sum(file.stat().st_size for file in (runs / "good").iterdir())


def test_a_folder_without_runs_and_one_that_is_not_there(
    tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "there is no such folder" in cli("runs").stderr
    assert cli("runs", "--json").exit_code == 2
    Path("runs").mkdir()
    assert cli("runs").stdout == "no run in runs\n"


def test_names_cannot_steer_the_table(make_folder: MakeFolder, tmp_path: Path, cli: Cli) -> None:
    make_folder([], "runs/x", settings={"model": "a\x1b[31m\nb"})
    lines = cli("runs", tmp_path / "runs").stdout.splitlines()
    assert len(lines) == 2
    assert "\x1b" not in lines[1]


def test_runs_are_compared(runs: Path, cli: Cli, tmp_path: Path) -> None:
    page = tmp_path / "out/both.html"
    page.parent.mkdir(exist_ok=True)
    result = cli("runs", "compare", runs / "good", runs / "part", "--html", page)
    assert result.exit_code == 0
    words = [line.split() for line in result.stdout.splitlines()]
    assert ["rank", "16", "8"] in words
    assert ["setting", "good", "part"] in words
    assert not [line for line in words if line and line[0] == "epochs"]
    assert "Not all have finished" in result.stdout
    assert words[-1] == [str(page)]
    text = page.read_text()
    assert "<script" not in text
    assert text.count("<polyline") == 3
    assert "script-src 'none'" in text


def test_a_page_of_several_runs_holds_no_code(make_folder: MakeFolder, cli: Cli, tmp_path: Path) -> None:
    runs = [
        make_folder([step(1, 1.0)], f"{n}/<img src=x>", settings={"model": HOSTILE * n, HOSTILE: n}) for n in (1, 2)
    ]
    for run in runs:
        write_samples(run, [sample(at, HOSTILE, HOSTILE, wanted=HOSTILE) for at in (0, 1)])
    assert cli("runs", "compare", *runs, "--html", tmp_path / "c.html").exit_code == 0
    parts = Parts((tmp_path / "c.html").read_text())
    assert not {tag for tag, _ in parts.elements} & {"script", "img"}


def test_answers_to_the_same_prompts_stand_beside_each_other(make_folder: MakeFolder, cli: Cli, tmp_path: Path) -> None:
    first = make_folder([evaluation(2, 1.0), evaluation(4, 2.0)], "first")
    second = make_folder([evaluation(4, 1.0)], "second")
    write_samples(first, [sample(at, "the cat", f"a{at}", wanted="sat") for at in (0, 2, 4)])
    write_samples(first, [sample(0, "alone", "x", number=2)])
    write_samples(second, [sample(0, "the cat", "a0", wanted="sat"), sample(4, "the cat", "b4", wanted="sat")])
    assert cli("runs", "compare", first, second, "--html", tmp_path / "c.html").exit_code == 0
    table = (tmp_path / "c.html").read_text().partition('<div class="samples"')[2].partition("</table>")[0]
    assert re.findall(r"<th[^>]*>([^<]*)</th>", table) == [
        "prompt",
        "wanted",
        "before",
        "first, step 2",
        "second, step 4",
    ]
    cells = [re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", table)]
    assert cells == ["the cat", "sat", "a0", "a2", "b4"]


def test_what_cannot_be_compared_is_refused(runs: Path, cli: Cli) -> None:
    assert "fewer than two" in cli("runs", "compare", runs / "good").stderr
    assert "named twice" in cli("runs", "compare", runs / "good", runs / "good").stderr
    result = cli("runs", "compare", runs / "good", runs / "other")
    assert (result.exit_code, "not a run folder" in result.stderr) == (1, True)


def test_a_run_is_removed_once_that_is_confirmed(runs: Path, cli: Cli) -> None:
    for answer in ("n\n", ""):
        refused = cli("runs", "rm", runs / "part", input=answer)
        assert (refused.exit_code, refused.stdout) == (1, "")
        assert "error: nothing is removed\nhint: answer y, or give --yes" in refused.stderr
    assert (runs / "part").is_dir()
    result = cli("runs", "rm", runs / "part", input="y\n")
    assert (result.exit_code, result.stdout) == (0, f"{runs / 'part'}\n")
    assert not (runs / "part").exists()
    assert cli("runs", "rm", runs / "good", runs / "broken", "--yes").exit_code == 0
    assert sorted(path.name for path in runs.iterdir()) == ["other"]


def test_what_is_no_run_or_is_being_trained_stays_and_so_do_the_others(runs: Path, cli: Cli) -> None:
    (runs / "other/config.yaml").write_text("model: x\n")
    assert "not a run folder" in cli("runs", "rm", runs / "good", runs / "other", "--yes").stderr
    with RunFolder(runs / "part").locked():
        assert "another process is training" in cli("runs", "rm", runs / "good", runs / "part", "--yes").stderr
    assert sorted(path.name for path in runs.iterdir()) == ["broken", "good", "other", "part"]


def test_links_are_not_followed(runs: Path, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/file").touch()
    (runs / "good/checkpoints").symlink_to(tmp_path / "kept")
    (runs / "link").symlink_to(runs / "part")
    assert "a symbolic link" in cli("runs", "rm", runs / "link", "--yes").stderr
    assert cli("runs", "rm", runs / "good", "--yes").exit_code == 0
    assert not (runs / "good").exists()
    assert (tmp_path / "kept/file").exists()
    assert (runs / "part/config.yaml").exists()


def test_a_page_is_written_elsewhere(runs: Path, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    result = cli("report", runs / "good", "--to", tmp_path / "new/page.html")
    assert result.stdout == f"{tmp_path / 'new/page.html'}\n"
    assert not (runs / "good/report.html").exists()
    assert cli("report", runs / "good").stdout == f"{runs / 'good/report.html'}\n"
    assert "not a run folder" in cli("report", runs / "other").stderr
