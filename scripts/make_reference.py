"""Write docs/reference from the code: the commands from click, the settings from `TrainConfig`, the API from docstrings.

`--check` writes nothing and fails where a page on disk is not what the code says. Knows nothing about what the commands do.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from mlx_sft.cli import main as program
from mlx_sft.common_settings import option_name, public_name
from mlx_sft.config import TrainConfig, all_fields, entry_settings, sections
from mlx_sft.registry import FORMATS, METHODS, OBJECTIVES, OPTIMIZERS

REFERENCE = Path(__file__).parents[1] / "docs" / "reference"
API_MODULES = ("mlx_sft", "mlx_sft.data")
NOTE = "<!-- Written by scripts/make_reference.py from the code: change it there, then `make docs`. -->\n"
WIDTH = 100


def pages() -> dict[str, str]:
    """Every page's text by its file name."""
    return {"cli.md": cli_page(), "config.md": config_page(), "api.md": api_page()}


# --- cli.md ------------------------------------------------------------------------------------------------------------------


def cli_page() -> str:
    parts = [NOTE, "# The command line\n"]
    for name, text in help_pages(program, "mlx-sft", None):
        parts.append(f"## {name}\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


def help_pages(command: click.Command, name: str, parent: click.Context | None) -> Iterator[tuple[str, str]]:
    """`--help` of a command, then of the commands under it, in a fixed width."""
    context = command.make_context(
        name, [], parent, resilient_parsing=True, terminal_width=WIDTH, max_content_width=WIDTH
    )
    text = click.unstyle(command.get_help(context))
    yield context.command_path, "\n".join(line.rstrip() for line in text.splitlines()).strip()
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            found = command.get_command(context, child)
            if found is not None and not found.hidden:
                yield from help_pages(found, child, context)


# --- config.md ---------------------------------------------------------------------------------------------------------------


def config_page() -> str:
    lines = [
        NOTE,
        "# Settings of a training run\n",
        "A setting is a line in a YAML file (`mlx-sft train --config FILE`) or the option beside it; an option goes before "
        "the file. A name that is not in these tables is an error, and so is a setting of something that was not chosen.",
    ]
    options, fields = set(option_names()), all_fields()
    for title, names in sections().items():
        lines += [f"\n## {title}\n", "| setting | option | values | default | |", "|---|---|---|---|---|"]
        for name in names:
            field, option = fields[name], option_name(name)
            cells = [
                f"`{public_name(name)}`",
                f"`{option}`" if option in options else "",
                chosen_among(name) or values(field),
                defaults(name, field),
                one_line(field.description or ""),
            ]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def chosen_among(name: str) -> str:
    """The built-in entries that a setting chooses among; empty for any other setting."""
    registries = {"method": METHODS, "objective": OBJECTIVES, "optimizer": OPTIMIZERS, "format": FORMATS}
    names = registries[name].built_in() if name in registries else []
    return " or ".join(f"`{entry}`" for entry in (["auto", *names] if name == "format" else names))


def defaults(name: str, field: FieldInfo) -> str:
    """The default; that of each entry, where several have the setting and differ in it."""
    owned = {entry: owner.model_fields[name] for _, entry, owner in entry_settings() if name in owner.model_fields}
    if len({default(other) for other in owned.values()}) < 2:
        return default(field)
    return "; ".join(f"{entry}: {default(other)}" for entry, other in owned.items())


def option_names() -> Iterator[str]:
    command = program.commands["train"]
    for parameter in command.get_params(click.Context(command)):
        yield from parameter.opts


def values(field: FieldInfo) -> str:
    """What a field takes, in words: `lora or full`, `whole number ≥ 1`."""
    words = describe(field.annotation)
    return " ".join([words, *(bound for item in field.metadata if (bound := describe_bound(item)))])


def describe(kind: Any) -> str:
    words: dict[Any, str] = {
        bool: "true or false",
        int: "whole number",
        float: "number",
        str: "text",
        type(None): "nothing",
    }
    if kind in words:
        return words[kind]
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        bounds = [
            bound
            for item in arguments[1:]
            for part in getattr(item, "metadata", [item])
            if (bound := describe_bound(part))
        ]
        return " ".join([describe(arguments[0]), *bounds])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(part) for part in arguments if part is not type(None))
    if origin is list:
        return f"list of {describe(arguments[0])}"
    if origin is dict:
        return "names and values"
    if origin is tuple:
        return " and ".join(describe(part) for part in arguments)
    raise TypeError(f"no words for {kind!r}: add them to scripts/make_reference.py")


