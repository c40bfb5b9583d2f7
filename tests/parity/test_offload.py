"""Where keys and values live changes no answer: staged from the host, swapped there and back, or made anew.

The kernels are the same on either tier, so what is only placed elsewhere is compared bit by bit.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from tests.driving import Job, assert_empty, drive, finish, kept_positions, loaded, relative_error
from tests.families import FAMILIES, tiny_model, token_ids
from tests.parity.test_engine import wide_model
from transformers import CONFIG_MAPPING

import kvatlas
from kvatlas.core.errors import CompositionError
from kvatlas.core.timeline import Timeline
from kvatlas.engine.engine import Engine
from kvatlas.engine.llm import LLM
from kvatlas.engine.params import SamplingParams
from kvatlas.models import clone
from kvatlas.models.loading import LoadedModel
from kvatlas.models.probe import _causal_class
from kvatlas.models.quiet import quiet
from kvatlas.strategies.strategy import Strategy

OUTPUT_TOKENS = 8
TOLERANCE = 1e-4
SHARING = ("gemma3n_text", "gemma4_text")
UNIFORM = ("llama", "qwen2", "qwen3", "mixtral", "phi3", "opt", "gpt_neox", "stablelm", "nemotron", "deepseek_v2")
ALL = (*FAMILIES, *SHARING, "stablelm", "nemotron", "deepseek_v2")
KEEPS = ("streaming_llm(sinks=2, recent=9)", "h2o(heavy=5, recent=4)", "snapkv(budget=9, window=4)")
SPECULATE_ALL = "rehearse(alpha=inf, cap=1.0) | offload(host)"
SPECULATE_SOME = "rehearse(alpha=inf, cap=0.5) | offload(host)"
PLACED = ("offload(host)", "offload(host, false)", *(f"{keep} | offload(host)" for keep in KEEPS), SPECULATE_SOME)


def slow(family: str):
    """Return a family that only the wide run takes."""
    return pytest.param(family, marks=pytest.mark.slow)


@cache
def model(family: str = "llama") -> LoadedModel:
    if family == "deepseek_v2":  # multi-head latent attention: keys wider than values
        config = CONFIG_MAPPING["deepseek_v2"](num_experts_per_tok=2)
        with quiet():
            return loaded(clone.build(_causal_class(config), clone.tiny_config(config)))
    return loaded(tiny_model(family))


@cache
def ids(length: int, seed: int = 0) -> list[int]:
    return token_ids(length, seed=seed)[0].tolist()


def vocabulary(family: str) -> int:
    return model(family).adapter.shape.vocab_size


def job(strategy: str, prompt_tokens: int, outputs: int = OUTPUT_TOKENS, family: str = "llama", seed: int = 0) -> Job:
    tokens = [token % vocabulary(family) for token in ids(prompt_tokens + outputs, prompt_tokens + seed)]
    return Job(tokens[:prompt_tokens], tokens[prompt_tokens:], strategy)


def logits_of(done: Job) -> torch.Tensor:
    return torch.stack(done.logits)


def engine_of(family: str = "llama", **options) -> Engine:
    options = {
        "kv_memory": "4MiB", "host_memory": "8MiB", "block_size": 4, "enable_prefix_caching": False, **options
    }  # fmt: skip
    return Engine(model(family), **options)


@cache
def alone(family: str, strategy: str, prompt_tokens: int, outputs: int = OUTPUT_TOKENS, chunk: int = 512):
    """Return the logits and kept positions of one job in an engine of its own."""
    (done,) = drive(engine_of(family, max_batched_tokens=chunk), [job(strategy, prompt_tokens, outputs, family)])
    return logits_of(done), done.kept


def assert_close(done: Job, wanted: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    for step, (got, right) in enumerate(zip(done.logits, wanted, strict=True)):
        error = relative_error(got, right)
        assert error < tolerance, f"{done.strategy}, prompt of {len(done.prompt)}, output {step}: {error:.1e}"


# On the host as on the device

PACKED = (
    "kivi(bits=4, residual=8)",
    "snapkv(budget=50, window=8) | kivi(bits=2, residual=8)",
    "snapkv(budget=40, window=8) | ada | kivi(bits=4, residual=0)",
    "h2o(heavy=40, recent=10) | kivi(bits=4, residual=0)",
    "kivi(bits=4, residual=8) | quest(budget=32, dense=0)",
    "int8(layers=0-1) | kivi(bits=4, residual=8, layers=2-)",
)


@pytest.mark.parametrize("keep", ["full", "fp16", *KEEPS, "h2o(heavy=0.3, recent=0.2) | bf16"])
@pytest.mark.parametrize("family", ["llama", slow("gemma2"), "gemma4_text", slow("deepseek_v2")])
def test_placed_elsewhere_it_is_the_same_to_the_bit(family: str, keep: str) -> None:
    for prompt_tokens, chunk, place in ((23, 9, "offload(host)"), (14, 512, "offload(host, prefetch=false)")):
        plain, kept = alone(family, keep, prompt_tokens, chunk=chunk)
        placed, where = alone(family, f"{keep} | {place}", prompt_tokens, chunk=chunk)
        assert torch.equal(placed, plain), f"{place}: {relative_error(placed, plain):.1e}"
        assert where == kept


@pytest.mark.parametrize("place", ["offload(host)", "offload(host, prefetch=false)"])
@pytest.mark.parametrize("keep", PACKED)
def test_packed_blocks_elsewhere_are_the_same_to_the_bit(keep: str, place: str) -> None:
    """Old blocks cross to the host when they are encoded, and visit; new ones stay on the device."""
    done = []
    for sentence in (keep, f"{keep} | {place}"):
        engine = Engine(wide_model(), kv_memory="8MiB", host_memory="8MiB", max_batched_tokens=100, link="8GB/s,1us")
        jobs = [job(sentence, length, 40) for length in (75, 9, 60)]
        done.append(drive(engine, jobs, interrupt_every=17))
        assert engine.store.books().used == 0 and engine.store.host.books().used == 0
        if place in sentence:
            assert engine.transport.link.to_host.num_bytes > 0 and engine.transport.link.to_device.num_bytes > 0
    for plain, placed in zip(*done, strict=True):
        assert torch.equal(logits_of(placed), logits_of(plain)) and placed.kept == plain.kept


@pytest.mark.parametrize("prefetch", ["true", "false"])
@pytest.mark.parametrize("resident", [1, 40, 1000])
@pytest.mark.parametrize(
    "choosing",
    [
        "quest(budget=32, dense=0)",
        "quest(budget=32, dense=1) | int8",
        "rocket(budget=24, page=2)",
        "rehearse(alpha=inf, cap=0.3)",
        "streaming_llm(sinks=4, recent=60) | quest(budget=32, dense=0)",
        "snapkv(budget=50, window=8) | ada | rocket(budget=24, page=4)",
        "kivi(bits=4, residual=8) | quest(budget=32, dense=0)",
        "h2o(heavy=20, recent=10, layers=0) | quest(budget=24, layers=1-)",
    ],
)
def test_what_stays_on_the_device_is_not_fetched_again(choosing: str, resident: int, prefetch: str) -> None:
    """Answers are the same to the bit; what moves is less, the more may stay, and never more."""
    layers = ", layers=1-" if "layers" in choosing else ""
    sentences = [f"{choosing} | offload(host, {prefetch}, resident={n}{layers})" for n in (0, resident)]
    done, moved = [], []
    for sentence in sentences:
        engine = engine_of(kv_memory="8MiB", max_batched_tokens=100, block_size=32 if "kivi" in choosing else 8)
        jobs = [job(sentence, length, 24) for length in (75, 9, 60)]
        drive(engine, jobs)
        done.append(jobs)
        moved.append(engine.link.to_device.num_bytes)
        assert all(one.request.peak_bytes <= one.request.footprint.peak_bytes for one in jobs)
        assert_empty(engine)
    for alike, other in zip(*done, strict=True):
        assert relative_error(logits_of(other), logits_of(alike)) < 1e-6 and other.kept == alike.kept
    assert moved[1] <= moved[0] and (resident == 1 or moved[1] < 0.9 * moved[0])


@pytest.mark.parametrize("family", [slow("gemma2"), "gemma4_text", "mistral"])
def test_windows_see_what_stays(family: str) -> None:
    """A block that stays is not fetched again with the positions of its newer tokens."""
    done = []
    for resident in (0, 40):
        jobs = [job(f"quest(budget=24, dense=0) | offload(host, resident={resident})", n, 24, family) for n in (70, 9)]
        drive(engine_of(family, max_batched_tokens=100, block_size=8), jobs, interrupt_every=9)
        done.append(jobs)
    for alike, other in zip(*done, strict=True):
        assert relative_error(logits_of(other), logits_of(alike)) < 1e-6


@pytest.mark.parametrize("place", ["", " | offload(host)"])
def test_layers_that_pack_beside_others_in_torch_form(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What layers with equal lanes compute once must not be used by those that have packed some of theirs."""
    done = []
    for form in ("auto", "torch"):
        monkeypatch.setenv("KVATLAS_KERNELS", form)
        engine = Engine(wide_model(), kv_memory="8MiB", host_memory="8MiB", max_batched_tokens=100)
        sentence = f"int8(layers=0-1) | kivi(bits=4, residual=8, layers=2-){place}"
        done.append(drive(engine, [job(sentence, length, 40) for length in (75, 9, 60)]))
    for fast, plain in zip(*done, strict=True):
        assert relative_error(logits_of(plain), logits_of(fast)) < 3e-2


