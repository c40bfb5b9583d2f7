import pytest
from hypothesis import given, strategies as st

from kvatlas.core.errors import ConfigError
from kvatlas.workloads.materialize import prompt_ids
from kvatlas.workloads.trace import Trace, TraceRequest, scale_trace


def request(number=0, prompt_tokens=40, hashes=(), block=None):
    return TraceRequest(
        number=number,
        arrival_s=0.0,
        prompt_tokens=prompt_tokens,
        output_tokens=1,
        prefix_hashes=hashes,
        hash_block_tokens=block,
    )


def common(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_equal_hashes_give_equal_prefixes_and_no_more():
    first = prompt_ids(request(0, 40, (1, 2, 3), 16), 32000, seed=0)
    second = prompt_ids(request(1, 48, (1, 2, 4), 16), 32000, seed=0)
    assert (len(first), len(second)) == (40, 48)
    assert common(first, second) == 32


def test_a_cut_block_is_the_start_of_the_whole_one():
    whole = prompt_ids(request(0, 16, (9,), 16), 1000, seed=0)
    assert prompt_ids(request(1, 5, (9,), 16), 1000, seed=0) == whole[:5]


def test_prompts_without_hashes_are_unrelated():
    assert common(prompt_ids(request(0), 32000, seed=0), prompt_ids(request(1), 32000, seed=0)) < 3


def test_what_no_hash_covers_is_unrelated_too():
    first = prompt_ids(request(0, 40, (1,), 16), 32000, seed=0)
    second = prompt_ids(request(1, 40, (1,), 16), 32000, seed=0)
    assert 16 <= common(first, second) < 19


def test_the_seed_decides():
    assert prompt_ids(request(), 32000, seed=5) == prompt_ids(request(), 32000, seed=5)
    assert prompt_ids(request(), 32000, seed=5) != prompt_ids(request(), 32000, seed=6)


@given(st.sets(st.integers(0, 30), max_size=20), st.lists(st.integers(-(2**63), 2**70), max_size=4, unique=True))
def test_ids_lie_in_the_vocabulary_and_avoid_special_ones(special, hashes):
    made = request(7, 64, tuple(hashes), 16 if hashes else None)
    ids = prompt_ids(made, 32, seed=1, special_ids=special)
    assert len(ids) == 64 and all(type(token) is int for token in ids)
    assert set(ids) <= set(range(32)) - special


def test_scaled_traces_still_share():
    requests = (request(0, 1500, (1, 2, 3), 512), request(1, 1600, (1, 2, 4, 5), 512))
    trace = Trace(name="t", source="here", licence="none", requests=requests)
    for scale, shared in ((1 / 64, 16), (0.01, 10), (2, 2048)):
        first, second = (prompt_ids(r, 32000, seed=0) for r in scale_trace(trace, length_scale=scale).requests)
        assert common(first, second) == shared


@pytest.mark.parametrize(("vocab_size", "special", "seed"), [(2, {0, 1}, 0), (0, set(), 0), (9, set(), -1)])
def test_an_impossible_vocabulary_or_seed_is_refused(vocab_size, special, seed):
    with pytest.raises(ConfigError):
        prompt_ids(request(), vocab_size, seed=seed, special_ids=special)
