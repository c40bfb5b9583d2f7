"""An observer is told all that happens in a step, and what it is told agrees with what the engine did."""

from __future__ import annotations

import collections
import threading
from contextlib import contextmanager

import pytest
import torch
from tests.driving import Job, drive, finish, loaded
from tests.families import tiny_model, token_ids

from kvatlas.core.observer import NULL, Counter, Observer, SpanKind, current_observer, observed_by
from kvatlas.core.timeline import IN_FORWARDS, Timeline
from kvatlas.engine.engine import Engine
from kvatlas.engine.params import SamplingParams
from kvatlas.engine.sampler import sample

MODEL = loaded(tiny_model("llama"))
PROMPT = token_ids(21)[0].tolist()
GREEDY = SamplingParams(max_tokens=4, ignore_eos=True)


def engine_of(**options) -> Engine:
    return Engine(MODEL, **{"kv_memory": "1MiB", "block_size": 4, "enable_prefix_caching": False} | options)


class Watcher(Observer):
    """Keeps the path of kinds of each span, and adds up what is counted."""

    def __init__(self) -> None:
        self.open: list[SpanKind] = []
        self.paths: collections.Counter[tuple[SpanKind, ...]] = collections.Counter()
        self.names: set[str] = set()
        self.moves: list[tuple[SpanKind, int]] = []
        self.total: collections.Counter[Counter] = collections.Counter()

    @contextmanager
    def span(self, kind, layer=-1, name=""):
        self.open.append(kind)
        self.paths[tuple(self.open)] += 1
        self.names.add(name)
        try:
            yield
        finally:
            assert self.open.pop() is kind

    def record(self, kind, layer, start_s, end_s, num_bytes):
        assert start_s <= end_s
        self.moves.append((kind, num_bytes))

    def count(self, counter, n):
        self.total[counter] += n() if callable(n) else n


def test_spans_of_a_step_nest() -> None:
    engine = engine_of(observer=(watcher := Watcher()))
    request = engine.add_request(PROMPT, GREEDY, "h2o(heavy=5, recent=4)")
    finish(engine)
    steps, layers = len(request.output_ids), len(MODEL.adapter.shape.layers)
    for kind in (SpanKind.SCHEDULE, SpanKind.PLACE, SpanKind.FORWARD, SpanKind.EVICT, SpanKind.SAMPLE):
        assert watcher.paths[(kind,)] == steps, kind
    attend = (SpanKind.FORWARD, SpanKind.MODEL, SpanKind.ATTEND)
    assert watcher.paths[attend] == steps * layers and watcher.paths[(*attend, SpanKind.KERNEL)] >= steps * layers
    assert {"decode_attention", "chunk_attention", "column_sums"} <= watcher.names
    assert not watcher.open


def test_tokens_are_counted() -> None:
    engine = engine_of(observer=(watcher := Watcher()), max_batched_tokens=16)
    requests = [engine.add_request(PROMPT, GREEDY) for _ in range(3)]
    finish(engine)
    assert watcher.total[Counter.PROMPT_TOKENS] == 3 * len(PROMPT)
    assert watcher.total[Counter.OUTPUT_TOKENS] == sum(len(request.output_ids) for request in requests) == 12