def describe_bound(item: Any) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    return " ".join(f"{sign} {getattr(item, name):,}" for name, sign in signs.items() if hasattr(item, name))


def default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        raise TypeError("every setting has a default")
    if value is None:
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{list(value) if isinstance(value, tuple) else value}`"


# --- api.md ------------------------------------------------------------------------------------------------------------------


def api_page() -> str:
    parts = [NOTE, "# The Python API\n"]
    seen: set[int] = set()
    for module_name in API_MODULES:
        module = importlib.import_module(module_name)
        parts.append(f"## `{module_name}`\n\n{docstring(module)}\n")
        for name in module.__all__:
            thing = getattr(module, name)
            if id(thing) in seen:
                continue
            if not (inspect.isclass(thing) or inspect.isfunction(thing)):
                raise TypeError(f"{module_name}.{name} is public and neither class nor function")
            seen.add(id(thing))
            parts.append(api_entry(name, thing))
    return "\n".join(parts)


def api_entry(name: str, thing: Any) -> str:
    call = f"{name}(**settings)" if thing is TrainConfig else name + signature(thing)
    entry = f"### `{name}`\n\n```python\n{call}\n```\n\n{docstring(thing)}\n"
    if inspect.isclass(thing):
        for method_name, method in public_methods(thing):
            summary = one_line(inspect.getdoc(method) or "")
            entry += f"\n- `{method_name}{signature(method)}`: {summary}"
        entry = entry.rstrip("\n") + "\n"
    return entry


def public_methods(kind: type) -> Iterator[tuple[str, Any]]:
    """Methods that the class itself defines and documents, without those it inherits."""
    for name, member in vars(kind).items():
        function = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
        if not name.startswith("_") and inspect.isfunction(function) and function.__doc__:
            yield name, getattr(kind, name)


class Verbatim:
    """An annotation that is a string already, shown as it is written in the source."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def signature(thing: Any) -> str:
    call = inspect.signature(thing)
    parameters = [p.replace(annotation=verbatim(p.annotation)) for p in call.parameters.values()]
    result = inspect.Signature.empty if inspect.isclass(thing) else verbatim(call.return_annotation)
    return str(call.replace(parameters=parameters, return_annotation=result))


def verbatim(annotation: Any) -> Any:
    return Verbatim(annotation) if isinstance(annotation, str) else annotation


def docstring(thing: Any) -> str:
    """A docstring as Markdown: a section of indented items becomes a list, an indented picture a block of code."""
    text = inspect.getdoc(thing)
    if not text:
        raise ValueError(f"{thing!r} is public and has no docstring")
    lines: list[str] = []
    in_section = False
    for line in text.splitlines():
        if re.fullmatch(r"(Args|Attributes|Returns|Raises|Yields):", line):
            in_section = True
            lines += [f"**{line[:-1]}**", ""]
        elif in_section and (item := re.fullmatch(r"    (\*{0,2}\w+): (.*)", line)):
            lines.append(f"- `{item[1]}`: {item[2]}")
        elif in_section and line.startswith("    "):
            lines.append(("  " if lines[-1] else "") + line.strip())
        else:
            in_section = in_section and not line
            lines.append(line)
    return "\n".join(lines).strip()


def one_line(text: str) -> str:
    """The first paragraph, on one line."""
    return " ".join(text.split("\n\n")[0].split())


# -----------------------------------------------------------------------------------------------------------------------------


def check() -> int:
    """Show what differs between the pages on disk and the code; the exit code."""
    stale = False
    for name, text in pages().items():
        path = REFERENCE / name
        current = path.read_text(encoding="utf-8") if path.exists() else ""
        if current != text:
            stale = True
            difference = difflib.unified_diff(
                current.splitlines(), text.splitlines(), f"docs/reference/{name}", "the code", n=1
            )
            print("\n".join(list(difference)[:40]), file=sys.stderr)
    if stale:
        print(
            "error: docs/reference is not what the code says\nhint: run `make docs`",
            file=sys.stderr,
        )
    return int(stale)


def main() -> int:
    parser = argparse.ArgumentParser(description="Write docs/reference from the code.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page is stale")
    if parser.parse_args().check:
        return check()
    REFERENCE.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (REFERENCE / name).write_text(text, encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
