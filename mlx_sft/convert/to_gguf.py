"""A run → a GGUF file for llama.cpp, and a Modelfile for Ollama, by way of the merged checkpoint.

Knows neither how a checkpoint is merged, converted or compared, nor how a Modelfile is made.

```
model.gguf   the merged model, as llama.cpp's own converter writes it
Modelfile    with --ollama: `ollama create NAME -f Modelfile`
LICENSE...   as the base has them
```
"""

from __future__ import annotations

import shutil
from pathlib import Path

from mlx_sft.config import TrainConfig
from mlx_sft.convert.gguf import check_gguf
from mlx_sft.convert.hf import Checkpoint
from mlx_sft.convert.llama_cpp import OUTPUT, find_converter, no_converter
from mlx_sft.convert.merged import write_merged
from mlx_sft.convert.ollama import Modelfile, make_modelfile
from mlx_sft.convert.verify import Merging, Verification
from mlx_sft.errors import UserError
from mlx_sft.files import refuse_full_disk, write_folder
from mlx_sft.model.load import LICENCE_FILES, load_tokenizer
from mlx_sft.trust import TRUST_HINT, code_files, may_run_code_of

MODELFILE = "Modelfile"
_SOURCE = f"./{OUTPUT}"


def export_gguf(
    merging: Merging,
    config: TrainConfig,
    target: Path,
    *,
    verify: bool,
    llama_cpp: str | Path | None,
    ollama: bool,
    room: str,
) -> tuple[Verification | None, tuple[str, ...]]:
    """Write the folder; what cannot be is found before anything is merged, where it can be.

    Args:
        merging: A finished run, and what it is merged into.
        config: The run's settings.
        target: The folder to write.
        verify: Compare the merged checkpoint with the trained model, and the file with the checkpoint.
        llama_cpp: The folder of llama.cpp, where it is not found by itself.
        ollama: Whether a Modelfile is written.
        room: What to do where the disk is too full.

    Returns:
        How the merged checkpoint compares with the trained model, and what a person should know.
    """
    checkpoint, base = merging.checkpoint, merging.checkpoint.path
    converter = find_converter(llama_cpp)
    if converter is None:
        raise no_converter(merging.run.path, target, checkpoint)
    if (files := code_files(base)) and not may_run_code_of(base):
        what = f"this model names Python code of its own ({', '.join(files)}), which llama.cpp's converter may run"
        raise UserError(what, where=str(base), hint=TRUST_HINT)
    modelfile = _modelfile(config, base) if ollama else None
    needed = 2 * checkpoint.size()
    refuse_full_disk(target, needed, "this export, with the merged checkpoint on its way,", room)
    with write_folder(target, needed) as temporary:
        merged = temporary / "merged" / target.name  # from the folder's name, the converter takes the model's
        merged.mkdir(parents=True)
        _, verification = write_merged(merging, config, merged, verify)
        written = Checkpoint.open(merged)
        converter.run(written, temporary / OUTPUT)
        facts = check_gguf(temporary / OUTPUT, written, numbers=verify)
        shutil.rmtree(merged.parent)
        for file in (file for pattern in LICENCE_FILES for file in base.glob(pattern) if file.is_file()):
            shutil.copyfile(file, temporary / file.name)
        if modelfile is None:
            return verification, (facts.said,)
        if facts.adds_bos is not None:
            modelfile = _modelfile(config, base, facts.adds_bos)
        (temporary / MODELFILE).write_text(modelfile.text, encoding="utf-8")
    return verification, (facts.said, *modelfile.notes)


def _modelfile(config: TrainConfig, base: Path, adds_bos: bool | None = None) -> Modelfile:
    return make_modelfile(load_tokenizer(base), config.chat_template_kwargs, _SOURCE, adds_bos)