@pytest.mark.parametrize("strategy", ["full", "quest(budget=12, dense=0)"])
def test_bytes_read_are_those_of_the_blocks(strategy: str) -> None:
    engine = engine_of(kv_memory="4MiB")
    request = engine.add_request(token_ids(65)[0].tolist(), GREEDY, strategy)
    engine.step()
    engine.observer = watcher = Watcher()
    engine.step()
    assert request.seq is not None
    shape, layout = MODEL.adapter.shape, request.seq.layout.of_layer(0).layout
    lanes = sum(layer.num_kv_heads for layer in shape.layers)
    held, bounds = -(-66 // 4), 2 * shape.layers[0].key_dim * 4
    read = held * layout.kv_bytes if strategy == "full" else 3 * layout.kv_bytes + held * bounds
    assert watcher.total[Counter.READ_BYTES] == lanes * read


def test_moves_are_told_with_their_bytes() -> None:
    engine = engine_of(observer=(watcher := Watcher()), host_memory="1MiB")
    engine.add_request(PROMPT, GREEDY, "offload(host)")
    finish(engine)
    assert any(path[-2:] == (SpanKind.STAGING, SpanKind.WAIT) for path in watcher.paths)
    for kind, traffic in ((SpanKind.FETCH, engine.link.to_device), (SpanKind.STORE, engine.link.to_host)):
        found = [num_bytes for each, num_bytes in watcher.moves if each is kind]
        assert (len(found), sum(found)) == (traffic.moves, traffic.num_bytes) and found


def test_whoever_watches_changes_no_token() -> None:
    outputs = []
    for observer in (NULL, Watcher(), Timeline(SpanKind)):
        engine = engine_of(observer=observer)
        request = engine.add_request(PROMPT, GREEDY, "snapkv(budget=9, window=4)")
        finish(engine)
        outputs.append(request.output_ids)
    assert outputs[0] == outputs[1] == outputs[2]


def test_engines_are_watched_apart_and_nobody_outside_of_steps() -> None:
    first, second = Watcher(), Watcher()
    engines = [engine_of(observer=first), engine_of(observer=second), engine_of()]
    for engine in engines:
        engine.add_request(PROMPT, GREEDY)
    engines[0].step()
    seen = first.paths.total()
    engines[2].step()
    assert current_observer() is NULL and first.paths.total() == seen > 0 and not second.paths
    engines[1].step()
    assert first.paths.total() == seen == second.paths.total()


def test_a_step_that_breaks_off_leaves_nobody_watching() -> None:
    class Broken(Observer):
        def span(self, kind, layer=-1, name=""):
            raise RuntimeError("broken")

    engine = engine_of(observer=Broken(), isolate_failures=False)
    engine.add_request(PROMPT, GREEDY)
    with pytest.raises(RuntimeError, match="broken"):
        engine.step()
    assert current_observer() is NULL


def test_other_threads_are_not_watched() -> None:
    seen = []
    with observed_by(Watcher()):
        thread = threading.Thread(target=lambda: seen.append(current_observer()))
        thread.start()
        thread.join()
    assert seen == [NULL]


def test_a_timeline_notes_what_it_is_asked_for() -> None:
    timeline, everything = Timeline(), Timeline(SpanKind)
    for observer in (timeline, everything):
        engine = engine_of(observer=observer)
        engine.add_request(PROMPT, GREEDY)
        finish(engine)
    assert {event.kind for event in timeline.events} == {SpanKind.FORWARD, SpanKind.ATTEND} < IN_FORWARDS
    assert {event.name for event in everything.events if event.kind is SpanKind.KERNEL} >= {"decode_attention"}
    with pytest.raises(ValueError, match="failed"), timeline.span(SpanKind.WAIT):
        raise ValueError("failed")
    assert all(event.kind is not SpanKind.WAIT and event.seconds >= 0 for event in timeline.events)


def test_a_sampler_decides_and_sees_logits() -> None:
    rows = []

    def last(logits: torch.Tensor, requests, end_ids):
        rows.append(logits.shape)
        return [logits.shape[1] - 1] * len(requests)

    engine = engine_of(sampler=last)
    requests = [engine.add_request(PROMPT, GREEDY) for _ in range(2)]
    finish(engine)
    vocabulary = MODEL.adapter.shape.vocab_size
    assert all(request.output_ids == [vocabulary - 1] * 4 for request in requests)
    assert rows == [(2, vocabulary)] * 4


def test_tokens_are_forced_beside_requests_that_sample() -> None:
    alone, engine = engine_of(), engine_of()
    wanted = alone.add_request(PROMPT, GREEDY)
    finish(alone)
    other = engine.add_request(PROMPT, GREEDY)
    (job,) = drive(engine, [Job(PROMPT, [5, 6, 7])])
    assert job.request is not None and job.request.output_ids == [5, 6, 7] and len(job.logits) == 3
    assert other.output_ids == wanted.output_ids
    assert alone.sampler is sample
