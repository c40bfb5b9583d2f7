"""How many tensor calls eviction and decode steps take: they follow tiles and kinds, not layers and requests."""

from __future__ import annotations

from functools import cache

import pytest
from tests.driving import finish, loaded
from tests.families import tiny_model, token_ids
from torch.utils._python_dispatch import TorchDispatchMode

from kvatlas.engine.engine import Engine
from kvatlas.engine.eviction import Evictor
from kvatlas.engine.params import SamplingParams
from kvatlas.models.loading import LoadedModel

GREEDY = SamplingParams(max_tokens=20, ignore_eos=True)


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@cache
def model(layers: int) -> LoadedModel:
    return loaded(tiny_model("llama", num_hidden_layers=layers))


def engine_of(layers: int) -> Engine:
    return Engine(model(layers), kv_memory="64MiB", max_batched_tokens=512, block_size=4, enable_prefix_caching=False)


def calls_of_acts(layers: int, strategies: list[str]) -> dict[str, int]:
    """Return the most calls of one act at each moment, for requests that run together."""
    engine, most = engine_of(layers), {}
    engine.add_request(token_ids(50)[0].tolist(), GREEDY, strategies[0])
    finish(engine)  # what is worked out once for a strategy is no call of each act
    act = Evictor.act

    def counted(evictor, moment, requests):
        with Calls() as calls:
            act(evictor, moment, requests)
        most[moment.value] = max(most.get(moment.value, 0), calls.count)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evictor, "act", counted)
        for seed, strategy in enumerate(strategies):
            engine.add_request(token_ids(50, seed=seed)[0].tolist(), GREEDY, strategy)
        finish(engine)
    return most


STRATEGIES = [
    "h2o(heavy=9, recent=8)", "snapkv(budget=20, window=8)", "streaming_llm(sinks=2, recent=9)", "tova(budget=12)",
    "knorm(budget=20)", "snapkv(budget=20, window=8) | ada",
]  # fmt: skip


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_calls_do_not_grow_with_layers_or_requests(strategy: str) -> None:
    small, deep = calls_of_acts(2, [strategy]), calls_of_acts(16, [strategy])
    assert deep == small, "one tile, whatever it holds"
    many = calls_of_acts(2, [strategy] * 8)
    assert all(many[moment] <= small[moment] + 8 * 3 for moment in small), (small, many)
    assert max(small.values()) < 300, small


def test_eight_budgets_share_calls() -> None:
    def step_calls(strategies: list[str]) -> int:
        engine = engine_of(4)
        for seed, strategy in enumerate(strategies):
            engine.add_request(token_ids(40, seed=seed)[0].tolist(), GREEDY, strategy)
        while any(len(request.output_ids) < 5 for request in engine.scheduler.running) or engine.scheduler.waiting:
            engine.step()
        with Calls() as calls:
            engine.step()
        return calls.count

    one = step_calls(["h2o(heavy=12, recent=8)"] * 8)
    assert step_calls([f"h2o(heavy={n}, recent={24 - n})" for n in range(9, 17)]) <= 1.3 * one
