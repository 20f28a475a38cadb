"""What makes a model: safetensors files, PEFT adapters, checkpoint folders, tokenizers. What is taken holds the numbers of its files."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from mlx.utils import tree_flatten
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.numpy import save

from mlx_sft.config import TrainConfig
from mlx_sft.data.prepare import prepare
from mlx_sft.errors import UserError
from mlx_sft.methods.peft_files import read_adapter
from mlx_sft.model.head import SplitModel
from mlx_sft.model.load import load_model, load_tokenizer
from mlx_sft.model.weights import Checkpoint
from mlx_sft.safetensors_file import open_safetensors, read_bytes
from mlx_sft.training.plan import footprint_of
from tests.chats import write_chats
from tests.fuzz.mutators import PIECES, any_value, as_json, changed, changed_bytes, changed_json
from tests.fuzz.parser import NO_FILES, Files, Materials, Parser, Wrong

CANARY = "canary.py"
RAN = "canary-ran"
"""The file that the code in `CANARY` makes, which lies in every model folder: it must never run."""
_CODE = f'import pathlib\npathlib.Path(__file__).with_name("{RAN}").touch()\nModel = ModelArgs = dict\n'.encode()

_WEIGHTS = "model.safetensors"


# A safetensors file


def _split(content: bytes) -> tuple[Any, bytes]:
    """The header and the rest of a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _joined(header: bytes, body: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + body


def _small_file() -> bytes:
    floats = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensors = {
        "a": floats,
        "b.c": floats.astype(np.float16),
        "d": np.arange(5, dtype=np.uint8),
        "e": np.zeros((0, 3), np.float32),
    }
    return save(tensors, metadata={"format": "pt"})


def changed_safetensors(chance: random.Random, good: bytes) -> bytes:
    """A safetensors file with something changed in its header or its bytes."""
    if chance.random() < 0.6:
        header, body = _split(good)
        header = changed(chance, header, chance.choice([1, 1, 2]))
        content = _joined(as_json(header, chance), body if chance.random() < 0.9 else changed_bytes(chance, body))
    else:
        content = changed_bytes(chance, good, [_small_file(), *PIECES], chance.choice([1, 2]))
    if chance.random() < 0.1:
        content = chance.choice([0, 1, 7, 2**31, 2**63, 2**64 - 1, len(content)]).to_bytes(8, "little") + content[8:]
    return content


def _make_safetensors(chance: random.Random, materials: Materials) -> Files:
    good = chance.choice([_small_file(), materials.adapter["adapter_model.safetensors"]])
    return {"x.safetensors": changed_safetensors(chance, good)}


def _read_safetensors(folder: Path, materials: Materials) -> None:
    path = folder / "x.safetensors"
    file = open_safetensors(path)
    try:
        plain = dict(deserialize(path.read_bytes()))
        with safe_open(path, "numpy") as opened:
            metadata = opened.metadata() or {}
    except SafetensorError as error:
        raise Wrong(f"the format's own reader refuses this file: {error}") from error
    found = {
        tensor.name: {"dtype": tensor.dtype, "shape": list(tensor.shape), "data": b"".join(read_bytes(tensor))}
        for tensor in file.tensors
    }
    if found != {name: entry | {"data": bytes(entry["data"])} for name, entry in plain.items()}:
        raise Wrong("the format's own reader finds other tensors")
    if file.metadata != metadata:
        raise Wrong(f"the format's own reader finds other metadata: {metadata!r:.200}")


# An adapter


def _make_adapter(chance: random.Random, materials: Materials) -> Files:
    files = dict(materials.adapter)
    if chance.random() < 0.7:
        name = "adapter_config.json"
        files[name] = changed_json(chance, files[name], list(files.values()))
    if chance.random() < 0.5:
        name = "adapter_model.safetensors"
        files[name] = changed_safetensors(chance, files[name])
    return files


def _read_adapter(folder: Path, materials: Materials) -> None:
    settings, parameters = read_adapter(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    if (settings.rank, settings.alpha) != (config["r"], float(config["lora_alpha"])):
        raise Wrong(f"rank and alpha are {config['r']} and {config['lora_alpha']}, and were read as {settings}")
    stored = {name: entry["data"] for name, entry in deserialize((folder / "adapter_model.safetensors").read_bytes())}
    for name, value in parameters.items():
        content = bytes(stored[f"base_model.model.{name}.weight"])
        if np.array(value).tobytes() != content and len(content) == value.nbytes:
            raise Wrong(f"{name} has other numbers than its file")


# A model folder


_CONFIG_STRINGS = (
    "qwen3", "llama", "gemma3", "phi3", "mistral", "qwen3_moe", "mamba", "silu", "gelu", "float16", "yarn", "dynamic", "llama3",
)  # fmt: skip
_RICH = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "layer_types": ["full_attention"],
    "auto_map": {"AutoConfig": "canary.Config", "AutoModelForCausalLM": "canary.Model", "AutoTokenizer": ["canary.T", None]},
    "model_file": CANARY,
    "quantization_config": {"bits": 4},
    "text_config": {"hidden_size": 32},
    "vocab_size": 4096,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
    "sliding_window": 16,
    "max_position_embeddings": 2048,
}  # fmt: skip
"""Further settings that a configuration may have."""


_BESIDE_MODELS = (
    "generation_config.json", "hf_quant_config.json", "pytorch_model.bin", "model-2.safetensors", "tokenizer.json",
)  # fmt: skip
_BESIDE_TOKENIZERS = (
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.json",
)  # fmt: skip


def _make_model(chance: random.Random, materials: Materials) -> Files:
    files = dict(materials.model) | {CANARY: _CODE}
    match chance.choice(["config", "config", "config", "weights", "shards", "beside"]):
        case "config":
            files["config.json"] = _broken_config(chance, files)
        case "weights":
            files[_WEIGHTS] = changed_safetensors(chance, files[_WEIGHTS])
        case "shards":
            _cut_in_shards(chance, files)
        case "beside":
            name = chance.choice(_BESIDE_MODELS)
            files[name] = chance.choice([b"", b"{}", _small_file(), as_json(any_value(chance), chance)])
            files.pop(chance.choice([_WEIGHTS, "config.json", "tokenizer.json", name, CANARY]), None)
    return files


def _broken_config(chance: random.Random, files: Files) -> bytes:
    config = json.loads(files["config.json"])
    if chance.random() < 0.5:
        name = chance.choice(list(_RICH))
        config[name] = _RICH[name]
    if chance.random() < 0.3:
        config[chance.choice(["model_type", "hidden_act", "dtype"])] = chance.choice(_CONFIG_STRINGS)
    return changed_json(chance, json.dumps(config).encode(), [files["generation_config.json"]])


def _cut_in_shards(chance: random.Random, files: Files) -> None:
    """Two shards and their index, in which something is not right."""
    header, body = _split(files.pop(_WEIGHTS))
    header.pop("__metadata__", None)
    names = sorted(header)
    weight_map = {}
    for number, part in enumerate((names[:5], names[5:]), 1):
        shard = f"model-{number:05}-of-00002.safetensors"
        entries, content = {}, b""
        for name in part:
            first, last = header[name]["data_offsets"]
            entries[name] = header[name] | {"data_offsets": [len(content), len(content) + last - first]}
            content += body[first:last]
            weight_map[name] = shard
        files[shard] = _joined(json.dumps(entries).encode(), content)
    index = {"metadata": {"total_size": len(body)}, "weight_map": weight_map}
    files["model.safetensors.index.json"] = changed_json(chance, json.dumps(index).encode(), [files["config.json"]])
    if chance.random() < 0.2:
        files.pop("model-00002-of-00002.safetensors")


def _read_model(folder: Path, materials: Materials) -> None:
    try:
        loaded = load_model(str(folder), "float32", tokenizer=_tokenizer(materials.folder / "model"))
        SplitModel(loaded.model)
        checkpoint = Checkpoint.open(folder)
    finally:
        check_canary(folder)
    stored = {name: tensor for name, tensor in checkpoint.tensors.items() if tensor.dtype == "F32"}
    for name, value in tree_flatten(loaded.model.parameters()):
        content = b"".join(read_bytes(stored[name])) if name in stored else np.array(value).tobytes()
        if np.array(value).tobytes() != content:
            raise Wrong(f"{name} has other numbers than its file")


def check_canary(folder: Path) -> None:
    if (folder / RAN).exists():
        raise Wrong("the code that comes with the model ran")


@lru_cache
def _tokenizer(folder: Path) -> Any:
    return load_tokenizer(folder)


# A tokenizer


_OF_TOKENIZERS = {
    "tokenizer_class": "LlamaTokenizer",
    "auto_map": {"AutoTokenizer": ["canary.Tokenizer", None]},
    "chat_template": [{"name": "default", "template": "{{ messages }}"}],
    "added_tokens_decoder": {"5": {"content": "<x>", "special": True}},
    "model_max_length": 10,
}
_TEMPLATES = (
    b"", b"{{ x", b"{% for m in messages %}{{ m.content }}", b"{{ messages[0].content.__class__ }}", b"{{ raise_exception('no') }}",
    b"{{ ''.__class__.__mro__[1].__subclasses__() }}", b"{% include '/etc/passwd' %}", b"{{ 1 / 0 }}", b"{{ messages }}", b"\xff\xfe",
    b"{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}", b"{{ 'x' * 10**5 }}",
    b"{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", b"{{ messages | map(attribute='nope') | list }}", b"{{ [1] | sum }}",
)  # fmt: skip


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


_WORDS = {"e": 0, "t": 1}
_BAD_PARTS: tuple[dict[str, Any], ...] = (
    {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"(\w+\s?)+$"}, "behavior": "Isolated", "invert": False}},
    {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    {"normalizer": _replace({"Regex": r"(\w|\w\w)+\d"}, "x")},
    {"normalizer": _replace({"String": ""}, "e")},
    {"normalizer": {"type": "Sequence", "normalizers": [_replace({"String": "e"}, "e" * 10**4)] * 3}},
    {"normalizer": {"type": "Prepend", "prepend": "x" * 10**6}},
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "BAAAAP////8A"}},
    {"model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "", "max_input_chars_per_word": 9, "vocab": _WORDS}},
    {"model": {"type": "WordLevel", "unk_token": "[UNK]", "vocab": _WORDS}},
    {"model": {"type": "Unigram", "unk_id": None, "vocab": [["e", -1.0]]}},
    {"decoder": {"type": "Sequence", "decoders": [{"type": "Fuse"}, _replace({"String": "e"}, "e" * 10**4)]}},
    {"decoder": {"type": "Strip", "content": "e", "start": 10**9, "stop": 10**9}},
)  # fmt: skip
"""Parts with which a tokenizer panics, fails, or makes very much of little."""


