"""Rows of records -> studies: what may share one figure, and what must stand apart.

An emulated link always stands apart. Any other condition splits only where it takes two values for one setting of
one strategy; where it differs between strategies they stay together, and captions say so. Other systems (peers)
lack conditions of ours: they join every study whose params they do not contradict.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from kvatlas.records.schema import ModelRole, Row
from kvatlas.records.store import RecordStore
from kvatlas.reports.known import KNOWN, swept
from kvatlas.reports.labels import BUDGET, LINK, is_peer
from kvatlas.reports.series import DEFAULTS, NEVER_SPLIT, Study

_Group = tuple[str, str, ModelRole]
# Conditions of the machine that one strategy may need and another ignores.
_OF_STRATEGIES = frozenset({"host_memory_bytes"})


def read_studies(store: RecordStore) -> list[Study]:
    """Return the studies of a records file."""
    return studies(store.rows())


def studies(rows: Iterable[Row]) -> list[Study]:
    """Return the rows as studies, known experiments first, in their order; without an emulated link first."""
    groups: dict[_Group, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.experiment, row.model, row.model_role].append(row)
    order = {name: place for place, name in enumerate(KNOWN)}
    return [
        study
        for group in sorted(groups, key=lambda group: (order.get(group[0], len(order)), group))
        for study in _split(group, groups[group])
    ]


def _split(group: _Group, rows: Sequence[Row]) -> list[Study]:
    experiment, model, role = group
    x_name = swept(experiment)
    if x_name and not all(isinstance(row.params.get(x_name), int | float) for row in rows):
        x_name = None
    peers = [row for row in rows if is_peer(row.strategy)]
    ours = [row for row in rows if not is_peer(row.strategy)]
    splitting = _splitting(ours or peers, x_name)
    parts: dict[tuple[object, ...], list[Row]] = defaultdict(list)
    for row in ours:
        parts[tuple(_value(row, name) for name in splitting)].append(row)
    for row in peers:
        _join(row, parts, splitting)
    found = [
        Study(
            experiment=experiment,
            model=model,
            model_role=role,
            swept=x_name,
            split={
                name: value
                for name, value in zip(splitting, values, strict=True)
                if isinstance(value, int | float | str)
            },
            rows=tuple(part),
        )
        for values, part in parts.items()
    ]
    return sorted(found, key=lambda study: study.link != DEFAULTS[LINK])


def _splitting(rows: Sequence[Row], x_name: str | None) -> list[str]:
    """Return the params whose values must not be pooled, nor silently stand side by side."""
    points = {row.point_key: row for row in rows}.values()
    names = dict.fromkeys(name for row in points for name in row.params if name not in {x_name, *NEVER_SPLIT})
    found = []
    for name in names:
        at_x: dict[tuple[object, ...], set[object]] = defaultdict(set)
        for row in points:
            of_one = (row.strategy, row.params.get(BUDGET)) if name in _OF_STRATEGIES else ()
            where = () if name == LINK else (row.params.get(x_name or ""), *of_one)
            at_x[where].add(_value(row, name))
        if any(len(values) > 1 for values in at_x.values()):
            found.append(name)
    return found


def _join(row: Row, parts: dict[tuple[object, ...], list[Row]], splitting: Sequence[str]) -> None:
    """Add a peer's row to every part it does not contradict; it makes a part of its own if there is none."""
    own = tuple(row.params.get(name) for name in splitting)
    fitting = [
        values
        for values in parts
        if all(mine is None or mine == other for mine, other in zip(own, values, strict=True))
    ]
    for values in fitting or [tuple(_value(row, name) for name in splitting)]:
        parts[values].append(row)


def _value(row: Row, name: str) -> object:
    return row.params.get(name, DEFAULTS.get(name))