@cache
def long_model() -> LoadedModel:
    return loaded(tiny_model("llama", max_position_embeddings=1024, num_hidden_layers=3))


@pytest.mark.parametrize(
    ("packing", "prompt_tokens"),
    [
        ("snapkv(budget=160, window=8) | pyramid | kivi(bits=4, residual=64) | quest(budget=96, dense=0)", 330),
        ("snapkv(budget=150, window=8, layers=0) | kivi(bits=4, residual=128) | quest(budget=96, dense=0)", 330),
        ("kivi(bits=4, residual=128) | quest(budget=96, dense=0)", 125),  # chooses before a block is packed
    ],
)
def test_packed_blocks_that_stay(packing: str, prompt_tokens: int) -> None:
    """Also where layers have packed different numbers of blocks, or none so far."""
    done, moved = [], []
    for resident in (0, 1, 1000):
        engine = Engine(long_model(), kv_memory="16MiB", host_memory="16MiB", enable_prefix_caching=False)
        sentence = f"{packing} | offload(host, resident={resident})"
        done.append(drive(engine, [job(sentence, prompt_tokens, 45)])[0])
        moved.append(engine.link.to_device.num_bytes)
        assert_empty(engine)
    for other in done[1:]:
        assert relative_error(logits_of(other), logits_of(done[0])) < 1e-6
    assert moved[2] < moved[0] and moved[1] <= moved[0]


