"""PEFT's files of methods that put something in front of a text: one tensor, whatever it stands for, and what it is of.

```
adapter_config.json         peft_type, and the sizes of the tensor
adapter_model.safetensors   prompt_embeddings [n, ...], float32
```
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import mlx.core as mx
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mlx_sft.errors import UserError
from mlx_sft.files import read_json, to_json
from mlx_sft.gate import checked
from mlx_sft.methods.peft_files import CONFIG, WEIGHTS, read_config, weights_file
from mlx_sft.safetensors_file import open_safetensors, read_float32, write_arrays
from mlx_sft.settings import first_problem
from mlx_sft.writing import make_folder, write_file, write_file_with

PROMPT = "prompt_embeddings"
"""Of the tensor in PEFT's file."""

MOST = 4096
"""Virtual tokens, at most."""


class Stated(BaseModel):
    """What is read of PEFT's settings, whatever the method."""

    model_config = ConfigDict(strict=True)

    num_virtual_tokens: Annotated[int, Field(ge=1, le=MOST)]
    num_transformer_submodules: Literal[1] | None = None


S = TypeVar("S", bound=Stated)


def write_prompt(
    folder: Path, tensor: mx.array, peft_type: str, base_model: str, revision: str | None, settings: Mapping[str, Any]
) -> None:
    """Write a tensor [n, ...] as PEFT does; `settings` are those of its method, and come before what is the same for all."""
    make_folder(folder)
    write_file_with(folder / WEIGHTS, lambda path: write_arrays(path, {PROMPT: tensor}, {"format": "pt"}))
    config = {
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "num_attention_heads": None,
        "num_layers": None,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": tensor.shape[0],
        "peft_type": peft_type,
        "revision": revision,
        "task_type": "CAUSAL_LM",
    }
    write_file(folder / CONFIG, to_json(dict(sorted((config | dict(settings)).items()))))


def read_prompt(folder: Path, method: str, stated_by: Mapping[str, type[S]]) -> tuple[S, mx.array]:
    """What PEFT's settings say, and the tensor [n, ...], float32.

    Args:
        method: Which reads it, for a message.
        stated_by: What is read of the settings, by `peft_type`.

    Raises:
        UserError: If it is another method's, or not whole.
    """
    config, where = read_config(folder / CONFIG), str(folder / CONFIG)
    kind = str(config.get("peft_type"))
    if kind not in stated_by:
        what = f"its peft_type is {kind!r}, and --method {method} reads {' and '.join(stated_by)}"
        raise UserError(what, where=where, hint="give the --method that it was trained with")
    try:
        stated = stated_by[kind].model_validate(config)
    except ValidationError as error:
        hint = "one of a causal language model is read, as PEFT writes it"
        raise UserError(first_problem(error), where=where, hint=hint) from error
    file = open_safetensors(weights_file(folder))
    shapes = {tensor.name: tensor.shape for tensor in file.tensors}
    if list(shapes) != [PROMPT] or len(shapes[PROMPT]) != 2 or shapes[PROMPT][0] != stated.num_virtual_tokens:
        what = f"it holds {shapes}, and not {PROMPT} of [{stated.num_virtual_tokens}, width]"
        raise UserError(what, where=str(file.path), hint="save it again with PEFT's `save_pretrained`")
    return stated, mx.array(read_float32(file.tensors[0]))


def states(folder: Path, *peft_types: str) -> bool:
    """Whether a folder holds PEFT's files of one of these types."""
    return (folder / CONFIG).is_file() and read_json(checked(folder) / CONFIG).get("peft_type") in peft_types
