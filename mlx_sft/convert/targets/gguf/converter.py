"""llama.cpp's own converters of Hugging Face checkpoints and of PEFT's adapters to GGUF: found on this machine, and run.

They are another program, with a Python and packages of its own.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlx_sft.errors import USAGE, UserError
from mlx_sft.files import user_path
from mlx_sft.model.weights import Checkpoint

SCRIPT, ADAPTER_SCRIPT = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"
OUTPUT = "model.gguf"

_OUTTYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
"""The converter's names of the dtypes. Its own choice, `auto`, would round float32 to half precision."""

_PACKAGES = "requirements/requirements-convert_hf_to_gguf.txt"
REPOSITORY = "https://github.com/ggml-org/llama.cpp"
_TRIED = "llama.cpp's commit 0c1e57098, the one in llama-cpp-python 0.3.36, was tried"
_LINES_SHOWN = 10

_UNKNOWN_TOKENIZER = re.compile(r"pre-tokenizer was not recognized.*?chkhsh:\s*([0-9a-f]{64})", re.DOTALL)
"""What the converter says of a tokenizer that is none of those that llama.cpp tells apart; a newer one need not know it either."""


@dataclass(frozen=True, slots=True)
class Converter:
    """The converter on this machine."""

    script: Path

    @property
    def interpreter(self) -> str:
        """The Python that has what the script needs.

        That of a virtual environment beside it; else the one that an installer, such as Homebrew, wrote into its first line; else
        the shell's `python3`, with which a person would run it. Ours comes last: it need not have PyTorch, which the script needs.
        """
        for environment in (".venv", "venv"):
            python = self.script.parent / environment / "bin" / "python"
            if python.is_file():
                return str(python)
        with self.script.open("rb") as file:
            named = file.readline(512).decode("utf-8", "replace").strip().removeprefix("#!").partition(" ")[0]
        if named.startswith("/") and Path(named).name.startswith("python") and Path(named).is_file():
            return named
        return shutil.which("python3") or sys.executable

    def run(self, source: Path, output: Path, outtype: str, base: Path | None = None) -> None:
        """Write a checkpoint, or with its base an adapter in PEFT's files, as a GGUF file of a precision.

        Raises:
            UserError: If the converter cannot be started, fails, or writes nothing.
        """
        command = [self.interpreter, str(self.script), str(source), "--outfile", str(output), "--outtype", outtype]
        command += ["--base", str(base)] if base is not None else []
        # The converter lets code that a tokenizer names be fetched and run; nothing is fetched here.
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        try:
            ended = subprocess.run(  # noqa: S603 (the user's own llama.cpp, with a list of arguments)
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                check=False,
            )
        except OSError as error:
            what = f"llama.cpp's converter cannot be started: {error.strerror or error}"
            raise UserError(what, where=command[0], hint="check --llama-cpp") from error
        if ended.returncode != 0:
            raise self._failure(ended.returncode, ended.stderr.decode("utf-8", "replace"))
        if not output.is_file():
            what = "llama.cpp's converter said that all went well, and wrote no file"
            raise UserError(what, where=str(self.script), hint="update llama.cpp: git pull in its folder")

    def _failure(self, code: int, said: str) -> UserError:
        tail = "\n".join(line.rstrip() for line in said.splitlines()[-_LINES_SHOWN:])
        if unknown := _UNKNOWN_TOKENIZER.search(said):
            what = f"llama.cpp does not know this model's tokenizer (chkhsh: {unknown[1]})"
            hint = (
                f"say beside this line, in get_vocab_base_pre() of {self.script.parent}, which of its tokenizers splits text alike; "
                "or export with --format merged"
            )
            return UserError(what, where=str(self.script), hint=hint)
        hint = f"this llama.cpp may not know the model's family: update it ({_TRIED}), or export with --format merged"
        if "ModuleNotFoundError" in said or "ImportError" in said:
            packages = self.script.parent / _PACKAGES
            hint = f"give its Python what it needs: {shlex.join([self.interpreter, '-m', 'pip', 'install', '-r', str(packages)])}"
        return UserError(f"llama.cpp's converter failed (exit code {code}):\n{tail}", where=str(self.script), hint=hint)


def find_converter(folder: str | Path | None = None, script: str = SCRIPT) -> Converter | None:
    """The converter in a folder of llama.cpp; where none is named, on PATH, in $LLAMA_CPP_DIR or in ~/llama.cpp.

    Raises:
        UserError: If a named folder does not have it.
    """
    if folder is not None:
        named = user_path(folder)
        found = next(_scripts_in(named, script), None)
        if found is None:
            hint = f"give the folder of a clone of {REPOSITORY}"
            raise UserError(f"there is no {script} in this folder", where=str(folder), hint=hint, exit_code=USAGE)
        return Converter(found)
    on_path = shutil.which(script)
    if on_path is not None:
        return Converter(Path(on_path).resolve())  # Homebrew links it
    usual = (os.environ.get("LLAMA_CPP_DIR", ""), "~/llama.cpp")
    scripts = (found for place in usual if place for found in _scripts_in(user_path(place), script))
    return next((Converter(script) for script in scripts), None)


def _scripts_in(folder: Path, name: str) -> Iterator[Path]:
    for script in (folder / name, folder / "bin" / name):
        if script.is_file():
            yield script.resolve()


def no_converter(script: str, then: list[list[str]]) -> UserError:
    """The error where there is no converter, with the commands that install one, and those that then do the same by hand."""
    install = [
        ["git", "clone", REPOSITORY],
        ["python3", "-m", "pip", "install", "-r", f"llama.cpp/{_PACKAGES}"],
    ]
    by_hand = "\n".join(f"  {shlex.join(command)}" for command in install + then)
    return UserError(
        f"llama.cpp's {script} is neither on PATH, nor in $LLAMA_CPP_DIR, nor in ~/llama.cpp",
        hint=f"name its folder with --llama-cpp DIR, or convert by hand:\n{by_hand}",
    )


def outtype(checkpoint: Checkpoint) -> str:
    """The converter's name of the precision that most numbers of a checkpoint have."""
    sizes = dict.fromkeys(_OUTTYPES, 0)
    for tensor in checkpoint.tensors.values():
        if tensor.dtype in sizes:
            sizes[tensor.dtype] += tensor.size
    return _OUTTYPES[max(sizes, key=sizes.__getitem__)]
