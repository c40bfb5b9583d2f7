"""What a request was said to need is what it takes: never more, and hardly less.

The schedules are random: strategies, lengths, chunks, blocks, models with and without sliding windows, memory of both
tiers that is far too small, and cancellations in between. Every run must end, with all memory free.
"""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings, strategies as st
from tests.driving import assert_empty, check, finish, loaded
from tests.families import tiny_model, token_ids

from kvatlas.core.errors import CapacityError
from kvatlas.engine.engine import Engine
from kvatlas.engine.llm import LLM
from kvatlas.engine.params import SamplingParams
from kvatlas.engine.request import Request
from kvatlas.models.loading import LoadedModel
from kvatlas.strategies.strategy import Strategy

FAMILIES = ("llama", "mistral", "gemma2", "gemma4_text")  # no window; all; some; some, of other widths, and shared
IDS = token_ids(128)[0].tolist()


@cache
def model(family: str) -> LoadedModel:
    return loaded(tiny_model(family))


small = st.integers(1, 30)
share = st.one_of(st.integers(1, 30), st.floats(0.01, 1.0))
keeps = st.one_of(
    st.just("full"),
    st.builds(lambda sinks, recent: f"streaming_llm(sinks={sinks}, recent={recent!r})", st.integers(0, 6), share),
    st.builds(lambda heavy, recent: f"h2o(heavy={heavy!r}, recent={recent!r})", share, share),
    st.builds(
        lambda budget, window: f"snapkv(budget={budget + window}, window={window}, pool=3)", small, st.integers(1, 9)
    ),
    st.builds(lambda budget: f"snapkv(budget={budget!r}, window=4)", st.floats(0.01, 1.0)),
)
divided = st.builds(
    lambda keep, how: f"{keep} | {how}",
    st.sampled_from(
        ["h2o(heavy=6, recent=4)", "h2o(budget=0.4)", "snapkv(budget=14, window=4)", "knorm(budget=0.5, recent=2)"]
    ),
    st.sampled_from(["ada(floor=0.0)", "ada(floor=0.3)", "pyramid(beta=2)", "pyramid(beta=20)"]),
)
partly = st.sampled_from(
    [
        "tova(budget=9)", "tova(budget=0.3, layers=1-)", "h2o(heavy=4, recent=4, layers=0)",
        "knorm(budget=20, layers=1-)", "h2o(heavy=4, recent=4, layers=0) | snapkv(budget=9, window=4, layers=1-)",
        "h2o(heavy=6, recent=4) | ada(layers=1-)", "snapkv(budget=14, window=4) | pyramid(beta=2, layers=1-)",
    ]
)  # fmt: skip
keeps = st.one_of(keeps, keeps, divided, partly)
encodes, places = (
    st.sampled_from(["", " | fp16", " | int8", " | int8(layers=1-)"]),
    st.sampled_from(["", " | offload(host)", " | offload(host, false)", " | offload(host, layers=0-1)"]),
)
speculations = st.builds(
    lambda keep, alpha, cap, partial: (
        f"{keep} | rehearse(alpha={alpha!r}, cap={cap!r}, partial={partial!r}) | offload(host)"
    ),
    st.sampled_from(["full", "full", "snapkv(budget=20, window=4)", "knorm(budget=25) | ada(floor=0.1)"]),
    st.sampled_from([0.0, 1.0, 4.0, float("inf")]), st.floats(0.01, 1.0), st.floats(0.01, 1.0),
)  # fmt: skip
chosen_from = st.sampled_from(["", " | offload(host)", " | offload(host, resident=20)"])
pages = st.builds(
    lambda keep, encode, budget, dense, place: f"{keep}{encode} | quest(budget={budget}, dense={dense}){place}",
    st.sampled_from(["full", "snapkv(budget=20, window=4)", "knorm(budget=25) | ada(floor=0.1)"]), encodes, small,
    st.integers(0, 2), chosen_from,
)  # fmt: skip
rockets = st.builds(
    "{}{} | rocket(budget={}, page=PAGE){}".format,
    st.sampled_from(["full", "snapkv(budget=20, window=4)", "knorm(budget=25) | ada(floor=0.1)"]), encodes,
    st.integers(16, 60), chosen_from,
)  # fmt: skip
strategies = st.one_of(
    *[st.builds("{}{}{}".format, keeps, encodes, places)] * 3,
    pages,
    rockets.map(lambda each: each.replace("PAGE", "1")),
)
bits, residuals = st.sampled_from([2, 4]), st.integers(0, 60)
packed = st.one_of(
    st.builds(lambda each, page: each.replace("PAGE", page), rockets, st.sampled_from(["2", "4", "8"])),
    st.builds("{} | kivi(bits={}, residual={})".format, keeps, bits, residuals),
    st.builds("{} | kivi(bits={}, residual={}){}".format, keeps, bits, residuals, places),
    st.builds(
        "{} | kivi(bits={}, residual={}) | quest(budget=32, dense=0){}".format,
        st.sampled_from(["full", "snapkv(budget=20, window=4)", "streaming_llm(sinks=2, recent=60)"]), bits, residuals,
        chosen_from,
    ),
)  # fmt: skip


