"""What a trial has at hand: runs to disturb, each with the undisturbed one to compare with, and a folder of its own to do it in.

    lab/                       made once, then only read
      model/  chats.jsonl
      <scene>/disk/run/        the undisturbed run, and what was exported of it
    lab/trials/kill-17-of-7/   one trial, of the seed 7
      disk/                    all that its processes write: run/, cache/, exported/
      said/                    what they said

Knows how a run is started, continued and compared; knows nothing of what is done to it.
"""

from __future__ import annotations

import hashlib
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tests.chats import write_chats
from tests.chosen import without_adapter
from tests.faults.children import Child, Ended
from tests.faults.injected import Clock, Fault, Record
from tests.faults.small import make_model
from tests.processes import options_of
from tests.run_folders import outcome

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
"""Of every process: nothing is fetched, and one thread computes, so that two runs at a time do not slow each other down."""

_COMMON = {"rank": 2, "lr": 1e-2, "batch_size": 4, "epochs": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"dropout": 0.1, "save_every": 2, "keep": 99},
    "best": {
        "lr": 10.0,
        "scheduler": "constant",
        "warmup": 0,
        "valid_fraction": 0.2,
        "eval_every": 1,
        "samples": 2,
        "sample_tokens": 4,
        "save_every": 3,
        "keep": 2,
    },
    "full": {"method": "full", "lr": 1e-3, "max_steps": 6, "save_every": 1, "keep": 1},
    "dated": {"save_every": 3, "keep": 2},
}
"""The runs. Of `best` the best is not the last; the chat template of `dated` writes the day."""

FORMATS = ("merged", "peft")

_DATED = "{{ date_string if date_string is defined else strftime_now('%d %B %Y') }}\n"
_NOON = time.mktime((2026, 1, 15, 12, 0, 0, 0, 0, -1))


class NotSurvived(Exception):
    """What should not have come of it."""


@dataclass(frozen=True, slots=True)
class Scene:
    """A run that was left alone.

    Attributes:
        options: What makes it, by the names of settings.
        disk: Its folder.
        calls: The names of the calls that it made, in their order, by what was done: `train`, or an export's format.
        seconds: It took.
    """

    name: str
    options: dict[str, Any]
    disk: Path
    calls: dict[str, list[str]]
    seconds: float

    @property
    def run(self) -> Path:
        return self.disk / "run"

    def exported(self, format: str) -> Path:
        return self.disk / f"exported-{format}"

    @property
    def clock(self) -> list[Fault]:
        """The day on which it begins, where that matters."""
        return [Clock(_NOON - time.time())] if self.name == "dated" else []


@dataclass(frozen=True, slots=True)
class Lab:
    folder: Path
    scenes: dict[str, Scene]


def make_lab(folder: Path, names: Sequence[str] = tuple(SETTINGS)) -> Lab:
    """The model, the rows, and of each of the scenes the run that is left alone, with its exports."""
    plain, dated = make_model(folder / "model"), make_model(folder / "dated-model")
    template = dated / "chat_template.jinja"
    template.write_text(_DATED + template.read_text())
    chats = write_chats(folder / "chats.jsonl", 24, seed=1)
    check_done(
        Child(["--version"], folder, folder, {}).wait()
    )  # so that what follows is not timed with the first one's imports
    scenes = {}
    for name in names:
        common = without_adapter(_COMMON) if name == "full" else _COMMON
        options = {"data": chats, "model": dated if name == "dated" else plain} | common | SETTINGS[name]
        scenes[name] = _left_alone(Scene(name, options, folder / name / "disk", {}, 0.0))
    return Lab(folder, scenes)


def _left_alone(scene: Scene) -> Scene:
    said = scene.disk.parent / "said"
    scene.disk.mkdir(parents=True)
    said.mkdir()
    started = time.monotonic()
    words = {"train": ["train", "--quiet", *options_of(scene.options | {"out": scene.run})]}
    formats = FORMATS if scene.options.get("method") != "full" else FORMATS[:1]
    words |= {form: export_words(scene.run, scene.exported(form), form) for form in formats}
    calls, seconds = {}, 0.0
    for what, typed in words.items():
        recorded = said / what
        ended = Child(typed, scene.disk, said, _environment(scene.disk), [*scene.clock, Record(recorded)]).wait()
        if ended.code != 0:
            raise NotSurvived(f"what is left alone fails: {' '.join(typed)}\n{ended.err}")
        calls[what] = [line.partition(" ")[0] for line in recorded.read_text().splitlines()]
        seconds = seconds or time.monotonic() - started
    return Scene(scene.name, scene.options, scene.disk, calls, seconds)


def export_words(run: Path, to: Path, format: str) -> list[str]:
    return ["export", "--run", str(run), "--to", str(to), "--format", format]


def _environment(disk: Path) -> dict[str, str]:
    return {"MLX_SFT_CACHE": str(disk / "cache")}


