"""A checkpoint is loaded as its config says, whichever transformers wrote it, or refused by the name of what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from huggingface_hub.utils import filter_repo_objects
from mlx.utils import tree_flatten
from safetensors.torch import load_file

from mlx_sft.errors import USAGE, UserError
from mlx_sft.model import load
from mlx_sft.model.load import (
    checkpoint_fingerprint,
    load_model,
    load_tokenizer,
    resolve_checkpoint,
    resolve_dtype,
)
from mlx_sft.model.translate import translate_config
from mlx_sft.model.vocabulary import vocabulary_size
from mlx_sft.model.weights import INDEX, weight_files
from mlx_sft.recommended import TINY


@pytest.fixture
def checkpoint(tmp_path: Path, make_base: Callable[..., Path]) -> Callable[..., Path]:
    """`checkpoint(family, **of config.json)` → a folder of one's own; a setting that is None is left out."""

    def make(family: str = "qwen3", /, **settings: object) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(make_base(family), folder)
        file = folder / "config.json"
        config = json.loads(file.read_text()) | settings
        file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
        return folder

    return make


def _refused(path: Path | str, match: str) -> UserError:
    with pytest.raises(UserError, match=match) as error:
        load_model(str(path), "float32")
    return error.value


@pytest.mark.parametrize(
    ("settings", "theta", "scaling"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, 7.0, None),
        ({"rope_parameters": None, "rope_theta": 7.0, "rope_scaling": None}, 7.0, None),
        ({"rope_parameters": None, "rope_theta": 7.0}, 7.0, None),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 7.0, "factor": 2.0}},
            7.0,
            {"type": "linear", "rope_type": "linear", "factor": 2.0},
        ),
        (
            {"rope_parameters": None, "rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
            7.0,
            {"type": "linear", "rope_type": "linear", "factor": 2.0},
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 7.0, "factor": 2.0}},
            7.0,
            {"type": "yarn", "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512},
        ),
        # What is left out is the family's default in transformers, not mlx-lm's.
        ({"rope_parameters": None}, 10_000.0, None),
    ],
)
def test_both_forms_of_rope_become_the_one_that_is_read(
    settings: dict[str, object], theta: float, scaling: dict[str, object] | None, checkpoint: Callable[..., Path]
) -> None:
    translated = translate_config(checkpoint("llama", **settings))
    assert translated["rope_theta"] == theta
    assert translated["rope_scaling"] == scaling
    assert translated["rope_parameters"]["rope_theta"] == theta


@pytest.mark.parametrize(
    ("family", "settings", "name"),
    [
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("qwen3", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "mscale": 1.5}},
         "mscale without mscale_all_dim"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "wobble": 1}},
         "wobble"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e3}}},
         "rope_parameters"),
    ],
)  # fmt: skip
def test_a_setting_that_nothing_would_read_is_refused_by_name(
    family: str, settings: dict[str, object], name: str, checkpoint: Callable[..., Path]
) -> None:
    error = _refused(checkpoint(family, **settings), f"does not read {name}")
    assert error.where.endswith("config.json")


def test_a_default_spelled_out_is_no_reason_to_refuse(checkpoint: Callable[..., Path]) -> None:
    settings = {"use_sliding_window": False, "hidden_act": "silu", "partial_rotary_factor": 1.0}
    load_model(str(checkpoint("qwen2", **settings)), "float32")


def test_a_family_that_mlx_lm_does_not_have_is_named(checkpoint: Callable[..., Path]) -> None:
    _refused(checkpoint("qwen3", model_type="bert"), "mlx-lm has no model of type bert")


def test_nested_settings_that_nothing_reads_are_refused_rather_than_passed_over(
    checkpoint: Callable[..., Path],
) -> None:
    nested = checkpoint("qwen3", text_config={"model_type": "unheard_of", "hidden_size": 64})
    assert "text-only" in _refused(nested, "nested in text_config").hint


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_loaded_in_the_precision_asked_for_and_frozen(dtype: str, make_base: Callable[..., Path]) -> None:
    base = make_base("qwen3", tied=True)
    loaded = load_model(str(base), dtype)
    weights = dict(tree_flatten(loaded.model.parameters()))
    assert {value.dtype for value in weights.values()} == {getattr(mx, dtype)}
    assert set(weights) == set(load_file(base / "model.safetensors"))
    assert not tree_flatten(loaded.model.trainable_parameters())
    assert (loaded.path, loaded.name) == (base, str(base))
    assert loaded.config == json.loads((base / "config.json").read_text())
    assert loaded.tokenizer.eos_token == "<|im_end|>"


