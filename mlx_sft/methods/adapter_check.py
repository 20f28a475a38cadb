"""The verb `adapters check`: what an adapter changes of a model, whether it changes anything, and which program would drop or refuse what.

    adapter's files ─► tensors by module ─┬─► the model's outline          mlx-sft, mlx-lm
                                          ├─► the class's names and rules   PEFT
                                          └─► its converter's rules         llama.cpp

Of the base it reads `config.json` and the names and shapes of its tensors; its weights only where PEFT saved a copy of one in the adapter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.tuner.utils import load_adapters

from mlx_sft.console import count, many
from mlx_sft.errors import USAGE, UserError, blamed_on
from mlx_sft.gate import checked
from mlx_sft.methods import Method, Parameters, method_in, mlx_lm_files, peft_files
from mlx_sft.methods.layers import layer_number, written_layers
from mlx_sft.methods.lora import Lora
from mlx_sft.methods.lora_settings import HALVES, MAGNITUDE, LoraSettings
from mlx_sft.methods.lora_targets import adaptable
from mlx_sft.methods.peft_base import peft_base
from mlx_sft.methods.peft_files import lost_by_peft
from mlx_sft.methods.peft_forms import check_copies
from mlx_sft.methods.peft_rules import in_a_layer
from mlx_sft.methods.results import attach_trained, refuse_unfinished_result, result_folder
from mlx_sft.methods.token_rows import ROWS, is_rows
from mlx_sft.model.head import HEAD, tied_embedding
from mlx_sft.model.linears import weight_shape
from mlx_sft.model.load import local_checkpoint
from mlx_sft.model.names import CAUSAL_LM, transformers_name
from mlx_sft.model.outline import outline
from mlx_sft.model.stored_form import give_mlx_form
from mlx_sft.model.translate import read_config
from mlx_sft.writing import private_folder

OURS, PEFT, MLX_LM, LLAMA_CPP = "mlx-sft", "PEFT", "mlx-lm", "llama.cpp"


@dataclass(frozen=True)
class Problem:
    """What a program would not take.

    Attributes:
        why: A sentence, with {} for the modules where it is about some.
        modules: Their names; empty where it is about the whole adapter.
    """

    why: str
    modules: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.why.format(_in_few_words(self.modules)) if self.modules else self.why


@dataclass(frozen=True)
class AdapterCheck:
    """What an adapter is on a model.

    Attributes:
        folder: Where it lies.
        form: Whose files they are: PEFT's or mlx-lm's.
        base: The model, as it was named.
        title: LoRA, DoRA, or what another method is called.
        tensors, numbers: How many are trained.
        modules: The names of the modules that it is on, in transformers.
        trained_in_full: Of those, the ones whose own weights it holds.
        ranks, alphas, scales: Those that there are.
        idle: Modules on which it changes nothing, because A, B or the scale is zero.
        homeless: Modules that the model does not have.
        problems: By program, what it would drop or refuse; nothing where it takes all of it, None where that was not seen.
        notes: What else a person should know.
    """

    folder: str
    form: str
    base: str
    title: str
    tensors: int
    numbers: int
    modules: list[str]
    trained_in_full: list[str] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    alphas: list[float] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    idle: list[str] = field(default_factory=list)
    homeless: list[str] = field(default_factory=list)
    problems: dict[str, list[Problem] | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def is_taken(self) -> bool:
        """Whether every program takes all of it."""
        return not any(self.problems.values())  # also where it was not seen

    @property
    def changes_nothing(self) -> bool:
        """Whether the model with it is the model without it."""
        return len(self.idle) == len(self.modules)

    def describe(self) -> str:
        """For a person."""
        stated: dict[str, Sequence[float]] = {"rank": self.ranks, "alpha": self.alphas, "scale": self.scales}
        shape = "".join(f", {name} {_some(values)}" for name, values in stated.items() if values)
        lines = [
            f"{self.folder}: {self.title} in {self.form}'s files{shape}",
            f"  {many(self.tensors, 'tensor')}, {count(self.numbers)} parameters, on {_in_few_words(self.modules)}",
        ]
        if self.trained_in_full:
            lines.append(f"  trained in full: {_in_few_words(self.trained_in_full)}")
        if self.changes_nothing:
            lines.append("  it changes nothing: A, B or the scale is zero on every module")
        elif self.idle:
            lines.append(f"  it changes nothing on {_in_few_words(self.idle)}")
        else:
            lines.append("  it changes every one of them")
        if self.homeless:
            lines.append(f"  this model has no {_in_few_words(self.homeless)}")
        lines += [f"  {note}" for note in self.notes]
        lines.append(f"on {self.base}")
        for name, problems in self.problems.items():
            verdict = "would not take it as it was trained" if problems else "takes all of it"
            lines.append(f"  {name}: {'not seen' if problems is None else verdict}")
            lines += [f"    {problem}" for problem in problems or []]
        return "\n".join(lines)

    def to_json(self) -> str:
        """A line of JSON."""
        problems = {
            name: None if found is None else [{"said": str(one), "modules": one.modules} for one in found]
            for name, found in self.problems.items()
        }
        verdict = {"changes_nothing": self.changes_nothing, "is_taken": self.is_taken}
        return json.dumps(asdict(self) | {"problems": problems} | verdict)


def check_adapter(folder: str | Path, model: str | None = None) -> AdapterCheck:
    """Look at an adapter and a model, and say what each program that opens adapters would make of them.

    Args:
        folder: An adapter in PEFT's or mlx-lm's files, or the folder of a run.
        model: The base; the one that the adapter names where not given. It must be on this disk, its weights need not.

    Raises:
        UserError: If the adapter cannot be read at all, or there is no such model.
    """
    where = result_folder(folder)
    peft_files.read_config(where / peft_files.CONFIG)  # refuses what is none
    kind = method_in(where)
    name = model or kind.base_model(where)
    if not name:
        raise UserError("this adapter names no base model", where=str(where), hint="give --model", exit_code=USAGE)
    base = local_checkpoint(name)
    if base is None:
        raise UserError("this model is not on this disk", where=name, hint="give the place of its base with --model")
    if not issubclass(kind, Lora):
        return _checked_as_a_whole(where, name, base, *kind.read(where))
    return _Look(where, name, base, *Lora.read_plain(where)).result()


def _checked_as_a_whole(where: Path, name: str, base: Path, method: Method, parameters: Parameters) -> AdapterCheck:
    """Of a method whose parameters are of no modules: whether the model has a place for them, and which programs have a form for them."""
    problems: dict[str, list[Problem] | None] = {OURS: []}
    try:
        attach_trained(outline(base, "float32").model, method, parameters, where)
    except UserError as error:
        problems[OURS] = [Problem(error.what)]
    no_form = [Problem(f"it has no form for what --method {method.name} trains")]
    form = PEFT if method.peft else {"peft": OURS}.get(method.alone, method.alone)
    problems |= {PEFT: no_form, MLX_LM: [] if method.mlx_lm else no_form, LLAMA_CPP: no_form, form: problems[OURS]}
    return AdapterCheck(
        folder=str(where),
        form=form,
        base=name,
        title=method.title,
        tensors=len(parameters),
        numbers=sum(value.size for value in parameters.values()),
        modules=list(parameters),
        problems=problems,
        notes=[method.describe()],
    )


class _Look:
    """One look at an adapter on a model."""

    def __init__(self, where: Path, name: str, base: Path, method: Lora, parameters: Parameters) -> None:
        self.where, self.name, self.base = where, name, base
        self.method, self.parameters = method, parameters
        self.is_mlx_lm = mlx_lm_files.holds_adapter(where)
        self.homeless: list[str] = []
        self.misfits: list[Problem] = []
        """Modules whose shapes are others than the model's."""
        self.notes: list[str] = []
        try:
            refuse_unfinished_result(where)
        except UserError as error:
            self.notes.append(error.what)

    def result(self) -> AdapterCheck:
        settings, parameters = self.method.settings, self.parameters
        modules = _modules(parameters)
        adapted = [module for module in modules if f"{module}.{HALVES[0]}" in parameters]
        rows = {name.removesuffix(ROWS): len(value) for name, value in parameters.items() if is_rows(name)}
        self.notes += [f"it has the rows of {many(number, 'token')} in {module}" for module, number in rows.items()]
        problems: dict[str, list[Problem] | None] = {OURS: self._ours()}
        problems[PEFT] = self._peft()
        problems[MLX_LM] = self._mlx_lm()
        problems[LLAMA_CPP] = self._llama_cpp()
        return AdapterCheck(
            folder=str(self.where),
            form=MLX_LM if self.is_mlx_lm else PEFT,
            base=self.name,
            title=self.method.title,
            tensors=len(parameters),
            numbers=sum(value.size for value in parameters.values()),
            modules=modules,
            trained_in_full=[module for module in modules if module not in {*adapted, *rows}],
            ranks=sorted({settings.rank_of(module) for module in adapted}),
            alphas=sorted({settings.alpha_of(module) for module in adapted}),
            scales=sorted({settings.scale_of(module) for module in adapted}),
            idle=[module for module in adapted if _is_idle(module, settings, parameters)],
            homeless=self.homeless,
            problems=problems,
            notes=self.notes,
        )

    def _ours(self) -> list[Problem]:
        """Of this package; from then on the method and its parameters are as this model has them."""
        try:
            if unseen := check_copies(self.method.base_copies, self.base, self.where):
                self.notes.append(
                    f"it holds copies of the base's weights that were not compared with the base: {', '.join(unseen)}"
                )
            model = outline(self.base, "float32").model
            self.parameters = self.method.of_model(model, self.parameters, self.where)
            self._look_for_places(model)
            if not self.homeless and not self.misfits:
                attach_trained(model, self.method, self.parameters, self.where)
        except UserError as error:
            return [Problem(error.what)]
        return self._homeless("{} is not there") + self.misfits

    def _look_for_places(self, model: Any) -> None:
        places = {name: weight_shape(module) for name, (_, module) in adaptable(model).items()}
        whole = {transformers_name(path) for path, _ in model.named_modules()} | {HEAD}
        shapes = self.method.changed_shapes(self.parameters)
        for module in _modules(self.parameters):
            shape = shapes.get(f"{module}.weight")
            if module not in (places if f"{module}.{HALVES[0]}" in self.parameters else whole):
                self.homeless.append(module)
            elif module in places and shape is not None and tuple(shape) != places[module]:
                why = f"{{}} is of a weight {list(shape)}, and the model's is {list(places[module])}"
                self.misfits.append(Problem(why, (module,)))

    def _homeless(self, why: str) -> list[Problem]:
        return [Problem(why, tuple(self.homeless))] if self.homeless else []

    def _peft(self) -> list[Problem] | None:
        """By the rules with which PEFT puts an adapter on the class that opens the base."""
        found = peft_base(self.name)
        if found is None or not found.modules:
            self.notes.append(
                "the weights of the base are not on this disk, so that it was not seen what PEFT finds there"
            )
            return None
        if found.opening is None:
            return [
                Problem(
                    "it is not known what transformers calls the language model inside of this base, where PEFT would look"
                )
            ]
        if found.opening.alone or found.opening.auto_class != CAUSAL_LM:
            self.notes.append(f"for PEFT, the base is opened with {found.opening.auto_class}")
        if not self.is_mlx_lm:
            lost = list(lost_by_peft(self.where, found))
        else:
            self.notes.append(
                "PEFT and llama.cpp do not read mlx-lm's files: what is said of them is of the same adapter in PEFT's"
            )
            with private_folder() as folder:
                self.method.write(Path(folder), self.parameters, self.name)
                lost = list(lost_by_peft(Path(folder), found))
        return _together((one.why, one.module) for one in lost) + self.misfits

    def _mlx_lm(self) -> list[Problem]:
        """By its own loader, on the model without its weights; PEFT's files once they are in mlx-lm's form."""
        if self.homeless or self.misfits:
            return self._homeless("{} is not there") + self.misfits
        try:
            model = outline(self.base, "float32").model
            paths = {name: path for name, (path, _) in adaptable(model).items() if name != HEAD or path.endswith(HEAD)}
            give_mlx_form(model)
            if self.is_mlx_lm:
                return _opened_by_mlx_lm(model, self.where)
            self.notes.append(
                "mlx-lm does not read PEFT's files: what is said of it is of the same adapter in its form"
            )
            with private_folder() as folder:
                settings, depth = self.method.settings, len(model.layers)
                mlx_lm_files.write_adapter(Path(folder), settings, self.parameters, self.name, paths, depth)
                return _opened_by_mlx_lm(model, Path(folder))
        except UserError as error:
            return [Problem(error.what)]

    def _llama_cpp(self) -> list[Problem]:
        """By what its convert_lora_to_gguf.py does with PEFT's files: it knows A, B and one alpha, which it divides by each rank."""
        settings = self.method.settings
        whole: list[str] = []
        adapted: list[str] = []
        for module in _modules(self.parameters):
            (adapted if f"{module}.{HALVES[0]}" in self.parameters else whole).append(module)
        found = [
            Problem(
                "its converter refuses {}: only matrices A and B are taken", tuple(m for m in whole if "norm" not in m)
            ),
            Problem(
                "its converter refuses DoRA's norms", tuple(m for m in adapted if f"{m}.{MAGNITUDE}" in self.parameters)
            ),
        ]
        at_once = tuple(sorted(self.method.on_parameters))
        found.append(Problem("its converter does not know adapters on the parameters of experts, such as {}", at_once))
        otherwise: dict[str, list[str]] = {}
        for module in adapted:
            scale = settings.alpha / settings.rank_of(module)
            if not (self.is_mlx_lm or at_once or math.isclose(scale, settings.scale_of(module), rel_tol=1e-6)):
                why = f"it multiplies what {{}} adds with {scale:g} in the place of {settings.scale_of(module):g}"
                otherwise.setdefault(why, []).append(module)
        found += [Problem(why, tuple(modules)) for why, modules in otherwise.items()]
        if HEAD in adapted and _is_tied(self.base):
            found.append(Problem("its converter refuses {} where the model ties it to the embeddings", (HEAD,)))
        return [one for one in found if one.modules] + self._homeless("its converter has no name for {}")


