"""Each bad input through the command line: one clear error, the right exit code, no traceback, nothing left behind or lost."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_sft import TrainConfig, UserError, export, load_run, train
from mlx_sft.common_settings import option_name
from mlx_sft.errors import FAILURE, USAGE
from mlx_sft.run_folder import RunFolder

Fails = Callable[..., str]


@pytest.fixture
def fails(cli: Callable[..., Any], settings: dict[str, Any]) -> Fails:
    """`fails(exit_code, rank=0, ...)` → what `train` with these settings says on stderr; it must fail and make nothing."""

    def run(exit_code: int, *further: object, **changes: object) -> str:
        named = {name: value for name, value in (settings | changes).items() if value is not None and name != "quiet"}
        words = [word for name, value in named.items() for word in (option_name(name), str(value))]
        result = cli("train", *words, *further)
        assert result.exit_code == exit_code, result.output
        assert result.stdout == ""
        said = str(result.stderr)
        assert said.count("error:") == 1
        assert said.startswith("error: ")
        assert "\nhint: " in said
        assert not Path(settings["out"]).exists(), "half a run is left"
        return said

    return run


GOOD = json.dumps({"messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": "cat"}]})
BAD_ROWS = {
    "not JSON": ("{nope", "not JSON"),
    "not an object": ("[1, 2]", "a row must be an object, not a list"),
    "no known format": ('{"foo": 1}', "a row without a known format: it has 'foo'"),
    "an unknown role": ('{"messages": [{"role": "wizard", "content": "x"}]}', "unknown role 'wizard'"),
    "nothing to train on": ('{"messages": [{"role": "user", "content": "x"}]}', "nothing to train on"),
    "no messages": ('{"messages": []}', "messages"),
    "messages of a wrong kind": ('{"messages": "hello"}', "messages"),
    "half a character": (GOOD.replace("the", "\\ud83d"), "surrogate"),
    "too deep": ("[" * 100_000, "nested too deeply"),
    "not a number of JSON": ('{"text": NaN}', "NaN"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_named_by_file_and_line(fails: Fails, tmp_path: Path, kind: str) -> None:
    line, message = BAD_ROWS[kind]
    data = tmp_path / "chäts.jsonl"
    data.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n")
    said = fails(FAILURE, data=data)
    assert f"error: {data}:3: " in said
    assert message in said
    assert "--skip-bad-rows" in said


def test_bad_rows_are_skipped_where_asked_for_and_reported(
    cli: Callable[..., Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    data = tmp_path / "chats.jsonl"
    lines = [line for line, _ in BAD_ROWS.values()]
    data.write_text("\n".join([GOOD, *lines, GOOD.replace("cat", "dog")]) + "\n")
    words = ("train", "--data", data, "--model", settings["model"], "--out", settings["out"], "--skip-bad-rows")
    refused = cli(*words)
    assert refused.exit_code == FAILURE
    assert f"more than half of the rows are lost, {len(lines)} of {len(lines) + 2}" in refused.stderr
    assert "--allow-lost-rows" in refused.stderr
    result = cli(*words, "--allow-lost-rows")
    assert result.exit_code == 0, result.output
    assert f"2 to train on, 0 held out, {len(lines)} bad" in result.stderr
    report = json.loads((Path(settings["out"]) / "data_report.json").read_text())
    assert report["totals"] == {"rows": len(lines) + 2, "kept": 2, "truncated": 0, "dropped": 0, "bad": len(lines)}
    notes = report["sources"][0]["not_simply_kept"]
    assert [note["origin"] for note in notes] == [f"{data}:{number}" for number in range(2, len(lines) + 2)]
    for note, (_, message) in zip(notes, BAD_ROWS.values(), strict=True):
        assert note["fate"] == "bad"
        assert message in note["reason"]


def test_a_file_of_bad_rows_alone_is_refused_even_so(fails: Fails, tmp_path: Path) -> None:
    data = tmp_path / "chats.jsonl"
    data.write_text("{\n{\n")
    assert "of 2 rows 2 are bad" in fails(FAILURE, "--skip-bad-rows", data=data)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize("content", [b"", b"\n\n", bytes(range(256)) * 3, b"\x00" * 64, b"PAR1junkPAR1"])
def test_a_file_that_holds_no_rows_is_named(fails: Fails, tmp_path: Path, suffix: str, content: bytes) -> None:
    data = tmp_path / f"x.{suffix}"
    data.write_bytes(content)
    assert str(data) in fails(FAILURE, data=data)


@pytest.mark.parametrize("name", ["ä" * 300, "x" * 5000], ids=["too long in bytes", "too long"])
def test_a_run_by_a_name_that_no_file_can_have_is_told(name: str, fails: Fails) -> None:
    assert name in fails(USAGE, resume=name)


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems have no such names")
def test_a_name_that_is_no_utf8_is_read_and_a_model_of_such_a_name_refused(
    fails: Fails, settings: dict[str, Any], tmp_path: Path
) -> None:
    odd = tmp_path / os.fsdecode(b"\xff")
    odd.mkdir()
    data, model = shutil.copy(settings["data"], odd / "x.jsonl"), shutil.copytree(settings["model"], odd / "model")
    said = fails(FAILURE, model=model)
    assert "has a name that is no UTF-8" in said
    assert "hint: rename it" in said
    run = train(TrainConfig(**settings | {"data": str(data), "out": str(odd / "run"), "max_steps": 1})).run_dir
    for format in ("merged", "mlx-lm"):
        with pytest.raises(UserError, match=r"has a name that is no UTF-8"):
            export(run, odd / "exported", format=format)
    assert not (odd / "exported").exists()
    export(run, tmp_path / "exported", format="merged")
    assert load_run(run)


def test_junk_in_any_place_is_never_a_traceback(fails: Fails, chats: Path, tmp_path: Path) -> None:
    rows = chats.read_bytes()
    data = tmp_path / "x.jsonl"
    for place in range(3, len(rows), len(rows) // 12):
        data.write_bytes(rows[:place] + b'"\xff{' + rows[place:])
        assert str(data) in fails(FAILURE, data=data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("none.jsonl", "no such file"),
        ("~no-such-user/x.jsonl", "no such file"),
        ("x" * 5000, "File name too long"),
        ("folder", "the folder holds no rows"),
        ("only-valid", "no train part"),
        ("x.rtf", "not a known kind of file"),
        ("hf:nonsense", "not a dataset id"),
    ],
)
def test_data_that_is_not_there_is_a_usage_error(
    fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "only-valid").mkdir()
    (tmp_path / "only-valid" / "valid.jsonl").write_text(GOOD)
    (tmp_path / "x.rtf").write_text(GOOD)
    said = fails(USAGE, data=data)
    assert message in said
    assert data in said
    if data != "only-valid":
        assert data in fails(USAGE, valid=data)


def test_rows_that_are_not_there_are_told_before_a_model_is_looked_for(cli: Callable[..., Any]) -> None:
    for command in ("train", "plan", "inspect"):
        for words in (["none.jsonl"], ["--data", "none.jsonl:0.5", "--data", "none.jsonl:0.5"]):
            result = cli(command, *words, "--model", "nobody/no-such-model")
            assert (result.exit_code, result.stdout) == (USAGE, "")
            assert "none.jsonl: no such file or folder" in result.stderr


@pytest.fixture
def base(settings: dict[str, Any], tmp_path: Path) -> Path:
    """A checkpoint of one's own to spoil."""
    folder = tmp_path / "base"
    shutil.copytree(settings["model"], folder)
    return folder


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", None, "a model folder without weights"),
        ("config.json", None, "no config.json"),
        ("config.json", "{", "not JSON"),
        ("config.json", "{}", "names no model_type"),
        ("config.json", '{"model_type": "martian"}', "martian"),
        ("tokenizer.json", None, "tokenizer"),
        ("model.safetensors", "torn", "not a valid safetensors file"),
    ],
)
def test_a_model_folder_that_is_not_whole_is_named(
    fails: Fails, base: Path, name: str, content: str | None, message: str
) -> None:
    (base / name).unlink() if content is None else (base / name).write_text(content)
    said = fails(FAILURE, model=base)
    assert str(base) in said
    assert message in said


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_weights_that_are_cut_short_are_named(fails: Fails, base: Path, share: float) -> None:
    weights = base / "model.safetensors"
    os.truncate(weights, int(weights.stat().st_size * share))
    assert f"{weights}: not a valid safetensors file" in fails(FAILURE, model=base)