def test_shards_are_one_model(make_base: Callable[..., Path]) -> None:
    sharded = make_base("llama", shard="60KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    one, many = (
        load_model(str(base), "float32").model(mx.array([[1, 2, 3]])) for base in (make_base("llama"), sharded)
    )
    assert mx.array_equal(one, many).item()


def test_auto_is_float32_on_the_cpu() -> None:
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    assert resolve_dtype("auto") == ("float32" if on_cpu else "bfloat16")
    assert resolve_dtype("float16") == "float16"


def test_tiny_is_embedded() -> None:
    assert resolve_checkpoint("tiny") == TINY


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c", "~/nowhere-at-all", "nowhere"])
def test_a_folder_that_is_not_there_is_a_mistake_of_use(name: str) -> None:
    error = _refused(name, "no such model folder")
    assert (error.where, error.exit_code) == (name, USAGE)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    assert _refused(tmp_path / "model.safetensors", "a folder, not a file").exit_code == USAGE


def test_what_is_no_hub_id_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    _refused("some one/mod el", "not a Hub id")


def test_a_model_that_cannot_be_downloaded_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def offline(name: str, **options: object) -> str:
        asked.append(options.get("local_files_only", False))
        raise load.LocalEntryNotFoundError("no route to host")

    monkeypatch.setattr(load, "snapshot_download", offline)
    error = _refused("some/model", "not on disk and cannot be downloaded")
    assert error.where == "some/model"
    assert asked == [True, False]


