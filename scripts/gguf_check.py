"""Whether the real llama.cpp computes what was trained: logits of its library beside transformers', a line for each family.

    make gguf-check                            builds llama.cpp first: some ten minutes, once
    make gguf-check ARGS="qwen3 gemma2"        these families alone
    make gguf-check ARGS="qwen3/pissa"         and an adapter of another kind

A tiny random model of each family is trained a step, exported as `gguf` and as `gguf-adapter`, and opened by libllama: the merged
file, and the adapter on a file of the base. The figures are the largest difference of a logit, in parts of the largest logit. The steps
run in a process of their own, since llama.cpp ends the process where it fails.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from families import EXACT, Apart, make, step
from family_shapes import FAMILIES, FULL, SLIDING, VOCABULARY
from transformers import AutoModelForCausalLM

from mlx_sft import export
from mlx_sft.convert.targets.gguf.converter import SCRIPT, Converter

ADAPTERS: dict[str, dict[str, Any]] = {
    "": {},
    "pissa": {"init": "pissa"},
    "olora": {"init": "olora", "rank_pattern": {"q_proj": 3}},
    "rslora": {"rslora": True, "alpha_pattern": {"q_proj": 5.0}},
    "dora": {"dora": True},
}
"""Settings of adapters that are written otherwise: of twice the rank, with scales of their own, or merged alone."""

_MERGED_ALONE = ("dora",)
"""Those for which llama.cpp has no adapter."""

KINDS = (
    "llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "gemma3", "phi3", "lfm2",
    *(f"qwen3/{adapter}" for adapter in ADAPTERS if adapter), "qwen3_moe/pissa",
)  # fmt: skip

AS_PUBLISHED: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {"query_pre_attn_scalar": 16, "num_hidden_layers": 6, "layer_types": [*[SLIDING] * 5, FULL]},
    "qwen3_moe": {"norm_topk_prob": True},
}
"""What llama.cpp does not read in a configuration: it takes these settings to be as the published models of the family have them."""
for _kind, _settings in AS_PUBLISHED.items():  # here, so that the processes of the steps have them, too
    FAMILIES[_kind] = FAMILIES.get(_kind, {}) | _settings

ROUNDED_GELU = {"gemma2": 5e-3, "gemma3_text": 5e-3, "gemma3": 5e-3}
"""The largest difference of families whose GELU llama.cpp looks up in a table of half precision on the CPU."""

_FLOAT32 = 0
"""The number of that type in llama.cpp: keys and values are kept in it, not in half precision as is usual there."""

_PRE_TOKENIZER = "def get_vocab_base_pre(self, tokenizer) -> str:\n"
_VOCABULARY = "        self.set_vocab()\n"


def for_any_tokenizer(llama_cpp: Path, folder: Path) -> Path:
    """A copy of llama.cpp's converters that takes the tokenizer of the tiny models, of which token ids alone matter here."""
    for name in ("conversion", "gguf-py"):
        shutil.copytree(llama_cpp / name, folder / name)
    for script in llama_cpp.glob("convert_*_to_gguf.py"):
        _, _, code = script.read_text().partition("\n")
        (folder / script.name).write_text(f"#!{sys.executable}\n{code}")
    base = folder / "conversion" / "base.py"
    source = base.read_text()
    if source.count(_PRE_TOKENIZER) != 1 or source.count(_VOCABULARY) != 1:
        raise SystemExit(f"this llama.cpp has changed: {base} is not as this script knows it")
    source = source.replace(_PRE_TOKENIZER, f'{_PRE_TOKENIZER}        return "gpt-2"\n')
    taken = '        self._set_vocab_gpt2() if type(self).__name__ != "LoraModel" else None\n'
    base.write_text(source.replace(_VOCABULARY, taken))
    return folder


