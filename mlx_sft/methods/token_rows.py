"""Single rows of embeddings and head that are trained: `--train-new-tokens`, PEFT's `trainable_token_indices`.

    token ids ─► rows of the frozen embedding ─► where a token is one of these, its trained row instead
    hidden states ─► logits of the frozen head ─► those of these tokens from the trained rows instead

A gradient and an optimizer's moments are there for these rows alone. A weight that is embeddings and head has its rows once, as in PEFT.
Settings call the two modules `embed_tokens` and `lm_head`, whatever a family calls them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from numpy.typing import NDArray

from mlx_sft.console import many
from mlx_sft.errors import UserError
from mlx_sft.methods import Parameters, Rows, WeightEdit
from mlx_sft.methods.also_train import Place, plain_copy
from mlx_sft.methods.lora_settings import DELTA
from mlx_sft.methods.peft_rules import MOST_FEATURES
from mlx_sft.model.head import HEAD, HEAD_WEIGHT, embedding_names
from mlx_sft.model.names import transformers_name
from mlx_sft.model.vocabulary import EMBEDDINGS, token_modules

TokenIds = dict[str, list[int]]
"""The tokens whose rows are trained, by `embed_tokens` and `lm_head`."""

Stated = list[int] | TokenIds
"""The same as settings and PEFT's config say it: a list is of the embeddings, and of the head where that is the same weight."""

ROWS = f".token_adapter.{DELTA}"
"""How PEFT's name of these rows goes on after the module's; it is that of a parameter here too."""

_FROZEN = ".token_adapter.base_layer.weight"
"""The same of the frozen weight, which PEFT saves besides where a vocabulary has grown."""

_OTHERS = "save it again with `save_pretrained` of PEFT"


@dataclass(frozen=True, kw_only=True)
class NewRows(WeightEdit):
    """W → W with these rows in the place of its own."""

    numbers: NDArray[np.int64]
    trained: NDArray[np.float32]

    def rows(self, base: Rows, start: int, stop: int, expert: int | None = None) -> NDArray[np.float32]:
        rows = np.array(base(start, stop), np.float32)
        here = (self.numbers >= start) & (self.numbers < stop)
        rows[self.numbers[here] - start] = self.trained[here]
        return rows


