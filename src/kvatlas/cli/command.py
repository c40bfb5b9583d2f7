"""What all commands have in common: an option is given once, and it acts or is refused; help is shown as it is written.

The parser below typer's keeps the last of several values of an option, and rich takes ``[word]`` in help for markup;
both in silence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

import typer
from rich.markup import escape
from typer.core import TyperCommand

from kvatlas.core.errors import ConfigError


class Command(TyperCommand):
    """A command whose options are given once each, unless they are lists."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.help = escape(self.help) if self.help else self.help
        for param in self.params:
            if text := getattr(param, "help", None):
                param.help = escape(text)  # type: ignore[attr-defined]  # options and arguments have one

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse as typer does, once no option is given twice.

        Raises:
            ConfigError: one is.
        """
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for param, count in Counter(order).items():
            if count > 1 and param.param_type_name == "option" and not (param.multiple or param.is_eager):
                step = "write them once, separated by commas" if "," in (param.metavar or "") else "write it once"
                raise ConfigError(f"{max(param.opts, key=len)} takes one value but is given {count} times; {step}")
        return super().parse_args(ctx, args)


class App(typer.Typer):
    """A typer app whose commands are ours."""

    def command(self, name: str | None = None, **options: Any) -> Any:
        """Return a decorator that registers a function as a command; see `typer.Typer.command`."""
        return super().command(name, **{"cls": Command, **options})


def given(context: typer.Context) -> set[str]:
    """Return the names of the parameters that stand on the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def option(context: typer.Context, name: str) -> str:
    """Return how a parameter is written on the command line."""
    param = next(param for param in context.command.params if param.name == name)
    return str(max(param.opts, key=len))


def refuse_idle(context: typer.Context, names: Collection[str], why: str) -> None:
    """Refuse options that would do nothing.

    Args:
        context: of the command.
        names: parameters without effect here.
        why: what makes them so, and what to do.

    Raises:
        ConfigError: one of them stands on the command line.
    """
    idle = [option(context, name) for name in context.params if name in names and name in given(context)]
    if idle:
        raise ConfigError(f"{' and '.join(idle)} would do nothing: {why}")
