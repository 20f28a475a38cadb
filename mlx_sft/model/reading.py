"""The tensors of a checkpoint on their way into mlx-lm's model: each is used, or the checkpoint is refused by its name.

    files ─► given ─► `before_reading` ─► mlx-lm's `sanitize` ─► taken ─► parameters ─► logits

mlx-lm's `sanitize` renames, turns and joins tensors, and throws some away. A tensor is used where a parameter is computed from it, and the
logits from the parameter: both are read off MLX's graph, in which nothing has been computed yet.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_sft.errors import UserError
from mlx_sft.model.corrections import before_reading, corrected
from mlx_sft.model.gemma3n import is_shared_away
from mlx_sft.model.head import EMBEDDING_KINDS, EMBEDDING_NAMES, HEAD_WEIGHT, weights_of
from mlx_sft.model.translate import DOWNLOAD_AGAIN, family_code
from mlx_sft.model.weights import Checkpoint
from mlx_sft.safetensors_file import STORED_AS, StoredTensor, read_rows

Weights = dict[str, mx.array]

_NEWER = "a newer mlx-lm may read it; otherwise this checkpoint cannot be trained exactly"

_NEEDLESS = {
    r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$": "computed from the settings",
    r"\.(attn|attention)\.(masked_)?bias$": "a causal mask",
    r"(^|\.)mtp(_\w+)?\.": "predicts more than the next token",
}
"""Names of tensors that neither transformers nor mlx-lm computes the next token from, and why."""

_OTHER_SENSES = re.compile(
    r"(^|\.)(visual|vision_\w+|audio_\w+|multi_modal_projector|mm_projector|embed_vision|embed_audio|image_newline)(\.|$)"
)
"""The parts of a model by which it sees or hears; text does not pass through them."""

_EMBEDDINGS = tuple(f"{name}.weight" for name in EMBEDDING_NAMES)
_ROWS_COMPARED = 64

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


class CheckpointReader:
    """Builds the model of a checkpoint for `mlx_lm.utils.load_model`, and watches what becomes of each tensor.

    Args:
        path: The checkpoint folder.
        settings: Its settings, translated.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path, self._settings = path, settings
        self._family = family_code(settings, path)

    def classes(self, config: dict[str, Any]) -> tuple[Any, Any]:
        """What `mlx_lm.utils.load_model` takes as `get_model_classes`."""
        return self._make, self._family.ModelArgs

    def _make(self, arguments: Any) -> nn.Module:
        model = corrected(self._family.Model(arguments), self._settings, str(self._path))
        sanitize = getattr(model, "sanitize", dict)

        def watched(given: Weights) -> Weights:
            object.__delattr__(model, "sanitize")
            taken: Weights = sanitize(before_reading(dict(given), self._settings, str(self._path)))
            parameters = weights_of(model)
            taken |= {name: given[name] for name in parameters if name in given and name not in taken}
            self._check_places(taken, parameters)
            self._check_read(given, taken)
            return taken

        object.__setattr__(model, "sanitize", watched)  # of this one model, for this one reading
        return model

    def check_computed_with(self, model: nn.Module) -> None:
        """Raise `UserError` for a parameter that logits would not be computed from; nothing is computed here."""
        parameters = weights_of(model)
        # With sparse attention, what chooses among positions is asked only where there are more than it chooses.
        length = 2 + int((self._settings.get("text_config") or self._settings).get("index_topk") or 0)
        reached = _reaching([model(mx.zeros((1, length), mx.int32))], parameters)
        embeddings = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, EMBEDDING_KINDS)}
        if embeddings and not embeddings & reached:  # numbers have been asked for on the way
            what = "mlx-lm's code for this family computes in pieces, so that no gradient goes through it"
            raise UserError(what, where=str(self._path), hint="a newer mlx-lm may compute it at once")
        if unread := [name for name in parameters if name not in reached and not self._needless(name)]:
            what = f"mlx-lm's code for this family loads {_some(unread)} and computes nothing with it"
            raise UserError(what, where=str(self._path), hint=_NEWER)

    def _check_places(self, taken: Weights, parameters: Weights) -> None:
        """Raise `UserError` where tensors and parameters, or their shapes, are not the same. Of packed ones nothing is known here."""
        if self._settings.get("quantization") or self._settings.get("quantization_config"):
            return
        if extra := [name for name in taken if name not in parameters]:
            what = f"mlx-lm's code for this family has no place for {_some(extra)}"
            raise UserError(what, where=str(self._path), hint=_NEWER)
        if missing := [name for name in parameters if name not in taken]:
            what = f"there is no tensor for {_some(missing)}, which mlx-lm's code for this family needs"
            hint = f"if a file is not whole, {DOWNLOAD_AGAIN}; otherwise a newer mlx-lm may know this form of it"
            raise UserError(what, where=str(self._path), hint=hint)
        for name, parameter in parameters.items():
            if taken[name].shape != parameter.shape:
                what = f"{name} is {list(taken[name].shape)} in the files, and {list(parameter.shape)} by config.json"
                hint = f"{DOWNLOAD_AGAIN}, config.json and weights together; if they do belong together, a newer mlx-lm may read them"
                raise UserError(what, where=str(self._path), hint=hint)

    def _check_read(self, given: Weights, taken: Weights) -> None:
        """Raise `UserError` for a tensor from which no parameter is computed."""
        as_it_is = {id(array) for array in taken.values()}
        left = {name: array for name, array in given.items() if id(array) not in as_it_is and not self._needless(name)}
        names = {id(array) for array in given.values()}
        made = [array for array in taken.values() if id(array) not in names]
        unread = left.keys() - (_reaching(made, left) if left and made else set())
        if unread:
            what = (
                f"mlx-lm's code for this family does not read {_some(sorted(unread))}; the model would be another one"
            )
            raise UserError(what, where=str(self._path), hint=_NEWER)

    def _needless(self, name: str) -> bool:
        if name.endswith(HEAD_WEIGHT) and _is_tied(self._settings):
            return True  # the embedding, stored a second time
        text = self._settings.get("text_config") or self._settings
        layer = _LAYER.search(name)
        beyond = layer is not None and int(layer[1]) >= text.get("num_hidden_layers", int(layer[1]) + 1)
        other_sense = text is not self._settings and _OTHER_SENSES.search(name) is not None
        return (
            beyond
            or other_sense
            or is_shared_away(name, text)
            or any(re.search(pattern, name) for pattern in _NEEDLESS)
        )