def test_something_stays_in_all_layers_or_in_none() -> None:
    sentence = "quest(budget=24, dense=0) | offload(host, resident=13, layers=0-1) | offload(host, layers=2-)"
    with pytest.raises(CompositionError, match="some stays in all layers or in none"):
        engine_of().add_request([1, 2, 3], SamplingParams(), sentence)


@pytest.mark.parametrize("family", ALL)
def test_offload_is_full(family: str) -> None:
    placed, plain = (alone(family, strategy, 23, chunk=9)[0] for strategy in ("offload(host)", "full"))
    assert torch.equal(placed, plain)


def test_layers_that_share_one_buffer() -> None:
    """One layer owns the lanes of all, and one after the other reads them through the only buffer."""
    own = loaded(
        tiny_model("gemma4_text", layer_types=["full_attention"] * 4, num_kv_shared_layers=3, global_head_dim=16)
    )
    assert own.adapter.shape.owners == (0,)
    done = []
    for strategy in ("full", "offload(host)", "offload(host, false)"):
        engine = Engine(own, kv_memory="4MiB", block_size=4, max_batched_tokens=9)
        done.append(logits_of(*drive(engine, [job(strategy, 23)])))
    assert torch.equal(done[1], done[0]) and torch.equal(done[2], done[0])


