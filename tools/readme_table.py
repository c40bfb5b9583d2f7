"""Write README's strategy table from the registry, so that the two cannot disagree.

python tools/readme_table.py            # rewrite the table
python tools/readme_table.py --check    # exit with status 1 if it is out of date; change nothing
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from kvatlas.core.vocabulary import Axis, Moment
from kvatlas.strategies.recipes import RECIPES, Recipe
from kvatlas.strategies.registry import stages
from kvatlas.strategies.stage import Stage

README = Path(__file__).parents[1] / "README.md"
BEGIN = "<!-- strategies:begin -->"
END = "<!-- strategies:end -->"

_HEADER = ("stage, with defaults", "axis", "what it does", "lowers", "outputs", "acts", "needs", "source")
_ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
_MOMENTS = {
    Moment.BEFORE_LAYER: "before each layer",
    Moment.SELECT: "before a layer reads",
    Moment.AFTER_CHUNK: "after each chunk",
    Moment.AFTER_PREFILL: "after the prompt",
    Moment.AFTER_STEP: "after each decode step",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite or check the table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if the table is out of date")
    options = parser.parse_args(arguments)
    text = README.read_text(encoding="utf-8")
    wanted = with_table(text)
    if text == wanted:
        return 0
    if options.check:
        print("error: README's strategy table is out of date; run python tools/readme_table.py", file=sys.stderr)
        return 1
    README.write_text(wanted, encoding="utf-8")
    return 0


def with_table(text: str) -> str:
    """Return the text with the generated table between its two markers.

    Raises:
        ValueError: a marker is missing, occurs twice, or stands in the wrong order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in before or END in after:
        raise ValueError(f"README wants one {BEGIN} and one {END} behind it; put both back")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def table() -> str:
    """Return one row per registered stage, by axis and name, as a Markdown table."""
    order = list(Axis)
    found = sorted(stages().values(), key=lambda stage: (order.index(stage.axis), stage.name))
    rows = [_HEADER, ("---",) * len(_HEADER), *(_row(stage) for stage in found)]
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    recipes = [f"- `{name}` is `{one.sentence}` ({_linked(one.paper)})" for name, one in _recipes().items()]
    return "\n".join([*lines, "", "Recipes, with their papers' defaults:", "", *recipes])


def _recipes() -> dict[str, Recipe]:
    """Return the recipes that are more than one stage."""
    return {name: recipe for name, recipe in RECIPES.items() if name not in stages()}


def _linked(paper: str) -> str:
    return _ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)


def _row(stage: type[Stage]) -> tuple[str, ...]:
    info = stage.info
    return (
        f"`{stage()}`",
        stage.axis.value,
        info.summary,
        ", ".join(saved.value for saved in info.saves) or "-",
        "equal to the full cache's" if info.traits.exact else "may differ",
        ", ".join(_MOMENTS.get(moment, moment.value) for moment in Moment if moment in stage().moments) or "-",
        ", ".join(need.about for need in stage().needs) or "-",
        _linked(info.paper),
    )


if __name__ == "__main__":
    sys.exit(main())