def tied_as_stored(settings: dict[str, Any], checkpoint: Checkpoint) -> dict[str, Any]:
    """The settings, where the head is the embedding unless another head is stored: transformers, too, goes by the files then."""
    head = next((tensor for name, tensor in checkpoint.named.items() if name.endswith(HEAD_WEIGHT)), None)
    embedding = next((tensor for name, tensor in checkpoint.named.items() if name.endswith(_EMBEDDINGS)), None)
    if head is None or embedding is None or not _is_tied(settings) or _equal(head, embedding):
        return settings
    untied = {"tie_word_embeddings": False}
    nested = {"text_config": settings["text_config"] | untied} if "text_config" in settings else {}
    return settings | untied | nested


def _is_tied(settings: dict[str, Any]) -> bool:
    return bool((settings.get("text_config") or settings).get("tie_word_embeddings", False))


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors have the same numbers in the same form, as far as rows evenly over them tell."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.dtype not in STORED_AS:
        return True  # packed: nobody trains one without the other
    rows = np.linspace(0, one.rows - 1, min(one.rows, _ROWS_COMPARED), dtype=int).tolist()
    return all(np.array_equal(read_rows(one, row, row + 1), read_rows(other, row, row + 1)) for row in rows)


def _reaching(outputs: list[mx.array], named: Mapping[str, mx.array]) -> set[str]:
    """The names of those arrays, which must depend on no others, from which at least one of the outputs would be computed."""
    graph = io.StringIO()
    # Arrays are written in the order in which they are met: first those that are asked about, one after another.
    mx.export_to_dot(graph, *named.values(), mx.depends(mx.zeros(1), outputs))
    lines = graph.getvalue().splitlines()
    arrays = [found[1] for line in lines if (found := _ARRAY.fullmatch(line))]
    used = {line.partition(" -> ")[0].strip('"') for line in lines if line.startswith('"')}
    return {name for name, array in zip(named, arrays, strict=False) if array in used}


_ARRAY = re.compile(r'\{ (?:rank=\w+; )?"(\w+)"; \}')
"""A line of the graph, in Graphviz's language, for an array; another says `"A" -> 5` of an operation that takes it."""


def _some(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
