"""What stages may ask for is what a plain forward of transformers says it is, in chunks, steps and batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product

import pytest
import torch
from tests.driving import loaded
from tests.families import tiny_model, token_ids

from kvatlas.core.needs import Received
from kvatlas.core.plan import Traits
from kvatlas.engine.engine import Engine
from kvatlas.engine.params import SamplingParams
from kvatlas.engine.request import Request
from kvatlas.models.loading import LoadedModel
from kvatlas.storage.eviction import lane_slots
from kvatlas.strategies import registry
from kvatlas.strategies.registry import register
from kvatlas.strategies.stage import Keep

PROMPT, STEPS = 41, 9
LAST = 7


@dataclass(frozen=True, kw_only=True)
class Votes(Keep):
    """Keeps everything and counts what it receives."""

    over: str = "sum"
    heads: str = "sum"
    last: int = 0

    @property
    def needs(self) -> tuple[Received]:
        return (Received(queries=self.last or None, over=self.over, heads=self.heads, in_decode=not self.last),)


@pytest.fixture(scope="module", autouse=True)
def known() -> Iterator[None]:
    """Make the stages of this file known, to its tests alone."""
    register("votes", summary="a stage of these tests", traits=Traits(keeps_all=True))(Votes)
    yield
    del registry._STAGES["votes"]


@cache
def plain() -> torch.nn.Module:
    own = tiny_model("llama", num_attention_heads=8, num_key_value_heads=2)
    own.set_attn_implementation("eager")
    return own


@cache
def model() -> LoadedModel:
    return loaded(tiny_model("llama", num_attention_heads=8, num_key_value_heads=2))


def attention(tokens: list[int]) -> torch.Tensor:
    """Return the probabilities [L, H, G, T, T] of a plain forward over all tokens."""
    own = plain()
    own.load_state_dict(model().adapter.model.state_dict())
    with torch.no_grad():
        found = own(torch.tensor([tokens]), output_attentions=True).attentions
    return torch.stack([layer[0].unflatten(0, (2, -1)) for layer in found])


def run(sentence: str) -> Iterator[tuple[Engine, Request]]:
    """Yield two requests that run together, each when all but the last of its output is cached."""
    engine = Engine(model(), kv_memory="8MiB", block_size=4, max_batched_tokens=13, enable_prefix_caching=False)
    params = SamplingParams(max_tokens=STEPS + 1, ignore_eos=True)
    requests = [engine.add_request(token_ids(PROMPT, seed=n)[0].tolist(), params, sentence) for n in (1, 2)]
    while engine.has_work:
        engine.step()
        for request in requests:
            if request.seq is not None and len(request.output_ids) == STEPS:
                yield engine, request


@pytest.mark.parametrize("last", [0, LAST])
@pytest.mark.parametrize(("over", "heads"), product(("sum", "max"), ("sum", "max", "mean")))
def test_attention_received(over: str, heads: str, last: int) -> None:
    found = 0
    for engine, request in run(f"votes(over={over}, heads={heads}, last={last})"):
        tokens = request.tokens[:-1]
        (group,) = request.seq.layout.groups
        got = lane_slots(engine.store, [request.seq], group).side("received")[0, :, : len(tokens), 0]
        paid = {"sum": torch.sum, "max": torch.amax, "mean": torch.mean}[heads](attention(tokens), dim=2)
        counting = paid[:, :, PROMPT - last : PROMPT] if last else paid
        wanted = counting.sum(dim=2) if over == "sum" else counting.amax(dim=2)
        torch.testing.assert_close(got, wanted.flatten(0, 1), rtol=1e-4, atol=1e-5)
        found += 1
    assert found == 2