def _opened_by_mlx_lm(model: Any, folder: Path) -> list[Problem]:
    """Have mlx-lm put an adapter in its form on a model."""
    with blamed_on(folder, "its loader refuses it"):
        load_adapters(model, str(checked(folder)))
    return []


def _is_tied(base: Path) -> bool:
    with suppress(UserError):
        return tied_embedding(outline(base, "float32").model) is not None
    return bool(read_config(base).get("tie_word_embeddings"))


def _modules(parameters: Iterable[str]) -> list[str]:
    return list(
        dict.fromkeys(name.removesuffix(ROWS) if is_rows(name) else name.rpartition(".")[0] for name in parameters)
    )


def _is_idle(module: str, settings: LoraSettings, parameters: Parameters) -> bool:
    """Whether B A and its scale add nothing; of DoRA it is not seen, because the norms may be others than the base's."""
    if f"{module}.{MAGNITUDE}" in parameters:
        return False
    is_zero = (not mx.any(parameters[f"{module}.{half}"]).item() for half in HALVES)
    return settings.scale_of(module) == 0 or any(is_zero)


def _together(found: Iterable[tuple[str, str]]) -> list[Problem]:
    """One problem for all modules of which the same is to be said."""
    modules: dict[str, dict[str, None]] = {}
    for why, module in found:
        modules.setdefault(why, {})[module] = None
    return [Problem(why, tuple(names)) for why, names in modules.items()]


def _in_few_words(modules: Sequence[str]) -> str:
    """`self_attn.q_proj and mlp.up_proj of layers 0-27, lm_head`."""
    layers: dict[str, list[int]] = {}
    for module in modules:
        number = layer_number(module)
        layers.setdefault(in_a_layer(module), []).extend([] if number is None else [number])
    alike: dict[str, list[str]] = {}
    for name, numbers in layers.items():
        alike.setdefault(written_layers(numbers), []).append(name)
    return ", ".join(_of_layers(numbers, names) for numbers, names in alike.items())


def _of_layers(numbers: str, names: Sequence[str]) -> str:
    *first, last = names
    listed = f"{', '.join(first)} and {last}" if first else last
    return f"{listed} of layer{'' if numbers.isdecimal() else 's'} {numbers}" if numbers else listed


def _some(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
