"""A run is published as it was exported and verified, with a card whose code works; or it is refused before any work is done."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlx_sft import TrainConfig, UserError, export, push, train
from mlx_sft.errors import USAGE
from mlx_sft.run_folder import RunFolder
from tests.chosen import without_adapter
from tests.hub import TOKEN, Hub

# PEFT asks a transformers model, and huggingface_hub sends files, in a way that has been renamed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning"),
]

Cli = Callable[..., Any]


@pytest.fixture
def run(train_once: Callable[..., Path], settings: dict[str, Any]) -> Path:
    """A finished run with validation."""
    return Path(shutil.copytree(train_once(valid_fraction=0.2), settings["out"]))


def arrived(hub: Hub, name: str = "me/model") -> dict[str, bytes]:
    return {path: content for path, content in hub.repositories[name].files.items() if path != ".gitattributes"}


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def metadata(card: bytes) -> dict[str, Any]:
    return yaml.safe_load(card.decode().split("---\n")[1])


def run_code(card: bytes, folder: Path, capsys: pytest.CaptureFixture[str], **names: object) -> int:
    """Run each piece of code of a card, with folders in the place of what would be fetched; how many there were."""
    pieces = re.findall(r"```python\n(.*?)```", card.decode(), re.DOTALL)
    for code in pieces:
        for name, path in names.items():
            code = code.replace(name.replace("__", "/"), str(path))
        code = re.sub(r"snapshot_download\(.*?\)", repr(str(folder)), code).replace('"me/model"', repr(str(folder)))
        assert "me/model" not in code
        exec(compile(code.replace("=256", "=3"), "card", "exec"), {})  # noqa: S102
        assert capsys.readouterr().out != "", "it prints no answer"
    return len(pieces)


def unpacked(hub: Hub, folder: Path) -> Path:
    for name, content in arrived(hub).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


# --- what is published ------------------------------------------------------------------------------------------------------------


def test_a_merged_checkpoint_arrives_as_it_is_exported(hub: Hub, cli: Cli, run: Path, tmp_path: Path) -> None:
    result = cli("push", run, "--repo", "me/model")
    assert (result.exit_code, result.stdout) == (0, f"{hub.url}/me/model\n")
    assert "verified on " in result.stderr
    assert "the licence of the base is not known here" in result.stderr
    exported = tree(export(run, tmp_path / "exported").path)
    files = arrived(hub)
    card = files.pop("README.md")
    assert files == exported
    assert {"model.safetensors", "config.json", "tokenizer.json", "LICENSE"} <= files.keys()
    assert metadata(card)["library_name"] == "transformers"
    assert not hub.repositories["me/model"].private
    assert hub.repositories["me/model"].commits[-1].startswith("Upload with mlx-sft ")


def test_an_adapter_arrives_for_peft_and_for_mlx_lm(hub: Hub, cli: Cli, run: Path, tmp_path: Path) -> None:
    result = cli("push", run, "--repo", "ours/adapter", "--adapter-only", "--private")
    assert (result.exit_code, result.stdout) == (0, f"{hub.url}/ours/adapter\n")
    assert hub.repositories["ours/adapter"].private
    files = arrived(hub, "ours/adapter")
    assert files.keys() == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors"),
        *("mlx-lm/adapter_config.json", "mlx-lm/adapters.safetensors"),
    }
    assert files["adapter_model.safetensors"] == (run / "adapter" / "adapter_model.safetensors").read_bytes()
    for_mlx_lm = export(run, tmp_path / "mlx-lm", format="mlx-lm").path
    assert files["mlx-lm/adapters.safetensors"] == (for_mlx_lm / "adapters.safetensors").read_bytes()
    assert metadata(files["README.md"])["library_name"] == "peft"


def test_a_full_run_is_a_checkpoint(hub: Hub, settings: dict[str, Any]) -> None:
    run = train(TrainConfig(**without_adapter(settings) | {"method": "full", "max_steps": 1})).run_dir
    result = push(run, "me/model")
    assert result.url == f"{hub.url}/me/model"
    assert repr(result) == f"PushResult(me/model: {len(result.files)} files, {result.url})"
    assert "every weight was trained" in arrived(hub)["README.md"].decode()


def test_no_file_tells_of_this_machine(hub: Hub, run: Path, settings: dict[str, Any]) -> None:
    push(run, "me/merged")
    push(run, "me/adapter", adapter_only=True)
    for name in ("me/merged", "me/adapter"):
        for path, content in arrived(hub, name).items():
            for secret in (Path(settings["model"]).parent, run, Path(settings["data"]).parent, Path.home()):
                assert f"{secret}/".encode() not in content, (path, secret)
    config = json.loads(arrived(hub, "me/adapter")["adapter_config.json"])
    assert config["base_model_name_or_path"] == Path(settings["model"]).name
    config = json.loads(arrived(hub, "me/adapter")["mlx-lm/adapter_config.json"])
    assert config["model"] == Path(settings["model"]).name


def test_an_adapter_that_mlx_lm_has_no_place_for_is_pefts_alone(
    hub: Hub, settings: dict[str, Any], make_base: Callable[..., Path]
) -> None:
    base = str(make_base("qwen3"))
    run = train(TrainConfig(**settings | {"model": base, "target": ["q_proj", "lm_head"], "max_steps": 1})).run_dir
    told: list[str] = []
    push(run, "me/model", adapter_only=True, note=told.append)
    assert "there will be no files for mlx-lm: mlx-lm has no place for an adapter on lm_head" in told
    assert arrived(hub).keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert b"mlx_lm" not in arrived(hub)["README.md"]


def test_a_base_from_the_hub_is_named_in_the_adapter(
    hub: Hub, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    snapshot = tmp_path / "cache" / "models--some--base" / "snapshots" / ("0" * 40)
    shutil.copytree(settings["model"], snapshot)
    run = train(TrainConfig(**settings | {"model": str(snapshot), "max_steps": 1})).run_dir
    push(run, "me/model", adapter_only=True)
    assert json.loads(arrived(hub)["adapter_config.json"])["base_model_name_or_path"] == "some/base"
    found = metadata(arrived(hub)["README.md"])
    assert (found["base_model"], found["base_model_relation"]) == ("some/base", "adapter")


def test_the_code_of_a_card_of_a_checkpoint_works(
    hub: Hub, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    push(run, "me/model")
    folder = unpacked(hub, tmp_path / "fetched")
    assert run_code(arrived(hub)["README.md"], folder, capsys) == 2


def test_the_code_of_a_card_of_an_adapter_works(
    hub: Hub, run: Path, settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    push(run, "me/model", adapter_only=True)
    folder = unpacked(hub, tmp_path / "fetched")
    assert run_code(arrived(hub)["README.md"], folder, capsys, path__to__the__base=settings["model"]) == 2


# --- a dry run ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter_only", [False, True])
def test_a_dry_run_shows_all_of_it_and_asks_no_one(
    logged_out: None, cli: Cli, run: Path, tmp_path: Path, adapter_only: bool
) -> None:
    before = tree(tmp_path)
    words = ["push", run, "--repo", "me/model", "--private", "--dry-run", *(["--adapter-only"] if adapter_only else [])]
    result = cli(*words)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("me/model (private): ")
    weights = "adapter_model.safetensors" if adapter_only else "model.safetensors"
    assert re.search(rf"^  {weights} +[\d,]+ bytes$", result.stdout, re.MULTILINE)
    assert "\nREADME.md:\n\n---\n" in result.stdout
    assert "# me/model\n" in result.stdout
    assert tree(tmp_path) == before, "something is left"


def test_a_dry_run_shows_what_a_push_sends(hub: Hub, run: Path) -> None:
    shown = push(run, "me/model", dry_run=True)
    assert hub.asked == []
    assert shown.url is None
    assert shown.verification is not None
    push(run, "me/model")
    files = arrived(hub)
    assert shown.files == {path: len(files[path]) for path in sorted(files)}
    assert shown.card.encode() == files["README.md"]


# --- what is refused ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever begins to write or verify anything fails."""

    def export(*arguments: object, **options: object) -> None:
        raise AssertionError("it has begun")

    monkeypatch.setattr(import_module("mlx_sft.convert.publish"), "export", export)


