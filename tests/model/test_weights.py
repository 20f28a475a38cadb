"""A checkpoint folder: what is read, what is refused, and which files go along."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mlx_sft.errors import UserError
from mlx_sft.model import weights
from mlx_sft.model.weights import INDEX, SINGLE, Checkpoint, copy_side_files, left_out, licence_files, side_files
from mlx_sft.safetensors_file import read_bytes


def _sharded(folder: Path) -> Path:
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, folder / "model-00001-of-00002.safetensors")
    save_file({"c": torch.ones(4)}, folder / "model-00002-of-00002.safetensors")
    names = {"a": 1, "b": 1, "c": 2}
    weight_map = {name: f"model-0000{number}-of-00002.safetensors" for name, number in names.items()}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_a_copy_has_the_same_bytes_in_every_tensor_file(tmp_path: Path, make_base: Callable[..., Path]) -> None:
    base = make_base(shard="100KB")
    copy = tmp_path / "copy"
    copy.mkdir()

    Checkpoint.open(base).write(copy, read_bytes)

    assert len(list(base.glob("model-*.safetensors"))) > 2
    assert {p.name for p in copy.iterdir()} == {p.name for p in base.iterdir()}
    for file in base.iterdir():
        assert (copy / file.name).read_bytes() == file.read_bytes(), file.name


def test_shards_are_read_with_and_without_their_index(tmp_path: Path) -> None:
    with_index = Checkpoint.open(_sharded(tmp_path))
    (tmp_path / INDEX).unlink()
    without = Checkpoint.open(tmp_path)

    assert with_index.tensors == without.tensors
    assert set(without.tensors) == {"a", "b", "c"}
    assert without.index is None


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (_sharded(tmp_path) / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"missing shard model-00002-of-00002\.safetensors \(1 of 2\)"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("file", "problem"),
    [(None, "without weights"), ("pytorch_model.bin", "pickled"), ("adapter.safetensors", "without weights")],
)
def test_a_folder_without_weights_is_refused(tmp_path: Path, file: str | None, problem: str) -> None:
    if file:
        (tmp_path / file).write_bytes(b"x")
    with pytest.raises(UserError, match=problem) as error:
        Checkpoint.open(tmp_path)
    assert error.value.where == str(tmp_path)
    assert error.value.hint


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such model folder"):
        Checkpoint.open(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "index",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": "../model.safetensors"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
        '{"weight_map": {"a": ""}}',
        '{"weight_map": {"a": ".."}}',
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path: Path, index: str) -> None:
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(UserError) as error:
        Checkpoint.open(tmp_path)
    assert error.value.where.startswith(str(tmp_path))


def test_an_index_that_does_not_tell_the_truth_is_refused(tmp_path: Path) -> None:
    index = json.loads((_sharded(tmp_path) / INDEX).read_text())
    index["weight_map"]["a"] = "model-00002-of-00002.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match="says that a is in model-00002"):
        Checkpoint.open(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    save_file(
        {"c": torch.ones(4), "a": torch.ones(2)},
        _sharded(tmp_path) / "model-00002-of-00002.safetensors",
    )
    with pytest.raises(UserError, match="tensor a is also in model-00001"):
        Checkpoint.open(tmp_path)


def test_all_that_is_no_weights_goes_along(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    (source / "additional_chat_templates").mkdir(parents=True)
    kept = {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "merges.txt",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
        "LICENSE.txt",
        "NOTICE",
        "USE_POLICY.md",
        "modeling_own.py",
        "params.json",
        "preprocessor_config.json",
        "processor_config.json",
        "video_preprocessor_config.json",
        "spiece.model",
        "tekken.json",
    }
    left = {
        "README.md": "the base's card",
        **dict.fromkeys([".git", "onnx", "original"], "a folder"),
        ".gitattributes": "hidden",
        **dict.fromkeys(["adapter_config.json", "model.gguf", "model_int8.onnx"], "weights, or of weights"),
        **dict.fromkeys(["optimizer.pt", "pytorch_model.bin"], "weights, or of weights"),
        **dict.fromkeys(["pytorch_model.bin.index.json", "x.lock"], "weights, or of weights"),
    }
    for name in kept | left.keys() | {SINGLE, INDEX}:
        if left.get(name) == "a folder":
            (source / name).mkdir()
            (source / name / "config.json").write_text("{}")
        else:
            (source / name).write_bytes(name.encode() + b"\r\n\xff")
    (source / INDEX).unlink()

    copy_side_files(source, target)

    copied = {str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()}
    assert copied == kept
    assert all((target / name).read_bytes() == (source / name).read_bytes() for name in kept)
    assert sorted(left_out(source)) == sorted(f"{name} ({reason})" for name, reason in left.items())


def test_a_link_is_followed_within_the_folder_and_in_the_hubs_cache_and_no_further(tmp_path: Path) -> None:
    """Otherwise the maker of a folder would decide which files of this machine are published."""
    secret, blobs = tmp_path / "secret", tmp_path / "models--a--b" / "blobs"
    secret.write_text("token")
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    for folder in (blobs, snapshot):
        folder.mkdir(parents=True)
    for name in (SINGLE, "config.json", "preprocessor_config.json", "LICENSE"):
        (blobs / f"{name}-hash").write_text(name)
        (snapshot / name).symlink_to(f"../../blobs/{name}-hash")
    (snapshot / "NOTICE").symlink_to("LICENSE")
    for name in ("LICENSE.key", "vocab.txt", "params.json"):
        (snapshot / name).symlink_to(secret)
    (snapshot / "gone.json").symlink_to("nowhere")
    (snapshot / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("of another folder, under its own name")

    assert {file.name for file in side_files(snapshot)} == {
        *("config.json", "preprocessor_config.json", "LICENSE", "NOTICE", "tokenizer.json")
    }
    assert {file.name for file in licence_files(snapshot)} == {"LICENSE", "NOTICE"}
    assert left_out(snapshot) == [
        "LICENSE.key (a link out of the folder)",
        "gone.json (not a file)",
        "params.json (a link out of the folder)",
        "vocab.txt (a link out of the folder)",
    ]


def test_what_is_no_regular_file_or_too_large_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_MOST_SIDE_BYTES", 3)
    os.mkfifo(tmp_path / "pipe.json")
    for name, size in (("small.json", 3), ("large.json", 4), ("tokenizer.json", 4)):
        (tmp_path / name).write_bytes(b"x" * size)
    assert [file.name for file in side_files(tmp_path)] == ["small.json", "tokenizer.json"]
    assert left_out(tmp_path) == ["large.json (larger than 0 MiB)", "pipe.json (not a file)"]
