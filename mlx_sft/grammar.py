"""How every command is written: what it works on may stand without an option, and what cannot be understood is told at once, in one form.

mlx-sft chat runs/x              as  mlx-sft chat --run runs/x
mlx-sft train chats.jsonl        as  mlx-sft train --data chats.jsonl
mlx-sft export runs/x --out m    as  mlx-sft export --run runs/x --to m
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click
from click.core import augment_usage_errors
from click.shell_completion import CompletionItem

from mlx_sft.common_settings import option_name
from mlx_sft.console import print_error
from mlx_sft.crash_report import Interrupted, command_line
from mlx_sft.errors import INTERRUPTED, USAGE, UserError, did_you_mean
from mlx_sft.files import refuse_lost_folder
from mlx_sft.other_names import suggestion

Function = Callable[..., Any]

COMPLETE = "_MLX_SFT_COMPLETE"
"""By this variable a shell asks how a command goes on."""

_LIST = "`mlx-sft runs` lists those under runs/"


class Bare(click.Argument):
    """Words without an option, for what an option names as well; given both ways, or needed and not given, it is an error.

    Args:
        declarations: The parameter of the option, which gets the words.
        metavar: What the help calls it.
        several: Whether more than one may be given.
        needed: The hint where neither is given; empty where that may be.
    """

    def __init__(self, declarations: Sequence[str], metavar: str, *, several: bool = False, needed: str = "") -> None:
        (field,) = declarations
        shown = f"{metavar}..." if several else metavar
        super().__init__([f"bare_{field}"], nargs=-1, required=False, metavar=shown if needed else f"[{shown}]")
        self.field, self.word, self.several, self.needed = field, metavar, several, needed

    def join(self, context: click.Context, option: click.Option) -> None:
        """Give the words to the option's parameter; raises `UserError` where they cannot be meant."""
        words: tuple[str, ...] = context.params.pop(self.name)
        named = context.params[self.field] or ()
        stray = words if named else () if self.several else words[1:]
        if not named and _is_config(context, *words[:1]):
            stray = words
        if stray:
            given = (*((named,) if isinstance(named, str) else named), *words)
            meant = [f"{'--config' if _is_config(context, word) else option.opts[0]} {word}" for word in given]
            one = f"one {self.word} is taken: leave {' or '.join(given)} out"
            if "prompt" in context.params:
                one = f"one {self.word} is taken; what to ask goes to --prompt"
            hint = f"did you mean {' '.join(meant)}?" if option.multiple else one
            raise UserError(f"{stray[0]} stands there without an option", hint=hint, exit_code=USAGE)
        if words:
            context.params[self.field] = words if option.multiple else words[0]
        elif not named and self.needed:
            raise UserError(f"no {self.word} is given", hint=self.needed, exit_code=USAGE)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        return a_path(ctx, self, incomplete)


def _is_config(context: click.Context, *words: str) -> bool:
    return "config_file" in context.params and any(word.lower().endswith((".yaml", ".yml")) for word in words)


