"""Options of commands made from the fields of `TrainConfig`, so that none can fail to reach it.

Knows click, as `cli.py` does; knows no command.
"""

from __future__ import annotations

from collections.abc import Callable
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import click

from mlx_sft.config import TrainConfig, option_name, public_name, sections

Command = Callable[..., None]


class Sectioned(click.Command):
    """A command whose help lists the settings of a run under their sections."""

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        section_of = {field: title for title, fields in sections().items() for field in fields}
        listed: dict[str, list[tuple[str, str]]] = {"Options": []}
        for parameter in self.get_params(context):
            if record := parameter.get_help_record(context):
                listed.setdefault(section_of.get(str(parameter.name), "Options"), []).append(record)
        for title, records in listed.items():
            with formatter.section(title):
                formatter.write_dl(records)


def settings(*fields: str) -> Callable[[Command], Command]:
    """`--config` and an option for each of these fields of `TrainConfig`."""

    def decorate(command: Command) -> Command:
        for field in reversed(fields):
            command = _option(field)(command)
        return click.option("--config", "config_file", metavar="FILE", help="YAML file with settings of a run.")(
            command
        )

    return decorate


def resolved(config_file: str | None, options: dict[str, Any]) -> TrainConfig:
    return TrainConfig.resolve(config_file, **given(options))


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, by their public names."""
    return {public_name(field): value for field, value in options.items() if value not in (None, ())}


def choices(field: str) -> click.Choice[str]:
    """What a field that is one of several words may be."""
    return click.Choice([str(value) for value in get_args(_without_none(TrainConfig.model_fields[field].annotation))])


def _option(field: str) -> Callable[[Command], Command]:
    info = TrainConfig.model_fields[field]
    kind = _without_none(info.annotation)
    options: dict[str, Any] = {"default": None, "help": _help(field)}
    names = [option_name(field), field]
    if kind is bool:
        if info.default:
            names[0] = f"{option_name(field)}/--no-{public_name(field).replace('_', '-')}"
        else:
            options["is_flag"] = True
            options["flag_value"] = True
    elif get_origin(kind) is Literal:
        options["type"] = choices(field)
    elif get_origin(kind) is tuple:
        options |= {"type": float, "nargs": len(get_args(kind))}
    elif get_origin(kind) is list:
        options |= {"multiple": True}
    else:
        options["type"] = _click_type(kind)
    return click.option(*names, **options)


def _without_none(kind: Any) -> Any:
    """`int` for `int | None`."""
    kinds = [k for k in get_args(kind) if k is not NoneType] if get_origin(kind) in (Union, UnionType) else []
    return kinds[0] if len(kinds) == 1 else kind


def _click_type(kind: Any) -> type:
    """Text for a union that only the configuration can tell apart."""
    return kind if kind in (int, float) else str


def _help(field: str) -> str:
    info = TrainConfig.model_fields[field]
    text = (info.description or "").strip()
    default = info.default
    if default is None or default is False or info.default_factory is not None:
        return text
    if isinstance(default, tuple):
        default = " ".join(map(str, default))
    return f"{text}  [default: {str(default).lower() if default is True else default}]"
