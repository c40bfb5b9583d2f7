"""The host tier: what is refused, who gives way when it is short, and what happens when a move fails."""

from __future__ import annotations

from functools import cache

import pytest
from tests.driving import Job, assert_empty, check, drive, finish, loaded, relative_error
from tests.families import tiny_model, token_ids

import kvatlas
from kvatlas.core.errors import CapacityError, ConfigError, KvatlasError, RequestError
from kvatlas.engine.engine import Engine
from kvatlas.engine.llm import LLM
from kvatlas.engine.params import SamplingParams
from kvatlas.engine.request import Request
from kvatlas.models.loading import LoadedModel
from kvatlas.storage.link import Move, Mover

OFFLOADING = ("offload(host)", "infinigen", "h2o(heavy=4, recent=4) | offload(host)")


@cache
def model(family: str = "llama") -> LoadedModel:
    return loaded(tiny_model(family))


@cache
def ids(length: int, seed: int = 0) -> list[int]:
    return token_ids(length, seed=seed)[0].tolist()


def params(outputs: int = 5) -> SamplingParams:
    return SamplingParams(max_tokens=outputs, ignore_eos=True)


def engine_of(family: str = "llama", **options) -> Engine:
    options = {"kv_memory": "2MiB", "host_memory": "2MiB", "block_size": 4, "enable_prefix_caching": False, **options}
    return Engine(model(family), **options)


def ended(engine: Engine, limit: int = 500) -> bool:
    """Step until no work is left; False if it never comes to that."""
    for _ in range(limit):
        if not engine.has_work:
            return True
        engine.step()
    return False


# Refused


@pytest.mark.parametrize("strategy", OFFLOADING)
@pytest.mark.parametrize("none", [0, "0", " 0 "])
def test_without_a_host_tier(strategy: str, none: str | int) -> None:
    engine = engine_of(host_memory=none)
    assert engine.store.host is None
    with pytest.raises(CapacityError, match=r"there is no host tier .*\(--host-memory\)"):
        engine.add_request(ids(9), params(), strategy)
    assert not engine.has_work
    with pytest.raises(CapacityError, match="--host-memory"):
        kvatlas.attach(tiny_model("llama"), strategy, host_memory=0)
    engine.add_request(ids(9), params(), "full")
    finish(engine)
    assert engine.peak_host_bytes == 0


