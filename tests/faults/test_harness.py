"""The harness notices what is broken, and says so."""

from __future__ import annotations

import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.faults import __main__ as command
from tests.faults import harness
from tests.faults.broken import WAYS, Broken
from tests.faults.harness import Result, try_once
from tests.faults.injected import PowerCut, Record
from tests.faults.kinds import KINDS
from tests.faults.soak import Sample, growth
from tests.faults.trial import Lab, NotSurvived, Trial, check_checkpoints, check_done

pytestmark = pytest.mark.faults

NOTICED_BY = {
    "nothing_is_synced": "power",
    "what_is_written_has_its_name_at_once": "kill",
    "errors_of_the_disk_are_tracebacks": "disk",
    "runs_have_no_lock": "two",
    "no_damage_is_seen": "damage",
    "dropout_goes_by_the_day": "clock",
}


@pytest.mark.parametrize(("way", "kind"), NOTICED_BY.items())
def test_a_broken_promise_is_not_survived(way: str, kind: str, lab: Lab) -> None:
    results = (try_once(lab, kind, number, 0, always=[Broken(way)], timed=False) for number in range(1, 13))
    failed = next((result for result in results if not result.survived), None)
    assert failed is not None
    assert failed.folder.is_dir()


def test_an_export_that_is_written_in_its_place_is_not_survived(lab: Lab) -> None:
    always = [Broken("what_is_written_has_its_name_at_once")]
    assert any(not try_once(lab, "export", number, 0, always=always).survived for number in range(1, 7))


def test_a_checkpoint_that_has_its_name_before_it_is_synced_is_torn_by_a_power_cut(lab: Lab, tmp_path: Path) -> None:
    scene, broken = lab.scenes["lora"], Broken("files_are_synced_after_they_have_their_names")
    assert {broken.way, *NOTICED_BY} == set(WAYS)
    trial = Trial(lab, tmp_path / "recorded", random.Random(0), (broken,), timed=False)
    check_done(trial.train(scene, Record(tmp_path / "calls")).wait())
    calls = [line for line in (tmp_path / "calls").read_text().splitlines() if not line.startswith("read")]
    renamed = calls.index("rename run/checkpoints/.writing-step-00000004")
    torn = Trial(lab, tmp_path / "torn", random.Random(0), (broken,), timed=False)
    torn.train(scene, PowerCut(renamed + 4, undone=0)).wait()
    with pytest.raises(NotSurvived, match=r"torn|does not name"):
        check_checkpoints(torn.run, scene)


def test_every_kind_has_an_option_and_a_number() -> None:
    options = command.parse(["--each", "2", "--kills", "3", "--stop", "0"])
    planned = command.planned(options)
    assert planned["kill"] == [1, 2, 3]
    assert "stop" not in planned
    assert set(planned) == KINDS.keys() - {"stop"}
    assert command.planned(command.parse(["--only", "disk:17"])) == {"disk": [17]}
    assert command.planned(command.parse(["--only", "two"])) == {"two": list(range(1, KINDS["two"].trials + 1))}


def test_what_did_not_survive_is_named_with_its_seed_and_the_exit_code_is_1(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    results = [Result("kill", 1, "", tmp_path), Result("kill", 2, "the run has otherwise README.md", tmp_path / "kept")]
    monkeypatch.setattr(command, "make_lab", lambda folder: lab)
    for found, code in ((results, 1), (results[:1], 0)):
        monkeypatch.setattr(harness, "try_all", lambda *_, found=found: iter(found))
        monkeypatch.setattr(
            sys, "argv", ["faults", "--only", "kill:2", "--seed", "7", "--folder", str(tmp_path / "work")]
        )
        assert command.main() == code
        said = capsys.readouterr().out
        assert f"kill 1/{len(found)} survived" in said
        if code:
            assert "kill 2 of seed 7: the run has otherwise README.md" in said
            assert str(tmp_path / "kept") in said
            assert 'make faults ARGS="--seed 7 --only kill:2"' in said


def test_a_trial_that_breaks_the_harness_has_not_survived(lab: Lab) -> None:
    with ThreadPoolExecutor(1) as pool:
        [result] = harness.try_all(lab, "no such kind", [1], 0, pool)
    assert "the harness fails" in result.problem
    assert "KeyError" in result.problem


def test_growth_is_named() -> None:
    first = Sample(500, 10_000_000, 200_000_000, 12, 4)
    assert list(growth([first, first])) == []
    leaking = Sample(3000, 13_000_000, 300_000_000, 13, 4)
    assert [line.partition(" ")[0] for line in growth([first, leaking])] == ["active", "resident", "files"]
    assert list(growth([first]))