def strategies_for(family: str) -> st.SearchStrategy[str]:
    """Return sentences that a family serves: none that speculates where layers are of several kinds."""
    if any(layer.window or layer.shares_kv_with is not None for layer in model(family).adapter.shape.layers):
        return strategies
    return st.one_of(strategies, strategies, st.builds("{}{}".format, speculations, encodes))


def params(outputs: int) -> SamplingParams:
    return SamplingParams(max_tokens=outputs, ignore_eos=True)


def held(engine: Engine, request: Request, *, on_host: bool = False) -> int:
    tier = engine.store.host if on_host else engine.store.arena
    return 0 if request.seq is None or tier is None else engine.store.allocated_bytes(request.seq, tier)


FOOTPRINTS = given(
    data=st.data(), family=st.sampled_from(FAMILIES), prompt=st.integers(1, 60), outputs=st.integers(1, 20),
    chunk=st.integers(1, 70), block_size=st.integers(1, 9),
)  # fmt: skip


@settings(max_examples=25, deadline=None)
@FOOTPRINTS
def test_bounds_hold_and_are_tight(data, family, prompt, outputs, chunk, block_size) -> None:
    engine = Engine(
        model(family), kv_memory="8MiB", host_memory="8MiB", max_batched_tokens=chunk, block_size=block_size,
        enable_prefix_caching=False,
    )  # fmt: skip
    request = engine.add_request(IDS[:prompt], params(outputs), data.draw(strategies_for(family)))
    bound, layout = request.footprint, engine.store.layout(request.plan.cache)
    rows = [row for row in (layout, layout.staging, layout.staging, layout.side) if row is not None]
    one_block_per_lane = sum(len(group.lanes) * group.blocks.block_bytes for row in rows for group in row.groups)
    windowed = any(layer.window for layer in model(family).adapter.shape.layers)
    ragged = any(layer.ragged for layer in request.plan.layers)
    windowed |= ragged  # blocks that lanes fill unevenly
    buffered = ragged and layout.staging is not None  # a buffer is for the longest lane that there may be
    slack = (3 if windowed else 1) * one_block_per_lane  # a window's blocks may begin anywhere
    prompt_peak = 0
    while engine.has_work and request.prefill_end is not None:
        engine.step()
        prompt_peak = request.peak_bytes
    assert prompt_peak <= bound.prefill_peak_bytes
    assert held(engine, request) <= bound.steady_bytes
    if request.seq is not None:
        assert held(engine, request) >= bound.steady_bytes - slack or buffered
    last = held(engine, request)
    while engine.has_work:
        last = max(last, held(engine, request))
        assert held(engine, request, on_host=True) <= bound.host_bytes
        engine.step()
    assert last <= bound.final_bytes
    assert request.peak_bytes <= bound.peak_bytes and engine.peak_host_bytes <= bound.host_bytes
    bounded = any(layer.keep.streams for layer in request.plan.layers) or windowed
    assert engine.peak_host_bytes >= bound.host_bytes - slack or bounded
    assert prompt_peak >= bound.prefill_peak_bytes - slack or (
        # chunks of a bounded prompt fill the bound only if one begins when the cache is full
        any(layer.keep.streams for layer in request.plan.layers) or windowed
    )
    assert request.peak_bytes >= bound.final_bytes - slack or buffered
    assert_empty(engine)


