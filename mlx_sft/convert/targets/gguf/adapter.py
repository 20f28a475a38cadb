"""A run → its adapter alone as a GGUF file, for llama.cpp's `--lora` beside a GGUF file of the base, and for Ollama's `ADAPTER`.

```
adapter.gguf   the adapter, as llama.cpp's own converter writes it
Modelfile      with --ollama-base: `ollama create NAME -f Modelfile`
LICENSE...     as the base has them
```
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import ClassVar

import mlx.core as mx

from mlx_sft.convert.targets.gguf.assumed import notes_of
from mlx_sft.convert.targets.gguf.comparison import check_adapter, read_facts
from mlx_sft.convert.targets.gguf.converter import ADAPTER_SCRIPT, Converter, find_converter, no_converter
from mlx_sft.convert.targets.gguf.target import MODELFILE, modelfile_of, refuse_source
from mlx_sft.convert.targets.peft import AdapterOnBase, PeftSettings
from mlx_sft.errors import USAGE, UserError
from mlx_sft.files import user_path
from mlx_sft.methods import Parameters
from mlx_sft.methods.lora_settings import HALVES, LoraSettings
from mlx_sft.methods.peft_files import WEIGHTS, our_name, write_adapter
from mlx_sft.model.weights import licence_files
from mlx_sft.safetensors_file import open_safetensors
from mlx_sft.writing import copy_file, write_file

OUTPUT = "adapter.gguf"
_MERGED = "export the run merged, with --format gguf"


class GgufAdapterSettings(PeftSettings):
    """Options of the export format `gguf-adapter`."""

    llama_cpp: str | None = None
    """The folder of llama.cpp, where it is not on PATH, in $LLAMA_CPP_DIR or in ~/llama.cpp."""
    ollama_base: str | None = None
    """Write a Modelfile beside the adapter; this is what its FROM names: what Ollama calls the base, or a GGUF file of it."""


class GgufAdapter(AdapterOnBase):
    """The export format `gguf-adapter`."""

    name: ClassVar = "gguf-adapter"
    summary: ClassVar = "the adapter alone for llama.cpp, by its own converter"
    Settings: ClassVar = GgufAdapterSettings

    def check(self) -> None:
        super().check()
        refuse_source(self.source)
        self._in_llama_cpp()
        if importlib.util.find_spec("gguf") is None:
            what = "llama.cpp's own package, which reads what its converter wrote, is not installed"
            raise UserError(what, hint="pip install 'mlx-sft[gguf]'")
        self._converter()
        if self.settings.ollama_base:
            modelfile_of(self.export.config, self.source, self._from())

    def write(self, folder: Path) -> None:
        base = self.source
        settings, parameters = self._in_llama_cpp()
        peft = folder / "peft"
        write_adapter(peft, settings, parameters, "")
        self._converter().run(peft, folder / OUTPUT, "f32", base)
        tensors = {our_name(tensor.name): tensor for tensor in open_safetensors(peft / WEIGHTS).tensors}
        self.notes.append(check_adapter(folder / OUTPUT, tensors, settings.alpha, numbers=self.export.verify))
        shutil.rmtree(peft)
        for file in licence_files(base):
            copy_file(file, folder / file.name)
        if self.settings.ollama_base:
            self._write_modelfile(folder)
        else:
            self.notes.append(f"it goes on a GGUF file of the base: llama-cli -m base.gguf --lora {OUTPUT}")
        self.notes += notes_of(base)

    def _in_llama_cpp(self) -> tuple[LoraSettings, Parameters]:
        method, parameters = self.trained()
        if not method.mergeable:
            self.refuse_form("llama.cpp")
        return in_llama_cpp(method.settings, parameters)

    def _write_modelfile(self, folder: Path) -> None:
        named = self._from()
        facts = read_facts(Path(named)) if Path(named).is_file() else None
        modelfile = modelfile_of(self.export.config, self.source, named, facts, f"./{OUTPUT}")
        write_file(folder / MODELFILE, modelfile.text)
        self.notes += modelfile.notes
        if facts is None and modelfile.chat_template is not None:
            self.notes.append(f"Ollama follows the chat template of {named}, which must be the one of {self.source}")

    def _from(self) -> str:
        """What FROM names: a file with its whole path, or else a name of Ollama's."""
        named: str = self.settings.ollama_base
        if not named.isprintable() or named != named.strip():
            raise UserError(f"a Modelfile cannot name {named!r}", where="--ollama-base", exit_code=USAGE)
        file = user_path(named)
        return str(file.resolve()) if file.exists() else named

    def _converter(self) -> Converter:
        converter = find_converter(self.settings.llama_cpp, ADAPTER_SCRIPT)
        if converter is None:
            run, to = str(self.export.run.path), str(self.export.to)
            again = ["mlx-sft", "export", run, "--out", to, "--format", self.name, "--llama-cpp", "llama.cpp"]
            raise no_converter(ADAPTER_SCRIPT, [again])
        return converter


def in_llama_cpp(settings: LoraSettings, parameters: Parameters) -> tuple[LoraSettings, Parameters]:
    """An adapter as llama.cpp computes it: with one alpha for all modules, and the scale alpha / r, r being each module's own.

    Where its scales are others (rank-stabilized, or an alpha for each module), they are in that alpha, and else in B.

    Raises:
        UserError: If it has something else than LoRA's two matrices.
    """
    if other := next((name for name in parameters if name.rpartition(".")[2] not in HALVES), None):
        what = f"llama.cpp's adapters hold LoRA's two matrices of a module, and have no place for {other}"
        raise UserError(what, hint=_MERGED)
    alphas = {name: settings.scale_of(name) * settings.rank_of(name) for name in _modules(parameters)}
    alpha = next(iter(alphas.values()))
    scaled = {
        name: value * (alphas[module] / alpha) if half == HALVES[1] and alphas[module] != alpha else value
        for name, value in parameters.items()
        for module, _, half in [name.rpartition(".")]
    }
    mx.eval(scaled)
    return settings.model_copy(update={"alpha": alpha, "alpha_pattern": {}, "rslora": False}), scaled


def _modules(parameters: Parameters) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[0] for name in parameters))
