"""Options of commands made from the fields of settings, so that none can fail to reach its owner. It knows click, as `cli.py` does.

They are made when a command is run or asked for its help: for them every method, objective, optimizer and export format is imported,
with MLX and transformers, which takes seconds that `mlx-sft --help` and `--version` need not.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from mlx_sft.common_settings import option_name, public_name
from mlx_sft.compare.settings import NOT_SHARED
from mlx_sft.config import TrainConfig, all_fields, entry_settings, owners_of, sections
from mlx_sft.config_files import NAMES_OR_PATHS, PATHS, read_settings
from mlx_sft.grammar import Command, a_path, bare, named
from mlx_sft.kept_options import is_completing, kept
from mlx_sft.registry import METHODS, OBJECTIVES, OPTIMIZERS, TARGETS
from mlx_sft.settings import OnResume, Settings, on_resume

Function = Callable[..., None]

_CHOSEN_AMONG = {"method": METHODS, "objective": OBJECTIVES, "optimizer": OPTIMIZERS}
_OF_ENTRIES = {"method", "objective", "callbacks"}
"""What chooses entries whose settings a comparison's runs do not share."""


class _Later(click.Option):
    """In the place of options that are not made yet."""

    def __init__(self, declarations: Sequence[str], make: Callable[[], Sequence[click.Option]]) -> None:
        super().__init__(declarations)
        self.make = make


class Late(Command):
    """A command with options that are made when they are asked for."""

    def get_params(self, context: click.Context) -> list[click.Parameter]:
        def options(later: _Later) -> Sequence[click.Option]:
            return kept(f"{self.name} {later.name}", later.make) if is_completing() else later.make()

        made = (options(one) if isinstance(one, _Later) else [one] for one in self.params)
        self.params = [parameter for parameters in made for parameter in parameters]
        return super().get_params(context)


class Sectioned(Late):
    """A command whose help lists the settings of a run under their sections."""

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        section_of = {field: title for title, fields in sections().items() for field in fields}
        listed: dict[str, list[tuple[str, str]]] = {"Options": []}
        for parameter in self.get_params(context):
            if isinstance(parameter, click.Option) and (record := parameter.get_help_record(context)):
                listed.setdefault(section_of.get(str(parameter.name), "Options"), []).append(record)
        for title, records in listed.items():
            with formatter.section(title):
                formatter.write_dl(records)


def settings(*without: str, only: Collection[str] = (), shared: bool = False) -> Callable[[Function], Function]:
    """`--config`, and an option for each setting of a run: all but some, or only some, or those that all runs of a comparison share."""

    def is_chosen(name: str) -> bool:
        if shared:
            return name not in NOT_SHARED and not _OF_ENTRIES & {kind for kind, _ in owners_of(name)}
        return name in only if only else name not in without

    def decorate(command: Function) -> Function:
        command = _settings(is_chosen)(command)
        command = click.option("--config", "config_file", metavar="FILE", shell_complete=a_path,
            help="YAML file with settings of a run, or the name of one that ships, such as tiny-lora.")(command)  # fmt: skip
        return bare("data", "DATA")(command)

    return decorate


def some_settings(*names: str) -> Callable[[Function], Function]:
    """Options for settings of a run, without a file of them."""
    return _settings(names.__contains__)


def _settings(is_chosen: Callable[[str], bool]) -> Callable[[Function], Function]:
    def make() -> list[click.Option]:
        fields = all_fields()
        return [_option(name, fields[name]) for names in sections().values() for name in names if is_chosen(name)]

    return click.option("--settings", cls=_Later, make=make)


def own_options(owner: type[Settings]) -> Callable[[Function], Function]:
    """An option for each field of the settings that a command has for itself."""

    def decorate(command: Function) -> Function:
        for name, info in reversed(owner.model_fields.items()):
            command = click.option(f"--{name.replace('_', '-')}", **_kind(info) | {"help": _help_text(info)})(command)
        return command

    return decorate


def export_options(command: Function) -> Function:
    """`--format`, and an option for each setting of an export format."""
    return click.option("--format", cls=_Later, make=_of_targets)(command)


def _of_targets() -> list[click.Option]:
    fields: dict[str, FieldInfo] = {}
    owners: dict[str, list[str]] = {}
    for name, target in TARGETS.items():
        for field, info in target.Settings.model_fields.items():
            fields.setdefault(field, info)
            owners.setdefault(field, []).append(name)
    summaries = "; ".join(f"{name}: {target.summary}" for name, target in TARGETS.items())
    form = click.Option(
        ["--format"], type=click.Choice(TARGETS.names()), default="merged", show_default=True, help=f"{summaries}."
    )
    of_settings = (
        click.Option(
            [f"--{field.replace('_', '-')}"],
            **_kind(info) | {"help": f"With --format {' or '.join(owners[field])}: {_help_text(info)}"},
        )
        for field, info in fields.items()
    )
    return [form, *of_settings]


def _trust(context: click.Context, _: click.Parameter, trusted: bool) -> None:
    if trusted:
        from mlx_sft.console import Console
        from mlx_sft.trust import trust_remote_code

        context.with_resource(trust_remote_code(Console().warn))