def test_without_a_token_no_work_is_done(logged_out: None, cli: Cli, run: Path, no_work: None) -> None:
    result = cli("push", run, "--repo", "me/model")
    assert result.exit_code == 1
    assert "error: " in result.stderr
    assert "--dry-run" in result.stderr


@pytest.mark.parametrize("request_", ["GET /api/whoami-v2", "GET /api/models/me/model"])
def test_a_hub_that_refuses_is_asked_before_the_work(hub: Hub, run: Path, no_work: None, request_: str) -> None:
    hub.refusals[request_] = (403, "no")
    with pytest.raises(UserError, match="the token may not do this"):
        push(run, "me/model")


def test_an_upload_that_fails_leaves_nothing_behind_and_works_once_more(
    hub: Hub, cli: Cli, run: Path, tmp_path: Path
) -> None:
    before = tree(tmp_path)
    hub.refusals["PUT /storage"] = (403, "no room")
    result = cli("push", run, "--repo", "me/model")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "error: me/model: the token may not do this (403: no room)" in result.stderr
    assert arrived(hub) == {}
    hub.refusals = {"POST /api/models/me/model/commit": (0, "")}  # the weights are there by now
    assert cli("push", run, "--repo", "me/model").exit_code == 1
    assert arrived(hub) == {}
    assert tree(tmp_path) == before
    hub.refusals = {}
    assert cli("push", run, "--repo", "me/model").exit_code == 0
    assert "model.safetensors" in arrived(hub)