def _make_tokenizer(chance: random.Random, materials: Materials) -> Files:
    files = {name: content for name, content in materials.model.items() if name != _WEIGHTS} | {CANARY: _CODE}
    match chance.choice(
        ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "beside"]
    ):
        case "tokenizer.json" if chance.random() < 0.3:
            files["tokenizer.json"] = as_json(_parsed(files["tokenizer.json"]) | chance.choice(_BAD_PARTS), chance)
        case "tokenizer.json" if chance.random() < 0.7:
            parsed = _parsed(files["tokenizer.json"])
            part = chance.choice([part for part in parsed if part != "model"] + ["model"])
            files["tokenizer.json"] = as_json(parsed | {part: _changed_part(chance, parsed[part])}, chance)
        case "tokenizer.json":
            files["tokenizer.json"] = changed_bytes(chance, files["tokenizer.json"], list(PIECES))
        case "tokenizer_config.json":
            config = json.loads(files["tokenizer_config.json"])
            name = chance.choice(list(_OF_TOKENIZERS))
            config |= {name: _OF_TOKENIZERS[name]} if chance.random() < 0.5 else {}
            files["tokenizer_config.json"] = as_json(changed(chance, config, chance.choice([0, 1, 1, 2])), chance)
        case "chat_template.jinja":
            good = files["chat_template.jinja"]
            files["chat_template.jinja"] = (
                chance.choice(_TEMPLATES) if chance.random() < 0.5 else changed_bytes(chance, good, _TEMPLATES)
            )
        case "generation_config.json":
            files["generation_config.json"] = changed_json(chance, files["generation_config.json"])
        case _:
            name = chance.choice(_BESIDE_TOKENIZERS)
            files[name] = chance.choice([b"", b"{}", b"\x00" * 40, as_json(any_value(chance), chance)])
            if chance.random() < 0.3:
                files.pop("tokenizer.json")
    return files


