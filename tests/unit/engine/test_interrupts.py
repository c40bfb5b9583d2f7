"""What Ctrl-C, or any error, leaves behind when it strikes within a swap or a step: nothing."""

import sys

import pytest
import torch

from kvatlas import LLM, SamplingParams
from kvatlas.models.loading import load_model
from kvatlas.models.rotation import model_digest
from kvatlas.storage.link import Move

STRATEGY = "h2o(heavy=400, recent=400)"
LONG = SamplingParams(max_tokens=120, ignore_eos=True)


@pytest.fixture(scope="module")
def model():
    return load_model("random:llama-mini")


def crowded(model, **options) -> LLM:
    """An engine in which eight requests do not fit at once."""
    return LLM(model, kv_memory="1500KiB", enable_prefix_caching=False, block_size=16, **options)


def run(llm: LLM) -> None:
    llm.generate([list(range(5, 85))] * 8, LONG, strategy=STRATEGY)


@pytest.mark.parametrize("place", ["try_swap_out", pytest.param("try_swap_in", marks=pytest.mark.slow)])
def test_an_interrupted_swap_loses_nothing(model, monkeypatch, place) -> None:
    llm, wait, struck = crowded(model), Move.wait, []

    def interrupted(self: Move) -> None:
        self.settle()
        if not struck and sys._getframe(2).f_code.co_name == place:
            struck.append(True)
            raise KeyboardInterrupt
        wait(self)

    monkeypatch.setattr(Move, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(llm)
    store = llm.engine.store
    assert struck and not llm.engine.has_work
    assert (store.books().used, store.host.books().used) == (0, 0)
    store.arena.check()
    store.host.check()
    run(llm)  # and it still works


def test_a_step_that_breaks_off_after_room_was_made_gives_the_room_back(model, monkeypatch) -> None:
    llm = crowded(model)
    request = llm.engine.add_request(list(range(5, 85)), LONG, STRATEGY)
    monkeypatch.setattr(llm.engine._runner, "run", lambda batch: (_ for _ in ()).throw(KeyboardInterrupt))
    for _ in range(2):  # twice: the second step makes room anew
        with pytest.raises(KeyboardInterrupt):
            llm.engine.step()
    monkeypatch.setattr(llm.engine._runner, "run", lambda batch: (_ for _ in ()).throw(RuntimeError("broken")))
    assert llm.engine.step() == [] and str(request.error) == "broken" and not llm.engine.has_work
    assert llm.engine.store.books().used == 0
    llm.engine.store.arena.check()


@pytest.mark.parametrize("host_memory", [17 * 1024, pytest.param(40 * 1024, marks=pytest.mark.slow)])
def test_a_host_of_few_blocks_serves_what_fits(model, host_memory) -> None:
    llm = crowded(model, host_memory=host_memory)
    run(llm)
    assert (llm.engine.store.books().used, llm.engine.store.host.books().used) == (0, 0)


def test_every_weight_counts_in_a_models_digest() -> None:
    adapter = load_model("random:llama-mini").adapter
    before = model_digest(adapter.model)
    weight = adapter.model.model.layers[1].self_attn.k_proj.weight
    with torch.no_grad():
        weight[3, 5] += 1e-3
    assert model_digest(adapter.model) != before
    with torch.no_grad():
        weight[3, 5] -= 1e-3