def test_a_name_that_cannot_be_is_a_usage_error(cli: Cli, run: Path, no_work: None) -> None:
    result = cli("push", run, "--repo", "model\x1b[31m", "--dry-run")
    assert result.exit_code == USAGE
    assert "not the name of a repository" in result.stderr
    assert "\x1b" not in result.stderr


def test_a_repository_must_be_named(cli: Cli, run: Path) -> None:
    result = cli("push", run)
    assert result.exit_code == USAGE
    assert "--repo" in result.stderr


def test_a_folder_that_is_no_run_is_refused(cli: Cli, tmp_path: Path) -> None:
    result = cli("push", tmp_path, "--repo", "me/model", "--dry-run")
    assert result.exit_code == 1
    assert f"error: {tmp_path}: not a run folder" in result.stderr


@pytest.mark.parametrize("gone", ["adapter", "README.md"])
def test_a_run_that_has_not_finished_is_refused(cli: Cli, run: Path, no_work: None, gone: str) -> None:
    path = run / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    result = cli("push", run, "--repo", "me/model", "--dry-run")
    assert result.exit_code == 1
    assert "this run has not finished" in result.stderr
    assert f"mlx-sft train --resume {run}" in result.stderr


def test_a_full_run_has_no_adapter_to_publish(cli: Cli, settings: dict[str, Any], no_work: None) -> None:
    run = train(TrainConfig(**without_adapter(settings) | {"method": "full", "max_steps": 1})).run_dir
    result = cli("push", run, "--repo", "me/model", "--adapter-only", "--dry-run")
    assert result.exit_code == USAGE
    assert "a run of --method full has no adapter" in result.stderr
    assert "leave --adapter-only out" in result.stderr


def test_a_base_whose_settings_name_a_folder_of_this_person_is_refused(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(settings["model"], base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"_name_or_path": str(Path.home() / "models" / "secret")}))
    run = train(TrainConfig(**settings | {"model": str(base), "max_steps": 1})).run_dir
    with pytest.raises(UserError, match=r"config\.json would tell that there is a folder"):
        push(run, "me/model", dry_run=True)
    push(run, "me/model", adapter_only=True, dry_run=True)


def test_where_no_disk_has_room_it_is_told_before_the_work(
    run: Path, no_work: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 0))
    with pytest.raises(UserError, match="this push takes up to") as caught:
        push(run, "me/model", dry_run=True)
    assert "TMPDIR" in caught.value.hint


def test_where_the_runs_disk_is_full_another_is_taken(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = import_module("mlx_sft.convert.publish")
    for name in ("files", "writing"):
        monkeypatch.setattr(f"mlx_sft.{name}.free_bytes", lambda path: 0 if path == run.parent else 10**12)
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(other))
    used = []
    real = module.export
    monkeypatch.setattr(module, "export", lambda run, to, **options: used.append(to) or real(run, to, **options))
    push(run, "me/model", dry_run=True)
    assert used[0].is_relative_to(other)
    assert list(other.iterdir()) == []


# --- as a person starts it ------------------------------------------------------------------------------------------------------


def test_the_token_is_in_no_file_and_no_line(hub: Hub, run: Path, tmp_path: Path) -> None:
    """In a process of its own, told of the Hub by the environment alone."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_TOKEN": TOKEN,
    }
    command = [sys.executable, "-m", "mlx_sft", "push", str(run), "--repo", "me/model", "--adapter-only"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stdout) == (0, f"{hub.url}/me/model\n"), ended.stderr
    assert "uploading " in ended.stderr
    assert TOKEN not in ended.stdout + ended.stderr
    assert all(TOKEN.encode() not in content for content in (*tree(run).values(), *arrived(hub).values()))
    assert RunFolder(run).card.is_file()
