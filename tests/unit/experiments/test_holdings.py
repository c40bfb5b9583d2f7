"""What experiments say that a request holds is what the books say is used, whatever stages are composed."""

from itertools import product

import pytest
from tests.driving import loaded
from tests.families import tiny_model, token_ids

from kvatlas.core.errors import CompositionError
from kvatlas.core.vocabulary import Axis
from kvatlas.engine.engine import Engine
from kvatlas.engine.params import SamplingParams
from kvatlas.experiments.holdings import holdings
from kvatlas.strategies.registry import stages
from kvatlas.strategies.strategy import Strategy

# Stages whose defaults spare a prompt of this length, with what makes them act on it.
SMALL = {
    "h2o": "h2o(heavy=40, recent=20)",
    "snapkv": "snapkv(budget=60, window=8)",
    "streaming_llm": "streaming_llm(sinks=2, recent=60)",
    "kivi": "kivi(bits=2, residual=0)",
    "quest": "quest(budget=32, dense=1)",
    "rocket": "rocket(budget=32, page=4)",
}
PROMPT_TOKENS, STEPS, CHUNK = 90, 36, 40


def compositions():
    """Return every sentence of at most one registered stage per axis that can be composed."""
    axes = [[""] + [SMALL.get(name, name) for name, stage in stages().items() if stage.axis == axis] for axis in Axis]
    found = []
    for chosen in product(*axes):
        sentence = " | ".join(filter(None, chosen)) or "full"
        try:
            found.append(str(Strategy.parse(sentence)))
        except CompositionError:
            continue
    return list(dict.fromkeys(found))


@pytest.fixture(scope="module")
def model():
    return loaded(tiny_model("llama"))


def test_every_stage_takes_part():
    sentences = compositions()
    assert all(any(name in sentence for sentence in sentences) for name in stages())


def slow_if_long(sentence):
    """Return a case that only the wide run takes where more than two stages meet."""
    return pytest.param(sentence, marks=pytest.mark.slow if sentence.count("|") > 1 else [])


STAYING = [
    f"{choosing} | offload(host, resident={resident})"
    for choosing, resident in (
        ("quest(budget=32, dense=1)", 50), ("rocket(budget=32, page=4)", 20), ("rehearse(alpha=inf, cap=0.3)", 200),
        ("kivi(bits=2, residual=0) | quest(budget=32, dense=0)", 64),
    )
]  # fmt: skip


@pytest.mark.parametrize("sentence", [*map(slow_if_long, compositions()), *STAYING])
def test_they_add_up_to_the_books_after_every_step(model, sentence):
    memory = {"kv_memory": "8MiB", "host_memory": "8MiB", "enable_prefix_caching": False}
    engine = Engine(model, max_batched_tokens=CHUNK, **memory)
    prompt = token_ids(PROMPT_TOKENS)[0].tolist()
    request = engine.add_request(prompt, SamplingParams(max_tokens=STEPS, ignore_eos=True), sentence)
    while engine.has_work:
        engine.step()
        if request.seq is None:
            continue
        held, device, host = holdings(engine.store, request.seq), engine.store.books(), engine.store.host.books()
        assert held.device_kv + held.device_sidecars + held.device_sketch + held.device_staging == device.used
        assert held.host_kv + held.host_sidecars == host.used
        assert held.host_kv == host.used_kv
        assert held.device_kv + held.host_kv == engine.store.kv_bytes(request.seq)