COMMIT = "0" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_base: Callable[..., Path]) -> Callable[..., Path]:
    """`cache(*names)` → the snapshot of some/model in a Hub cache of its own, which holds these files of a checkpoint."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    def fill(*names: str, shard: str = "5GB") -> Path:
        folder = tmp_path / "models--some--model"
        snapshot = folder / "snapshots" / COMMIT
        snapshot.mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(COMMIT)
        for name in names:
            for file in make_base("llama", shard=shard).glob(name):
                shutil.copyfile(file, snapshot / file.name)
        return snapshot

    return fill


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch, make_base: Callable[..., Path]) -> list[list[str]]:
    """The patterns of every download, each of which gives a whole checkpoint; the cache is asked as ever."""
    asked: list[list[str]] = []
    in_cache = load.snapshot_download

    def download(name: str, *, allow_patterns: list[str], local_files_only: bool = False) -> str:
        if local_files_only:
            return in_cache(name, allow_patterns=allow_patterns, local_files_only=True)
        asked.append(allow_patterns)
        return str(make_base("llama"))

    monkeypatch.setattr(load, "snapshot_download", download)
    return asked


@pytest.mark.parametrize("shard", ["5GB", "60KB"])
def test_a_model_in_the_cache_needs_no_network(
    shard: str, cache: Callable[..., Path], downloads: list[list[str]]
) -> None:
    snapshot = cache("config.json", "tokenizer*", "model*", shard=shard)
    assert resolve_checkpoint("some/model") == snapshot
    load_model("some/model", "float32")
    assert downloads == []


def test_files_that_are_not_needed_may_be_missing_in_the_cache(
    cache: Callable[..., Path], downloads: list[list[str]]
) -> None:
    tree = pytest.importorskip("huggingface_hub._tree_cache")
    snapshot = cache("config.json", "tokenizer*", "model*")
    names = ["config.json", "training_args.json", "onnx/model.safetensors", "consolidated.safetensors"]
    entry = dict.fromkeys(("lfs_sha256", "lfs_size", "xet_hash"))
    entries = {name: tree.TreeCacheEntry(size=1, blob_id="0", **entry) for name in names}
    tree.write_tree_cache(str(snapshot.parents[1]), COMMIT, entries)
    with pytest.raises(load.LocalEntryNotFoundError, match="incomplete"):  # what huggingface_hub thinks of it
        load.snapshot_download("some/model", allow_patterns=["*.json"], local_files_only=True)
    assert resolve_checkpoint("some/model") == snapshot
    assert downloads == []


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_part_of_a_model_in_the_cache_is_completed(
    missing: str, cache: Callable[..., Path], downloads: list[list[str]], make_base: Callable[..., Path]
) -> None:
    names = {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"} - {missing}
    assert len(list(cache(*names).iterdir())) == 3
    assert resolve_checkpoint("some/model") == make_base("llama")
    assert len(downloads) == 1


def test_a_missing_shard_in_the_cache_is_downloaded(cache: Callable[..., Path], downloads: list[list[str]]) -> None:
    snapshot = cache("config.json", "tokenizer*", "model*", shard="60KB")
    min(snapshot.glob("model-*.safetensors")).unlink()
    assert resolve_checkpoint("some/model") != snapshot
    assert len(downloads) == 1


def test_only_what_makes_the_model_is_downloaded(cache: Callable[..., Path], downloads: list[list[str]]) -> None:
    cache("config.json")
    resolve_checkpoint("some/model")
    wanted = [
        "config.json",
        "model.safetensors",
        "model-00001-of-2.safetensors",
        INDEX,
        "qwen.tiktoken",
        "LICENSE",
        "README.md",
        "preprocessor_config.json",
        "tekken.json",
        "tokenizer.model",
        "modeling_own.py",
    ]
    others = [
        "consolidated.safetensors",
        "onnx/model.onnx",
        "original/model.safetensors",
        "pytorch_model.bin",
        "x.json",
    ]
    assert list(filter_repo_objects([*wanted, *others], allow_patterns=downloads[0])) == wanted


def test_what_the_hub_does_not_have_either_is_told(cache: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = cache("config.json", "tokenizer*")
    monkeypatch.setattr(load, "snapshot_download", lambda name, **options: str(snapshot))
    assert "network" in _refused("some/model", r"no model\.safetensors, neither on disk nor to be downloaded").hint


def test_a_folder_that_is_no_checkpoint_is_told_what_it_lacks(tmp_path: Path, make_base: Callable[..., Path]) -> None:
    _refused(tmp_path, r"no config\.json")
    config = tmp_path / "config.json"
    for text in ("{", "[1]", "{}", '{"model_type": 3}'):
        config.write_text(text)
        assert _refused(tmp_path, "not JSON|not a mapping|names no model_type").where == str(config)
    shutil.copyfile(make_base() / "config.json", config)
    _refused(tmp_path, r"without weights: no model\.safetensors\n")
    (tmp_path / "pytorch_model.bin").touch()
    assert "save_pretrained" in _refused(tmp_path, r"only pytorch_model\.bin").hint


def test_a_missing_shard_is_named(tmp_path: Path, make_base: Callable[..., Path]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(make_base("llama", shard="60KB"), folder)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    _refused(folder, f"missing shard {shard.name}")
    (folder / "model.safetensors.index.json").write_text("[]")
    _refused(folder, "not a mapping")


def test_weights_that_are_not_the_configs_are_refused(checkpoint: Callable[..., Path]) -> None:
    error = _refused(
        checkpoint("qwen3", hidden_size=32), r"embed_tokens\.weight is \[264, 64\] in the files, and \[264, 32\]"
    )
    assert "config.json and weights together" in error.hint


def test_a_damaged_weight_file_is_refused(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint()
    weights = (folder / "model.safetensors").read_bytes()
    for damaged in (b"\x08" + 7 * b"\x00" + b"{broken}", weights[:1000], weights[:-1000]):
        (folder / "model.safetensors").write_bytes(damaged)
        assert _refused(folder, "not a valid safetensors file").where == str(folder / "model.safetensors")


def test_a_checkpoint_that_is_not_quantized_as_it_says_is_refused(checkpoint: Callable[..., Path]) -> None:
    _refused(checkpoint("qwen3", quantization={"bits": "4", "group_size": 64}), "by another library")


def test_a_missing_tokenizer_is_told(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(UserError, match="cannot load its tokenizer") as error:
        load_tokenizer(folder)
    assert "tokenizer.json" in error.value.hint


def test_the_fingerprint_notices_any_change_of_the_model(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint()
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    seen = {checkpoint_fingerprint(folder)}
    assert checkpoint_fingerprint(folder) in seen
    for name in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"):
        content = bytearray((folder / name).read_bytes())
        content[-1] ^= 1
        (folder / name).write_bytes(content)
        seen.add(checkpoint_fingerprint(folder))
    (folder / "generation_config.json").unlink()
    seen.add(checkpoint_fingerprint(folder))
    assert len(seen) == 6


def test_the_fingerprint_does_not_care_for_other_files(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint()
    before = checkpoint_fingerprint(folder)
    for name in (".DS_Store", "README.md", "training_args.bin", "optimizer.safetensors"):
        (folder / name).write_text(name)
    (folder / "LICENSE").write_text("another")
    assert checkpoint_fingerprint(folder) == before


def test_shards_by_names_that_mlx_lm_does_not_read_are_refused(tmp_path: Path, make_base: Callable[..., Path]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(make_base("llama", shard="60KB"), folder)
    index = folder / INDEX
    for shard in folder.glob("model-*.safetensors"):
        shard.rename(folder / shard.name.replace("model-", "weights-"))
    index.write_text(index.read_text().replace("model-", "weights-"))
    error = _refused(folder, r"its index names weights-00001.*reads only weights that are called model\*")
    assert "save_pretrained" in error.hint


def test_an_index_that_leads_elsewhere_is_refused(tmp_path: Path, make_base: Callable[..., Path]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(make_base("llama", shard="60KB"), folder)
    index = folder / INDEX
    index.write_text(index.read_text().replace("model-", "../model-"))
    _refused(folder, "no `weight_map` from tensors to files of this folder")


def test_a_single_file_goes_before_an_index(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint()
    (folder / INDEX).write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')
    assert weight_files(folder) == [folder / "model.safetensors"]
    load_model(str(folder), "float32")


def test_weights_of_two_models_in_one_folder_are_refused(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint()
    shutil.copyfile(folder / "model.safetensors", folder / "model-00001-of-00001.safetensors")
    _refused(folder, r"model-00001-of-00001\.safetensors stands beside model\.safetensors, and mlx-lm would read both")
    (folder / INDEX).write_text('{"weight_map": {"a": "model-00002-of-00002.safetensors"}}')
    (folder / "model.safetensors").rename(folder / "model-00002-of-00002.safetensors")
    _refused(folder, r"stands beside the shards of model\.safetensors\.index\.json")


def test_the_vocabulary_is_the_embeddings_rows(make_base: Callable[..., Path]) -> None:
    loaded = load_model(str(make_base("qwen3", tied=True)), "float32")
    rows = loaded.model.model.embed_tokens.weight.shape[0]
    assert vocabulary_size(loaded.model, loaded.config) == loaded.config["vocab_size"] == rows
    assert vocabulary_size(loaded.model, {"text_config": {"vocab_size": rows}}) == rows
    assert vocabulary_size(loaded.model, {}) == vocabulary_size(loaded.model, {"vocab_size": 10**6}) == rows

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.positions = nn.Embedding(7, 2), nn.Embedding(9, 2)

    assert vocabulary_size(Positions(), {"vocab_size": 7}) == 7
    assert vocabulary_size(nn.Module(), {"vocab_size": 7}) == 7
    with pytest.raises(UserError, match="how many tokens it knows"):
        vocabulary_size(nn.Module(), {})


def test_where_only_the_tokenizer_is_needed_no_weights_are_downloaded(
    cache: Callable[..., Path], downloads: list[list[str]]
) -> None:
    snapshot = cache("config.json", "tokenizer*")
    assert resolve_checkpoint("some/model", weights=False) == snapshot
    assert downloads == []
    (snapshot / "tokenizer.json").unlink()
    resolve_checkpoint("some/model", weights=False)
    (patterns,) = downloads
    assert "tokenizer.json" in patterns
    assert not [pattern for pattern in patterns if "model" in pattern and "safetensors" in pattern]