@dataclass(frozen=True, slots=True)
class Trial:
    """One trial.

    Attributes:
        always: Faults of every process, which the trial's own come after.
        timed: Whether something may be done at a time; else all is done at calls, which a seed repeats exactly.
    """

    lab: Lab
    folder: Path
    random: random.Random
    always: tuple[Fault, ...] = ()
    timed: bool = True

    def __post_init__(self) -> None:
        self.disk.mkdir(parents=True)
        self.said.mkdir()

    @property
    def disk(self) -> Path:
        return self.folder / "disk"

    @property
    def said(self) -> Path:
        return self.folder / "said"

    @property
    def run(self) -> Path:
        return self.disk / "run"

    def scene(self, *names: str) -> Scene:
        """One of these, or of all."""
        return self.lab.scenes[
            self.random.choice([name for name in names or self.lab.scenes if name in self.lab.scenes])
        ]

    def start(self, words: Sequence[str], *faults: Fault) -> Child:
        return Child(words, self.disk, self.said, _environment(self.disk), [*self.always, *faults])

    def train(self, scene: Scene, *faults: Fault, quiet: bool = True, json: bool = False) -> Child:
        """The run, begun or continued as it stands."""
        clock = [] if any(isinstance(fault, Clock) for fault in faults) else scene.clock
        if (self.run / "config.yaml").exists():
            return self.resume(*clock, *faults)
        shown = [*(["--quiet"] if quiet else []), *(["--json"] if json else [])]
        return self.start(["train", *shown, *options_of(scene.options | {"out": self.run})], *clock, *faults)

    def resume(self, *faults: Fault) -> Child:
        return self.start(["train", "--quiet", "--resume", str(self.run)], *faults)

    def finish(self, scene: Scene, *faults: Fault, saved: bool = False) -> None:
        """Continue the run to its end, and compare it with the one that was left alone."""
        check_done(self.train(scene, *faults).wait())
        self.compare(scene, saved=saved)

    def compare(self, scene: Scene, *, saved: bool = False) -> None:
        """Raise `NotSurvived` unless the run is the one that was left alone, byte for byte.

        Args:
            saved: Whether what ended it may have saved it, so that there may be a checkpoint of one step more.
        """
        found, wanted = self.found(), expected(scene.run)
        further = {path.parent for path in map(Path, found.keys() - wanted.keys()) if path.parent.name[:5] == "step-"}
        if saved and len(further) == 1:
            found = {name: value for name, value in found.items() if Path(name).parent not in further}
        compare(found, wanted, "the run")

    def found(self) -> dict[str, Any]:
        try:
            return outcome(self.run)
        except ValueError as error:
            raise NotSurvived(f"the run cannot be read: {error}") from error


@lru_cache
def expected(run: Path) -> dict[str, Any]:
    return outcome(run)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def compare(found: dict[str, Any], wanted: dict[str, Any], what: str) -> None:
    if found == wanted:
        return
    lost, more = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    other = sorted(name for name in found.keys() & wanted.keys() if found[name] != wanted[name])
    parts = {"lacks": lost, "has besides": more, "has otherwise": other}
    raise NotSurvived(f"{what} " + "; ".join(f"{verb} {', '.join(names)}" for verb, names in parts.items() if names))


def check_done(ended: Ended) -> None:
    if ended.code != 0:
        raise NotSurvived(f"it ended with {ended.code}: {_shortened(ended.err)}")


def check_refused(ended: Ended, *words: str, codes: tuple[int, ...] = (1,)) -> None:
    """It ended with exit code 1 and one error that says what, where and a way out, these words among them."""
    said = " ".join(ended.err.split())
    if ended.code not in codes or "Traceback" in said or said.count("error: ") != 1 or " hint: " not in said:
        wanted = "it should end with exit code 1 and one error in words"
        raise NotSurvived(f"{wanted}, and ended with {ended.code}: {_shortened(ended.err)}")
    if missing := [word for word in words if word not in said]:
        raise NotSurvived(f"its error does not say {' or '.join(missing)}: {ended.err}")


def _shortened(err: str) -> str:
    """What a process said; of a traceback the places in the product, and the exception."""
    _, traceback, after = err.rpartition("Traceback (most recent call last):\n")
    if not traceback:
        return err
    places = [line for line in after.splitlines() if "/mlx_sft/" in line]
    return "\n".join(["", traceback.strip(), *places, *after.splitlines()[-1:]])


def check_checkpoints(run: Path, scene: Scene) -> None:
    """The checkpoints that are kept are whole, by a reader of `SHA256SUMS` that is not the product's; older ones may be half gone."""
    for folder in sorted(run.glob("checkpoints/step-*"))[-scene.options["keep"] :]:
        names = {"parameters.safetensors", "optimizer.safetensors", "state.json", "SHA256SUMS"}
        if {path.name for path in folder.iterdir()} != names:
            raise NotSurvived(f"{folder.name} has {sorted(path.name for path in folder.iterdir())}")
        lines = (folder / "SHA256SUMS").read_text()
        for digest, name in re.findall(r"^([0-9a-f]{64})  (\S+)$", lines, re.MULTILINE):
            names.discard(name)
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
                raise NotSurvived(f"{folder.name} is torn: {name} is not what SHA256SUMS says")
        if names != {"SHA256SUMS"}:
            raise NotSurvived(f"{folder.name}: SHA256SUMS does not name {sorted(names)}")


def clean(path: Path) -> None:
    """Raise `NotSurvived` where something temporary is left."""
    left = [
        str(found.relative_to(path)) for found in path.rglob(".*") if re.match(r"\.(writing|replaced)-", found.name)
    ]
    if left:
        raise NotSurvived(f"left behind: {', '.join(sorted(left))}")
