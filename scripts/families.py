"""What becomes of every family of models, each made tiny and random by transformers: the table in docs/models.md.

    make families                              every family: some ten minutes
    make families ARGS="qwen3 gpt_oss"         these alone, printed and not written

Each step runs in a process of its own, so that what one family breaks is one cell of the table.
"""

from __future__ import annotations

import argparse
import inspect
import json
import multiprocessing
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import peft
import torch
from family_shapes import FAMILIES, OF_TEXT, SEES, SMALL, VOCABULARY, WHOLES
from mlx_lm.utils import load as load_of_mlx_lm
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers import logging as transformers_logging
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mlx_sft import export, load_run, train
from mlx_sft.config import TrainConfig
from mlx_sft.convert.targets.mlx import convert
from mlx_sft.model.load import load_model
from mlx_sft.model.names import INSIDE
from mlx_sft.model.translate import exact_length, family_code
from mlx_sft.recommended import TINY

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
START, END = "<!-- families -->", "<!-- end of families -->"

ROWS, LENGTH = 3, 24
EXACT = 1e-4
"""The largest difference of a logit, in parts of the largest logit, that counts as the same model."""


@dataclass
class Row:
    """A line of the table: figures by column, or what was said instead."""

    kind: str
    figures: dict[str, float] = field(default_factory=dict)
    said: dict[str, str] = field(default_factory=dict)

    @property
    def made(self) -> bool:
        return "make" not in self.said


def make(kind: str, folder: Path) -> None:
    """Write a checkpoint with random numbers in every tensor, buffers included."""
    if kind in OF_TEXT:
        text, theirs, ours = OF_TEXT[kind]
        make(text, folder)
        _rename(folder, theirs, ours)
        config = json.loads((folder / "config.json").read_text())
        tied = config.get("tie_word_embeddings", False)
        whole = {"model_type": kind, "text_config": config, "tie_word_embeddings": tied}
        (folder / "config.json").write_text(json.dumps(whole))
        return
    torch.manual_seed(0)
    model = _class(kind).from_config(_config(kind), attn_implementation="eager").float()
    seen: set[int] = set()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())  # a tied one has two names
                noise = torch.randn_like(tensor)
                tensor.copy_(tensor + 0.2 * noise if tensor.ndim < 2 or "A_log" in name else 0.1 * noise)
    model.save_pretrained(folder)
    for file in (*TINY.glob("*token*"), TINY / "chat_template.jinja"):
        shutil.copy(file, folder)


def _class(kind: str) -> Any:
    return AutoModelForImageTextToText if kind in WHOLES else AutoModelForCausalLM


def _config(kind: str) -> Any:
    name, _, text = kind.partition("+")
    config = CONFIG_MAPPING[name]
    if kind not in WHOLES:
        return config(**_small(config, FAMILIES.get(kind, {})))
    usual, given = config(), WHOLES[kind]
    text = text or usual.text_config.model_type
    parts = {"text_config": {"model_type": text} | _small(CONFIG_MAPPING[text], FAMILIES.get(text, {}))}
    for part in ("vision_config", "audio_config"):
        if (sees := getattr(usual, part, None)) is not None:
            known = sees.to_dict()
            parts[part] = known | {name: SEES[name] for name in SEES if name in known} | given.get(part, {})
    return config(**given | parts)


def _small(config: Any, more: dict[str, Any]) -> dict[str, Any]:
    known = {*config().to_dict(), *inspect.signature(config.__init__).parameters, *config.attribute_map}
    return {name: value for name, value in SMALL.items() if name in known} | more


def _rename(folder: Path, before: str, after: str) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    renamed = {
        after + name.removeprefix(before) if name.startswith(before) else name: tensor
        for name, tensor in tensors.items()
    }
    save_file(renamed, file, {"format": "pt"})


def _opened(kind: str, folder: Path, of_class: Any = None) -> torch.nn.Module:
    """A checkpoint as transformers opens it; raises where a tensor of it is missing, or has no place."""
    if kind in OF_TEXT:
        text, theirs, ours = OF_TEXT[kind]
        alone = folder.with_name(f"{folder.name}-alone")
        shutil.copytree(folder, alone, dirs_exist_ok=True)
        _rename(alone, ours, theirs)
        config = json.loads((alone / "config.json").read_text())
        (alone / "config.json").write_text(json.dumps(config["text_config"]))
        kind, folder = text, alone
    model, report = (of_class or _class(kind)).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    if of_class is None and (unlike := {what: names for what, names in report.items() if names}):
        raise ValueError(f"transformers reports {unlike}")
    opened: torch.nn.Module = model.eval()
    return opened