@settings(max_examples=12, deadline=None)
@given(data=st.data(), family=st.sampled_from(FAMILIES), slabs=st.integers(1, 5), host_slabs=st.integers(0, 6))
def test_random_schedules_end_within_their_footprints(data, family, slabs, host_slabs) -> None:
    """Requests come and go under tiny memory; nobody exceeds a footprint, everything ends, no byte is lost."""
    block_size, chunk = data.draw(st.integers(2, 5)), data.draw(st.integers(1, 40))
    options = {
        "block_size": block_size, "max_batched_tokens": chunk, "max_num_seqs": data.draw(st.integers(1, 6)),
        "enable_prefix_caching": data.draw(st.booleans()),
    }  # fmt: skip
    slab = Engine(model(family), kv_memory="8MiB", **options).store.arena.slab_bytes
    engine = Engine(model(family), kv_memory=slabs * slab, host_memory=host_slabs * slab, **options)
    requests: list[Request] = []
    for _ in range(data.draw(st.integers(1, 14))):
        action = data.draw(st.sampled_from(["add", "add", "step", "step", "cancel"]))
        if action == "add":
            start, length = data.draw(st.sampled_from([0, 0, 3])), data.draw(st.integers(1, 60))
            try:
                requests.append(
                    engine.add_request(
                        IDS[start : start + length], params(data.draw(small)), data.draw(strategies_for(family))
                    )
                )
            except CapacityError:
                continue
        elif action == "step":
            for _ in range(data.draw(st.integers(1, 10))):
                step(engine, requests)
        elif requests:
            engine.cancel(data.draw(st.sampled_from(requests)))
            check(engine)
    for _ in range(5000):
        if not engine.has_work:
            break
        step(engine, requests)
    assert not engine.has_work, "goes round in circles"
    assert all(request.finish_reason for request in requests)
    assert_empty(engine)
    assert all(len(request.output_ids) == request.params.max_tokens for request in requests
               if request.finish_reason == "length")  # fmt: skip


def step(engine: Engine, requests: list[Request]) -> None:
    engine.step()
    check(engine)
    for request in requests:
        assert request.error is None
        assert request.peak_bytes <= request.footprint.peak_bytes
        assert held(engine, request, on_host=True) <= request.footprint.host_bytes


PACKED_FOOTPRINTS = given(
    strategy=packed, family=st.sampled_from(("llama", "gemma2")), prompt=st.integers(1, 100),
    outputs=st.integers(1, 28), chunk=st.integers(1, 120),
)  # fmt: skip


@settings(max_examples=25, deadline=None)
@PACKED_FOOTPRINTS
def test_bounds_of_packed_formats_hold(strategy, family, prompt, outputs, chunk) -> None:
    engine = Engine(model(family), kv_memory="8MiB", max_batched_tokens=chunk)
    request = engine.add_request(IDS[:prompt], params(outputs), strategy)
    bound = request.footprint
    while engine.has_work:
        engine.step()
        kind = bound.prefill_peak_bytes if request.prefill_end is not None else bound.peak_bytes
        assert held(engine, request) <= kind
        check(engine)
    assert request.peak_bytes <= bound.peak_bytes
    assert_empty(engine)


SHARES = given(data=st.data(), share=st.floats(1.0, 3.0), chunk=st.integers(8, 60), host=st.booleans())


@settings(max_examples=12, deadline=None)
@SHARES
def test_packed_requests_share_tiny_memory(data, share, chunk, host) -> None:
    """Caches of two formats come and go, are swapped or replayed; nobody exceeds a footprint, everything ends."""
    sentences = [data.draw(packed) for _ in range(data.draw(st.integers(1, 5)))]
    sizing = Engine(model("llama"), kv_memory="8MiB", max_batched_tokens=chunk)
    most = max(sizing.footprint(Strategy.parse(each), 90, 20).peak_bytes for each in sentences)
    engine = Engine(
        model("llama"), kv_memory=int(share * most) + sizing.store.arena.slab_bytes,
        host_memory="8MiB" if host else 0, max_batched_tokens=chunk,
    )  # fmt: skip
    requests = []
    for sentence in sentences:
        try:
            requests.append(engine.add_request(IDS[: data.draw(st.integers(1, 90))], params(20), sentence))
        except CapacityError:
            continue
    for _ in range(5000):
        if not engine.has_work:
            break
        step(engine, requests)
    assert not engine.has_work, "goes round in circles"
    assert all(len(request.output_ids) == 20 for request in requests)
    assert_empty(engine)


SESSIONS = given(data=st.data(), family=st.sampled_from(FAMILIES))


@settings(max_examples=15, deadline=None)
@SESSIONS
def test_sessions_keep_to_their_footprints(data, family) -> None:
    llm = LLM(
        model(family), kv_memory="8MiB", host_memory="8MiB", block_size=3,
        max_batched_tokens=data.draw(st.integers(1, 20)),
    )  # fmt: skip
    engine = llm.engine
    with llm.session(data.draw(strategies_for(family))) as session:
        for turn in range(3):
            prompt = IDS[turn : turn + data.draw(st.integers(1, 24))]
            session.generate(prompt, params(data.draw(st.integers(1, 6))))
            request = session._request
            assert held(engine, request) <= request.footprint.final_bytes
            assert request.peak_bytes <= request.footprint.peak_bytes
            assert held(engine, request, on_host=True) <= request.footprint.host_bytes
            if data.draw(st.booleans()):
                engine.scheduler._take_cache(request)
            check(engine)
    assert_empty(engine)


