"""``kvatlas strategies``: what the registry has."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvatlas.cli.options import Plugins, examples
from kvatlas.core.vocabulary import Axis
from kvatlas.strategies.plugins import load_files
from kvatlas.strategies.recipes import RECIPES
from kvatlas.strategies.registry import stages
from kvatlas.strategies.stage import Stage
from kvatlas.strategies.strategy import Strategy


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("strategies", epilog=examples("kvatlas strategies", "kvatlas strategies --json"))(strategies)


def strategies(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False, plugins: Plugins = None
) -> None:
    """List all strategies: parameters with defaults, axis, paper, what they save and need.

    Stages of different axes are joined by |, as in 'h2o(heavy=0.1, recent=0.1) | bf16'.
    """
    load_files(plugins or ())
    order = list(Axis)
    found = [facts(stage) for stage in sorted(stages().values(), key=lambda stage: order.index(stage.axis))]
    found += [recipe_facts(name) for name in RECIPES if name not in stages()]
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        Console().print(_table(found))


def facts(stage: type[Stage]) -> dict[str, Any]:
    """Return what is known of a stage, as plain JSON values."""
    info = stage.info
    return {
        "name": stage.name,
        "sentence": str(stage()),
        "parameters": {field.name: getattr(stage(), field.name) for field in stage.parameters()},
        "axis": stage.axis.value,
        "summary": info.summary,
        "paper": info.paper,
        "saves": [saved.value for saved in info.saves],
        "lossless": info.traits.exact,
        "traits": dataclasses.asdict(info.traits),
        "needs": needs_of([stage()]),
        "moments": sorted(moment.value for moment in stage().moments),
    }


def needs_of(parts: Iterable[Stage]) -> list[str]:
    """Return what some stages need, for people."""
    return sorted({need.about for stage in parts for need in stage.needs})


def recipe_facts(name: str) -> dict[str, Any]:
    """Return what is known of a recipe that is not one stage of the same name."""
    recipe = RECIPES[name]
    strategy = Strategy.parse(name)
    parts = [stage for stage in strategy.stages if str(stage) != "full"]
    return {
        "name": name,
        "sentence": recipe.sentence,
        "parameters": {},
        "axis": " and ".join(stage.axis.value for stage in parts),
        "summary": f"{recipe.label}: {'; '.join(stage.info.summary for stage in parts)}",
        "paper": recipe.paper,
        "saves": sorted({saved.value for stage in strategy.stages for saved in stage.info.saves}),
        "lossless": strategy.traits.exact,
        "traits": dataclasses.asdict(strategy.traits),
        "needs": needs_of(parts),
        "moments": sorted({moment.value for stage in parts for moment in stage.moments}),
    }


def _table(found: list[dict[str, Any]]) -> Table:
    table = Table(show_lines=True)
    table.add_column("strategy, with defaults", overflow="fold")
    table.add_column("what it does to the cache", overflow="fold")
    for one in found:
        named = one["sentence"] if one["sentence"].startswith(one["name"]) else f"{one['name']} = {one['sentence']}"
        about = f"[bold]{escape(named)}[/]\n{escape(one['summary'])}\n[dim]{escape(one['paper'])}[/]"
        lines = [
            f"axis: {one['axis']}",
            f"saves: {', '.join(one['saves']) or 'nothing'}",
            f"outputs: {'those of the full cache' if one['lossless'] else 'may differ'}",
            f"needs: {', '.join(one['needs']) or 'nothing'}",
            f"acts: {', '.join(one['moments']) or 'never'}",
        ]
        table.add_row(about, "\n".join(lines))
    return table