def test_a_missing_shard_is_named(fails: Fails, make_base: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    shutil.copytree(make_base("qwen3", shard="200KB"), folder)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert f"missing shard {shard.name}" in fails(FAILURE, model=folder)


def test_a_model_that_is_nowhere_is_a_usage_error(fails: Fails, tmp_path: Path) -> None:
    assert "no such model folder" in fails(USAGE, model=tmp_path / "none")
    (tmp_path / "file").touch()
    assert "a model is a folder" in fails(USAGE, model=tmp_path / "file")
    assert "no such model folder" in fails(USAGE, model="~no-such-user/x")


def test_an_adapter_for_another_model_is_refused(fails: Fails, settings: dict[str, Any], tmp_path: Path) -> None:
    train(TrainConfig(**settings | {"out": str(tmp_path / "other"), "max_steps": 1}))
    adapter = tmp_path / "other" / "adapter"
    narrow = _narrower(Path(settings["model"]), tmp_path / "narrow")
    said = fails(FAILURE, rank=None, init_adapter=adapter, model=narrow)
    assert str(adapter) in said
    assert "another model" in said
    assert "--rank 3 differs from the adapter's 2" in fails(USAGE, rank=3, init_adapter=adapter)
    assert "no adapter_config.json" in fails(FAILURE, rank=None, init_adapter=narrow)


def _narrower(base: Path, folder: Path) -> Path:
    """A checkpoint of the same family with another width."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(base, folder)
    config = AutoConfig.from_pretrained(base)
    config.intermediate_size = 32
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("code", "changes", "message"),
    [
        (USAGE, {"rank": 0}, "rank"),
        (FAILURE, {"rank": 10**12}, "rank"),
        (FAILURE, {"target": "no_such_proj"}, "it has down_proj"),
        (USAGE, {"early_stop": 1}, "--early-stop needs validation rows"),
        (USAGE, {"lr": "nan"}, "lr"),
        (USAGE, {"chat_template_kwargs": "[" * 5000}, "chat_template_kwargs"),
        (USAGE, {"config": "c.yaml"}, "c.yaml"),
        (USAGE, {"config": "/"}, "not a regular file"),
        (FAILURE, {"resume": "/"}, "not a run folder"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(
    fails: Fails, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setitem(TrainConfig.model_fields, "config", TrainConfig.model_fields["out"])
    monkeypatch.chdir(tmp_path)
    assert message in fails(code, **changes)


def test_an_unknown_key_of_a_configuration_is_named_with_its_likeness(fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("rnk: 3\n")
    said = fails(USAGE, "--config", tmp_path / "c.yaml")
    assert f'error: {tmp_path / "c.yaml"}: rnk: no such setting\nhint: did you mean "rank"?' in said


def test_huge_numbers_that_mean_something_are_taken(settings: dict[str, Any]) -> None:
    huge = 10**30
    names = ("batch_size", "micro_batch_tokens", "max_length", "keep", "save_every", "eval_every", "epochs")
    result = train(TrainConfig(**settings | dict.fromkeys(names, huge), max_steps=1))
    assert result.steps == 1


def test_an_output_folder_that_holds_something_is_refused_before_any_work(
    cli: Callable[..., Any], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def too_early(*_: object) -> None:
        pytest.fail("the model was looked for first")

    monkeypatch.setattr("mlx_sft.training.setup.resolve_checkpoint", too_early)
    (tmp_path / "mine").write_text("mine")
    for out in (tmp_path, tmp_path / "mine"):
        result = cli("train", "--data", settings["data"], "--out", out)
        assert result.exit_code == FAILURE
        assert f"error: {out}: this folder already holds something\nhint: " in result.stderr
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("limit", [0, 300, 900, 2_500, 6_000, 15_000, 20_000, 30_000])
def test_a_disk_that_is_full_ends_a_run_that_can_go_on(
    settings: dict[str, Any], tmp_path: Path, cli: Callable[..., Any], limit: int
) -> None:
    settings |= {"save_every": 1, "valid_fraction": 0.2, "eval_every": 2}
    words = [w for name, value in settings.items() if name != "quiet" for w in (option_name(name), str(value))]
    whole = tmp_path / "whole"
    train(TrainConfig(**settings | {"out": str(whole)}))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # no file may grow beyond it: a write fails half-way
    try:
        result = cli("train", *words, "--quiet")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert result.exit_code == FAILURE, "this limit is no longer one"
    assert result.stderr.startswith("error: ")
    assert "cannot write: File too large\nhint: " in result.stderr
    run = RunFolder(settings["out"])
    assert not list(run.path.rglob(".writing-*"))
    if run.path.exists():
        train(TrainConfig(resume=str(run.path), quiet=True))
    else:
        train(TrainConfig(**settings))
    assert _files(run.path, ".safetensors") == _files(whole, ".safetensors")


def _files(run: Path, suffix: str) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob(f"*{suffix}")}


def test_a_full_disk_says_so_and_keeps_the_checkpoints_before_it(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(settings["out"])
    sync = os.fsync

    def full(descriptor: int) -> None:
        if run.checkpoint(3).exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="the disk is full") as caught:
            train(TrainConfig(**settings, save_every=1))
    assert caught.value.exit_code == FAILURE
    assert "--resume" in caught.value.hint
    assert run.checkpoint_steps()[:2] == [1, 2]
    train(TrainConfig(resume=str(run.path), quiet=True))
    assert run.checkpoint_steps() == [4, 5, 6]


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_what_may_not_be_read_is_named(fails: Fails, base: Path, chats: Path, tmp_path: Path) -> None:
    data = tmp_path / "secret.jsonl"
    data.write_bytes(chats.read_bytes())
    data.chmod(0)
    assert str(data) in fails(FAILURE, data=data)
    (base / "config.json").chmod(0)
    assert str(base) in fails(FAILURE, model=base)


def test_a_tokenizer_with_more_tokens_than_the_model_has_embeddings_is_refused(
    settings: dict[str, Any], make_base: Callable[..., Path], cli: Callable[..., Any]
) -> None:
    small = make_base("qwen3", vocab_size=100, eos_token_id=1)
    result = cli("train", "--data", settings["data"], "--model", small, "--out", settings["out"])
    assert result.exit_code == 1
    assert "embeddings only for 0 to 99" in result.stderr
    assert not Path(settings["out"]).exists()