def test_what_can_never_fit_is_refused_at_once() -> None:
    engine = Engine(model("llama"), kv_memory="64KiB", block_size=4, max_batched_tokens=16)
    with pytest.raises(CapacityError, match=r"needs .* under full, the pool has .*KiB; raise --kv-memory"):
        engine.add_request(IDS[:100], params(20), "full")
    assert not engine.has_work
    engine.add_request(IDS[:100], params(20), "streaming_llm(sinks=2, recent=8)")
    with pytest.raises(CapacityError, match="exceeds the 128 positions of llama"):
        engine.add_request(IDS[:120], params(20), "streaming_llm(sinks=2, recent=8)")


@pytest.mark.parametrize("kv_memory", [64, 600, 1000, 2000, 5000, 9000, 20_000, 30_000])
@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_budgets_run_or_refuse(family: str, kv_memory: int) -> None:
    """Where two layouts compete for few slabs, a request is refused or runs; it never waits forever."""
    for strategy in ("full", "h2o(heavy=2, recent=2)", "full | fp16", "offload(host)", "fp16 | offload(host)"):
        try:
            engine = Engine(model(family), kv_memory=kv_memory, host_memory=kv_memory, block_size=4)
            engine.add_request(IDS[:7], params(3), strategy)
        except CapacityError:
            continue
        finish(engine)
        engine.store.arena.check()


@pytest.mark.parametrize("enable_prefix_caching", [False, True])
def test_long_output_of_a_windowed_model_is_made_anew_in_its_footprint(enable_prefix_caching: bool) -> None:
    """Prompt and output together are a longer prompt than the footprint is of; computed at once, they would not fit."""
    options = {"block_size": 4, "max_batched_tokens": 64, "enable_prefix_caching": enable_prefix_caching}
    slab = Engine(model("mistral"), kv_memory="8MiB", **options).store.arena.slab_bytes
    engine = Engine(model("mistral"), kv_memory=2 * slab, **options)
    request = engine.add_request(IDS[:5], params(60))
    for _ in range(45):
        engine.step()
    engine.scheduler._preempt(request)
    finish(engine)
    assert len(request.output_ids) == 60 and request.num_preemptions == 1
    assert request.peak_bytes <= request.footprint.peak_bytes


def test_cached_prefixes_of_passed_windows_give_way() -> None:
    """Blocks that only the prefix cache holds are free to take, also of entries that are partly in use."""
    for prompt in range(60, 20, -1):
        engine = Engine(model("gemma2"), kv_memory=60_000, block_size=4, max_batched_tokens=4)
        try:
            engine.add_request(IDS[:prompt], params(4))
            break
        except CapacityError:
            continue
    finish(engine)
    again = engine.add_request(IDS[:prompt], params(4))
    finish(engine)
    assert again.num_preemptions == 0


def test_memory_of_few_full_requests_admits_more_of_h2o() -> None:
    """A strategy that bounds its cache admits more requests: that is its throughput gain."""
    most_running = {}
    for strategy in ("full", "h2o(heavy=4, recent=4)", "streaming_llm(sinks=2, recent=6)"):
        probe = Engine(model("llama"), kv_memory="8MiB", block_size=4)
        budget = 3 * probe.footprint(Strategy.parse("full"), 60, 10).peak_bytes
        engine = Engine(model("llama"), kv_memory=budget, block_size=4, max_batched_tokens=60)
        for number in range(12):
            engine.add_request(IDS[number : number + 60], params(10), strategy)
        most = 0
        while engine.has_work:
            engine.step()
            most = max(most, len(engine.scheduler.running))
        most_running[strategy] = most
    full, h2o, streaming = most_running.values()
    assert full <= 3 < h2o and streaming > 3


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(data=st.data(), family=st.sampled_from(FAMILIES), slabs=st.integers(1, 5), host_slabs=st.integers(0, 6))
def test_random_schedules_wide(data, family, slabs, host_slabs) -> None:
    test_random_schedules_end_within_their_footprints.hypothesis.inner_test(data, family, slabs, host_slabs)


def wide(drawn, test):
    """Return a fast test with many more cases, for the slow run."""
    return pytest.mark.slow(settings(max_examples=200, deadline=None)(drawn(test.hypothesis.inner_test)))


test_bounds_hold_and_are_tight_wide = wide(FOOTPRINTS, test_bounds_hold_and_are_tight)
test_bounds_of_packed_formats_hold_wide = wide(PACKED_FOOTPRINTS, test_bounds_of_packed_formats_hold)
test_packed_requests_share_tiny_memory_wide = wide(SHARES, test_packed_requests_share_tiny_memory)
test_sessions_keep_to_their_footprints_wide = wide(SESSIONS, test_sessions_keep_to_their_footprints)
