"""Formats and pages under awkward schedules: what once went wrong, or nearly did."""

from __future__ import annotations

import pytest
import torch
from tests.driving import Job, assert_empty, drive, loaded, relative_error
from tests.families import tiny_model, token_ids

from kvatlas.engine.engine import Engine
from kvatlas.engine.params import SamplingParams
from kvatlas.kernels.blocks import read_keys
from kvatlas.strategies.attend.quest import Quest
from kvatlas.strategies.strategy import Strategy

MODEL = loaded(tiny_model("llama", num_hidden_layers=2, max_position_embeddings=2048))


def job(strategy: str, prompt_tokens: int, output_tokens: int) -> Job:
    ids = token_ids(prompt_tokens + output_tokens, seed=prompt_tokens)[0].tolist()
    return Job(ids[:prompt_tokens], ids[prompt_tokens:], strategy)


@pytest.mark.parametrize("bits", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_lone_packed_request_fits_where_it_was_admitted(bits: int) -> None:
    """Every slab of waiting tokens keeps a few blocks when their fronts are encoded; none may be stranded."""
    strategy = f"kivi(bits={bits}, residual=40)"
    sizing = Engine(MODEL, kv_memory="8MiB", max_batched_tokens=400)
    least = sizing.footprint(Strategy.parse(strategy), 400, 600).peak_bytes
    slab = sizing.store.arena.slab_bytes
    engine = Engine(
        MODEL, kv_memory=least + 3 * slab, max_batched_tokens=400, host_memory=0, enable_prefix_caching=False
    )
    request = engine.add_request(token_ids(400)[0].tolist(), SamplingParams(max_tokens=600, ignore_eos=True), strategy)
    for _ in range(700):
        engine.step()
        engine.store.arena.check()
    assert request.finish_reason == "length" and request.num_preemptions == 0
    assert_empty(engine)


def test_blocks_moved_together_keep_what_they_hold() -> None:
    """Requests of several formats in little memory answer as they do alone."""
    strategies = ["kivi(bits=2, residual=8)", "full", "int8", "kivi(bits=4, residual=0)", "h2o(heavy=20, recent=20)"]
    jobs = [job(strategy, 200, 80) for strategy in strategies for _ in range(2)]
    sizing = Engine(MODEL, kv_memory="8MiB", max_batched_tokens=300)
    most = max(sizing.footprint(Strategy.parse(each), 200, 80).peak_bytes for each in strategies)
    tight = Engine(MODEL, kv_memory=4 * most, host_memory="16MiB", max_batched_tokens=300, max_num_seqs=6)
    drive(tight, jobs)
    assert_empty(tight)
    for done in jobs:
        alone = job(done.strategy, 200, 80)
        drive(Engine(MODEL, kv_memory="8MiB", max_batched_tokens=300), [alone])
        assert done.kept == alone.kept
        if "kivi" not in done.strategy:  # whose answers depend on where its prompt was cut into chunks
            errors = [relative_error(a, b) for a, b in zip(done.logits, alone.logits, strict=True)]
            assert max(errors) < 1e-3, done.strategy


@pytest.mark.parametrize("keep", ["streaming_llm(sinks=4, recent=252)", "full", "snapkv(budget=200, window=8)"])
def test_quest_always_reads_the_newest_token(keep: str, monkeypatch: pytest.MonkeyPatch) -> None:
    select, seen = Quest.select, []

    def noting(this, view):
        found = select(this, view)
        if found is not None:
            meant = torch.arange(found.index_RHn.shape[-1]) < found.count_RH[..., None]
            newest = (view.newest_RH // view.block_size)[..., None]
            seen.append(bool(((found.index_RHn == newest) & meant).any(dim=-1).all()))
        return found

    monkeypatch.setattr(Quest, "select", noting)
    drive(Engine(MODEL, kv_memory="8MiB"), [job(f"{keep} | quest(budget=96, dense=0)", 400, 60)])
    assert len(seen) >= 2 * 59 and all(seen)


@pytest.mark.parametrize("keep", ["streaming_llm(sinks=4, recent=100)", "snapkv(budget=90, window=8)"])
@pytest.mark.parametrize("encode", ["", " | int8"])
def test_bounds_are_never_narrower_than_the_keys(keep: str, encode: str) -> None:
    engine = Engine(MODEL, kv_memory="8MiB", max_batched_tokens=70)
    prompt = token_ids(200)[0].tolist()
    request = engine.add_request(
        prompt, SamplingParams(max_tokens=80, ignore_eos=True), f"{keep} | quest(budget=96, dense=0){encode}"
    )
    while engine.has_work:
        engine.step()
        if request.seq is None:
            break
        for group in request.seq.layout.groups:
            for lane in group.lanes.tolist():
                length, hole = (int(each[request.seq.row, lane]) for each in (engine.store.length, engine.store.hole))
                table = engine.store.table[request.seq.row, lane, : -(-length // 32)]
                keys = read_keys(group.blocks.pool, table, torch.float32)
                beside = engine.store.table[request.seq.side.row, lane, : len(table)].long()
                low, high = group.side.pool.view("bounds")[beside, 0].repeat_interleave(32, dim=0).chunk(2, dim=-1)
                live = torch.tensor([slot for slot in range(length) if slot != hole])
                assert (keys[live] >= low[live]).all() and (keys[live] <= high[live]).all()


@pytest.mark.parametrize("strategy", ["int8", "h2o(heavy=30, recent=30) | int8"])
def test_int8_does_not_depend_on_chunks(strategy: str) -> None:
    """A chunk's own queries see keys and values as later ones do."""
    whole, parts = job(strategy, 150, 20), job(strategy, 150, 20)
    drive(Engine(MODEL, kv_memory="8MiB"), [whole])
    drive(Engine(MODEL, kv_memory="8MiB", max_batched_tokens=37), [parts])
    errors = [relative_error(a, b) for a, b in zip(parts.logits, whole.logits, strict=True)]
    assert sorted(errors)[len(errors) // 2] < 1e-3