@pytest.mark.parametrize("family", UNIFORM)
def test_speculation_that_reads_everything_is_full(family: str) -> None:
    got, wanted = (alone(family, each, 23, chunk=9)[0] for each in (SPECULATE_ALL, "full"))
    assert all(relative_error(a, b) < TOLERANCE for a, b in zip(got, wanted, strict=True))


def test_as_many_dense_layers_as_there_are_is_full() -> None:
    got = alone("llama", "rehearse(dense=9) | offload(host)", 23)[0]
    assert torch.equal(got, alone("llama", "full", 23)[0])


@pytest.mark.parametrize("strategy", PLACED)
@pytest.mark.parametrize("family", ["llama", "gpt_oss", slow("gemma4_text"), slow("phi3")])
def test_alone_is_batched_and_whole_is_chunked(family: str, strategy: str) -> None:
    if "rehearse" in strategy and family not in UNIFORM:
        strategy = "offload(host)"  # speculation is refused for windows and shared lanes
    lengths = (31, 3, 12)
    jobs = [job(each, n, family=family) for n in lengths for each in (strategy, "full", "offload(host)")]
    engine = engine_of(family, max_batched_tokens=13)
    for done in drive(engine, jobs):
        assert_close(done, alone(family, done.strategy, len(done.prompt))[0])
    assert_empty(engine)


@pytest.mark.parametrize("block_size", [1, 3, 32])
def test_blocks_of_any_size(block_size: int) -> None:
    jobs = [job(strategy, n) for n in (31, 12) for strategy in PLACED]
    for done in drive(engine_of(block_size=block_size, max_batched_tokens=17), jobs):
        assert_close(done, alone("llama", done.strategy, len(done.prompt))[0])


def test_an_emulated_link_changes_times_only() -> None:
    timeline = Timeline()
    engine = engine_of(link="1GB/s,20us", observer=timeline)
    for done in drive(engine, [job(strategy, 12) for strategy in PLACED]):
        assert_close(done, alone("llama", done.strategy, 12)[0])
    assert engine.link.rate is not None and str(engine.link.rate) == "1 GB/s, 20 us"
    for traffic in (engine.link.to_host, engine.link.to_device):
        least = traffic.moves * 20e-6 + traffic.num_bytes / 1e9
        assert traffic.moves > 0 and traffic.seconds >= least
    for kind, traffic in (("fetch", engine.link.to_device), ("store", engine.link.to_host)):
        noted = [event for event in timeline.events if event.kind == kind]
        assert sum(event.num_bytes for event in noted) == traffic.num_bytes and len(noted) == traffic.moves
        assert all(event.num_bytes > 0 for event in noted), "a link is not troubled for nothing"


