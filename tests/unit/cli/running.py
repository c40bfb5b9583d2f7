"""Run a command line in this process, through the same entry point as the shell does."""

import io
import re
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass

from kvatlas.cli.main import main

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Result:
    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of an error; fails where there is more or less than that."""
        assert self.status == 2, self
        lines = self.err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: "), lines
        return lines[0].removeprefix("error: ")


def kvatlas(*arguments: object) -> Result:
    out, err, status = io.StringIO(), io.StringIO(), None
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            status = end.code
    assert isinstance(status, int)
    return Result(status=status, out=_COLOURS.sub("", out.getvalue()), err=_COLOURS.sub("", err.getvalue()))


def once(*words: object) -> list[object]:
    """Return words and options of one value each, of the options that are given twice the last."""
    texts, options, found = [str(word) for word in words], {}, []
    while texts:
        word = texts.pop(0)
        if word.startswith("--"):
            options[word] = texts.pop(0)
        else:
            found.append(word)
    return [*found, *(part for option in options.items() for part in option)]
