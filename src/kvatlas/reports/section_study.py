"""The section on the study: each of its findings, our number beside it, and the verdict that the rules give."""

from __future__ import annotations

from collections.abc import Sequence

from kvatlas.reports.figures.canvas import Plot
from kvatlas.reports.findings.findings import Finding, Judged
from kvatlas.reports.findings.rules import RULES, Part
from kvatlas.reports.known import heading
from kvatlas.reports.labels import NO_LINK
from kvatlas.reports.markup import bullets, details, paragraph, raw_table, section, text
from kvatlas.reports.published import SOURCE, TRUST
from kvatlas.reports.sections import Images, figure

CAVEAT = (
    "What is compared are statements about policies, not the paper's systems: models here are others and far smaller, "
    "the machine is another, and facts are planted in filler text. So ratios are compared, never seconds or bytes; at "
    "what settings, each row says."
)
_CLASSES = {"reproduced": "wins", "refuted": "refuted", "reproduced in part": "tie", "not testable here": "single"}


def study_section(found: Sequence[Finding], plots: Sequence[Plot], images: Images) -> str:
    """Return the verdicts at a glance, the rules, the figure, and each finding with its statements."""
    shown = "".join(figure(plot, *images[plot.name]) for plot in plots if plot.experiment == "study")
    return section(
        "study",
        "The study this reproduces",
        paragraph(f"Source: {SOURCE}"),
        _glance(found),
        details("How a verdict is found", bullets(RULES)),
        shown,
        *map(_finding, found),
        paragraph(CAVEAT, "small"),
    )


def _glance(found: Sequence[Finding]) -> str:
    rows = "".join(
        f'<tr><th scope="row"><a href="#finding-{one.number}">{one.number}. {text(one.title)}</a></th>'
        f"<td>{text(one.says)}</td>{_verdicts(one)}</tr>"
        for one in found
    )
    headings = ("Finding", f"The study says ({TRUST})", "Here")
    return raw_table("The study's findings and what the records say", headings, f"<tbody>{rows}</tbody>", hidden=True)


def _verdicts(one: Finding) -> str:
    words = "".join(
        f'<div class="{_CLASSES[outcome]}">{text(outcome)}{text(_on(link))}</div>'
        for link, outcome in one.outcomes.items()
    )
    return f'<td class="verdict">{words}</td>'


def _on(link: str) -> str:
    return "" if link == NO_LINK else f" (emulated link {link})"


def _finding(one: Finding) -> str:
    title = f'<h3 id="finding-{one.number}">{one.number}. {text(one.title)}</h3>'
    if not one.judged:
        where = " and ".join(heading(experiment) for experiment in one.experiments)
        return title + paragraph(f"Not testable here: nothing was measured of {where}.")
    bodies = "".join(map(_judged, one.judged))
    headings = ("The study says", f"There ({TRUST})", "Here", "Verdict", "What our number is")
    return title + raw_table(f"Finding {one.number}: {one.title}", headings, bodies, hidden=True)


def _judged(one: Judged) -> str:
    where = f'<tr class="group"><th colspan="5" scope="rowgroup"><span>{text(one.where)}</span></th></tr>'
    return f"<tbody>{where}{''.join(map(_row, one.parts))}</tbody>"


def _row(part: Part) -> str:
    return (
        f"<tr><td>{text(part.statement)}</td><td>{text(part.published)}</td><td>{text(part.measured)}</td>"
        f'<td class="{_CLASSES[part.outcome]}">{text(part.outcome)}</td><td>{text(part.evidence)}</td></tr>'
    )
