"""The section on who wins when: a map of winners over each swept value, and every verdict with its numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import groupby

from kvatlas.reports.answer import short_name
from kvatlas.reports.captions import ROLES
from kvatlas.reports.figures.theme import Palette, dark_hue, hue
from kvatlas.reports.known import AXES, heading, swept
from kvatlas.reports.labels import NO_LINK, format_share, named_family
from kvatlas.reports.markup import details, paragraph, raw_table, section, text
from kvatlas.reports.winners import WinnerRow

BASELINE_NOTE = (
    "full is the paged baseline: it keeps every token in paged blocks with continuous batching. That is vLLM's policy, "
    "not vLLM; nothing here says how fast vLLM is."
)
PEER_NOTE = (
    "full is the paged baseline, vLLM's policy on this engine, and not vLLM. A label that begins with peer: is another "
    "system, run as it is on the same requests; it differs in far more than its cache."
)
VERDICT_NOTE = (
    "The best estimate wins; whoever's interval overlaps that of the best ties with it, and for right or wrong answers "
    "whoever's paired difference to the best contains 0. n=1: a single sample has no interval, so an order may be "
    "noise; one run: requests or steps of a single run depend on each other, so their number is no proof; too few "
    "samples: an interval covers less than half; failed: latencies of a point that lost requests are not compared. "
    "Repeats: the median, of requests or steps each run's median or percentile, between order statistics; right or "
    "wrong answers: Wilson's interval."
)
MAP_NOTE = (
    "Each table sweeps one value and holds the others fixed; more criteria are under the tables. A filled name wins; "
    "names with an outline tie; a name with a question mark is ahead by a single run, or by single or too few samples; "
    "a dash: only one strategy was measured, or all lost requests."
)
_OUT_OF_PLACE = "At one setting"


def winners_section(rows: Sequence[WinnerRow], palette: Palette, *, tiers: str = "", peers: bool = False) -> str:
    """Return the maps and tables, apart for each link; ``tiers`` says what host and device are here."""
    parts = []
    links = list(dict.fromkeys(row.link for row in rows))
    for link in links:
        mine = [row for row in rows if row.link == link]
        name = "Measured without an emulated link" if link == NO_LINK else f"With an emulated link of {link} (emulated)"
        titled = f"<h3>{text(name)}</h3>" if len(links) > 1 or link != NO_LINK else ""
        parts += [titled, *_maps(mine, palette, link), details("Every verdict with its numbers", _table(mine, name))]
    notes = [MAP_NOTE, VERDICT_NOTE, PEER_NOTE if peers else BASELINE_NOTE, tiers]
    closing = "".join(paragraph(note, "small") for note in notes if note)
    return section("winners", "Which wins when", *parts, closing)


def _maps(rows: Sequence[WinnerRow], palette: Palette, link: str) -> list[str]:
    """Return a table per swept value: a row per criterion, a column per value."""
    found: dict[str, list[WinnerRow]] = defaultdict(list)
    for row in rows:
        if row.criterion.short:
            found[swept(row.experiment) or _OUT_OF_PLACE].append(row)
    order = sorted(found, key=lambda name: name == _OUT_OF_PLACE)
    return [_map(name, found[name], palette, link) for name in order]


def _map(name: str, rows: Sequence[WinnerRow], palette: Palette, link: str) -> str:
    several = len({row.model for row in rows}) > 1
    single = name == _OUT_OF_PLACE
    values = [0.0] if single else sorted({row.x for row in rows})
    lines: dict[tuple[str, str], dict[float, WinnerRow]] = defaultdict(dict)
    for row in rows:
        where = [row.split or _setting(row) if single else row.split, row.model if several else ""]
        where.append(f"budget {format_share(row.budget)}" if row.budget else "")
        line = (f"{row.criterion.name}", ", ".join(part for part in where if part))
        lines[line][0.0 if single else row.x] = row
    body = "".join(
        f'<tr><th scope="row">{text(criterion)}{f"<small>{text(where)}</small>" if where else ""}</th>'
        f"{''.join(_cell(cells.get(x), palette) for x in values)}</tr>"
        for (criterion, where), cells in lines.items()
    )
    heads = ["Best"] if single else [format_share(x) if name == "budget" else f"{x:,.7g}" for x in values]
    axis = _OUT_OF_PLACE if single else AXES[name]
    emulated = "" if link == NO_LINK else f", emulated link {link}"
    return f'<div class="map">{raw_table(f"{axis}{emulated}", ("", *heads), f"<tbody>{body}</tbody>")}</div>'


def _setting(row: WinnerRow) -> str:
    """Return the condition of what is not swept; models stand for themselves."""
    return "" if row.experiment == "model_size" else row.condition


def _cell(row: WinnerRow | None, palette: Palette) -> str:
    if row is None:
        return "<td></td>"
    lost = [f"{short_name(name, [row])}: {count}" for name, count in row.failed.items()]
    if row.verdict in ("only one", "failed"):
        return f"<td>–{_asides(lost)}</td>"
    mark = _asides([*([] if row.best_provenance == "measured" else [row.best_provenance]), *lost])
    kind = {"winner": "won", "tie": "tied"}.get(row.verdict, "unsure")
    everyone = len(row.names) == len(row.candidates) and len(row.names) > 2
    if everyone:
        return f'<td><span class="chip all">all {len(row.names)} tie</span>{mark}</td>'
    chips = "".join(_chip(name, row, palette, kind) for name in row.names)
    return f'<td title="{text(f"{row.value_text} ({row.interval_text})")}">{chips}{mark}</td>'


def _asides(words: Sequence[str]) -> str:
    return "".join(f" <small>{text(word)}</small>" for word in words)


def _chip(name: str, row: WinnerRow, palette: Palette, kind: str) -> str:
    kind_of = named_family(name)
    look = palette.looks([kind_of])[kind_of]
    doubt = "?" if kind == "unsure" else ""
    style = f"--c:{hue(look)};--d:{dark_hue(look)}"
    return f'<span class="chip {kind}" style="{style}">{text(short_name(name, [row]))}{doubt}</span>'


def _table(rows: Sequence[WinnerRow], name: str) -> str:
    """Return the table of every verdict, grouped by experiment and criterion."""
    groups = groupby(rows, key=lambda row: (row.experiment, row.model, row.model_role))
    bodies = "".join(_group(key, list(found)) for key, found in groups)
    headings = ("Criterion", "Condition", "Best", "Value", "Interval (95 % unless said)", "Note")
    return raw_table(f"Which strategy wins when: {name}", headings, bodies, hidden=True) if bodies else ""


def _group(key: tuple[str, str, str], rows: Sequence[WinnerRow]) -> str:
    experiment, model, role = key
    words = f"{heading(experiment)}: {model} ({ROLES.get(role, role)})"
    lines = [f'<tr class="group"><th colspan="6" scope="rowgroup"><span>{text(words)}</span></th></tr>']
    for criterion, found in groupby(rows, key=lambda row: row.criterion):
        same = list(found)
        first = f'<th rowspan="{len(same)}" scope="rowgroup">{text(criterion.name)}</th>'
        lines += [f"<tr>{first if place == 0 else ''}{_cells(row)}</tr>" for place, row in enumerate(same)]
    return f"<tbody>{''.join(lines)}</tbody>"


def _cells(row: WinnerRow) -> str:
    notes = [row.note, "" if row.provenance == "measured" else f"rests on {row.provenance} numbers"]
    kind = {"winner": "wins", "tie": "tie"}.get(row.verdict, "single")
    return (
        f'<td class="tight">{text(row.condition)}</td><td class="{kind}">{text(row.verdict_sentence)}</td>'
        f'<td class="tight">{text(row.value_text)}</td><td class="tight">{text(row.interval_text)}</td>'
        f"<td>{text('; '.join(note for note in notes if note))}</td>"
    )
