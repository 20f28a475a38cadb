"""The runner notices every way in which a parser can fail, goes on, and says how to repeat it."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from tests.fuzz import __main__ as command
from tests.fuzz.broken import PARSERS
from tests.fuzz.parser import Materials
from tests.fuzz.parsers import PARSERS as OURS
from tests.fuzz.runner import Fuzzing, Outcome, bug, report

NOTICED = {
    "raises": "KeyError: 'missing'",
    "takes it for something else": "1 became 2",
    "says nothing": "an error without words",
    "raises what is no exception": "SystemExit: 3",
    "writes elsewhere": "outside of its folder: open",
    "starts a program": "outside of its folder: subprocess.Popen",
    "asks the network": "outside of its folder: socket.getaddrinfo",
    "computes for ever": "it takes more than 0.3 s",
    "ends the interpreter": "the interpreter ended with -6",
}


def fuzzing(name: str, folder: Path) -> Fuzzing:
    return Fuzzing(name, 0, Materials(folder / "lab"), folder, "tests.fuzz.broken", longest=0.3)


@pytest.mark.parametrize(("name", "problem"), NOTICED.items())
def test_a_parser_that_fails_is_noticed_and_the_other_inputs_are_parsed(
    name: str, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not report(fuzzing(name, tmp_path), 2, range(1, 10))
    said = capsys.readouterr().out
    harmful = [number for number in range(1, 10) if random.Random(f"0/{name}/{number}").randrange(3) == 0]
    assert said.startswith(f"{name} {9 - len(harmful)}/9  (")
    assert f"{len(harmful)} × {problem}" in said
    assert f'make fuzz ARGS="--seed 0 --only {name}:{harmful[0]}"' in said
    assert (tmp_path / "failed" / f"{name}-{harmful[0]}-of-0" / "number").read_text() == "0"


def test_a_sound_parser_is_not_suspected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(fuzzing("sound", tmp_path), 2, range(1, 10))
    assert capsys.readouterr().out.startswith("sound 9/9  (")
    assert list(tmp_path.iterdir()) == []


def test_every_way_to_fail_is_tried() -> None:
    assert NOTICED.keys() == PARSERS.keys() - {"sound"}


def test_bugs_are_told_apart_by_their_kind_and_place() -> None:
    one, other, third = (
        Outcome(1, "failed", f"{what}  ({place})")
        for what, place in (("KeyError: 'a'", "x.py:1 f"), ("KeyError: 'b'", "x.py:1 f"), ("KeyError: 'a'", "x.py:2 f"))
    )
    assert bug(one) == bug(other) != bug(third)


def test_inputs_are_shared_among_the_parsers_as_many_as_asked_for() -> None:
    planned = command.planned(command.parse(["--count", "1000"]))
    assert planned.keys() == OURS.keys()
    assert 1000 <= sum(map(len, planned.values())) < 1000 + len(OURS)
    assert sum(map(len, command.planned(command.parse([])).values())) >= 10_000
    assert command.planned(command.parse(["--only", "config:17"])) == {"config": [17]}
    assert command.planned(command.parse(["--only", "config", "--count", "5"])) == {"config": [1, 2, 3, 4, 5]}


@pytest.mark.parametrize("found", [True, False])
def test_the_exit_code_says_whether_all_were_parsed(
    found: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["fuzz", "--only", "config:1", "--folder", str(tmp_path / "work")])
    monkeypatch.setattr(command, "make_lab", lambda folder, names: Materials(folder))
    monkeypatch.setattr(command, "report", lambda *_: found)
    assert command.main() == (0 if found else 1)