class TokenRows(nn.Module):
    """An embedding or a head, of which some rows are others: called as either is."""

    def __init__(self, module: Any, token_ids: list[int], dtype: mx.Dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.frozen = module
        self._ids = mx.array(token_ids, mx.int32)
        self.rows: Any = plain_copy(module, dtype, lambda array: array[self._ids])
        slots = np.full(module.weight.shape[0], len(token_ids), np.int32)
        slots[token_ids] = np.arange(len(token_ids))
        self._slots = mx.array(slots)
        self._is_embedding = hasattr(module, "as_linear")

    def __call__(self, x: mx.array) -> mx.array:
        if not self._is_embedding:
            return self._in_place(self.frozen(x), self.rows(x))
        slots, number = self._slots[x], self._ids.size
        return mx.where((slots < number)[..., None], self.rows(mx.minimum(slots, number - 1)), self.frozen(x))

    def as_linear(self, x: mx.array) -> mx.array:
        """The head of a tied model."""
        return self._in_place(self.frozen.as_linear(x), self.rows.as_linear(x))

    @property
    def weight(self) -> mx.array:
        """As the code of a few families multiplies with it."""
        weight: mx.array = self.frozen.weight * 1
        weight[self._ids] = self.rows.weight
        return weight

    def _in_place(self, logits: mx.array, own: mx.array) -> mx.array:
        places = mx.broadcast_to(self._ids, own.shape)
        return mx.put_along_axis(logits, places, own.astype(logits.dtype), axis=-1)


def attach_rows(model: nn.Module, dtype: mx.Dtype, token_ids: TokenIds) -> dict[str, Place]:
    """Put rows beside the modules, as these have them.

    Args:
        dtype: The model's precision.
        token_ids: Whose rows.

    Returns:
        The place of each parameter: `<module>` and PEFT's further name, [tokens, hidden].
    """
    places: dict[str, Place] = {}
    for role, (path, module) in (token_modules(model) if token_ids else {}).items():
        if role in token_ids:
            beside = TokenRows(module, token_ids[role], dtype)
            model.update_modules(tree_unflatten([(path, beside)]))
            places[f"{transformers_name(path)}{ROWS}"] = (beside.rows, "weight", dtype)
    return places


def is_rows(name: str) -> bool:
    """Whether a parameter is rows of single tokens."""
    return name.endswith(ROWS)


def on_model(model: nn.Module, token_ids: TokenIds, in_full: Iterable[str], adapted: Iterable[str] = ()) -> Stated:
    """What is said of a model with such rows: a list where embeddings and head are one weight.

    Args:
        in_full: The names in transformers of the modules that are trained in full.
        adapted: Of those that get an adapter.

    Raises:
        UserError: Where there are no such rows or modules, or these are trained otherwise, too.
    """
    if not token_ids:
        return {}
    modules = token_modules(model)
    of_embeddings = token_ids.get(EMBEDDINGS)
    if HEAD not in modules and (of_embeddings is None or token_ids.get(HEAD, of_embeddings) != of_embeddings):
        what = f"this model has one weight for {EMBEDDINGS} and {HEAD}, and other rows of each are to be trained"
        raise UserError(what, where="train_new_tokens", hint="name the same for both")
    for role, (path, module) in modules.items():
        if role in token_ids and transformers_name(path) in set(in_full):
            hint = "leave out --train-new-tokens, or the module of --also-train"
            raise UserError(f"{path} is trained in full, and its rows besides", where="train_new_tokens", hint=hint)
        if role in token_ids and {role, transformers_name(path)} & set(adapted):
            hint = "leave out --train-new-tokens, or the module of --target"
            raise UserError(f"{path} gets an adapter, and rows of its own besides", where="train_new_tokens", hint=hint)
        if role in token_ids and (most := max(token_ids[role])) >= module.weight.shape[0]:
            what = f"there is no row for the token {most}: this model has {module.weight.shape[0]}"
            hint = "add the tokens with which it was trained: --add-tokens FILE, or their tokenizer beside the adapter"
            raise UserError(what, where="train_new_tokens", hint=hint)
    return of_embeddings if of_embeddings and HEAD not in modules else token_ids


def weights_of_rows(parameters: Parameters) -> dict[str, str]:
    """The name of each weight that has such rows, and that of the rows."""
    return {f"{name.removesuffix(ROWS)}.weight": name for name in parameters if is_rows(name)}


def tokens_of(weight: str, token_ids: TokenIds) -> list[int]:
    """The tokens whose rows of a weight are trained."""
    return token_ids[HEAD if weight.startswith(HEAD) else EMBEDDINGS]


def changed_rows(weight: mx.array, name: str, parameters: Parameters, token_ids: TokenIds) -> mx.array:
    """A weight with its trained rows, float32."""
    changed = weight.astype(mx.float32)
    changed[mx.array(tokens_of(name, token_ids))] = parameters[weights_of_rows(parameters)[name]]
    return changed


def row_edits(parameters: Parameters, token_ids: TokenIds, *, tied: bool) -> dict[str, WeightEdit]:
    """What becomes of the weights of which rows are trained; of a tied one, also of the copy that a checkpoint may store."""
    edits: dict[str, WeightEdit] = {}
    for weight, rows in weights_of_rows(parameters).items():
        numbers, trained = np.array(tokens_of(weight, token_ids)), np.array(parameters[rows], np.float32)
        edits[weight] = NewRows(shape=None, numbers=numbers, trained=trained)
        if tied:
            edits[HEAD_WEIGHT] = NewRows(shape=None, optional=True, numbers=numbers, trained=trained)
    return edits


# PEFT's files


def indices(stated: bool | Stated, parameters: Parameters, written: Callable[[str], str]) -> dict[str, Any]:
    """What PEFT's config says of the rows.

    Args:
        stated: As settings say it.
        written: The name of a module in the class that opens the base, by its name here.
    """
    if not isinstance(stated, dict):
        return {"trainable_token_indices": stated} if stated else {}
    named = {
        weight: written(weight.removesuffix(".weight")).rpartition(".")[2] for weight in weights_of_rows(parameters)
    }
    return {"trainable_token_indices": {module: tokens_of(weight, stated) for weight, module in named.items()}}


def is_frozen_copy(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a tensor of an adapter with such rows is a frozen weight, which PEFT saves besides where a vocabulary has grown."""
    names = {f"{module.rpartition('.')[2]}.weight" for module in (*embedding_names(), HEAD)}
    return bool(config.get("trainable_token_indices")) and (
        name.endswith(_FROZEN) or (".".join(name.split(".")[-2:]) in names)
    )


def read_indices(config: Mapping[str, Any], rows: Parameters, where: Path) -> bool | Stated:
    """The tokens whose rows an adapter has, as PEFT's config and the tensors say; of rows that are there under two names one are dropped.

    Raises:
        UserError: Where the two do not agree.
    """
    stated = config.get("trainable_token_indices") or {}
    lists = stated if isinstance(stated, dict) else {EMBEDDINGS: stated}
    found: TokenIds = {}
    for module, numbers in lists.items():
        role = HEAD if str(module).rpartition(".")[2] == HEAD else EMBEDDINGS
        if (
            not isinstance(numbers, list)
            or not all(type(n) is int and 0 <= n < MOST_FEATURES for n in numbers)
            or not numbers
        ):
            raise UserError("trainable_token_indices names no tokens", where=str(where), hint=_OTHERS)
        if role in found or len(set(numbers)) < len(numbers):
            raise UserError("trainable_token_indices names something twice", where=str(where), hint=_OTHERS)
        found[role] = numbers
    by_role = {HEAD if name.startswith(HEAD) else EMBEDDINGS: name for name in rows}
    head, embeddings = by_role.get(HEAD), by_role.get(EMBEDDINGS)
    if head and embeddings and mx.array_equal(rows[head], rows[embeddings]):
        del rows[head], by_role[HEAD]  # PEFT saves those of a tied weight twice where the vocabulary has grown
    for role, name in by_role.items():
        if role not in found or rows[name].ndim != 2 or rows[name].shape[0] != len(found[role]):
            what = f"{name} is {list(rows[name].shape)}, and trainable_token_indices names {many(len(found.get(role, [])), 'token')}"
            raise UserError(what, where=str(where), hint=_OTHERS)
    missing = found.keys() - by_role.keys()
    if EMBEDDINGS in missing or (missing and found.get(EMBEDDINGS) != found[HEAD]):
        what = "trainable_token_indices names tokens, and no rows of them are there"
        raise UserError(what, where=str(where), hint=_OTHERS)
    if missing:  # of a tied weight, by both names
        return found[EMBEDDINGS]
    return found if isinstance(stated, dict) and found else found.get(EMBEDDINGS, False)
