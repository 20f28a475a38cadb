"""What is done to runs, a function each: it disturbs a run of its trial and raises `NotSurvived` where that shows in the end.

Every choice is the trial's `random`'s, so that a seed repeats it. Knows nothing of how many trials there are.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.faults.children import Ended
from tests.faults.injected import STREAMS, Clock, Fault, Kill, PowerCut, Refuse, Stop, Stream, Wait, error_names
from tests.faults.layer import CHANGES
from tests.faults.mounts import can_forbid, can_mount, enlarge, read_only, small_disk
from tests.faults.trial import (
    NotSurvived,
    Scene,
    Trial,
    check_checkpoints,
    check_done,
    check_refused,
    clean,
    compare,
    expected,
    export_words,
    tree,
)
from tests.processes import options_of

_AT_A_CALL = 0.8
"""Share of the kills that come at a call that writes; the others come at a time."""
_CODES = (1, 2)
"""Of errors of the disk: a configuration that cannot be read is one that was wrongly given."""
_YEAR, _HOUR = 365 * 24 * 3600, 3600


@dataclass(frozen=True, slots=True)
class Kind:
    """A way to disturb a run: its trial, how many there are unless asked otherwise, and what it is in words."""

    try_once: Callable[[Trial], None]
    trials: int
    about: str


# --- the process ends -----------------------------------------------------------------------------------------------------------


def kill(trial: Trial) -> None:
    scene = trial.scene()
    for _ in range(trial.random.choice([1, 1, 1, 2, 3])):
        if trial.random.random() < _AT_A_CALL or not trial.timed:
            ended = trial.train(scene, Kill(_call(trial, scene), trial.random.random())).wait()
        else:
            child = trial.train(scene)
            time.sleep(trial.random.random() * scene.seconds)
            child.kill()
            ended = child.wait()
        check_checkpoints(trial.run, scene)
        if not _killed(ended):
            break
    trial.finish(scene)


def power(trial: Trial) -> None:
    scene = trial.scene()
    for _ in range(trial.random.choice([1, 1, 2])):
        cut = PowerCut(_call(trial, scene), trial.random.choice([0, 0, 1, 2, 5, 1000]), trial.random.random())
        ended = trial.train(scene, cut).wait()
        check_checkpoints(trial.run, scene)
        if not _killed(ended):
            break
    trial.finish(scene)


def _call(trial: Trial, scene: Scene, what: str = "train", names: frozenset[str] = CHANGES, after: float = 0.0) -> int:
    """The number of a call of these names that the undisturbed process made, behind a share of them."""
    calls = sum(name in names for name in scene.calls[what])
    return trial.random.randint(1 + int(calls * after), calls)


def _killed(ended: Ended) -> bool:
    """Whether it was, or had ended before."""
    if ended.code == -signal.SIGKILL:
        return True
    check_done(ended)
    return False


# --- the disk ---------------------------------------------------------------------------------------------------------------


def disk(trial: Trial) -> None:
    scene = trial.scene()
    if can_mount() and trial.random.random() < 0.5:
        _small_disk(trial, scene)
        return
    error = trial.random.choice([errno.ENOSPC, errno.ENOSPC, errno.EIO, errno.EDQUOT])
    fault = _refusal(trial, scene, "train", error, lasting=trial.random.random() < 0.6)
    _fails(trial, scene, trial.train(scene, fault).wait())
    if fault.lasting and error != errno.EIO:  # where nothing can be removed either, something stays
        clean(trial.disk)
    trial.finish(scene, saved=True)


def _small_disk(trial: Trial, scene: Scene) -> None:
    used = sum(-(-path.stat().st_size // 4096) * 4096 for path in scene.disk.rglob("*") if path.is_file())
    with small_disk(trial.disk, int(used * trial.random.random()) + 4096):
        try:
            _fails(trial, scene, trial.train(scene).wait())
            clean(trial.disk)
            enlarge(trial.disk, 2**30)
            trial.finish(scene, saved=True)
        except NotSurvived:
            shutil.copytree(trial.disk, trial.folder / "kept")  # before the disk is gone
            raise


def _refusal(trial: Trial, scene: Scene, what: str, error: int, *, lasting: bool) -> Refuse:
    names = error_names(error)
    return Refuse(_call(trial, scene, what, names), error, names, trial.random.random(), lasting)


def _fails(trial: Trial, scene: Scene, ended: Ended) -> None:
    """In words that name the place; or not at all, for some calls can fail and do no harm."""
    check_checkpoints(trial.run, scene)
    if ended.code != 0:
        check_refused(ended, str(trial.disk), codes=_CODES)


def read_only_folder(trial: Trial) -> None:
    """What stands cannot be written to any more: a run that goes on, one that is to begin, or any call from some moment on."""
    scene = trial.scene()
    if trial.random.random() < 0.5 or not can_forbid():
        error = trial.random.choice([errno.EROFS, errno.EACCES])
        _fails(trial, scene, trial.train(scene, _refusal(trial, scene, "train", error, lasting=True)).wait())
        trial.finish(scene, saved=True)
        return
    if trial.random.random() < 0.5:
        _killed(trial.train(scene, Kill(_call(trial, scene, after=0.3))).wait())
    before = tree(trial.disk)
    with read_only(trial.disk):
        ended = trial.train(scene).wait()
    if ended.code != 0 or _is_unfinished(trial, scene):
        check_refused(ended, "no permission to write here", str(trial.run))
    compare(tree(trial.disk), before, "what may not be written to")
    trial.finish(scene)


def _is_unfinished(trial: Trial, scene: Scene) -> bool:
    return not trial.run.exists() or trial.found() != expected(scene.run)


# --- an export ----------------------------------------------------------------------------------------------------------------


def export(trial: Trial) -> None:
    """An export that is killed, or for which there is no space, into a new folder or over an old one."""
    scene = trial.scene()
    format = trial.random.choice([what for what in scene.calls if what != "train"])
    to = trial.disk / "exported"
    old: dict[str, bytes] = {}
    shutil.copytree(scene.run, trial.run)
    words = export_words(trial.run, to, format)
    if trial.random.random() < 0.3:
        shutil.copytree(scene.exported("merged"), to)
        (to / "notes.md").write_text("of an older one")
        old, words = tree(to), [*words, "--overwrite"]
    error = trial.random.choice([0, errno.ENOSPC, errno.ENOSPC, errno.EIO])
    fault: Fault = Kill(_call(trial, scene, format), trial.random.random())
    if error:
        fault = _refusal(trial, scene, format, error, lasting=trial.random.random() < 0.5)
    ended = trial.start(words, fault).wait()
    wanted = tree(scene.exported(format))
    found = tree(to) if to.exists() else {}
    if error and ended.code != 0:
        check_refused(ended, str(trial.disk), codes=_CODES)
    if found not in (old, wanted):
        raise NotSurvived(
            f"there is a part: {', '.join(sorted(found))}" if found else "what was to be replaced is gone"
        )
    if error == errno.ENOSPC:
        clean(trial.disk)
    if ended.code != 0:
        words = [word for word in words if word != "--overwrite"] + (["--overwrite"] if found else [])
        check_done(trial.start(words).wait())
    compare(tree(to), wanted, "the export")
    clean(trial.disk)


# --- checkpoints that are not as they were written ------------------------------------------------------------------------------


def damage(trial: Trial) -> None:
    scene = trial.scene("lora")
    shutil.copytree(scene.run, trial.run)
    for result in [path for path in ("adapter", "README.md") if trial.random.random() < 0.5]:
        path = trial.run / result
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    folders = sorted((trial.run / "checkpoints").iterdir(), reverse=True)
    number = trial.random.choice([*range(1, len(folders)), len(folders)])
    damaged = {folder: _damage(trial, scene, folder) for folder in folders[:number]}
    before = tree(trial.run)
    ended = trial.resume().wait()
    if number == len(folders):
        check_refused(ended, "every checkpoint is damaged", *(folder.name for folder in folders))
        compare(tree(trial.run), before, "a run that was refused")
        return
    check_done(ended)
    said = " ".join(ended.err.split())
    good = int(folders[number].name.removeprefix("step-"))
    for folder, file in damaged.items():
        # Of a list of digests that was changed, the message names the files that no longer match it.
        for word in (folder.name, file if file != "SHA256SUMS" else "", f"goes on from step {good}"):
            if word not in said:
                raise NotSurvived(f"it does not say {word}: {ended.err}")
        shutil.rmtree(folder.with_name(f"damaged-{folder.name}"))
    trial.compare(scene)


def _damage(trial: Trial, scene: Scene, folder: Path) -> str:
    """Do something to a file of a checkpoint, and name the file.

    How long a file is may differ from run to run, and no choice may depend on it: a seed would not repeat the trial.
    """
    path = trial.random.choice(sorted(folder.iterdir()))
    content = bytearray(path.read_bytes())
    place, bit = int(trial.random.random() * len(content)), trial.random.randrange(8)
    what = trial.random.choice(["flip", "flip", "cut", "cut", "add", "remove", "other"])
    # Of the undisturbed run: in this one, another checkpoint may have lost the file, or hold the one of this.
    others = sorted(one for one in (scene.run / "checkpoints").iterdir() if one.name != folder.name)
    other = trial.random.choice(others) / path.name
    if what == "flip":
        content[place] ^= 1 << bit
    elif what == "cut":
        del content[place:]
    elif what == "add":
        content += bytes(1 + place % 9)
    elif what == "other":
        content[:] = other.read_bytes()
    path.write_bytes(content)
    if what == "remove":
        path.unlink()
    return path.name


# --- places that are not what they were, or never were ---------------------------------------------------------------------------


def moved(trial: Trial) -> None:
    """The folder of a run is renamed or removed at a call; the run, which may be killed then, goes on."""
    scene = trial.scene()
    here, there = trial.folder / "here", trial.disk / "renamed"
    child = trial.train(scene, Wait(_call(trial, scene, after=0.3), here))
    if not child.until(here.exists):
        raise NotSurvived(f"it ended early: {child.wait().err}")
    if removed := trial.random.random() < 0.3:
        shutil.rmtree(trial.run)
    else:
        trial.run.rename(there)
    here.unlink()
    if trial.timed and trial.random.random() < 0.3:
        time.sleep(trial.random.random() * scene.seconds / 2)
        child.kill()
    ended = child.wait()
    if trial.run.exists():
        raise NotSurvived(f"it writes where the folder was: {sorted(tree(trial.run))}")
    if removed and ended.code == 1:
        check_refused(ended, "the run folder was removed", str(trial.run))
    elif not removed:
        _killed(ended)
        there.rename(trial.run)
    trial.finish(scene)


def links(trial: Trial) -> None:
    """Links, and other names of files, that someone has put where something is to be written: no file outside is written, nor removed."""
    scene = trial.scene()
    outside, run = trial.folder / "outside", trial.run
    outside.mkdir()
    for name in ("a", "b", "c"):
        (outside / name).write_text(f"{name} of someone")
    before = tree(outside)
    _killed(trial.train(scene, Kill(_call(trial, scene, after=0.3))).wait())
    files = [path for path in sorted(run.rglob("*")) if path.is_file()]
    for path in trial.random.sample(files, len(files) // 2):  # as a backup by hard links has them
        (outside / "backup" / path.relative_to(run)).parent.mkdir(parents=True, exist_ok=True)
        os.link(path, outside / "backup" / path.relative_to(run))
    before |= tree(outside)
    for name in (".writing-adapter_config.json", ".replaced-step-00000004", ".writing-config.yaml"):
        plant = run / trial.random.choice(["", "checkpoints", "adapter"]) / name
        if plant.parent.is_dir() and trial.random.random() < 0.5:
            os.link(outside / "a", plant)
    ended = trial.train(scene).wait()
    check_done(ended)
    for planted in run.rglob(".*"):
        planted.unlink()
    trial.compare(scene)
    _outputs(trial, outside)
    compare(tree(outside), before, "what lies outside")


def _outputs(trial: Trial, outside: Path) -> None:
    """Each file and folder that a command writes, in the place of a link."""
    to, data = trial.disk / "exported", str(trial.lab.folder / "chats.jsonl")
    model = str(trial.lab.folder / "model")
    words = {
        "page.html": ["inspect", "--data", data, "--model", model, "--html"],
        "clean.jsonl": ["inspect", "--data", data, "--model", model, "--overwrite", "--write-clean"],
    }
    for name, typed in words.items():
        target = trial.disk / name
        for plant in (target, target.with_name(f".writing-{name}")):
            trial.random.choice([os.symlink, os.link])(outside / trial.random.choice("abc"), plant)
        check_done(trial.start([*typed, str(target)]).wait())
        if target.is_symlink() or target.stat().st_nlink != 1:
            raise NotSurvived(f"{name} is another file still")
    to.symlink_to(trial.random.choice([outside, outside / "nowhere"]))
    for typed in (export_words(trial.run, to, "peft"), ["train", "--data", data, "--model", model, "--out", str(to)]):
        check_refused(trial.start(typed).wait(), "a symbolic link", str(to))


# --- where it is written to ---------------------------------------------------------------------------------------------------------


def streams(trial: Trial) -> None:
    """An output fails from the beginning: all is done and saved, and where something is lost on stdout the exit code says so."""
    scene = trial.scene()
    descriptor, what = trial.random.choice([1, 2]), trial.random.choice(STREAMS[:-1])
    lines = trial.random.random() < 0.5
    ended = trial.train(scene, Stream(descriptor, what), quiet=False, json=lines).wait()
    code = 0 if descriptor == 2 or what == "gone" else 1
    if ended.code != code or "Traceback" in ended.err or "Exception ignored" in ended.err:
        raise NotSurvived(f"it should end with {code}, and ended with {ended.code}: {ended.err}")
    if code == 1 and "standard output cannot be written" not in ended.err:
        raise NotSurvived(f"it does not say what it could not write: {ended.err}")
    trial.compare(scene)


def unread(trial: Trial) -> None:
    """Nobody reads stdout or stderr, and a signal asks the run to stop; or two do, at once or a little later."""
    scene = trial.scene()
    descriptor, room = trial.random.choice([1, 1, 2]), trial.random.choice([0, 4096, 8192])
    child = trial.train(scene, Stream(descriptor, "unread", room), quiet=descriptor == 1, json=descriptor == 1)
    metrics, deadline = (
        trial.run / "metrics.jsonl",
        time.monotonic() + 10,
    )  # it may wait for its reader before it begins
    child.until(lambda: time.monotonic() > deadline or (metrics.exists() and metrics.stat().st_size > 0))
    number = trial.random.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    for _ in range(trial.random.choice([1, 2])):
        with suppress(ProcessLookupError):
            os.kill(child.pid, number)
        time.sleep(trial.random.choice([0.0, 0.1]))
    ended = child.wait()
    if ended.code not in (0, 128 + number, -number) or "Traceback" in ended.err:
        raise NotSurvived(f"it should end with {128 + number}, and ended with {ended.code}: {ended.err}")
    check_checkpoints(trial.run, scene)
    trial.finish(scene, saved=True)


# --- the time, other processes, the terminal -------------------------------------------------------------------------------------


def clock(trial: Trial) -> None:
    """The clock jumps, back or ahead, in the middle of a run and before it goes on."""
    scene = trial.scene()
    jumps = [-_HOUR, -_HOUR, -_YEAR, -_YEAR, _HOUR, _YEAR, -40 * _YEAR]
    began = scene.clock[0].off if scene.clock else 0.0
    jump = Clock(began, began + trial.random.choice(jumps), _call(trial, scene, after=0.5))
    if trial.random.random() < 0.6:
        _killed(trial.train(scene, jump, Kill(_call(trial, scene, after=0.5))).wait())
    else:
        check_done(trial.train(scene, jump).wait())
    trial.finish(scene, Clock(began + trial.random.choice(jumps)))


def two(trial: Trial) -> None:
    """Another process takes up, or begins, a run that a process is at; or two begin it at once."""
    scene = trial.scene()
    if trial.random.random() < 0.3 and trial.timed:
        _both_begin(trial, scene)
        return
    here = trial.folder / "here"
    first = trial.train(scene, Wait(_call(trial, scene, after=0.5), here))
    if not first.until(here.exists):
        raise NotSurvived(f"the first ended early: {first.wait().err}")
    try:
        check_refused(trial.resume().wait(), "another process is training this run", str(trial.run))
        check_refused(trial.start(_begin(trial, scene)).wait(), "this folder already holds something", str(trial.run))
    finally:
        here.unlink()
    check_done(first.wait())
    trial.compare(scene)


def _begin(trial: Trial, scene: Scene) -> list[str]:
    return ["train", "--quiet", *options_of(scene.options | {"out": trial.run})]


def _both_begin(trial: Trial, scene: Scene) -> None:
    children = [trial.start(_begin(trial, scene), *scene.clock) for _ in range(2)]
    first, second = sorted((child.wait() for child in children), key=lambda ended: ended.code)
    check_done(first)
    check_refused(second, str(trial.run))
    trial.compare(scene)


def stop(trial: Trial) -> None:
    """Ctrl-Z and `fg`: at a call, or at a time."""
    scene = trial.scene()
    if trial.random.random() < 0.6 or not trial.timed:
        child = trial.train(scene, Stop(_call(trial, scene)))
    else:
        child = trial.train(scene)
        time.sleep(trial.random.random() * scene.seconds)
        with suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGTSTP)
    if child.until(child.is_stopped):
        os.kill(child.pid, signal.SIGCONT)
    check_done(child.wait())
    trial.compare(scene)


KINDS = {
    "kill": Kind(kill, 100, "SIGKILL at calls that write and at random times, up to three times in one run"),
    "power": Kind(power, 40, "the same, and all that was not synced is lost"),
    "disk": Kind(disk, 60, "a disk that is full or broken: a small one where it can be mounted, else failing calls"),
    "export": Kind(export, 60, "exports that are killed, or fail for the disk"),
    "damage": Kind(damage, 40, "checkpoints with a bit, a part or a file that is not theirs"),
    "moved": Kind(moved, 40, "a run folder that is renamed or removed"),
    "links": Kind(links, 20, "links, and other names of files, in the place of everything that is written"),
    "read-only": Kind(read_only_folder, 20, "folders that may not be written to"),
    "clock": Kind(clock, 20, "a clock that jumps by an hour or years"),
    "two": Kind(two, 10, "two processes on one run"),
    "streams": Kind(streams, 40, "standard output or error on a full disk, closed, or without a reader"),
    "unread": Kind(unread, 20, "signals while nobody reads what the run writes"),
    "stop": Kind(stop, 10, "SIGTSTP, then SIGCONT"),
}
"""Every kind by its name."""