trusting = click.option(
    "--trust-remote-code",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_trust,
    help="Let Python code that comes with the model run, with all that you may do; it is named before it does.",
)


step = click.option("--step", metavar="STEP",
    help="What the run had trained by its best evaluation (best), by now (last), or by a step that has a checkpoint (its number); "
    "the result of a finished run where not given.")  # fmt: skip
strength = click.option(
    "--strength", type=float, help="What an adapter of the run adds is multiplied with this: 0.8 takes a fifth away."
)
base_model = click.option("--base-model", metavar="MODEL",
    help="Where the run's base lies now, if not where training found it.")  # fmt: skip


def which_model(command: Function) -> Function:
    """A run, a model, or an adapter on a model: what `load_named` takes."""
    return _which(command)


def which_models(command: Function) -> Function:
    """Several of them: what `each_named` takes."""
    return _which(command, " Give it again for several.")


def _which(command: Function, more: str = "") -> Function:
    several = bool(more)
    for option in (
        trusting,
        click.option("--base", is_flag=True, help="The model as it was before training."),
        click.option("--adapter", metavar="DIR", multiple=several,
                     help="An adapter of PEFT's or mlx-lm's, or a run that trained one, on --model or on the base that it names." + more),
        click.option("--model", metavar="MODEL", multiple=several,
                     help="A model instead of a run, such as an exported folder." + more),
        strength,
        step,
        base_model,
        named("run", "--run", "RUN", several=several, help="The run folder, as RUN names it too." + more),
    ):  # fmt: skip
        command = option(command)
    return command


def resolved(config_file: str | None, options: dict[str, Any]) -> TrainConfig:
    return TrainConfig.resolve(config_file, **given(options))


def taken(owner: type[Settings], options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given of a command's own settings, which are taken out of all options."""
    own = {name: options.pop(name) for name in owner.model_fields}
    return {name: value for name, value in own.items() if value not in (None, ())}


def stated(config_file: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """The settings of runs that were given, with those of a YAML file beneath them."""
    return (read_settings(config_file) if config_file else {}) | given(options)


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, by their public names."""
    return {public_name(field): value for field, value in options.items() if value not in (None, ())}


def choices(field: str) -> click.Choice[str]:
    """What a field that is one of several words may be."""
    return click.Choice([str(value) for value in get_args(_without_none(TrainConfig.model_fields[field].annotation))])


def _option(field: str, info: FieldInfo) -> click.Option:
    options = _kind(info) | {"help": _help(field, info)}
    names = [option_name(field), field]
    if field in _CHOSEN_AMONG:
        options["type"] = click.Choice(_CHOSEN_AMONG[field].names())
    elif field in (*PATHS, *NAMES_OR_PATHS, "out"):
        options["shell_complete"] = a_path
    elif info.annotation is bool and (
        info.default or on_resume(info) is OnResume.COMPUTED or len({str(owner.default) for owner in _owned(field)}) > 1
    ):
        names[0] = f"{option_name(field)}/--no-{public_name(field).replace('_', '-')}"
        options = {"default": None, "help": options["help"]}
    return click.Option(names, **options)


def _kind(info: FieldInfo) -> dict[str, Any]:
    """click's arguments for the values of a field."""
    kind = _without_none(info.annotation)
    options: dict[str, Any] = {"default": None}
    if bool in (kind, *get_args(kind)):
        options |= {"is_flag": True, "flag_value": True}
    elif get_origin(kind) is Literal:
        options["type"] = click.Choice([str(value) for value in get_args(kind)])
    elif get_origin(kind) is tuple:
        options |= {"type": float, "nargs": len(get_args(kind))}
    elif get_origin(kind) is list:
        options["multiple"] = True
    else:
        options["type"] = _click_type(kind)
    return options


def _owned(field: str) -> list[FieldInfo]:
    """The field of each entry that has it."""
    return [owner.model_fields[field] for _, _, owner in entry_settings() if field in owner.model_fields]


def _without_none(kind: Any) -> Any:
    """`int` for `int | None`."""
    kinds = [k for k in get_args(kind) if k is not NoneType] if get_origin(kind) in (Union, UnionType) else []
    return kinds[0] if len(kinds) == 1 else kind


def _click_type(kind: Any) -> type:
    """Text for a union that only the configuration can tell apart."""
    return kind if kind in (int, float) else str


def _help(field: str, info: FieldInfo) -> str:
    """What a setting is for, with its default; whose it is, where several entries have it or its section does not say."""
    owners = [name for kind, name in owners_of(field) if kind != "callbacks"]
    if len(owners) < 2:
        return _help_text(info)
    texts = dict(zip(owners, map(_help_text, _owned(field)), strict=False))
    if len(set(texts.values())) == 1:
        return f"{texts[owners[0]]} Of {', '.join(owners)}."
    return " ".join(f"{name}: {text}" for name, text in texts.items())


def _help_text(info: FieldInfo) -> str:
    text = (info.description or "").strip()
    default = info.default
    if default is None or default is False or info.default_factory is not None:
        return text
    if isinstance(default, tuple):
        default = " ".join(map(str, default))
    return f"{text}  [default: {str(default).lower() if default is True else default}]"