@pytest.mark.parametrize("prefetch", [True, False])
def test_what_a_step_moves(prefetch: bool) -> None:
    """All blocks of all layers in, the new token out; and no more than the footprint says."""
    for family in ("llama", "gemma4_text"):
        engine = engine_of(family)
        request = engine.add_request(
            ids(20), SamplingParams(max_tokens=9, ignore_eos=True), f"offload(host, {str(prefetch).lower()})"
        )
        engine.step()
        for _ in range(8):
            before, cached = engine.link.to_device.num_bytes, request.computed
            stored = engine.link.to_host.num_bytes
            engine.step()
            layers = model(family).adapter.shape.layers
            fetched = engine.link.to_device.num_bytes - before
            assert 0 < fetched <= request.footprint.moved_bytes_per_step
            if family == "llama":
                blocks = engine.store.layout(engine.plan(Strategy.parse("full")).cache).groups[0].blocks
                assert fetched == len(layers) * 2 * blocks.block_bytes * -(-(cached + 1) // 4)
                new = sum(layer.num_kv_heads * (layer.key_dim + layer.value_dim) * 4 for layer in layers)
                assert engine.link.to_host.num_bytes - stored == new


@pytest.mark.parametrize("strategy", ["offload(host)", "offload(host, false)", SPECULATE_SOME])
def test_what_a_chunk_moves(strategy: str) -> None:
    """The whole past of each layer on the host, once; nothing where there is no past."""
    engine = engine_of(max_batched_tokens=8)
    engine.add_request(ids(24), SamplingParams(max_tokens=1), strategy)
    layers = 3 if "rehearse" not in strategy else 2
    for past in (0, 8, 16):
        moves, moved = engine.link.to_device.moves, engine.link.to_device.num_bytes
        engine.step()
        blocks = engine.store.layout(engine.plan(Strategy.parse("full")).cache).groups[0].blocks
        assert engine.link.to_device.num_bytes - moved == layers * 2 * blocks.block_bytes * past // 4
        assert engine.link.to_device.moves - moves == (layers if past else 0)


# Swapped, or made anew


STAYING = "snapkv(budget=15, window=4) | quest(budget=12, dense=0) | offload(host, resident=14)"
INTERRUPTED = ("full", *KEEPS, "offload(host)", "h2o(heavy=5, recent=4) | offload(host)", SPECULATE_SOME, STAYING)


@pytest.mark.parametrize(
    ("strategy", "host_memory"),
    [
        *((each, room) for each in INTERRUPTED for room in ("8MiB", 0) if room or "offload" not in each),
        *(
            pytest.param(each, 60_000, marks=[] if each in INTERRUPTED[2:5:2] else pytest.mark.slow)
            for each in INTERRUPTED
        ),
    ],
)
def test_interrupted_is_uninterrupted(strategy: str, host_memory: str | int) -> None:
    """With room on the host caches wait there; with little or none they are computed or replayed anew."""
    jobs = [job(strategy, n, outputs=16) for n in (9, 17, 30)]
    engine = engine_of(max_batched_tokens=10, host_memory=host_memory)
    drive(engine, jobs, interrupt_every=4)
    assert sum(done.request.num_preemptions for done in jobs) >= 5
    assert (engine.scheduler.num_swaps > 0) == (host_memory != 0)
    for done in jobs:
        assert_close(done, alone("llama", strategy, len(done.prompt), 16)[0])
        assert done.kept == alone("llama", strategy, len(done.prompt), 16)[1]
    assert_empty(engine)


@pytest.mark.parametrize("strategy", INTERRUPTED)
def test_a_swap_changes_not_a_bit(strategy: str) -> None:
    """One request, swapped at every step of its life: the same forwards on the same bytes."""
    wanted = alone("llama", strategy, 17, chunk=10)[0]
    for every in (1, 2):
        done, engine = job(strategy, 17), engine_of(max_batched_tokens=10)
        drive(engine, [done], interrupt_every=every)
        assert engine.scheduler.num_swaps == done.request.num_preemptions >= 3
        assert torch.equal(logits_of(done), wanted)
        assert_empty(engine)


@pytest.mark.parametrize("family", [slow("gemma2"), "gemma4_text", "phi3", slow("mistral")])
@pytest.mark.parametrize("strategy", ["full", "h2o(heavy=5, recent=4)", "offload(host)"])
def test_swaps_of_windows_shared_lanes_and_long_ropes(family: str, strategy: str) -> None:
    jobs = [job(strategy, n, outputs=14, family=family) for n in (9, 30)]
    engine = engine_of(family, max_batched_tokens=10)
    drive(engine, jobs, interrupt_every=3)
    assert engine.scheduler.num_swaps >= 5
    for done in jobs:
        assert_close(done, alone(family, strategy, len(done.prompt), 14)[0])
    assert_empty(engine)


@pytest.mark.parametrize("strategy", INTERRUPTED)
def test_cancelled_wherever_it_is(strategy: str) -> None:
    for steps in (0, 1, 3, 5):
        engine = engine_of(max_batched_tokens=7)
        requests = [
            engine.add_request(ids(12, seed), SamplingParams(max_tokens=9, ignore_eos=True), strategy)
            for seed in (1, 2, 3)
        ]
        for _ in range(steps):
            engine.step()
        for request in requests[:2]:
            if request in engine.scheduler.running:
                engine.scheduler._preempt(request)
        engine.cancel(requests[0])
        assert requests[0].swapped is None and requests[0].seq is None
        engine.step()
        engine.cancel(requests[1])
        finish(engine)
        assert len(requests[2].output_ids) == 9
        assert_empty(engine)


# Sessions, forks, prefixes


def conversation(llm: LLM, strategy: str, *, take_after: tuple[int, ...] = (), swap: bool = True, noise: bool = False):
    """Return the answers of four turns; the cache is taken before some of them."""
    answers = []
    with llm.session(strategy) as session:
        for turn, (prompt_tokens, outputs) in enumerate([(9, 1), (7, 5), (1, 4), (12, 3)]):
            if turn in take_after:
                llm.engine.scheduler._take_cache(session._request, swap=swap)
                assert (session._request.swapped is not None) == swap
                if noise:
                    llm.generate(ids(20, turn), SamplingParams(max_tokens=3, ignore_eos=True), strategy=strategy)
            params = SamplingParams(max_tokens=outputs, ignore_eos=True)
            answers.append(session.generate(ids(prompt_tokens, turn), params).outputs[0].token_ids)
            held = kept_positions(llm.engine.store, session._request.seq)
            answers.append(held)
    assert_empty(llm.engine)
    return answers


@pytest.mark.parametrize("strategy", INTERRUPTED)
def test_sessions_are_taken_and_brought_back(strategy: str) -> None:
    options = {"kv_memory": "4MiB", "host_memory": "8MiB", "block_size": 4, "max_batched_tokens": 6}
    wanted = conversation(LLM(model(), **options), strategy)
    for taken, swap in (((1, 2, 3), True), ((1, 3), False)):
        again = conversation(LLM(model(), **options), strategy, take_after=taken, swap=swap, noise=True)
        assert again == wanted, f"taken before {taken}, {'swapped' if swap else 'made anew'}"


@pytest.mark.parametrize("strategy", ["offload(host)", SPECULATE_SOME, "h2o(heavy=5, recent=4) | offload(host)"])
def test_offloaded_two_turns_are_those_of_the_plain_cache(strategy: str) -> None:
    """Where nothing is chosen, answers are those of the device; and speculation does not forget a turn."""
    plain = {"offload(host)": "full", SPECULATE_SOME: SPECULATE_SOME}.get(strategy, "h2o(heavy=5, recent=4)")
    options = {"kv_memory": "4MiB", "host_memory": "8MiB", "block_size": 4, "max_batched_tokens": 6}
    assert conversation(LLM(model(), **options), strategy) == conversation(LLM(model(), **options), plain)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("strategy", ["full", "offload(host)"])
@pytest.mark.parametrize("first_to_write", [0, 1])
def test_forks_do_not_see_each_other(strategy: str, first_to_write: int, swapped: bool) -> None:
    params, prompts = SamplingParams(max_tokens=5, ignore_eos=True), (ids(6, 4), ids(9, 5))
    wanted = []
    for prompt in prompts:
        with LLM(model(), kv_memory="4MiB", block_size=4).session("full") as session:
            session.generate(ids(7), params)
            wanted.append(session.generate(prompt, params).outputs[0].token_ids)
    llm = LLM(model(), kv_memory="4MiB", block_size=4, enable_prefix_caching=False)
    with llm.session(strategy) as session:
        session.generate(ids(7), params)
        if swapped:
            llm.engine.scheduler._take_cache(session._request)
        with session.fork() as other:
            both = [session, other]
            for turn in (first_to_write, 1 - first_to_write):
                if not swapped:
                    llm.engine.scheduler._take_cache(both[turn]._request)
                assert both[turn].generate(prompts[turn], params).outputs[0].token_ids == wanted[turn]
    assert_empty(llm.engine)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma4_text"])
@pytest.mark.parametrize("max_batched_tokens", [5, 64])
def test_prefixes_on_the_host(family: str, max_batched_tokens: int) -> None:
    common = ids(22)
    prompts = [common, common + ids(7, 1), common[:13] + ids(9, 2), common, ids(30, 3)]
    cached = engine_of(family, max_batched_tokens=max_batched_tokens, enable_prefix_caching=True)
    plain = engine_of(family)
    hits = []
    for prompt in prompts:
        outputs = [*prompt[:3], *ids(4, 9)]
        with_cache, without = Job(prompt, outputs, "offload(host)"), Job(prompt, outputs, "full")
        drive(cached, [with_cache])
        drive(plain, [without])
        assert_close(with_cache, logits_of(without))
        hits.append(with_cache.request.adopted_tokens)
    assert hits[0] == hits[4] == 0
    if family == "llama" or max_batched_tokens == 5:
        assert hits[1:4] == [20, 12, 20]
    books = cached.store.host.books()
    assert books.cached > 0 == cached.store.books().cached, "prefixes of the host stay on the host"
    assert_empty(cached)


def test_prefixes_give_way_on_a_short_host() -> None:
    """Many prompts after another on a host for little more than one; some share a prefix that may be gone."""
    engine = engine_of(host_memory=60_000, enable_prefix_caching=True, kv_memory=60_000)
    for seed in (0, 1, 0, 2, 3, 0):
        prompt, outputs = ids(30, seed), ids(6, 9)
        done = Job(prompt, outputs, "offload(host)")
        drive(engine, [done])
        assert done.request.num_preemptions == 0
        without = Job(prompt, outputs)
        drive(engine_of(), [without])
        assert_close(done, logits_of(without))
    assert engine.store.host.books().cached > 0
    assert_empty(engine)


def test_prefixes_never_cross_tiers() -> None:
    engine = engine_of(enable_prefix_caching=True)
    adopted = []
    for strategy in ("full", "offload(host)", "offload(host)", SPECULATE_SOME, "full", "offload(host, false)"):
        done = job(strategy, 21)
        drive(engine, [done])
        assert_close(done, alone("llama", strategy, 21)[0])
        adopted.append(done.request.adopted_tokens)
    assert adopted == [0, 0, 20, 0, 20, 20]


# Through transformers' generate


@pytest.mark.parametrize(
    ("strategy", "like"), [("offload(host)", "full"), (SPECULATE_ALL, "full"), (SPECULATE_SOME, None)]
)
def test_attach(strategy: str, like: str | None) -> None:
    own = tiny_model("llama")
    prompts = torch.tensor([[0, 0, 0, *ids(9, 1)], ids(12, 2)])
    mask = (prompts > 0).long()
    options = {"attention_mask": mask, "max_new_tokens": 7, "do_sample": False, "eos_token_id": None}
    if like is None:
        llm = LLM(model(), strategy, kv_memory="4MiB", block_size=4)
        answers = llm.generate([ids(9, 1), ids(12, 2)], SamplingParams(max_tokens=7, ignore_eos=True))
        wanted = torch.tensor([answer.outputs[0].token_ids for answer in answers])
    else:
        wanted = own.generate(prompts, **options, pad_token_id=0)[:, 12:]
    with kvatlas.attach(own, strategy, kv_memory="4MiB", block_size=4, max_batched_tokens=7) as attachment:
        for _ in range(2):
            assert torch.equal(own.generate(prompts, **options, pad_token_id=0)[:, 12:], wanted)
            assert_empty(attachment.engine)
    assert not any(module._forward_pre_hooks for module in own.modules())