def _changed_part(chance: random.Random, part: Any) -> Any:
    """A changed part of a tokenizer; of its thousands of tokens a few are left, so that some of the changes are elsewhere."""
    if isinstance(part, dict) and "vocab" in part:
        part = part | {"vocab": dict(list(part["vocab"].items())[:300]), "merges": part["merges"][:20]}
    return changed(chance, part)


@lru_cache
def _parsed(content: bytes) -> Any:
    return json.loads(content)


def _read_tokenizer(folder: Path, materials: Materials) -> None:
    try:
        tokenizer = load_tokenizer(folder)
        chats = write_chats(folder / "chats.jsonl", 2, seed=1)
        prepared = prepare(TrainConfig(data=[str(chats)], data_cache=False), tokenizer)
    finally:
        check_canary(folder)
    if any(not len(example.token_ids) or not example.supervised_tokens for example in _examples(prepared.train)):
        raise Wrong("an example has nothing to train on")


def _examples(examples: Any) -> Iterator[Any]:
    return (examples[index] for index in range(len(examples)))


# A folder in which something is no file, or a number is none that a model has


_PLACES = (
    "config.json", "generation_config.json", "hf_quant_config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "README.md",
    "chat_template.jinja", "chat_template.json", "preprocessor_config.json", "adapter_config.json", "additional_chat_templates/x.jinja",
)  # fmt: skip
_NUMBERS_OF = (
    "num_labels", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size", "hidden_size", "intermediate_size",
    "head_dim", "max_position_embeddings", "rope_theta", "rms_norm_eps", "num_local_experts", "layer_types", "eos_token_id",
)  # fmt: skip
_NUMBERS = (
    0,
    -1,
    1,
    3,
    2.5,
    10**6,
    10**9,
    10**12,
    10**30,
    -(10**9),
    1e300,
    float("nan"),
    float("inf"),
    "3",
    "x",
    None,
    [10**9],
    ["x"] * 10**5,
)


