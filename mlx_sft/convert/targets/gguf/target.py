"""A run → a GGUF file for llama.cpp, and a Modelfile for Ollama, by way of the merged checkpoint.

```
model.gguf   the merged model, as llama.cpp's own converter writes it
Modelfile    with --ollama: `ollama create NAME -f Modelfile`
LICENSE...   as the base has them
```
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import ClassVar

from mlx_sft.config import TrainConfig
from mlx_sft.convert.merge import write_merged
from mlx_sft.convert.targets import MergeSettings, WholeModel
from mlx_sft.convert.targets.gguf.assumed import notes_of, refuse_other_settings
from mlx_sft.convert.targets.gguf.comparison import GgufFacts, check_gguf
from mlx_sft.convert.targets.gguf.converter import (
    OUTPUT,
    REPOSITORY,
    SCRIPT,
    Converter,
    find_converter,
    no_converter,
    outtype,
)
from mlx_sft.convert.targets.gguf.modelfile import Modelfile, make_modelfile
from mlx_sft.convert.verify import Verification, verify_merged
from mlx_sft.errors import USAGE, UserError
from mlx_sft.model.load import load_tokenizer
from mlx_sft.model.weights import Checkpoint, licence_files
from mlx_sft.recommended import TINY
from mlx_sft.trust import TRUST_HINT, code_files, may_run_code_of
from mlx_sft.writing import copy_file, write_file

MODELFILE = "Modelfile"


class GgufSettings(MergeSettings):
    """Options of the export format `gguf`."""

    llama_cpp: str | None = None
    """The folder of llama.cpp, where it is not on PATH, in $LLAMA_CPP_DIR or in ~/llama.cpp."""
    ollama: bool = False
    """Write a Modelfile beside the file, for `ollama create`."""


class Gguf(WholeModel):
    """The export format `gguf`. What can be refused beforehand is refused before anything is merged."""

    name: ClassVar = "gguf"
    summary: ClassVar = "the whole as one file for llama.cpp, by its own converter"
    Settings: ClassVar = GgufSettings

    _verification: Verification | None = None

    @classmethod
    def needs(cls) -> list[tuple[str, str, str]]:
        converter, ollama = find_converter(), shutil.which("ollama")
        clone = f"git clone {REPOSITORY} ~/llama.cpp, or name its folder with --llama-cpp" if converter is None else ""
        install = "" if ollama else "for `--ollama`: https://ollama.com/download"
        return [("llama.cpp", str(converter.script) if converter else "", clone), ("Ollama", ollama or "", install)]

    def check(self) -> None:
        super().check()
        base = self.source
        refuse_source(base)
        self._converter()
        if self.settings.ollama:
            modelfile_of(self.export.config, base, f"./{OUTPUT}")

    def needed_bytes(self) -> int:
        """With the merged checkpoint on its way."""
        return 2 * super().needed_bytes()

    def write(self, folder: Path) -> None:
        base, config = self.source, self.export.config
        merged = folder / "merged" / self.export.to.name  # from the folder's name, the converter takes the model's
        merged.mkdir(parents=True)
        merging = write_merged(self.merging(), merged)
        if self.export.verify:
            self._verification = verify_merged(merging, merged)
        written = Checkpoint.open(merged)
        self._converter().run(written.path, folder / OUTPUT, outtype(written))
        facts = check_gguf(folder / OUTPUT, written, numbers=self.export.verify)
        shutil.rmtree(merged.parent)
        for file in licence_files(base):
            copy_file(file, folder / file.name)
        self.notes += [facts.said, *notes_of(base)]
        if self.settings.ollama:
            modelfile = modelfile_of(config, base, f"./{OUTPUT}", facts)
            write_file(folder / MODELFILE, modelfile.text)
            self.notes += modelfile.notes

    def verify(self, folder: Path) -> Verification | None:
        """How the merged checkpoint compares; the file was compared with it, tensor by tensor, before that was removed."""
        return self._verification

    def _converter(self) -> Converter:
        converter = find_converter(self.settings.llama_cpp)
        if converter is None:
            run, to = self.export.run.path, self.export.to
            merged = to.with_name(f"{to.name}-merged")
            outfile = ["--outfile", f"{to}.gguf", "--outtype", outtype(Checkpoint.open(self.source))]
            export = ["mlx-sft", "export", str(run), "--out", str(merged)]
            raise no_converter(SCRIPT, [export, ["python3", f"llama.cpp/{SCRIPT}", str(merged), *outfile]])
        return converter


def refuse_source(base: Path) -> None:
    """Raise `UserError` for a base that llama.cpp's converters do not read, might run code of, or would make another model of."""
    if base == TINY:
        what = "llama.cpp does not know the tokenizer of the embedded model `tiny`, so that it has no GGUF file"
        raise UserError(what, hint="train another model, or export with --format merged", exit_code=USAGE)
    if (files := code_files(base)) and not may_run_code_of(base):
        what = f"this model names Python code of its own ({', '.join(files)}), which llama.cpp's converter may run"
        raise UserError(what, where=str(base), hint=TRUST_HINT)
    refuse_other_settings(base)


def modelfile_of(
    config: TrainConfig, base: Path, model: str, facts: GgufFacts | None = None, adapter: str = ""
) -> Modelfile:
    """The Modelfile for what its FROM names, where that is a GGUF file that is there already of what it was found to be."""
    adds_bos, found = (None, None) if facts is None else (facts.adds_bos, facts.chat_template)
    tokenizer = load_tokenizer(base, config.chat_template, config.add_tokens)
    modelfile = make_modelfile(tokenizer, config.chat_template_kwargs, model, adds_bos, adapter)
    if modelfile.chat_template is not None and found is not None and found != modelfile.chat_template:
        what = f"the chat template in {Path(model).name}, which Ollama follows, is not the tokenizer's"
        raise UserError(what, where=str(base), hint="leave out --ollama or --ollama-base, or update llama.cpp")
    return modelfile
