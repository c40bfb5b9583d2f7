"""In which order layers are fetched: ahead into a free buffer, never into the one that is about to be read."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kvatlas.core.timeline import Timeline
from kvatlas.engine.staging import Staging, Transfer
from kvatlas.storage.link import AHEAD, URGENT, Link, Move


class Visits:
    """Stands in for the sequences that visit the device."""

    def __init__(self, buffers: dict[int, int], *, ahead: bool = True, chooses: bool = False, num_bytes: int = 8):
        self.layout = SimpleNamespace(buffers=buffers)
        self.ahead, self.chooses, self.late, self.num_bytes = ahead, chooses, False, num_bytes
        self.log: list[tuple[str, int]] = []

    def reads_host(self, layer: int) -> bool:
        return layer in self.layout.buffers

    def whole(self, layer: int) -> Transfer:
        return self.transfer("whole", layer)

    def transfer(self, kind: str, layer: int) -> Transfer:
        self.log.append((f"order {kind}", layer))
        return Transfer(copy=lambda: self.log.append((f"fetch {kind}", layer)), num_bytes=self.num_bytes)


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> Link:
    """Return a link that carries everything out at once and remembers priorities."""
    made = Link()
    made.priorities = []

    def submit(move: Move, priority: int) -> Move:
        made.priorities.append(priority)
        move.run(None, made.to_device)
        return move

    monkeypatch.setattr(made.fetches, "submit", submit)
    return made


def run(link: Link, visitors: list[Visits], layers: int) -> None:
    """Walk through a forward, noting when each layer is read."""
    staging = Staging(link, visitors, layers)
    for layer in range(layers):
        for each in visitors:
            if each.chooses and each.reads_host(layer + 1):
                staging.bring(layer + 1, each, each.transfer("chosen", layer + 1))
        staging.enter(layer)
        for each in visitors:
            each.log.append(("read", layer))
    staging.finish()


def test_what_is_chosen_late_is_fetched_when_it_is_asked_for(link: Link) -> None:
    visits = Visits({0: 0, 1: 1}, chooses=True)
    visits.late = True
    staging = Staging(link, [visits], 2)
    for layer in range(2):
        staging.enter(layer)
        staging.fetch(layer, visits, visits.transfer("chosen", layer))
        visits.log.append(("read", layer))
    staging.finish()
    assert steps(visits) == [("fetch chosen", 0), ("read", 0), ("fetch chosen", 1), ("read", 1)]
    assert link.priorities == [URGENT, URGENT]


def steps(visits: Visits) -> list[tuple[str, int]]:
    return [(kind, layer) for kind, layer in visits.log if not kind.startswith("order")]


def test_each_layer_is_fetched_while_the_one_before_it_is_read(link: Link) -> None:
    visits = Visits({0: 0, 1: 1, 2: 0})
    run(link, [visits], 3)
    assert steps(visits) == [
        ("fetch whole", 0), ("fetch whole", 1), ("read", 0), ("fetch whole", 2), ("read", 1), ("read", 2)
    ]  # fmt: skip
    assert link.priorities == [AHEAD] * 3


def test_nothing_is_fetched_into_the_buffer_that_is_read_next(link: Link) -> None:
    """With a single buffer, a layer waits until the one before it has been read."""
    visits = Visits({0: 0, 1: 0, 2: 0})
    run(link, [visits], 3)
    assert steps(visits) == [(kind, layer) for layer in range(3) for kind in ("fetch whole", "read")]
    assert link.priorities == [AHEAD, URGENT, URGENT]


def test_dense_first_layers_are_no_reason_to_fetch_twice(link: Link) -> None:
    visits = Visits({2: 2, 3: 3})
    run(link, [visits], 4)
    assert [step for step in steps(visits) if step[0] != "read"] == [("fetch whole", 2), ("fetch whole", 3)]


def test_without_prefetch_a_layer_is_fetched_when_it_is_needed(link: Link) -> None:
    visits = Visits({0: 0, 1: 1}, ahead=False)
    run(link, [visits], 2)
    assert steps(visits) == [("fetch whole", 0), ("read", 0), ("fetch whole", 1), ("read", 1)]
    assert link.priorities == [URGENT, URGENT]


@pytest.mark.parametrize("ahead", [True, False])
def test_what_is_chosen_is_fetched_and_nothing_else(link: Link, ahead: bool) -> None:
    visits = Visits({1: 1, 2: 2}, ahead=ahead, chooses=True)
    run(link, [visits], 3)
    first = [("fetch chosen", 1), ("read", 0)] if ahead else [("read", 0), ("fetch chosen", 1)]
    then = [("fetch chosen", 2), ("read", 1)] if ahead else [("read", 1), ("fetch chosen", 2)]
    assert steps(visits) == [*first, *then, ("read", 2)]


def test_visitors_of_a_layer_share_a_move(link: Link) -> None:
    early, late, slow = Visits({0: 0, 1: 1}), Visits({1: 1}), Visits({0: 0, 1: 1}, ahead=False)
    run(link, [early, late, slow], 2)
    assert steps(early)[:2] == [("fetch whole", 0), ("fetch whole", 1)]
    assert steps(late)[:1] == [("fetch whole", 1)]
    assert (link.to_device.moves, link.to_device.num_bytes) == (4, 5 * 8), "ahead, and when needed; per layer"


def test_a_link_is_not_troubled_for_nothing(link: Link) -> None:
    visits = Visits({0: 0, 1: 1}, num_bytes=0)
    run(link, [visits], 2)
    assert not link.priorities and link.to_device.moves == 0


def test_events_say_what_was_moved_and_waited_for() -> None:
    link, timeline, visits = Link(), Timeline(), Visits({0: 0, 1: 1})
    staging = Staging(link, [visits], 2, timeline)
    for layer in range(2):
        staging.enter(layer)
        staging.store(layer, Transfer(copy=lambda: None, num_bytes=3))
    staging.finish()
    found = sorted((event.kind, event.layer, event.num_bytes) for event in timeline.events)
    waits = [("wait", -1, 0), ("wait", 0, 0), ("wait", 1, 0)]  # -1: for the stores, at the end of the forward
    assert found == [("fetch", 0, 8), ("fetch", 1, 8), ("store", 0, 3), ("store", 1, 3), *waits]
    assert all(event.seconds >= 0 for event in timeline.events)
    assert (link.to_device.num_bytes, link.to_host.num_bytes) == (16, 6)