def _make_folder(chance: random.Random, materials: Materials) -> Files:
    files = dict(materials.model) | {CANARY: _CODE}
    if chance.random() < 0.6:
        files[chance.choice(_PLACES)] = chance.choice(list(NO_FILES))
    else:
        name = chance.choice(["config.json", "config.json", "generation_config.json", "tokenizer_config.json"])
        config = json.loads(files[name])
        place = config if chance.random() < 0.8 else config.setdefault("text_config", {})
        place[chance.choice(_NUMBERS_OF)] = chance.choice(_NUMBERS)
        files[name] = json.dumps(config).encode()
    return files


def _read_folder(folder: Path, materials: Materials) -> None:
    ways: list[Callable[[], Any]] = [
        lambda: load_model(str(folder), "float32"),
        lambda: load_tokenizer(folder),
        lambda: footprint_of(TrainConfig(data=["-"], model=str(folder)), folder, "float32", fused=False),
    ]
    refused = []
    try:
        for way in ways:
            try:
                way()
            except UserError as error:
                refused.append(error)
    finally:
        check_canary(folder)
    broken = [path.name for path in folder.iterdir() if path.exists() and not (path.is_file() or path.is_dir())]
    if broken and len(refused) < len(ways):
        raise Wrong(f"it was read, although {broken[0]} is no file")
    if refused:
        raise refused[0]


SAFETENSORS = Parser("safetensors", _make_safetensors, _read_safetensors, 1500)
ADAPTER = Parser("adapter", _make_adapter, _read_adapter, 1000)
MODEL = Parser("model", _make_model, _read_model, 800)
FOLDER = Parser("folder", _make_folder, _read_folder, 600)
TOKENIZER = Parser("tokenizer", _make_tokenizer, _read_tokenizer, 400)
