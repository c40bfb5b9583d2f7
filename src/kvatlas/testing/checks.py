"""What holds of every strategy, whatever it keeps: its answers, its promises and its memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kvatlas.engine.engine import Engine
from kvatlas.engine.params import SamplingParams
from kvatlas.engine.request import Request
from kvatlas.strategies.strategy import Strategy
from kvatlas.testing.driving import STEP_LIMIT, Job, assert_empty, check, drive, relative_error
from kvatlas.testing.model import tiny_model, tokens
from kvatlas.testing.retelling import Retelling

_LENGTHS = (70, 9, 40)
_OPTIONS: dict[str, Any] = {
    "kv_memory": "16MiB",
    "host_memory": "16MiB",
    "enable_prefix_caching": False,
    "isolate_failures": False,  # what a stage raises comes through
}


def run(
    strategy: str | Strategy, *, prompt_tokens: int = 40, output_tokens: int = 16, seed: int = 0, **options: Any
) -> Job:
    """Return what `tiny_model` does alone with random tokens under a strategy.

    ``job.kept[step][lane]`` are the positions in the cache of a KV head when output token ``step`` is chosen, in
    ascending order; lanes are the heads of the first layer, then of the second. ``job.logits[step]`` are its logits.

    Args:
        strategy: sentence or strategy.
        prompt_tokens: length of the prompt.
        output_tokens: tokens of the output.
        seed: of the tokens.
        options: of `kvatlas.engine.engine.Engine`.
    """
    job = _job(strategy, prompt_tokens, output_tokens, seed)
    drive(_engine(**options), [job])
    return job


def check_parity(
    strategy: str | Strategy, *, chunks: Sequence[int] = (29, 64), output_tokens: int = 16, tolerance: float = 1e-4
) -> None:
    """Check that others, chunks of the prompt and lost caches change neither what is kept nor any logit.

    Args:
        strategy: sentence or strategy.
        chunks: step token limits; empty where what a strategy stores depends on where a prompt is cut.
        output_tokens: of each of three prompts.
        tolerance: of logits, relative.

    Raises:
        AssertionError: something differs from a run alone; names where and by how much.
    """
    alone = [run(strategy, prompt_tokens=n, output_tokens=output_tokens, seed=n) for n in _LENGTHS]

    def compare(where: str, interrupt_every: int | None = None, **options: Any) -> None:
        jobs = [_job(name, n, output_tokens, n) for name in (strategy, "full") for n in _LENGTHS]
        drive(_engine(**options), jobs, interrupt_every=interrupt_every)
        lost = sum(job.request.num_preemptions for job in jobs if job.request is not None)
        assert lost or not interrupt_every, f"{strategy} {where}: no cache was lost, so nothing is checked"
        for wanted, job in zip(alone, jobs, strict=False):
            _assert_equal(job, wanted, where, tolerance)

    compare("in a batch")
    for chunk in chunks:
        compare(f"in chunks of {chunk}", max_batched_tokens=chunk)
    compare("swapped out and in", interrupt_every=1)
    compare("interrupted and made anew", interrupt_every=1, host_memory=_host_bytes(strategy, output_tokens))


def check_retold(
    strategy: str | Strategy,
    tell: Callable[[int], Retelling],
    *,
    prompts: Sequence[int] = (1, 7, 34),
    output_tokens: int = 8,
    tolerance: float = 1e-4,
) -> None:
    """Check that the engine keeps the tokens and gives the logits of a slow re-telling in plain Python.

    Args:
        strategy: sentence or strategy.
        tell: returns the re-telling for a prompt of so many tokens.
        prompts: lengths of prompts.
        output_tokens: of each.
        tolerance: of logits, relative.

    Raises:
        AssertionError: a token or a logit differs.
    """
    for length in prompts:
        done = run(strategy, prompt_tokens=length, output_tokens=output_tokens, max_batched_tokens=16)
        told = Job(done.prompt, done.outputs)
        told.logits, told.kept = tell(length).run(tiny_model().adapter, [*done.prompt, *done.outputs[:-1]])
        _assert_equal(done, told, "beside its re-telling", tolerance)


def check_full_budget(
    strategy: str | Strategy, *, prompt_tokens: int = 40, output_tokens: int = 16, tolerance: float = 1e-4
) -> None:
    """Check that a budget as long as prompt and output keeps every token, and answers as dense attention does.

    Args:
        strategy: with such a budget, as ``"h2o(heavy=40, recent=20)"`` is for 40 + 16 tokens.
        prompt_tokens: length of the prompt.
        output_tokens: tokens of the output.
        tolerance: of logits, relative.

    Raises:
        AssertionError: a token is missing or a logit differs.
    """
    size = {"prompt_tokens": prompt_tokens, "output_tokens": output_tokens}
    _assert_equal(run(strategy, **size), run("full", **size), "with room for all tokens", tolerance)


def check_books(strategy: str | Strategy, *, output_tokens: int = 16, seed: int = 0) -> None:
    """Check that requests hold no more than was promised, share too little memory, and leave nothing behind.

    Args:
        strategy: sentence or strategy.
        output_tokens: of each request.
        seed: of the tokens.

    Raises:
        AssertionError: a request exceeds its footprint, the books do not balance, or memory is lost.
    """
    parsed = Strategy.parse(strategy)
    for length in _LENGTHS:
        _check_moments(parsed, length, output_tokens, seed)
    spacious = _engine(max_batched_tokens=29)
    slab, host = spacious.store.arena.slab_bytes, _host_bytes(parsed, output_tokens)
    needed = max(spacious.footprint(parsed, n, output_tokens).peak_bytes for n in _LENGTHS)
    little: dict[str, Any] = {"kv_memory": needed + 3 * slab, "max_batched_tokens": 29, "enable_prefix_caching": True}
    for host_memory in (host, 2 * host + slab):  # without room for caches that are swapped out, and with some
        engine = _engine(**little, host_memory=host_memory)
        requests = [_request(engine, parsed, n, output_tokens, seed) for n in (*_LENGTHS, *_LENGTHS)]
        for step in range(STEP_LIMIT):
            if not engine.has_work:
                break
            engine.step()
            check(engine)
            for request in requests:
                assert request.peak_bytes <= request.footprint.peak_bytes, _exceeds(request, "its whole life")
            if step == 5:
                engine.cancel(requests[1])
        assert not engine.has_work, f"{parsed}: requests that share little memory are not done in {STEP_LIMIT} steps"
        assert_empty(engine)


def _host_bytes(strategy: str | Strategy, output_tokens: int) -> int:
    """Return what the checks' requests hold on the host by themselves, which leaves no room for caches swapped out."""
    engine = _engine()
    held = [engine.footprint(Strategy.parse(strategy), n, output_tokens).host_bytes for n in _LENGTHS]
    return sum(-(-each // engine.store.arena.slab_bytes) for each in held) * engine.store.arena.slab_bytes


def _check_moments(strategy: Strategy, prompt_tokens: int, output_tokens: int, seed: int) -> None:
    """Check one request alone against the bounds of each part of its life."""
    engine = _engine(max_batched_tokens=29)
    request = _request(engine, strategy, prompt_tokens, output_tokens, seed)
    bound = request.footprint
    while engine.has_work:
        was_prompt = request.prefill_end is not None
        engine.step()
        check(engine)
        if request.seq is None:
            continue
        held = engine.store.allocated_bytes(request.seq)
        if was_prompt:
            assert request.peak_bytes <= bound.prefill_peak_bytes, _exceeds(request, "its prompt")
        if was_prompt and request.prefill_end is None:
            assert held <= bound.steady_bytes, _exceeds(request, "the cut after its prompt")
        assert request.prefill_end is not None or held <= bound.final_bytes, _exceeds(request, "its output")
        assert engine.peak_host_bytes <= bound.host_bytes, _exceeds(request, "what it holds on the host")
    assert_empty(engine)


def _engine(**options: Any) -> Engine:
    return Engine(tiny_model(), **{**_OPTIONS, **options})


def _job(strategy: str | Strategy, prompt_tokens: int, output_tokens: int, seed: int) -> Job:
    ids = tokens(prompt_tokens + output_tokens, seed)
    return Job(ids[:prompt_tokens], ids[prompt_tokens:], str(strategy))


def _request(engine: Engine, strategy: Strategy, prompt_tokens: int, output_tokens: int, seed: int) -> Request:
    params = SamplingParams(max_tokens=output_tokens, ignore_eos=True)
    return engine.add_request(tokens(prompt_tokens, seed), params, strategy)


def _assert_equal(got: Job, wanted: Job, where: str, tolerance: float) -> None:
    for step, (kept, right) in enumerate(zip(got.kept, wanted.kept, strict=True)):
        at = f"{got.strategy} {where}, prompt of {len(got.prompt)}, output {step}"
        for lane, (mine, theirs) in enumerate(zip(kept, right, strict=True)):
            lost, more = sorted(set(theirs) - set(mine)), sorted(set(mine) - set(theirs))
            assert not lost and not more, f"{at}: lane {lane} lacks positions {lost} and holds {more} more"
        error = relative_error(got.logits[step], wanted.logits[step])
        assert error <= tolerance, f"{at}: logits differ by {error:.1e} of their norm"


def _exceeds(request: Request, when: str) -> str:
    return f"{request.strategy}: a request of {request.prompt_tokens} tokens exceeds its footprint in {when}"
