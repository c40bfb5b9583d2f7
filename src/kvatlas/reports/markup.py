"""Pieces of HTML: escaped text, tables that scroll, sections. No template engine, no script."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def text(value: object) -> str:
    """Return the value escaped for HTML."""
    return escape(str(value))


def table(caption: str, headings: Sequence[str], rows: Iterable[Sequence[object]], *, hidden: bool = False) -> str:
    """Return a table of plain values that scrolls sideways where it is too wide; a hidden caption is read aloud."""
    body = "".join(f"<tr>{''.join(f'<td>{text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return raw_table(caption, headings, f"<tbody>{body}</tbody>", hidden=hidden)


def raw_table(caption: str, headings: Sequence[str], body: str, *, hidden: bool = False) -> str:
    """Return a table around a body that is HTML already."""
    head = "".join(f'<th scope="col">{text(heading)}</th>' for heading in headings)
    kind = ' class="unseen"' if hidden else ""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{text(caption)}"><table>'
        f"<caption{kind}>{text(caption)}</caption><thead><tr>{head}</tr></thead>{body}</table></div>"
    )


def section(name: str, title: str, *parts: str) -> str:
    """Return a section with a heading that can be linked to."""
    return f'<section id="{text(name)}"><h2>{text(title)}</h2>{"".join(parts)}</section>'


def paragraph(words: str, kind: str = "") -> str:
    """Return a paragraph of plain text."""
    return f'<p class="{kind}">{text(words)}</p>' if kind else f"<p>{text(words)}</p>"


def bullets(items: Iterable[str]) -> str:
    """Return a list of plain texts."""
    return f"<ul>{''.join(f'<li>{text(item)}</li>' for item in items)}</ul>"


def details(summary: str, body: str) -> str:
    """Return a part that opens on request, without script."""
    return f"<details><summary>{text(summary)}</summary>{body}</details>"


def facts(pairs: Iterable[tuple[str, object]]) -> str:
    """Return a list of names and values."""
    items = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in pairs)
    return f"<dl>{items}</dl>"
