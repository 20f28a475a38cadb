"""Stands in for llama.cpp's `convert_hf_to_gguf.py` and `convert_lora_to_gguf.py`: the same command lines, names and order of rows, small.

`MODE` is written before this text where it is put in place; it says what goes wrong.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from mlx_sft.safetensors_file import open_safetensors, read_float32

MODE: str = globals().get("MODE", "")

UNKNOWN_TOKENIZER = f"""WARNING:hf-to-gguf:** WARNING: The BPE pre-tokenizer was not recognized!
WARNING:hf-to-gguf:**          - the model has not been added to convert_hf_to_gguf_update.py yet
WARNING:hf-to-gguf:** ref:     https://github.com/ggml-org/llama.cpp/pull/6920
WARNING:hf-to-gguf:**
WARNING:hf-to-gguf:** chkhsh:  {"0123456789abcdef" * 4}
"""

_KINDS = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "bf16": gguf.GGMLQuantizationType.BF16,
}


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """The rows of a query or key projection, as llama.cpp's Llama wants them."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def stored(values: np.ndarray, kind: str) -> np.ndarray:
    if kind != "bf16":
        return values.astype(np.float32 if kind == "f32" else np.float16)
    half = (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return half.view(np.uint8).reshape(*values.shape[:-1], -1)


def tensors(folder: Path, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """By their names in GGUF, in float32."""
    names = gguf.get_tensor_name_map(_architecture(config), config["num_hidden_layers"])
    found: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        for tensor in open_safetensors(file).tensors:
            name, values = tensor.name, read_float32(tensor)
            if name == "lm_head.weight" and config["tie_word_embeddings"]:
                continue
            if config["model_type"] == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
                heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
                values = permuted(values, heads)
            found[names.get_name(name, try_suffixes=(".weight", ".bias"))] = values
    return found


def _named(config: dict[str, Any]) -> str:
    return str(config["model_type"]).replace("_", "")


def _architecture(config: dict[str, Any]) -> gguf.MODEL_ARCH:
    return next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == _named(config))


def spoilt(found: dict[str, np.ndarray]) -> None:
    gate, up = "blk.1.ffn_gate.weight", "blk.1.ffn_up.weight"
    if MODE == "swapped":
        found[gate], found[up] = found[up], found[gate]
    elif MODE == "changed":
        found[gate] = found[gate].copy()
        found[gate][3, 5] += 0.01
    elif MODE == "nan":
        found["output_norm.weight"] = np.full_like(found["output_norm.weight"], np.nan)
    elif MODE == "missing":
        del found[gate]
    elif MODE == "shape":
        found[gate] = found[gate].T


def write(folder: Path, output: Path, kind: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    architecture = "of-tomorrow" if MODE == "unknown" else config["model_type"]
    writer = gguf.GGUFWriter(output, architecture)
    writer.add_name(folder.name)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"<{number}>" for number in range(config["vocab_size"] - (MODE == "vocabulary"))])
    writer.add_add_bos_token(MODE == "bos")
    chat_template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    writer.add_chat_template(chat_template.upper() if MODE == "template" else chat_template)
    found = tensors(folder, config)
    spoilt(found)
    for name, values in found.items():
        one = "f32" if values.ndim == 1 else kind
        writer.add_tensor(name, stored(values, one), raw_dtype=_KINDS[one])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_adapter(folder: Path, base: Path, output: Path) -> None:
    """As `convert_lora_to_gguf.py` does, of PEFT's files."""
    config = json.loads((base / "config.json").read_text())
    architecture = "of-tomorrow" if MODE == "unknown" else "deepseek2" if MODE == "latent" else _named(config)
    writer = gguf.GGUFWriter(output, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    alpha = json.loads((folder / "adapter_config.json").read_text())["lora_alpha"]
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha + (MODE == "alpha"))
    names = gguf.get_tensor_name_map(_architecture(config), config["num_hidden_layers"])
    found: dict[str, Any] = {}
    for tensor in open_safetensors(folder / "adapter_model.safetensors").tensors:
        module, _, half = tensor.name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        values = read_float32(tensor)
        if config["model_type"] == "llama" and module.endswith(("q_proj", "k_proj")) and half == "lora_B":
            values = permuted(values, config["num_attention_heads" if "q_proj" in module else "num_key_value_heads"])
        name = f"{names.get_name(re.sub('experts[.][0-9]+', 'experts', module))}.weight.{half.lower()}"
        found[name] = [*found.get(name, []), values] if ".experts." in module else values
    gate, up = "blk.1.ffn_gate.weight.lora_b", "blk.1.ffn_up.weight.lora_b"
    if MODE == "swapped":
        found[gate], found[up] = found[up], found[gate]
    elif MODE == "missing":
        del found[gate]
    elif MODE == "more":
        found["blk.1.ffn_norm.weight.lora_b"] = found[gate]
    for name, values in found.items():
        writer.add_tensor(name, np.array(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--outfile", type=Path, required=True)
    parser.add_argument("--outtype", choices=list(_KINDS), required=True)
    parser.add_argument("--base", type=Path)
    given = parser.parse_args()
    if MODE == "fails":
        print("INFO: reading\nModel FooForCausalLM is not supported", file=sys.stderr)
        return 3
    if MODE == "tokenizer":
        print(UNKNOWN_TOKENIZER, file=sys.stderr)
        raise NotImplementedError("BPE pre-tokenizer was not recognized - update get_vocab_base_pre()")
    if MODE == "packages":
        raise ModuleNotFoundError("No module named 'torch'")
    if MODE == "silent":
        return 0
    if MODE == "garbage":
        given.outfile.write_bytes(b"not a model" * 100_000)
        return 0
    if given.base is not None:
        write_adapter(given.model, given.base, given.outfile)
        return 0
    write(given.model, given.outfile, given.outtype)
    if MODE == "truncated":
        content = given.outfile.read_bytes()
        given.outfile.write_bytes(content[: int(0.9 * len(content))])
    if MODE == "cut short":
        given.outfile.write_bytes(given.outfile.read_bytes()[:5000])
    return 0


if __name__ == "__main__":
    sys.exit(main())