def in_llama_cpp(model: Path, adapter: Path | None = None) -> np.ndarray:
    """Logits [rows, width, vocabulary] as llama.cpp's library computes them on the CPU."""
    import llama_cpp

    opened = llama_cpp.Llama(
        str(model),
        lora_path=None if adapter is None else str(adapter),
        logits_all=True,
        n_gpu_layers=0,
        n_threads=1,
        type_k=_FLOAT32,
        type_v=_FLOAT32,
        verbose=False,
    )
    found = []
    for row in _token_ids():
        opened.reset()
        opened.eval(row.tolist())
        found.append(np.array(opened.scores[: len(row)]))
    return np.stack(found)


def in_transformers(folder: Path) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logits: np.ndarray = model(input_ids=torch.tensor(_token_ids())).logits.numpy()
    return logits


def _token_ids() -> np.ndarray:
    return np.random.default_rng(3).integers(0, VOCABULARY - 64, (3, 24))


def exported(run: Path, to: Path, form: str, llama_cpp: Path) -> None:
    export(run, to, format=form, llama_cpp=None if form == "merged" else str(llama_cpp))


def as_gguf(base: Path, file: Path, llama_cpp: Path) -> None:
    """The base alone, on which the adapter goes."""
    Converter(llama_cpp / SCRIPT).run(base, file, "f32")


def measure(kind: str, work: Path, llama_cpp: Path, apart: Apart) -> tuple[list[str], bool]:
    """The cells of a family's line, and whether all is well."""

    def done(function: Callable[..., Any], *arguments: Any) -> Any:
        result, error = apart(function, *arguments)
        if error is not None:
            raise RuntimeError(" ".join(str(error).split())[:300] or "the process ended")
        return result

    base, run, merged, model, adapter = (work / name for name in ("base", "run", "merged", "gguf", "adapter"))
    cells, well = [kind], True
    family, _, trained = kind.partition("/")
    try:
        done(make, family, base)
        done(partial(step, **ADAPTERS[trained]), base, run, "lora")
        done(exported, run, merged, "merged", llama_cpp)
        theirs = done(in_transformers, merged)
    except RuntimeError as error:
        return [*cells, str(error)], False

    def of_model() -> np.ndarray:
        done(exported, run, model, "gguf", llama_cpp)
        return np.asarray(done(in_llama_cpp, model / "model.gguf"))

    def of_adapter() -> np.ndarray:
        done(as_gguf, base, work / "base.gguf", llama_cpp)
        done(exported, run, adapter, "gguf-adapter", llama_cpp)
        return np.asarray(done(in_llama_cpp, work / "base.gguf", adapter / "adapter.gguf"))

    for found in (of_model,) if trained in _MERGED_ALONE else (of_model, of_adapter):
        try:
            apart_by = float(np.abs(found() - theirs).max() / np.abs(theirs).max())
        except RuntimeError as error:
            cells, well = [*cells, str(error)], False
        else:
            cells, well = [*cells, f"{apart_by:.0e}"], well and apart_by <= ROUNDED_GELU.get(family, EXACT)
    return cells + ["-"] * (3 - len(cells)), well


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "kinds",
        nargs="*",
        help=f"types of models; the usual ones, if left out; or one of them with /{', /'.join(filter(None, ADAPTERS))} behind it",
    )
    parser.add_argument("--llama-cpp", type=Path, required=True, help="the folder of llama.cpp's source")
    given = parser.parse_args()
    failed = 0
    print("| family | merged | adapter | |\n|---|---|---|---|")
    with Apart() as apart, tempfile.TemporaryDirectory() as copy:
        llama_cpp = for_any_tokenizer(given.llama_cpp, Path(copy))
        for kind in given.kinds or KINDS:
            with tempfile.TemporaryDirectory() as work:
                cells, well = measure(kind, Path(work), llama_cpp, apart)
            failed += not well
            print("| " + " | ".join([*cells, "✓" if well else "✗"]) + " |", flush=True)
    sys.exit(min(failed, 1))


if __name__ == "__main__":
    main()
