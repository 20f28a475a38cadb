"""The cache of tokenized rows: what it depends on, and that it is whole or absent whatever happens."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from mlx_sft import writing
from mlx_sft.data import cache
from mlx_sft.data.dataset import CONTENTS, TABLE, Examples
from mlx_sft.data.example import SPAN
from mlx_sft.data.keys import KeyRules
from mlx_sft.errors import UserError
from mlx_sft.files import cache_folder

WriteRows = Callable[..., str]
HERE = Path(__file__).parent
pytestmark = pytest.mark.usefixtures("folder")
FILES = ["token_ids", "spans", "table", "origins", "rows.json", "checksums.json"]


@pytest.fixture
def rows(write_rows: WriteRows) -> str:
    return write_rows(*({"text": f"row {number}"} for number in range(300)), {"text": "bad"}, "nonsense")


def texts(result: Any) -> list[str]:
    return [bytes(example.token_ids.astype("u1")).decode() for example in Examples([result.store])]


def entries(folder: Path) -> list[str]:
    """The names in the cache."""
    return sorted(path.name for path in folder.iterdir())


def start(rows: str, workers: int = 1) -> subprocess.Popen[str]:
    """Another process that tokenizes the file."""
    command = [sys.executable, str(HERE / "stand_in.py"), rows, str(workers)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def outcome(process: subprocess.Popen[str]) -> dict[str, Any]:
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    result: dict[str, Any] = json.loads(output)
    return result


# What it holds


def test_a_second_run_finds_the_rows_of_the_first(stand_in: ModuleType, rows: str, folder: Path) -> None:
    told = stand_in.Told()
    first, second = stand_in.read(rows, told), stand_in.read(rows, told)
    assert told.sources == [(rows, 302, False), (rows, 302, True)]
    assert texts(first) == texts(second) == [f"row {number}" for number in range(300)]
    assert (first.sha256, first.store.row_format) == (second.sha256, second.store.row_format)
    assert second.store.row_format == "text"
    assert len(entries(folder)) == 1
    assert [example.origin for example in Examples([second.store])][-1] == f"{rows}:300"


def test_lost_rows_are_remembered_with_their_numbers_and_reasons(stand_in: ModuleType, rows: str) -> None:
    lost: list[Any] = []
    for _ in range(2):
        lost.clear()
        stand_in.read(rows, on_lost=lost.append)
        assert [(row.number, row.note.origin, row.note.fate) for row in lost] == [
            (300, f"{rows}:301", "bad"),
            (301, f"{rows}:302", "bad"),
        ]
        assert lost[0].note.reason == "a bad row"
        assert lost[1].note.hint


def test_the_rows_of_a_renamed_file_have_its_new_name(
    stand_in: ModuleType, write_rows: WriteRows, tmp_path: Path
) -> None:
    rows = write_rows({"text": "plain"}, {"prompt": "a", "completion": "b"}, "nonsense")
    stand_in.read(rows)
    moved, told = tmp_path / "elsewhere" / "other.jsonl", stand_in.Told()
    moved.parent.mkdir()
    Path(rows).rename(moved)
    for _ in range(2):
        result = stand_in.read(moved, told)
        assert Examples([result.store])[0].origin == f"{moved}:1"
        mixed, bad = result.store.lost
        assert mixed.mixed
        assert (mixed.note.origin, bad.note.origin) == (f"{moved}:2", f"{moved}:3")
        assert f"{moved}:1 is text" in mixed.note.reason
    assert told.sources == [(str(moved), 3, False), (str(moved), 3, True)]


def test_an_abandoned_reading_leaves_nothing(stand_in: ModuleType, rows: str, folder: Path) -> None:
    def refuse(row: Any) -> None:
        raise UserError("enough")

    with pytest.raises(UserError, match="enough"):
        stand_in.read(rows, on_lost=refuse)
    assert entries(folder) == []
    stand_in.read(rows)
    with pytest.raises(UserError, match="enough"):
        stand_in.read(rows, on_lost=refuse)


# What it depends on


def test_whatever_could_change_an_example_misses(stand_in: ModuleType, rows: str) -> None:
    pipelines = [
        stand_in.make_pipeline(),
        stand_in.make_pipeline(stand_in.Encoder("{{ messages }}")),
        stand_in.make_pipeline(stand_in.Encoder(train_on="last")),
        stand_in.make_pipeline(stand_in.Encoder(template_kwargs={"enable_thinking": False})),
        stand_in.make_pipeline(stand_in.Encoder(append_eos=True)),
        stand_in.make_pipeline(special_in_content="keep"),
        replace(stand_in.make_pipeline(), keys=KeyRules(ignore_unknown=True)),
    ]
    told = stand_in.Told()
    for pipeline in (*pipelines, *pipelines):
        stand_in.read(rows, told, pipeline=pipeline)
    assert [cached for *_, cached in told.sources] == [False] * 7 + [True] * 7
    Path(rows).write_text('{"text": "another"}\n')
    assert texts(stand_in.read(rows)) == ["another"]


def test_every_part_of_the_tokenizer_is_in_the_key(make_tokenizer: Any) -> None:
    from mlx_sft.config import TrainConfig
    from mlx_sft.data.pipeline import Pipeline

    def key(tokenizer: Any, **settings: Any) -> str:
        config = TrainConfig(data="a.jsonl", **settings)
        return cache.entry_key("0" * 64, "a.jsonl", Pipeline.from_config(config, tokenizer))

    grown = make_tokenizer()
    grown.add_tokens(["more"])
    split = make_tokenizer()
    split.split_special_tokens = True
    keys = [
        key(make_tokenizer()),
        key(make_tokenizer("{{ messages }}")),
        key(make_tokenizer(eos="<|endoftext|>")),
        key(grown),
        key(make_tokenizer(), format="text"),
        key(make_tokenizer(), columns={"user": "question"}),
        key(make_tokenizer(), system="fold"),
        key(make_tokenizer(), roles={"hero": "assistant"}),
        key(make_tokenizer(), roles={"hero": "user"}),
        key(make_tokenizer(), train_think_prefill=False),
        key(split),
        key(make_tokenizer(), chat_template_kwargs={"user": {"name": "A", "age": 3}}),
        key(make_tokenizer(), chat_template_kwargs={"user": {"age": 3, "name": "A"}}),
    ]
    assert len(set(keys)) == len(keys)
    assert key(make_tokenizer(name="moved")) == keys[0]
    cut = make_tokenizer()
    cut.backend_tokenizer.enable_truncation(512)  # as it is saved after a training; the first text turns it off
    cut.backend_tokenizer.enable_padding()
    assert key(cut) == keys[0]


def test_the_day_matters_only_where_the_template_writes_it(
    stand_in: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(template: str, **template_kwargs: str) -> str:
        encoder = stand_in.Encoder(template, template_kwargs=template_kwargs)
        return cache.entry_key("0" * 64, "a.jsonl", stand_in.make_pipeline(encoder))

    class Tomorrow(cache.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return super().now(tz).replace(year=2000)

    dated = "{{ date_string or strftime_now('%d') }}"
    always = "{{ strftime_now('%d') }}"
    today = [key("plain"), key(dated, date_string="1 May"), key(dated), key(always, date_string="1 May")]
    monkeypatch.setattr(cache, "datetime", Tomorrow)
    tomorrow = [key("plain"), key(dated, date_string="1 May"), key(dated), key(always, date_string="1 May")]
    assert today[:2] == tomorrow[:2]
    assert today[2] != tomorrow[2]
    assert today[3] != tomorrow[3]


def test_the_same_content_under_another_name_is_another_entry(stand_in: ModuleType) -> None:
    pipeline = stand_in.make_pipeline()
    names = ["a.jsonl", "a.json", "a.csv", "b.jsonl", "folder/a.jsonl"]
    assert len({cache.entry_key("0", name, pipeline) for name in names}) == len(names)


def test_an_edit_that_leaves_size_and_time_as_they_were_misses(stand_in: ModuleType, rows: str) -> None:
    first = stand_in.read(rows)
    before = Path(rows).stat()
    Path(rows).write_text(Path(rows).read_text().replace("row 1", "row 2"))
    os.utime(rows, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert Path(rows).stat().st_size == before.st_size
    assert stand_in.read(rows).sha256 != first.sha256


# Damage, kills and other runs


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_entry_is_noticed_and_made_again(
    stand_in: ModuleType, rows: str, folder: Path, file: str, damage: str
) -> None:
    expected = texts(stand_in.read(rows))
    (name,) = entries(folder)
    path = folder / name / file
    content = path.read_bytes()
    middle = len(content) // 2
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(
            content[:middle]
            if damage == "cut"
            else content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
        )
    told = stand_in.Told()
    result = stand_in.read(rows, told)
    assert texts(result) == expected
    assert told.sources == [(rows, 302, False)]
    assert "is damaged" in told.notes[0]
    assert entries(folder) == [name]
    assert (folder / name / file).read_bytes()[:middle] == content[:middle]
    stand_in.read(rows, told)
    assert told.sources[-1] == (rows, 302, True)


def forge_rows(entry: Path, **values: Any) -> None:
    file = entry / "rows.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def forge_array(entry: Path, file: str, dtype: Any, change: Callable[[Any], None]) -> None:
    array = np.fromfile(entry / file, dtype)
    change(array)
    array.tofile(entry / file)


def pipe_in_place(entry: Path) -> None:
    (entry / "spans").unlink()
    os.mkfifo(entry / "spans")


@pytest.mark.parametrize(
    "forge",
    [
        lambda entry: forge_rows(entry, rows="many"),
        lambda entry: forge_rows(entry, lost=[{"number": 1}]),
        lambda entry: forge_rows(entry, rows=1),
        lambda entry: forge_array(entry, "table", TABLE, lambda table: table["first_token"].fill(2**62)),
        lambda entry: forge_array(entry, "table", TABLE, lambda table: table["characters"].fill(-1)),
        lambda entry: forge_array(entry, "contents", CONTENTS, lambda contents: contents["length"].fill(2**30)),
        lambda entry: forge_array(entry, "token_ids", "<i4", lambda ids: ids.fill(-5)),
        lambda entry: forge_array(entry, "spans", SPAN, lambda spans: spans["weight"].fill(np.nan)),
        pipe_in_place,
    ],
)
def test_an_entry_with_values_that_none_has_is_made_again(
    stand_in: ModuleType, rows: str, folder: Path, forge: Callable[[Path], None]
) -> None:
    """Its checksums are right, as one makes them who has changed it on purpose."""
    expected = texts(stand_in.read(rows))
    (name,) = entries(folder)
    forge(folder / name)
    sums = {file.name: zlib.crc32(file.read_bytes()) for file in (folder / name).iterdir() if file.is_file()}
    (folder / name / "checksums.json").write_text(
        json.dumps({file: sums[file] for file in sums if file != "checksums.json"})
    )
    told = stand_in.Told()
    assert texts(stand_in.read(rows, told)) == expected
    assert told.sources == [(rows, 302, False)]


def test_a_kill_in_the_middle_leaves_what_the_next_run_removes(
    stand_in: ModuleType, write_rows: WriteRows, folder: Path
) -> None:
    slow = write_rows(*({"text": f"row {n}"} for n in range(200)), {"text": "wait 60"}, name="slow.jsonl")
    process = start(slow)
    for _ in range(600):
        if folder.exists() and any(path.name.startswith(".writing") for path in folder.iterdir()):
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (left,) = entries(folder)
    assert left.startswith(".writing")
    other = write_rows({"text": "plain"})
    assert texts(stand_in.read(other)) == ["plain"]
    (entry,) = entries(folder)
    assert not entry.startswith(".writing")


def test_what_a_living_run_is_writing_stays(stand_in: ModuleType, rows: str, folder: Path) -> None:
    with cache.writing(folder / "key", stand_in.Told()) as written:
        stand_in.read(rows)
        assert written.parent == folder
        assert written.exists()
    assert len(entries(folder)) == 1


def test_what_a_run_of_another_machine_is_writing_stays_for_a_month(
    stand_in: ModuleType, rows: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(writing, "_THIS_MACHINE", "0" * 8)
        patch.setattr(os, "getpid", lambda: 2**22 + 1)  # that of no process
        folder.mkdir()
        theirs = cache.writing(folder / "key", stand_in.Told())
        written = theirs.__enter__()
    stand_in.read(rows)
    assert written.exists()
    month = time.time() - 31 * 24 * 3600
    os.utime(written, (month, month))
    stand_in.read(rows, pipeline=stand_in.make_pipeline(special_in_content="keep"))
    assert not written.exists()
    theirs.__exit__(None, None, None)


def test_concurrent_runs_agree_and_leave_one_entry(write_rows: WriteRows, folder: Path) -> None:
    rows = write_rows(*({"text": f"row {n}"} for n in range(400)), {"text": "wait 0.5"})
    results = [outcome(process) for process in [start(rows), start(rows)]]
    assert results[0]["fingerprint"] == results[1]["fingerprint"]
    assert {result["rows"] for result in results} == {401}
    assert len(entries(folder)) == 1
    assert outcome(start(rows))["cached"]


def test_whoever_comes_second_leaves_the_first_ones(
    stand_in: ModuleType, rows: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = cache.Writer.finish

    def finish_late(writer: cache.Writer) -> Any:
        monkeypatch.setattr(cache.Writer, "finish", finish)
        stand_in.read(rows)
        return finish(writer)

    monkeypatch.setattr(cache.Writer, "finish", finish_late)
    assert len(texts(stand_in.read(rows))) == 300
    assert len(entries(folder)) == 1
    told = stand_in.Told()
    stand_in.read(rows, told)
    assert told.sources == [(rows, 302, True)]


def test_an_entry_can_be_removed_while_it_is_in_use(stand_in: ModuleType, rows: str, folder: Path) -> None:
    result = stand_in.read(rows)
    shutil.rmtree(folder)
    assert texts(result)[-1] == "row 299"
    assert len(list(result.store.lost)) == 2


def test_ctrl_c_leaves_nothing(stand_in: ModuleType, rows: str, folder: Path) -> None:
    def interrupt(row: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stand_in.read(rows, on_lost=interrupt)
    assert entries(folder) == []


def test_a_file_that_changes_while_it_is_read_is_refused(stand_in: ModuleType, rows: str, folder: Path) -> None:
    def append(row: Any) -> None:
        with Path(rows).open("a") as file:
            file.write("{}\n")

    with pytest.raises(UserError, match="it changed while it was being read"):
        stand_in.read(rows, on_lost=append)
    assert entries(folder) == []


# Where it is, and what stays in it


def test_entries_that_no_run_has_used_for_a_month_are_removed_when_one_is_written(
    stand_in: ModuleType, write_rows: WriteRows, folder: Path
) -> None:
    files = [write_rows({"text": name}, name=f"{name}.jsonl") for name in ("old", "used")]
    for file in files:
        stand_in.read(file)
    month = time.time() - 31 * 24 * 3600
    for name in entries(folder):
        os.utime(folder / name, (month, month))
    stand_in.read(files[1])
    stand_in.read(write_rows({"text": "new"}))
    told = stand_in.Told()
    for file in (files[1], files[0]):
        stand_in.read(file, told)
    assert [cached for *_, cached in told.sources] == [True, False]


def test_without_the_cache_nothing_is_left_on_the_disk(
    stand_in: ModuleType, rows: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    result = stand_in.read(rows, keep=False)
    assert len(texts(result)) == 300
    assert not folder.exists()
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_source_without_a_digest_is_read_each_time(
    stand_in: ModuleType, rows: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stand_in.FileSource, "sha256", lambda self: None)
    told = stand_in.Told()
    for _ in range(2):
        assert len(texts(stand_in.read(rows, told))) == 300
    assert [cached for *_, cached in told.sources] == [False, False]
    assert not folder.exists()


def test_a_cache_that_cannot_be_written_to_is_done_without(
    stand_in: ModuleType, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLX_SFT_CACHE", str(tmp_path / "file" / "cache"))
    told = stand_in.Told()
    assert len(texts(stand_in.read(rows, told))) == 300
    assert "cannot write to the cache" in told.notes[0]
    assert "MLX_SFT_CACHE" in told.notes[0]


def test_a_full_disk_is_one_clear_error(
    stand_in: ModuleType, rows: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache.Writer, "append", full)
    with pytest.raises(UserError, match="the disk is full") as caught:
        stand_in.read(rows)
    assert caught.value.where == str(folder)
    assert "MLX_SFT_CACHE" in caught.value.hint
    assert entries(folder) == []


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == Path(os.environ["MLX_SFT_CACHE"])
    monkeypatch.delenv("MLX_SFT_CACHE")
    assert cache_folder() == tmp_path / "mlx-sft"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == Path.home() / ".cache" / "mlx-sft"


def test_for_a_user_without_a_home_no_rows_are_kept_where_others_could_put_theirs(
    stand_in: ModuleType, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("MLX_SFT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", without)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    assert cache_folder() is None
    told = stand_in.Told()
    for _ in range(2):
        assert len(texts(stand_in.read(rows, told))) == 300
    assert told.sources == [(rows, 302, False)] * 2
    assert list((tmp_path / "temporary").iterdir()) == []


# Memory


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    def peak(megabytes: int) -> int:
        path = tmp_path / f"{megabytes}.jsonl"
        with path.open("w") as file:
            for number in range(megabytes * 250):
                file.write(json.dumps({"text": f"{number} ".ljust(3980, "x")}) + "\n")
        result = outcome(start(str(path)))
        assert result["rows"] == megabytes * 250
        memory: int = result["peak"]
        return memory

    assert peak(30) - peak(3) < 10_000_000