def test_a_prompt_that_the_host_tier_cannot_hold() -> None:
    engine = engine_of(host_memory="40KiB")
    with pytest.raises(CapacityError) as refusal:
        engine.add_request(ids(100), params(20), "offload(host)")
    message = str(refusal.value)
    assert "prompt of 100 tokens + max_tokens 20 needs" in message and "the host tier has" in message
    assert "raise --host-memory" in message and "\n" not in message
    with pytest.raises(CapacityError, match=r"the pool has .* raise --kv-memory"):
        engine_of(kv_memory="40KiB").add_request(ids(100), params(20), "full")
    assert not engine.has_work


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"link": "16GB"}, ConfigError, "link '16GB' is not understood; write it like 16GB/s,10us"),
        ({"link": "16XB/s"}, ConfigError, "link '16XB/s' is not understood"),
        ({"link": "16GB/s,soon"}, ConfigError, "link '16GB/s,soon' is not understood"),
        ({"host_memory": "much"}, ConfigError, "memory size 'much' is not understood"),
        ({"host_memory": -1}, ConfigError, "must be at least 1 byte"),
        ({"host_memory": 1}, CapacityError, "does not hold one block"),
        ({"host_memory": "900TB"}, CapacityError, "--host-memory"),
    ],
)
def test_options_refused(options: dict, kind: type[KvatlasError], message: str) -> None:
    with pytest.raises(kind) as refusal:
        engine_of(**options)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_attached_rows_that_outgrow_the_host() -> None:
    import torch

    own = tiny_model("llama")
    options = {"max_new_tokens": 60, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with kvatlas.attach(own, "offload(host)", host_memory="40KiB", kv_memory="2MiB", block_size=4) as attachment:
        with pytest.raises(CapacityError, match=r"host memory of .* is full .* attach with more host_memory"):
            own.generate(torch.tensor([ids(9)]), **options)
        assert_empty(attachment.engine)
    with kvatlas.attach(own, "offload(host)", kv_memory="24KiB", block_size=4) as attachment:
        with pytest.raises(CapacityError, match=r"KV memory of .* is full .* attach with more kv_memory"):
            own.generate(torch.tensor([ids(9)]), **options)
        assert_empty(attachment.engine)


# Who gives way


def slabs(count: int) -> int:
    return count * engine_of().store.arena.slab_bytes


def parked(engine: Engine, strategy: str, length: int = 40) -> Request:
    """Return a session's request after its first turn."""
    request = engine.add_request(ids(length), params(), strategy)
    request.held_by_session = True
    finish(engine)
    return request


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("strategy", ["offload(host)", "infinigen", "full"])
def test_idle_sessions_give_way_on_the_host(strategy: str, swapped: bool) -> None:
    """Also those that were swapped there: nobody runs, nobody waits, and still the host is not theirs."""
    engine = engine_of(host_memory=slabs(3))
    session = parked(engine, strategy)
    first = list(session.output_ids)
    if swapped:
        engine.scheduler._take_cache(session)
        assert session.swapped is not None
    other = engine.add_request(ids(40, 2), params(60), "offload(host)")
    assert ended(engine), "goes round in circles"
    assert len(other.output_ids) == 60
    assert engine.scheduler.num_swaps == int(swapped), "to swap to the host frees nothing there"
    if strategy != "infinigen":  # of which a layer less is on the host: there may be room for both
        on_host = swapped or strategy != "full"
        assert (session.seq is None and session.swapped is None) == on_host, "there is not room for both"
    engine.continue_request(session, ids(3, 7), params())
    finish(engine)
    roomy = engine_of()
    again = parked(roomy, strategy)
    assert list(again.output_ids) == first
    roomy.continue_request(again, ids(3, 7), params())
    finish(roomy)
    assert again.output_ids == session.output_ids
    for each, request in ((engine, session), (roomy, again)):
        each.release(request)
        assert_empty(each)


def test_what_was_swapped_gives_way_to_what_lives_on_the_host() -> None:
    engine = engine_of(host_memory=slabs(3))
    waiting = engine.add_request(ids(40), params(), "full")
    engine.step()
    engine.scheduler._preempt(waiting)
    engine.scheduler.waiting.remove(waiting)
    other = engine.add_request(ids(40, 2), params(60), "offload(host)")
    engine.scheduler.waiting.append(waiting)  # behind the other, which needs all of the host
    assert waiting.swapped is not None
    assert ended(engine)
    assert (len(waiting.output_ids), len(other.output_ids)) == (5, 60)
    assert_empty(engine)


def test_a_swapped_request_takes_the_place_of_idle_sessions() -> None:
    """It comes back rather than being computed anew: what is idle can wait on the host in its stead."""
    engine = engine_of(kv_memory=slabs(2))
    request = engine.add_request(ids(40, 2), params(9), "full")
    engine.step()
    engine.scheduler._preempt(request)
    engine.scheduler.waiting.clear()
    session = parked(engine, "full", 60)
    engine.scheduler.waiting.append(request)
    computed = request.computed
    engine.step()
    engine.step()
    assert request.seq is not None and request.computed > computed > 0 and request.swapped is None
    assert session.swapped is not None and session in engine.scheduler.idle
    assert engine.link.to_device.moves == 1, "swapped in"
    finish(engine)
    engine.release(session)
    assert_empty(engine)


def test_two_kinds_of_blocks_compete_for_the_host() -> None:
    """Each could have what it needs, but not both; cached prefixes on the host must go, not those of the device."""
    for host_slabs in (2, 3):
        engine = engine_of("gemma4_text", host_memory=host_slabs * engine_of("gemma4_text").store.host.slab_bytes,
                           enable_prefix_caching=True)  # fmt: skip
        for seed in range(4):
            try:
                engine.add_request(ids(30, seed), params(12), "offload(host)")
            except CapacityError:
                continue
            assert ended(engine), f"goes round in circles with {host_slabs} slabs"
        assert_empty(engine)


def test_the_tier_that_is_short_is_named_where_classes_compete() -> None:
    """Two classes of blocks, one free slab, and each says that it could have it."""
    engine = engine_of("gemma4_text")
    store = engine.store
    groups = store.layout(engine.plan(kvatlas.strategies.strategy.Strategy.parse("offload")).cache).groups
    assert len(groups) == 2 and store.host is not None
    everything = [(group, group.blocks.per_slab * store.host.num_slabs) for group in groups]
    for each in everything:
        assert store.short_of([each]) is None
    before = store.host.books()
    assert store.short_of(everything) is store.host and store.try_allocate(everything) is None
    assert store.host.books() == before
    check(engine)


def test_long_outputs_of_windowed_models_are_made_anew_in_their_footprints() -> None:
    """As one prompt they need more of the host than they were said to, unless their chunks are short."""
    engine = engine_of("gemma2", max_batched_tokens=64)
    request = engine.add_request(ids(5), params(60), "offload(host)")
    for _ in range(50):
        engine.step()
    engine.scheduler.running.remove(request)
    engine.scheduler._take_cache(request, swap=False)
    engine.scheduler.waiting.append(request)
    finish(engine)
    assert 0 < engine.peak_host_bytes <= request.footprint.host_bytes
    assert request.peak_bytes <= request.footprint.peak_bytes
    assert_empty(engine)


def test_forks_of_swapped_sessions_do_not_share_the_swapped_blocks() -> None:
    llm = LLM(model(), kv_memory="2MiB", host_memory="2MiB", block_size=4)
    with llm.session("full") as session:
        session.generate(ids(20), params())
        llm.engine.scheduler._take_cache(session._request)
        with session.fork() as other:
            answers = [each.generate(ids(4, 3), params()).outputs[0].token_ids for each in (session, other)]
            check(llm.engine)
        assert answers[0] == answers[1]
    assert_empty(llm.engine)


# On the device it is less


@pytest.mark.parametrize(("strategy", "most"), [("offload(host)", 0.30), ("infinigen", 0.45)])
def test_what_is_on_the_host_is_not_on_the_device(strategy: str, most: float) -> None:
    """Measured by the books after a long prompt, on eight layers; the host holds the rest."""
    deep = loaded(tiny_model("llama", num_hidden_layers=8, max_position_embeddings=1024))
    used = {}
    for each in ("full", strategy):
        engine = Engine(deep, kv_memory="16MiB", host_memory="16MiB", block_size=4, enable_prefix_caching=False)
        request = engine.add_request(ids(900), params(20), each)
        for _ in range(9):
            engine.step()
        used[each] = engine.store.books().used, engine.store.host.books().used
        assert used[each][0] <= request.footprint.final_bytes and used[each][1] <= request.footprint.host_bytes
        finish(engine)
    (device, host), (full, _) = used[strategy], used["full"]
    assert device < most * full
    assert host >= full * 7 / 8 * 0.99
    if strategy == "infinigen":
        parts = full / 8 * (1 + 7 * 0.3 + 2 * 0.2)  # a layer, the sketch of keys with room to spare, two buffers
        assert device < parts


# When a move fails


@pytest.mark.parametrize("strategy", OFFLOADING)
@pytest.mark.parametrize("which", ["fetches", "stores"])
def test_an_error_of_moves_reaches_the_caller(strategy: str, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(model(), strategy, kv_memory="2MiB", host_memory="2MiB", block_size=4, max_batched_tokens=8)
    engine, submit, moves = llm.engine, Mover.submit, []
    wanted = llm.generate(ids(20), params())[0].outputs

    def broken() -> None:
        raise OSError("the bus is gone")

    def failing(self: Mover, move, priority: int = 0):
        moves.append(move)
        if self is getattr(engine.link, which) and len(moves) >= 5:
            move.copy = broken
        return submit(self, move, priority)

    monkeypatch.setattr(Mover, "submit", failing)
    with pytest.raises(RequestError, match=r"request-1 failed .*, and 1 more of 2: OSError: the bus is gone") as raised:
        llm.generate([ids(20), ids(13, 1)], params(20))
    assert isinstance(raised.value.__cause__, OSError)
    assert all(move.done for move in moves), "a move outlives its step"
    assert not engine.has_work
    monkeypatch.undo()
    check(engine)
    assert engine.store.books().used == engine.store.host.books().used == 0
    assert llm.generate(ids(20), params())[0].outputs == wanted, "the next request is none the wiser"


@pytest.mark.parametrize("strategy", OFFLOADING)
@pytest.mark.parametrize("which", ["fetches", "stores"])
def test_a_passing_error_of_a_move_ends_nobody(strategy: str, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(model(), strategy, kv_memory="2MiB", host_memory="2MiB", block_size=4, enable_prefix_caching=False)
    prompts = [ids(20), ids(13, 1), ids(7, 2)]
    wanted = [output.outputs for output in llm.generate(prompts, params(9))]
    submit, moves, breaks = Mover.submit, [], iter([True])

    def failing(self: Mover, move, priority: int = 0):
        moves.append(move)
        if self is getattr(llm.engine.link, which) and len(moves) >= 60 and next(breaks, False):
            move.copy = lambda: (_ for _ in ()).throw(OSError("the bus is gone"))
        return submit(self, move, priority)

    monkeypatch.setattr(Mover, "submit", failing)
    assert [output.outputs for output in llm.generate(prompts, params(9))] == wanted
    assert len(moves) > 50 and all(move.done for move in moves)
    check(llm.engine)


@pytest.mark.parametrize("where", ["a module", "a wait"])
def test_a_step_that_breaks_off_leaves_no_move_behind(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when somebody presses Ctrl-C on a slow link: what is under way must not land in others' blocks."""
    llm = LLM(model(), "offload(host)", kv_memory="2MiB", host_memory="2MiB", block_size=4, link="10MB/s,20ms")
    request = llm.engine.add_request(ids(30), params(9), "offload(host)")
    llm.engine.step()
    moves, submit = [], Mover.submit

    def noting(self: Mover, move: Move, priority: int = 0) -> Move:
        moves.append(move)
        return submit(self, move, priority)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Mover, "submit", noting)
    if where == "a wait":
        monkeypatch.setattr(Move, "wait", interrupted)
    handle = model().adapter.model.model.layers[1].register_forward_pre_hook(interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            llm.engine.step()
    finally:
        handle.remove()
    assert moves and all(move.done for move in moves)
    llm.engine.cancel(request)
    assert_empty(llm.engine)


def test_engines_side_by_side_do_not_mix() -> None:
    """Two engines on one model, one of them speculating: hooks on the model serve whoever runs."""
    done = []
    for _ in range(2):
        engines = [engine_of(), engine_of()]
        jobs = [Job(ids(20), ids(6, 1), strategy) for strategy in ("infinigen", "offload(host)")]
        for engine, job in zip(engines, jobs, strict=True):
            drive(engine, [job])
        done.append(jobs)
    for one, two in zip(*done, strict=True):
        assert all(relative_error(a, b) == 0 for a, b in zip(one.logits, two.logits, strict=True))
