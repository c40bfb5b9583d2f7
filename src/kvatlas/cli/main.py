"""``kvatlas``: the entry point, and the one place where an error for users becomes a line and an exit status.

0 success, 1 some points failed, 2 a request that cannot be met, 130 interrupted. Unexpected errors keep their
traceback.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from pydantic import ValidationError

from kvatlas import __version__
from kvatlas.cli import bench, characterize, drive, evaluate, generate, info, report, strategies
from kvatlas.cli.command import App
from kvatlas.cli.options import examples
from kvatlas.core.errors import KvatlasError, one_line

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

app = App(
    name="kvatlas",
    help="Every KV-cache management strategy for LLM inference: implemented, run, measured, compared on one engine.",
    epilog=examples("kvatlas strategies", "kvatlas generate 'def add('", "kvatlas characterize --preset quick"),
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)
for _command in (strategies, info, generate, characterize, drive, evaluate, report, bench):
    _command.add_to(app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command line and exit; without ``arguments``, the process's own."""
    typed = list(sys.argv[1:] if arguments is None else arguments)
    if sys.stdout is None:  # as after >&- in a shell
        sys.exit(_refuse("the standard output is closed; redirect it, to /dev/null if nothing of it is wanted"))
    try:
        status = app(typed, prog_name="kvatlas", standalone_mode=False, obj=typed) or 0
        sys.stdout.flush()
    except KvatlasError as error:
        status = _refuse(str(error))
    except typer.TyperException as error:
        status = _refuse(_usage(error))
    except BrokenPipeError:
        _forget_output()
        status = 1
    except OSError as error:
        if error.errno not in _FULL:
            raise
        _forget_output()
        where = "the standard output" if error.filename is None else repr(str(error.filename))
        status = _refuse(f"{where} cannot be written ({error.strerror}); free some space and run again")
    sys.exit(status)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        typer.echo(f"kvatlas {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _forget_output() -> None:
    """Let what the standard output still holds go nowhere, so that the flush at exit does not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refuse(message: str) -> int:
    print(f"error: {one_line(' '.join(message.split()))}", file=sys.stderr)
    return 2


def _usage(error: typer.TyperException) -> str:
    """Return what was wrong on the command line, the value given, and where to look."""
    context = getattr(error, "ctx", None)
    cause = error.__cause__
    given = f", got {cause.errors()[0]['input']!r}" if isinstance(cause, ValidationError) else ""
    command = context.command_path if context else "kvatlas"
    return f"{error.format_message().rstrip('.')}{given}; see {command} --help"
