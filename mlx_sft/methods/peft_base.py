"""A base model on this disk, as PEFT finds it: read off config.json and the names of the checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlx_sft.errors import UserError
from mlx_sft.methods.layers import layer_number
from mlx_sft.methods.peft_rules import PeftBase, in_a_layer, renamed
from mlx_sft.model.load import local_checkpoint
from mlx_sft.model.names import EXPERTS_PART, Opening, opening, transformers_name
from mlx_sft.model.translate import read_config
from mlx_sft.model.weights import Checkpoint

_EXTRA = "mtp."
"""How the names of modules begin that predict further tokens, and that transformers leaves out."""

_TOWER = "model.vision_tower.layers.0"
"""Such a name as modules have that see."""


def peft_base(name: str) -> PeftBase | None:
    """The base of this name or path; None where it is not on this disk. Without its weights, its modules are not known."""
    folder = local_checkpoint(name) if name else None
    with suppress(UserError):
        return None if folder is None else _read(folder, read_config(folder))
    return None


def _read(folder: Path, config: Mapping[str, Any]) -> PeftBase:
    found = opening(config)
    modules: set[str] = set()
    experts: set[str] = set()
    with suppress(UserError):
        for name in _names(Checkpoint.open(folder).tensors, found, config):
            before, is_expert, _ = f"{name}.".partition(EXPERTS_PART)
            module = renamed(found.family if found else "", before if is_expert else name)
            if is_expert:
                experts.add(f"{module}.experts")
            while module:
                modules.add(module)
                module = module.rpartition(".")[0]
        if modules:
            modules.add("lm_head")  # also where the checkpoint ties it to the embeddings
    if found is not None and found.begins != "model." and not _holds_others(modules, found):
        # mlx-lm leaves the rest out of its folders; it may have modules of any of the names that are in layers.
        inside = {in_a_layer(module) for module in modules if module.startswith(found.begins)}
        modules |= {f"{_TOWER}.{name}" for name in inside - modules}
    return PeftBase(found, frozenset(modules), frozenset(experts))


def _holds_others(modules: set[str], found: Opening) -> bool:
    """Whether there are modules beside those of the language model and those that hold it."""
    inside = found.begins.removesuffix(".")
    return any(not module.startswith(found.begins) and module not in ("lm_head", inside, "model") for module in modules)


def _names(tensors: Mapping[str, Any], found: Opening | None, config: Mapping[str, Any]) -> Iterator[str]:
    """The names of modules with weights in the class that opens the checkpoint, before transformers 5 renames them."""
    text = config.get("text_config")
    is_nested = isinstance(text, Mapping)
    layers = (text if isinstance(text, Mapping) else config).get("num_hidden_layers")
    is_marked = any(transformers_name(tensor) != tensor for tensor in tensors)
    for tensor in tensors:
        name = transformers_name(tensor)
        module = name.rpartition(".")[0]
        number = layer_number(f"{module}.") if module.startswith("model.layers.") else None
        if module.startswith(_EXTRA) or (isinstance(layers, int) and number is not None and number >= layers):
            continue  # transformers leaves out what the configuration does not count, too
        language = name != tensor if is_marked else tensor.startswith("model.")
        if found is not None and (language or not is_nested or module == "lm_head"):
            yield found.name(module)
        elif found is None or found.begins != "model.":  # where the text is taken alone, the rest is not there
            yield module