def a_path(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The shell completes it as a path."""
    return [CompletionItem(incomplete, type="file")]


class Command(click.Command):
    """A command that tells all of its unknown options at once, and takes bare words in the place of an option."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        parameters = self.get_params(context)
        if not context.resilient_parsing and (unknown := self._unknown(context, args)):
            raise _no_such_options(context, parameters, unknown)
        with augment_usage_errors(context):
            rest = super().parse_args(context, args)
        for bare in [one for one in parameters if isinstance(one, Bare)]:
            option = next(one for one in parameters if isinstance(one, click.Option) and one.name == bare.field)
            if context.resilient_parsing:
                context.params.pop(bare.name, None)
            else:
                bare.join(context, option)
        return rest

    def _unknown(self, context: click.Context, args: Sequence[str]) -> list[str]:
        """The options that it does not have, as far as what stands before another mistake."""
        found: list[str] = []
        while True:
            try:
                self.make_parser(context).parse_args(list(args))
            except click.NoSuchOption as error:
                found.append(error.option_name)
                left = [word for word in args if word.partition("=")[0] != error.option_name]
                if len(left) == len(args):  # one letter of several, -abc
                    return found
                args = left
            except click.UsageError:
                return found
            else:
                return found


def _no_such_options(context: click.Context, parameters: Sequence[click.Parameter], unknown: list[str]) -> UserError:
    fields = {one.name for one in parameters}
    known = [name for one in parameters if isinstance(one, click.Option) for name in (*one.opts, *one.secondary_opts)]
    hints = {}
    for name in unknown:
        elsewhere = suggestion(name, lambda field: option_name(field) if field in fields else None)
        if hint := elsewhere or did_you_mean(name, [word for word in known if word.startswith("--")]):
            hints[name] = hint
    told = [hint if len(unknown) == 1 else f"{name}: {hint}" for name, hint in hints.items()]
    hint = "; ".join(told) or f"`{context.command_path} --help` names every option"
    what = f"no such option{'s' * (len(unknown) > 1)} {', '.join(unknown)}"
    return UserError(what, hint=hint, exit_code=USAGE)


class Commands(click.Group):
    """Commands whose errors become a message and an exit code, and so does Ctrl-C, and whatever else is raised."""

    command_class = Command

    def main(self, *args: Any, **options: Any) -> Any:
        with command_line():
            return super().main(*args, **options)

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        with _told():
            return super().make_context(*args, **options)

    def invoke(self, context: click.Context) -> Any:
        with _told():
            refuse_lost_folder()
            return super().invoke(context)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        known = self.list_commands(ctx)
        if (
            args
            and self.get_command(ctx, args[0]) is None
            and not args[0].startswith("-")
            and not ctx.resilient_parsing
        ):
            hint = did_you_mean(args[0], known) or f"there is {', '.join(known)}"
            raise UserError(f"no such command {args[0]}", hint=hint, exit_code=USAGE)
        return super().resolve_command(ctx, args)


Commands.group_class = Commands


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(INTERRUPTED) from None
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        said = " ".join(error.format_message().split()).removesuffix(".")
        path = error.ctx.command_path if error.ctx else "mlx-sft"
        hint = f"see `{path} --help`"
        if isinstance(error, click.MissingParameter) and isinstance(error.param, click.Option):
            hint = f"add {error.param.opts[0]} {error.param.metavar or '...'}; {hint}"
        print_error(UserError(said[:1].lower() + said[1:], hint=hint))
        raise click.exceptions.Exit(error.exit_code) from None
    except UserError as error:
        print_error(error)
        raise click.exceptions.Exit(error.exit_code) from None


def command(name: str | None = None) -> Callable[[Function], Command]:
    """As `click.command`, of this grammar."""
    return click.command(name, cls=Command)


def named_run(
    *, help: str = "The run folder, as RUN names it too.", example: str = ""
) -> Callable[[Function], Function]:
    """RUN or `--run`, one run; needed where an example of the command is given."""
    needed = f"write {example}; {_LIST}" if example else ""
    return named("run", "--run", "RUN", help=help, needed=needed)


def named(
    field: str, option: str, metavar: str, *, help: str, several: bool = False, needed: str = ""
) -> Callable[[Function], Function]:
    """What a command works on, as bare words or as values of an option."""

    def decorate(function: Function) -> Function:
        function = click.option(option, field, metavar=metavar, multiple=several, help=help, shell_complete=a_path)(
            function
        )
        return bare(field, metavar, several=several, needed=needed)(function)

    return decorate


def bare(field: str, metavar: str, **how: Any) -> Callable[[Function], Function]:
    """Bare words for what an option names that the command has otherwise."""

    def decorate(function: Function) -> Function:
        return click.argument(field, cls=Bare, metavar=metavar, **how)(function)

    return decorate


def out(help: str, *, metavar: str = "DIR", required: bool = True) -> Callable[[Function], Function]:
    """`--out`, and `--to` as it was called before: where what the command makes is written."""
    return click.option("--out", "--to", "to", required=required, metavar=metavar, help=help, shell_complete=a_path)