def _token_ids(folder: Path) -> np.ndarray:
    return np.random.default_rng(3).integers(0, VOCABULARY - 64, (ROWS, exact_length(folder) or LENGTH))


def _theirs(model: Any, token_ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        logits: np.ndarray = model(input_ids=torch.tensor(token_ids)).logits.float().numpy()
    return logits


def _ours(model: Any, token_ids: np.ndarray) -> np.ndarray:
    return np.array(model(mx.array(token_ids)).astype(mx.float32))


def _apart(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def _loss(logits: np.ndarray, token_ids: np.ndarray) -> float:
    logits = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    of_next = np.take_along_axis(logits[:, :-1], token_ids[:, 1:, None], -1)
    return float((np.log(np.exp(logits[:, :-1]).sum(-1, keepdims=True)) - of_next).mean())


def compare(kind: str, folder: Path) -> dict[str, float]:
    """Logits and mean loss beside transformers', in float32."""
    token_ids = _token_ids(folder)
    ours = _ours(load_model(str(folder), "float32").model, token_ids)
    theirs = _theirs(_opened(kind, folder), token_ids)
    return {"logits": _apart(ours, theirs), "loss": abs(_loss(ours, token_ids) - _loss(theirs, token_ids))}


def step(folder: Path, run: Path, method: str, **further: Any) -> None:
    """Train one step, far enough to see it; `further` are settings of the method."""
    data = folder.with_name("chats.jsonl")
    turns = [("the cat", "sat on the mat"), ("the dog", "sat"), ("and", "the mat on the cat")]
    messages = [[{"role": "user", "content": asked}, {"role": "assistant", "content": said}] for asked, said in turns]
    data.write_text("".join(json.dumps({"messages": one}) + "\n" for one in messages))
    settings = {"rank": 2, "lr": 0.03} if method == "lora" else {"lr": 3e-3}
    config = {
        "data": str(data),
        "model": str(folder),
        "out": str(run),
        "method": method,
        "max_steps": 1,
        "warmup": 0,
        "dtype": "float32",
    }
    train(TrainConfig(**config | settings | further, quiet=True))
    token_ids = _token_ids(folder)
    before, after = (load_run(run, base=base, dtype="float32").model for base in (True, False))
    if _apart(_ours(after, token_ids), _ours(before, token_ids)) < 100 * EXACT:
        raise ValueError("a step changed nothing")


def merged(kind: str, run: Path, folder: Path) -> float:
    """The merged checkpoint as transformers opens it."""
    export(run, folder)
    token_ids = _token_ids(folder)
    return _apart(_ours(load_run(run, dtype="float32").model, token_ids), _theirs(_opened(kind, folder), token_ids))


def in_peft(kind: str, base: Path, run: Path, folder: Path) -> float:
    """The adapter as PEFT opens it, on the base in a class of transformers that has its modules."""
    adapter = export(run, folder, format="peft").path
    token_ids = _token_ids(base)
    ours = _ours(load_run(run, dtype="float32").model, token_ids)
    found = []
    with_head = [AutoModelForCausalLM] if kind.partition("+")[0] in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else []
    for of_class in dict.fromkeys((_class(kind), *with_head)):
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            opened = _opened(kind, base, of_class)
            if OF_TEXT.get(kind, ("",) * 3)[2] == INSIDE:
                opened.model = _Inside(opened.model)
            model = peft.PeftModel.from_pretrained(opened, adapter).eval()
        if not any("missing adapter keys" in str(one.message) for one in warned):
            found.append(_apart(ours, _theirs(model, token_ids)))
    if not found:
        raise ValueError("PEFT finds no module by the names in the adapter")
    return min(found)


def in_mlx_lm(base: Path, run: Path, work: Path) -> float:
    """The adapter in mlx-lm's form, on the base in mlx-lm's form, as mlx-lm opens both."""
    adapter = export(run, work / "adapter", format="mlx-lm").path
    model, _ = load_of_mlx_lm(str(convert(str(base), work / "base-in-mlx")), adapter_path=str(adapter))
    token_ids = _token_ids(base)
    return _apart(_ours(model, token_ids), _ours(load_run(run, dtype="float32").model, token_ids))


class _Inside(torch.nn.Module):
    """The body of a text under the name that it has in the whole."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.language_model, self.forward = body, body.forward
        vars(self)["embed_tokens"] = body.embed_tokens  # PEFT asks for it; it keeps its one name


class Apart:
    """Runs functions in another process; where one ends that process, in a new one from then on."""

    def __init__(self) -> None:
        self._process = self._start()

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> tuple[Any, BaseException | None]:
        """What the function returned, and what it raised."""
        future = self._process.submit(function, *arguments)
        error = future.exception()
        if isinstance(error, BrokenProcessPool):
            self._process = self._start()
        return None if error is not None else future.result(), error

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.shutdown()

    @staticmethod
    def _start() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _quiet)


def measure(kind: str, work: Path, apart: Apart) -> Row:
    """Every column of a family, as far as one leads to the next."""
    row = Row(kind)
    base, lora, full = work / "base", work / "lora", work / "full"

    def done(column: str, function: Callable[..., Any], *arguments: Any) -> bool:
        result, error = apart(function, *arguments)
        if error is not None:
            row.said[column] = _in_a_line(error, work)
            return False
        row.figures |= result if isinstance(result, dict) else {column: result or 0.0}
        return True

    if done("make", make, kind, base) and done("logits", compare, kind, base) and row.figures["logits"] <= EXACT:
        if done("step", step, base, lora, "lora"):
            done("merged", merged, kind, lora, work / "merged")
            done("peft", in_peft, kind, base, lora, work / "peft")
            done("mlx-lm", in_mlx_lm, base, lora, work)
        if done("full step", step, base, full, "full"):
            done("full", merged, kind, full, work / "merged-full")
    return row


def _quiet() -> None:
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)


def _in_a_line(error: BaseException, work: Path) -> str:
    said = str(error).partition("\nhint:")[0] or type(error).__name__
    said = " ".join(said.split()).replace(f"{work}/", "").removeprefix("base/config.json: ").removeprefix("base: ")
    return said if len(said) <= 160 else f"{said[:157]}..."


COLUMNS = {
    "logits": "logits",
    "loss": "loss",
    "merged": "LoRA, merged",
    "peft": "PEFT",
    "mlx-lm": "mlx-lm",
    "full": "full",
}


def table(rows: Iterable[Row]) -> str:
    """The table, what was said instead of figures below it, and the families that could not be made."""
    rows = list(rows)
    lines = ["| " + " | ".join(("`model_type`", *COLUMNS.values())) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    notes: list[str] = []
    for row in (row for row in rows if row.made):
        cells = [_cell(row, column, notes) for column in COLUMNS]
        lines.append("| " + " | ".join((f"`{row.kind}`", *cells)) + " |")
    lines += ["", *(f"{number}. {note}" for number, note in enumerate(notes, 1))]
    if unmade := [f"`{row.kind}`" for row in rows if not row.made]:
        lines += ["", f"Not made by transformers in this environment, and so not measured: {', '.join(unmade)}."]
    return "\n".join(lines)


_LEADS_TO = {
    "loss": ("logits",),
    "merged": ("step", "logits"),
    "peft": ("step", "logits"),
    "mlx-lm": ("step", "logits"),
    "full": ("full step", "logits"),
}


def _cell(row: Row, column: str, notes: list[str]) -> str:
    if column in row.figures:
        figure = row.figures[column]
        shown = f"{figure:.0e}" if figure else "0"
        return shown if figure <= EXACT or column == "loss" else f"**{shown}**"
    said = next((row.said[one] for one in (column, *_LEADS_TO.get(column, ())) if one in row.said), None)
    if said is None:
        return "–"
    if said not in notes:
        notes.append(said)
    return f"[{notes.index(said) + 1}]"


def all_kinds(apart: Apart) -> list[str]:
    """The families that transformers and mlx-lm both define, in alphabetical order; of those that see or hear, the ones above."""
    names = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in CONFIG_MAPPING]
    text = [name for name in names if not CONFIG_MAPPING[name].sub_configs and apart(_in_mlx_lm, name)[0]]
    return sorted({*text, *WHOLES, *OF_TEXT})


def _in_mlx_lm(kind: str) -> bool:
    return family_code({"model_type": kind}, Path()) is not None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="types of models; all, if left out")
    kinds = parser.parse_args().kinds
    rows = []
    with Apart() as apart:
        for kind in kinds or all_kinds(apart):
            with tempfile.TemporaryDirectory() as work:
                rows.append(measure(kind, Path(work), apart))
            print(kind, rows[-1].figures, rows[-1].said, file=sys.stderr, flush=True)
    if kinds:
        print(table(rows))
        return
    before, _, rest = PAGE.read_text().partition(START)
    PAGE.write_text(f"{before}{START}\n\n{table(rows)}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
